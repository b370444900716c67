// Finds videos, and copies commands.
const groups = [...document.querySelectorAll(".group")], text = document.getElementById("text");
const told = groups.map((group) => [...group.querySelectorAll("h2, h3, b, .seed")].map((part) => part.textContent).join(" ").toLowerCase());
function show() {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  groups.forEach((group, place) => { group.hidden = !words.every((word) => told[place].includes(word)); });
  const shown = groups.filter((group) => !group.hidden).length;
  document.getElementById("count").value = shown === groups.length ? `${whole(shown)} prompts` : `${whole(shown)} of ${whole(groups.length)}`;
  document.getElementById("none").hidden = shown > 0;
}
if (text) { text.addEventListener("input", show); show(); }

// Pages that are not served safely have no clipboard of the newer kind.
async function copy(words) {
  try { await navigator.clipboard.writeText(words); return true; } catch { /* the older way */ }
  const area = make("textarea", { readonly: "", style: "position: fixed; top: 0; opacity: 0" });
  area.value = words;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
for (const button of document.querySelectorAll(".copy"))
  button.addEventListener("click", async () => {
    const done = await copy(button.dataset.command), recipe = button.nextElementSibling;
    button.textContent = done ? "copied" : "not allowed: it is below";
    if (!done) { recipe.open = true; getSelection().selectAllChildren(recipe.querySelector("code")); }
    setTimeout(() => { button.textContent = "copy command"; }, 2000);
  });
