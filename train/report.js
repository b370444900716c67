// Draws the curves of the page's data as SVG, again whenever the width, the shown runs or the scale change.
const COLOURS = 7, HEIGHT = { hero: 320, usual: 230, small: 190 };
const MARGIN = { top: 10, right: 10, bottom: 24, left: 52 };
const QUARTILES = ["0 to 249", "250 to 499", "500 to 749", "750 to 999"];
const PHASES = [["data", 1], ["forward", 0.74], ["backward", 0.5], ["optimizer", 0.3], ["other", 0.14]];
const runs = JSON.parse(document.getElementById("data").textContent).runs;
const hidden = new Set();
const drawings = [];
let logarithmic = false;

const classOf = (run) => `run-${run % COLOURS}`;
const swatch = (run) => make("i", { class: `swatch ${classOf(run)}${run >= COLOURS ? " dashed" : ""}` });

function told(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5) return value.toExponential(2);
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("-", "\u2212").replace("e-", "e\u2212");
  return size >= 1000 ? whole(Math.round(value)) : String(Number(value.toPrecision(4)));
}
const reading = (value) => (Math.abs(value) >= 1e-3 && Math.abs(value) < 1000 ? value.toPrecision(4) : told(value));

function ticksOf(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) * power;
  const found = [];
  for (let tick = Math.ceil(low / step); tick * step <= high + step / 1e6; tick += 1) found.push(tick * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const factor of [1, 2, 5]) if (factor * 10 ** power >= low && factor * 10 ** power <= high) found.push(factor * 10 ** power);
  if (found.length < 2) return ticksOf(low, high, 4);
  return found.length > 7 ? found.filter((tick) => Math.log10(tick) % 1 === 0) : found;
}

// Labels with equally many decimals, unless they are too small for that, or powers of ten.
function labelsOf(ticks, log) {
  const labels = ticks.map((tick) => told(Number(tick.toPrecision(6))));
  if (log || labels.some((label) => label.includes("e") || label.includes(","))) return labels;
  const decimals = Math.max(...labels.map((label) => (label.split(".")[1] ?? "").length));
  return ticks.map((tick) => tick.toFixed(decimals));
}

function percentile(values, part) {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.round(part * (sorted.length - 1))];
}

// The vertical range: all of what is bold, and single values without the outermost 1 % to each side.
function rangeOf(series, { zero = false, log = false }) {
  const ends = [];
  for (const { points, kind } of series) {
    if (kind === "band") continue;
    const values = points.map((point) => point[1]).filter((value) => !log || value > 0);
    if (!values.length) continue;
    ends.push(...(["faint", "area"].includes(kind) ? [percentile(values, 0.01), percentile(values, 0.99)] : [Math.min(...values), Math.max(...values)]));
  }
  let low = Math.min(...ends), high = Math.max(...ends);
  if (zero && !log) low = Math.min(0, low);
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - Math.abs(low || 1) / 10, high + Math.abs(high || 1) / 10];
  if (log) return [low / (high / low) ** 0.05, high * (high / low) ** 0.05];
  const air = (high - low) * 0.06;
  return [zero && low === 0 ? 0 : low - air, high + air];
}

