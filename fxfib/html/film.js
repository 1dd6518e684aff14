// The graph of one look after another. An entry that is null has not changed since the look before.
const NAMES = { fiber: "fibers", opfiber: "opfibers", cover: "covers" };
for (const looks of Object.values(DATA.frames))
  looks.forEach((look, at) => look.forEach((slots, layer) => { if (slots === null) look[layer] = looks[at - 1][layer]; }));
const last = DATA.steps.length - 1;
let frame = last, symmetry = "cover", timer = null;

// One look is a picture, not a film: nothing plays, and nothing has changed.
const title = last ? `${DATA.model} in training` : DATA.model;
for (const name of last ? [] : ["play", "frame", "step", "speed", "curves-card", "changes"]) $(name).hidden = true;
document.title = `fxfib: ${title}`;
$("title").textContent = title;
$("subtitle").textContent = DATA.subtitle;
$("footer").textContent = "Made by fxfib. This page holds all its data and loads nothing.";

function paintLegend() {
  $("legend").replaceChildren();
  const stops = [0, 1, 2, 3, 4].map((slot) => fiberColor({ group: 0 }, slot)).map((color, at) => `${color} ${at * 20}% ${at * 20 + 20}%`);
  for (const [background, text] of [[`linear-gradient(90deg, ${stops.join(",")})`, "several nodes of one class, in the color of its first node"], [colors.node, "a class of one node"]])
    $("legend").append(element("span", {}, element("i", { class: "key", style: { background } }), text));
}
themeListeners.push(paintLegend);

function describe(layer, run) {
  const lines = [layer.name];
  if (!run) return [...lines, `${grouped(layer.count)} nodes, ${grouped(layer.fiberCount)} ${NAMES[symmetry]}`];
  return [...lines, run.nodes.length > 1 ? `${symmetry} of ${run.nodes.length} nodes` : `a ${symmetry} of its own`, `nodes ${ranges(run.nodes)}`];
}

function changesOf(index) {
  // Which classes met, and which parted, since the look before.
  if (!frame) return [];
  const [old, now] = [frame - 1, frame].map((at) => decode(DATA.frames[symmetry][at][index]));
  const gather = (whole, parts) => {
    const found = new Map();
    whole.forEach((label, node) => {
      if (!found.has(label)) found.set(label, new Map());
      const own = found.get(label);
      own.set(parts[node], [...(own.get(parts[node]) || []), node]);
    });
    return [...found.values()].filter((own) => own.size > 1).map((own) => [...own.values()]);
  };
  return [...gather(now, old).map((parts) => ["merged", parts]), ...gather(old, now).map((parts) => ["split", parts])];
}

function showLayer(layer) {
  $("layer-card").hidden = false;
  $("layer-name").textContent = $("layer-name").title = layer.name;
  $("layer-facts").textContent = `${grouped(layer.count)} nodes, ${grouped(layer.fiberCount)} ${NAMES[symmetry]}, ${grouped(layer.fiberCount - layer.merged)} of one node`;
  const list = $("fibers"), other = $("changes");
  list.replaceChildren();
  other.replaceChildren();
  const shown = layer.runs.filter((run) => run.kind === "fiber").sort((a, b) => b.nodes.length - a.nodes.length);
  for (const run of shown.slice(0, 100))
    list.append(element("div", { class: "fiber" }, element("i", { class: "key", style: { background: runColor(layer, run) } }), element("span", { class: "members" }, ranges(run.nodes, 40)), element("span", { class: "count" }, `${run.nodes.length} nodes`)));
  if (!shown.length) list.append(element("p", { class: "facts", style: { textAlign: "left" } }, `Every node is a ${symmetry} of its own.`));
  if (timer) return;
  const changes = changesOf(layer.index);
  for (const [what, parts] of changes.slice(0, 100))
    other.append(element("div", { class: "fiber" }, element("span", { class: "members" }, parts.map((nodes) => ranges(nodes, 8)).join(" | ")), element("span", { class: "count" }, what)));
  if (!changes.length) other.append(element("p", { class: "facts", style: { textAlign: "left" } }, frame ? "Nothing changed since the look before." : "This is the first look."));
}
themeListeners.push(() => { if (DATA.layers[selected]) showLayer(DATA.layers[selected]); });

function show(at) {
  frame = Math.max(0, Math.min(last, at));
  DATA.layers.forEach((layer, index) => {
    layer.slots = DATA.frames[symmetry][frame][index];
    layer.runs = layer.strips = null;
    prepared(layer);
  });
  place();
  draw();
  $("frame").value = frame;
  $("step").textContent = `step ${grouped(DATA.steps[frame])}`;
  $("graph-title").textContent = `The model, colored by ${symmetry}`;
  showLayer(DATA.layers[selected]);
  moveCursor();
}

function play(on) {
  clearInterval(timer);
  timer = null;
  if (on) {
    if (frame === last) show(0);
    timer = setInterval(() => (frame < last ? show(frame + 1) : play(false)), 1000 / +$("speed").value);
  }
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", on ? "stop" : "play");
  if (!on) showLayer(DATA.layers[selected]);
}

