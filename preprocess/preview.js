// Shows the samples that the filters ask for.
const field = (id) => document.getElementById(id);
const cards = [...document.querySelectorAll(".sample")];
const texts = cards.map((card) => `${card.querySelector(".caption").textContent} ${card.querySelector(".source").textContent}`.toLowerCase());

function show() {
  const words = field("text").value.toLowerCase().split(/\s+/).filter(Boolean), bucket = field("bucket").value;
  let shown = 0;
  cards.forEach((card, place) => {
    const fits = words.every((word) => texts[place].includes(word)) && (!bucket || card.dataset.bucket === bucket)
      && (!field("truncated").checked || "truncated" in card.dataset) && (!field("decoded")?.checked || "decoded" in card.dataset);
    card.hidden = !fits;
    shown += fits;
  });
  field("count").value = shown === cards.length ? `${whole(shown)} samples` : `${whole(shown)} of ${whole(cards.length)}`;
  for (const button of document.querySelectorAll(".rows button")) button.setAttribute("aria-pressed", String(button.dataset.bucket === bucket));
}

for (const id of ["text", "bucket", "truncated", "decoded"]) field(id)?.addEventListener("input", show);
for (const button of document.querySelectorAll(".rows button"))
  button.addEventListener("click", () => { field("bucket").value = field("bucket").value === button.dataset.bucket ? "" : button.dataset.bucket; show(); });
show();