// Pairs of step and value, without steps that have no value.
const pairs = (steps, values) => steps.map((step, place) => [step, values[place]]).filter((pair) => pair[1] !== null && pair[1] !== undefined);
const pathOf = (points, x, y) => points.map((point, place) => `${place ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("");
const bandOf = (upper, lower, x, y) => `${pathOf(upper, x, y)}L${pathOf([...lower].reverse(), x, y).slice(1)}Z`;

// One chart: { title, series: [{ run, kind, points, ... }], size, zero, log, skips, range }.
function drawChart(holder, spec) {
  const shown = spec.series.filter(({ run }) => !hidden.has(run) && runs[run]);
  holder.hidden = !shown.length;
  const svg = holder.querySelector("svg"), width = svg.clientWidth || 300, height = spec.height ?? HEIGHT[spec.size];
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  if (!shown.length) return;
  const log = Boolean(spec.log && logarithmic && shown.every(({ points }) => points.every((point) => point[1] > 0)));
  const [low, high] = spec.range && !hidden.size ? spec.range : rangeOf(shown, { zero: spec.zero, log });
  const last = Math.max(1, ...runs.filter((_, run) => !hidden.has(run)).flatMap((run) => [run.steps.at(-1) ?? 1, run.holdout.steps.at(-1) ?? 1]));
  const left = MARGIN.left, right = width - MARGIN.right, top = MARGIN.top, bottom = height - MARGIN.bottom;
  const x = (step) => left + ((right - left) * step) / last;
  const part = log ? (value) => Math.log(value / low) / Math.log(high / low) : (value) => (value - low) / (high - low);
  const y = (value) => Math.max(top - 400, Math.min(bottom + 400, bottom - (bottom - top) * part(value)));

  const clip = `clip-${drawings.findIndex((drawing) => drawing.holder === holder)}`;
  svg.append(make("clipPath", { id: clip }, make("rect", { x: left, y: top - 2, width: right - left + 8, height: bottom - top + 4 })));
  const ticks = log ? logTicks(low, high) : ticksOf(low, high, height > 260 ? 7 : 5), labels = labelsOf(ticks, log);
  ticks.forEach((tick, place) => {
    svg.append(make("line", { class: "gridline", x1: left, x2: right, y1: y(tick), y2: y(tick) }));
    svg.append(make("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, labels[place]));
  });
  svg.append(make("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  for (const tick of ticksOf(0, last, Math.max(2, Math.min(10, Math.floor(width / 80))))) {
    if (tick % 1) continue;
    const anchor = tick === 0 ? "start" : x(tick) > right - 18 ? "end" : "middle";
    svg.append(make("text", { x: x(tick), y: bottom + 17, "text-anchor": anchor }, whole(tick)));
  }
  const inside = make("g", { "clip-path": `url(#${clip})` });
  svg.append(inside);
  const order = ["band", "area", "faint", "thin", "line", "dots"];
  for (const one of [...shown].sort((a, b) => order.indexOf(a.kind) - order.indexOf(b.kind))) {
    const dashed = one.run >= COLOURS ? " dashed" : "";
    if (one.kind === "band" || one.kind === "area")
      inside.append(make("path", { class: `${one.kind} ${classOf(one.run)}`, d: bandOf(one.points, one.lower, x, y), ...(one.opacity && { "fill-opacity": one.opacity }) }));
    else if (one.points.length > 1)
      inside.append(make("path", { class: `${one.kind === "dots" ? "line" : one.kind === "thin" ? "line thin" : one.kind} ${classOf(one.run)}${dashed}`, d: pathOf(one.points, x, y) }));
    if (one.kind === "dots" || (one.kind === "line" && one.points.length === 1))
      for (const [step, value] of one.points) {
        const best = one.kind === "dots" && value === Math.min(...one.points.map((point) => point[1]));
        svg.append(make("circle", { class: `dot${best ? " best" : ""} ${classOf(one.run)}`, cx: x(step), cy: y(value), r: best ? 5 : 3.5 }));
      }
  }
  for (const run of spec.skips ? runs.keys() : [])
    for (const step of hidden.has(run) ? [] : runs[run].skipped)
      svg.append(make("path", { class: `skip ${classOf(run)}`, d: `M${x(step) - 4} ${top - 2}h8l-4 7z` }, make("title", {}, `step ${whole(step)} was skipped`)));
  follow(holder, svg, shown, { x, y, left, right, top, bottom, last });
}

// The pointer's step: a line, and what each run has there.
function follow(holder, svg, shown, { x, y, left, right, top, bottom, last }) {
  const read = shown.filter(({ reads }) => reads);
  const marks = make("g"), tip = holder.querySelector(".tip");
  svg.append(marks);
  const clear = () => { marks.replaceChildren(); tip.hidden = true; };
  svg.onpointerleave = clear;
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect(), at = event.clientX - box.left;
    if (at < left - 6 || at > right + 6) return clear();
    const asked = ((at - left) / (right - left)) * last;
    const lines = [], steps = [];
    marks.replaceChildren();
    for (const { run, points, reads, values, exact } of read) {
      if (!points.length) continue;
      let low = 0, high = points.length - 1;
      while (high - low > 1) { const middle = (low + high) >> 1; if (points[middle][0] < asked) low = middle; else high = middle; }
      const place = Math.abs(points[low][0] - asked) <= Math.abs(points[high][0] - asked) ? low : high;
      const [step, value] = points[place];
      if (Math.abs(x(step) - x(asked)) > 60) continue;
      steps.push([step, exact ? 1 : runs[run].width]);
      if (y(value) >= top && y(value) <= bottom && !values) marks.append(make("circle", { class: `hover-dot ${classOf(run)}`, cx: x(step), cy: y(value), r: 4 }));
      lines.push(make("div", {}, make("span", {}, swatch(run), reads === true ? runs[run].name : reads), make("b", {}, reading(values ? values[place] : value))));
    }
    if (!lines.length) return clear();
    const [step, width] = steps[0];
    marks.prepend(make("line", { class: "cross", x1: x(step), x2: x(step), y1: top, y2: bottom }));
    tip.replaceChildren(make("p", {}, width > 1 ? `steps ${whole(Math.max(1, step - width + 1))} to ${whole(step)}` : `step ${whole(step)}`), ...lines);
    tip.hidden = false;
    const outer = holder.getBoundingClientRect(), before = box.left - outer.left + x(step), room = holder.clientWidth - tip.offsetWidth - 4;
    const aside = before + 14 + tip.offsetWidth > holder.clientWidth ? before - 14 - tip.offsetWidth : before + 14;
    tip.style.left = `${Math.max(4, Math.min(room, aside))}px`;
    tip.style.top = `${box.top - outer.top + top + 4}px`;
  };
}