// Curves: of every layer the classes as a share of its nodes, and what was logged, each to its own scale.
const WIDE = 900, TALL = 300, LEFT = 50, RIGHT = 170, UP = 12, DOWN = 34;
const span = DATA.steps[last] - DATA.steps[0] || 1;
const atStep = (step) => LEFT + ((step - DATA.steps[0]) / span) * (WIDE - LEFT - RIGHT);
const atShare = (share) => UP + (1 - share) * (TALL - UP - DOWN);
let cursor = null;
function paintCurves() {
  const svg = drawing("svg", { viewBox: `0 0 ${WIDE} ${TALL}`, role: "img" });
  for (let part = 0; part <= 4; part++) {
    const y = atShare(part / 4), step = DATA.steps[0] + (span * part) / 4;
    svg.append(drawing("line", { x1: LEFT, x2: WIDE - RIGHT, y1: y, y2: y, stroke: "var(--line)" }));
    svg.append(drawing("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, `${25 * part} %`));
    svg.append(drawing("text", { x: atStep(step), y: TALL - 12, "text-anchor": "middle" }, grouped(step)));
  }
  const line = (points, color, dashed, name, lines) => {
    const d = points.map(([step, share], at) => `${at ? "L" : "M"}${atStep(step).toFixed(1)} ${atShare(share).toFixed(1)}`).join("");
    const path = drawing("path", { d, fill: "none", stroke: color, "stroke-width": 2, "stroke-dasharray": dashed ? "6 4" : "none" });
    path.addEventListener("pointermove", (event) => showTip(event, [name, ...lines]));
    path.addEventListener("pointerleave", hideTip);
    svg.append(path);
  };
  const ends = [];
  DATA.layers.forEach((layer, index) => {
    const color = `hsl(${(index * PALETTE_GOLDEN + 215) % 360}, 60%, ${colors.dark ? 64 : 45}%)`;
    const points = DATA.steps.map((step, at) => [step, DATA.counts[symmetry][at][index] / Math.max(1, layer.count)]);
    line(points, color, true, layer.name, [`${DATA.counts[symmetry][last][index]} ${NAMES[symmetry]} of ${layer.count} nodes at the end`]);
    ends.push([points[last][1], clipped(layer.name, 24), color]);
  });
  for (const [name, points] of Object.entries(DATA.logged)) {
    const values = points.map((point) => point[1]).filter(Number.isFinite);
    if (!values.length) continue;
    const most = Math.max(...values.map(Math.abs)) || 1;
    const shown = points.filter((point) => Number.isFinite(point[1])).map(([step, value]) => [step, Math.max(0, value / most)]);
    const end = values[values.length - 1];
    line(shown, "var(--good)", false, name, [`${end.toPrecision(4)} at the end; ${most.toPrecision(4)} is the top of the scale`]);
    ends.push([shown[shown.length - 1][1], clipped(`${name} ${end.toPrecision(3)}`, 24), "var(--good)"]);
  }
  // Names at the ends of the curves, moved apart.
  ends.sort((a, b) => b[0] - a[0]);
  let low = UP - 4;
  for (const [share, name, color] of ends.slice(0, 20)) {
    low = Math.max(low + 14, atShare(share) + 4);
    svg.append(drawing("text", { x: WIDE - RIGHT + 8, y: low, style: `fill: ${color}` }, name));
  }
  cursor = drawing("line", { y1: UP, y2: TALL - DOWN, stroke: "var(--ink)", "stroke-width": 1.5 });
  svg.append(cursor);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const step = DATA.steps[0] + (((event.clientX - box.left) / box.width) * WIDE - LEFT) / (WIDE - LEFT - RIGHT) * span;
    show(DATA.steps.reduce((best, own, at) => (Math.abs(own - step) < Math.abs(DATA.steps[best] - step) ? at : best), 0));
  });
  $("curves").replaceChildren(svg);
  moveCursor();
}
function moveCursor() {
  if (!cursor) return;
  for (const end of ["x1", "x2"]) cursor.setAttribute(end, atStep(DATA.steps[frame]));
}
themeListeners.push(paintCurves);

const asked = new URLSearchParams(location.search);
if (Object.hasOwn(NAMES, asked.get("symmetry"))) symmetry = asked.get("symmetry");
for (const [value, name] of Object.entries(NAMES)) $("symmetry").append(element("option", { value, defaultSelected: value === symmetry }, name));
for (const value of [2, 4, 8, 16, 32]) $("speed").append(element("option", { value }, `${value} looks a second`));
$("speed").value = 8;
$("frame").max = last;
$("frame").oninput = (event) => { play(false); show(+event.target.value); };
$("symmetry").onchange = (event) => { symmetry = event.target.value; paintCurves(); show(frame); };
$("speed").onchange = () => { if (timer) play(true); };
$("play").onclick = () => play(!timer);
addEventListener("keydown", (event) => {
  if (event.key !== " " || ["INPUT", "SELECT", "BUTTON"].includes(event.target.tagName)) return;
  event.preventDefault();
  play(!timer);
});
$("theme").onclick = () => setTheme(root.dataset.theme === "dark" ? "light" : "dark");
show(asked.has("frame") ? +asked.get("frame") || 0 : last);
const named = asked.get("theme");
setTheme(named === "dark" || named === "light" ? named : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
fit();
if (asked.has("play")) play(true);
root.dataset.ready = "yes";
