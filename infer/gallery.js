// Finds prompts, and copies commands.
const groups = [...document.querySelectorAll(".group")], text = document.getElementById("text");
function show() {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const group of groups) group.hidden = !words.every((word) => group.querySelector("q").textContent.toLowerCase().includes(word));
  document.getElementById("count").value = `${whole(groups.filter((group) => !group.hidden).length)} of ${whole(groups.length)}`;
}
text.addEventListener("input", show);
show();
for (const button of document.querySelectorAll(".copy"))
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(button.dataset.command); button.textContent = "copied"; }
    catch { button.textContent = "not allowed: see recipe"; }
    setTimeout(() => { button.textContent = "copy command"; }, 2000);
  });