function addChart(charts, spec) {
  const lasts = make("div", { class: "lasts" }, ...(spec.key ?? lastValues(spec)));
  const svg = make("svg", { role: "img", "aria-label": `${spec.title}: a curve by step` });
  const tip = make("div", { class: "tip", hidden: "" });
  const holder = make("figure", { class: "chart", style: "margin:0" }, make("header", {}, make("h3", { class: spec.size }, spec.title), lasts), svg, tip);
  charts.append(holder);
  drawings.push({ holder, spec });
}

// What each run's curve ends at; a wide chart has room for the names too.
const lastValues = ({ series, size }) => series.filter(({ reads, points }) => reads === true && points.length)
  .map(({ run, points }) => make("span", { class: classOf(run), title: `${runs[run].name}, last value` },
    ...(size === "hero" ? [swatch(run), `${runs[run].name} `] : []), make("b", {}, reading(points.at(-1)[1]))));

function addGroup(title, note, columns, specs) {
  const filled = specs.filter(({ series }) => series.some(({ points }) => points.length));
  if (!filled.length) return false;
  const charts = make("div", { class: "charts", style: `--columns:${Math.min(columns, filled.length)}` });
  document.getElementById("curves").append(make("div", { class: "group" }, make("h2", {}, title), make("p", { class: "note" }, note), charts));
  for (const spec of filled) addChart(charts, spec);
  return true;
}

const each = (build) => runs.flatMap((run, number) => build(run, number)).filter(({ points }) => points.length);
const plain = (column) => each((run, number) => [{ run: number, kind: "line", reads: true, points: pairs(run.steps, run.means[column] ?? []) }]);
const noisy = (column) => each((run, number) => [
  { run: number, kind: "band", points: pairs(run.steps, run.high[column] ?? []), lower: pairs(run.steps, run.low[column] ?? []) },
  { run: number, kind: "faint", points: pairs(run.steps, run.means[column] ?? []) },
  { run: number, kind: "line", reads: true, points: pairs(run.steps, run.smoothed[column] ?? []) },
]);
const heldOut = () => each((run, number) => [{ run: number, kind: "dots", reads: true, exact: true, points: pairs(run.holdout.steps, run.holdout.loss) }]);
const quartile = (place) => each((run, number) => [
  { run: number, kind: "line", reads: true, points: pairs(run.steps, run.smoothed[`loss_q${place + 1}`] ?? []) },
  { run: number, kind: "thin", reads: "held-out", exact: true, points: pairs(run.holdout.steps, run.holdout.quartiles.map((values) => values[place])) },
]);

// The seconds of a step, one phase on the other; what no phase accounts for is `other`.
function timeSplit(run, number) {
  const total = run.means.seconds ?? [];
  let below = total.map(() => 0);
  return PHASES.map(([phase, opacity]) => {
    const values = total.map((seconds, place) => Math.max(0, phase === "other" ? seconds - below[place] : run.means[`${phase}_seconds`]?.[place] ?? 0));
    const above = below.map((value, place) => value + values[place]);
    const kept = run.steps.map((_, place) => place).filter((place) => total[place] !== null);
    const series = { run: number, kind: "area", reads: phase, opacity, values: kept.map((place) => values[place]),
      points: kept.map((place) => [run.steps[place], above[place]]), lower: kept.map((place) => [run.steps[place], below[place]]) };
    below = above;
    return series;
  }).filter(({ values }) => values.some((value) => value > 0));
}

function build() {
  if (!addGroup("Held-out loss", "On clips that training never sees, at fixed timesteps and noise: the number to compare runs by.", 1, [{ title: "Held-out loss by step", size: "hero", log: true, series: heldOut() }]))
    document.getElementById("curves").append(make("div", { class: "group" }, make("h2", {}, "Held-out loss"), make("p", { class: "note" }, "Not measured: these runs have no holdout.jsonl.")));
  addGroup("Training loss", "Single steps pale, smoothed bold.", 1, [{ title: "Loss by step", size: "hero", log: true, skips: true, series: noisy("loss") }]);
  addGroup("Loss by timestep", "Quartiles of the noise schedule, from little noise to pure noise; smoothed, held-out dotted.", 4,
    QUARTILES.map((title, place) => ({ title: `Timesteps ${title}`, size: "small", log: true, series: quartile(place) })));
  addGroup("Optimizer", "Learning rate, gradient norm before clipping, norm of the LoRA's weights.", 3, [
    { title: "Learning rate", size: "usual", zero: true, series: plain("lr") },
    { title: "Gradient norm", size: "usual", log: true, skips: true, series: noisy("grad_norm") },
    { title: "LoRA norm", size: "usual", zero: true, series: plain("lora_norm") },
  ]);
  const splits = runs.map((run, number) => timeSplit(run, number)).map((series, number) => ({
    title: runs.length > 1 ? runs[number].name : "Seconds of a step", size: "usual", zero: true, series,
    key: series.map(({ reads, opacity }) => make("span", { class: `phase ${classOf(number)}` }, make("i", { style: `opacity:${opacity}` }), reads)),
  }));
  const filled = splits.flatMap(({ series }) => series);
  if (filled.length) for (const split of splits) split.range = rangeOf(filled, { zero: true });
  addGroup("Speed", "Samples trained on a second.", 1, [{ title: "Samples a second", size: "hero", height: 190, zero: true, series: noisy("samples_per_second") }]);
  addGroup("Where the time goes", "Seconds of a step: waiting for data, forward, backward, optimizer, and the rest.", 3, splits);
}

const drawAll = () => { for (const { holder, spec } of drawings) drawChart(holder, spec); };

build();
drawAll();
let drawnWidth = document.body.clientWidth;
addEventListener("resize", () => { if (document.body.clientWidth !== drawnWidth) { drawnWidth = document.body.clientWidth; requestAnimationFrame(drawAll); } });
document.getElementById("log").addEventListener("change", (event) => { logarithmic = event.target.checked; drawAll(); });
for (const button of document.querySelectorAll(".legend button"))
  button.addEventListener("click", () => {
    const run = Number(button.dataset.run), hide = !hidden.has(run);
    if (hide) hidden.add(run); else hidden.delete(run);
    button.setAttribute("aria-pressed", String(!hide));
    drawAll();
  });
