// Small helpers. Text from the model goes into the page as text nodes only.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PALETTE_GOLDEN = 137.508;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") Object.assign(made.style, value);
    else if (key === "class") made.className = value;
    else made[key] = value;
  }
  for (const child of children) made.append(child);
  return made;
}

function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  for (const child of children) made.append(child);
  return made;
}

const grouped = (number) => Math.round(number).toLocaleString("en-US");
function short(number) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (number >= size) return (number / size).toPrecision(3) + " " + unit;
  return String(number);
}
const percent = (part, whole) => (whole ? ((100 * part) / whole).toFixed(1) + " %" : "–");
const scientific = (number) => (number === null || number === undefined ? "–" : typeof number === "number" ? (number === 0 ? "0" : number.toExponential(1)) : String(number));
const clipped = (text, length) => (text.length > length ? text.slice(0, length / 2 - 1) + "…" + text.slice(1 - length / 2) : text);

// "0-3,0,c" -> slots; c (constant) is -1, u (unread) is -2.
function decode(text) {
  const slots = [];
  if (!text) return slots;
  for (const part of text.split(",")) {
    if (part === "c") slots.push(-1);
    else if (part === "u") slots.push(-2);
    else {
      const dash = part.indexOf("-");
      const first = +(dash < 0 ? part : part.slice(0, dash));
      const last = dash < 0 ? first : +part.slice(dash + 1);
      for (let slot = first; slot <= last; slot++) slots.push(slot);
    }
  }
  return slots;
}

// A layer's nodes, those of one fiber next to each other; worked out when first looked at.
function prepared(layer) {
  if (layer.runs) return layer;
  const slots = decode(layer.slots);
  const fibers = slots.reduce((most, slot) => Math.max(most, slot), -1) + 1;
  const members = Array.from({ length: fibers }, () => []);
  const constant = [], unread = [];
  slots.forEach((slot, node) => (slot >= 0 ? members[slot] : slot === -1 ? constant : unread).push(node));
  // Over time a color stays with the first node of its class, however classes are numbered.
  const runs = members.map((nodes, slot) => ({ kind: nodes.length > 1 ? "fiber" : "single", slot, nodes, hue: DATA.frames ? nodes[0] : slot }));
  if (constant.length) runs.push({ kind: "constant", slot: -1, nodes: constant });
  if (unread.length) runs.push({ kind: "unread", slot: -2, nodes: unread });
  let start = 0;
  for (const run of runs) { run.start = start; start += run.nodes.length; }
  return Object.assign(layer, { runs, count: slots.length, fiberCount: fibers, merged: runs.filter((run) => run.kind === "fiber").length });
}
DATA.layers.forEach((layer, index) => { layer.index = index; layer.readers = []; });
DATA.layers.forEach((layer) => layer.inputs.forEach((input) => DATA.layers[input].readers.push(layer.index)));

const root = document.documentElement;
const themeListeners = [];
let colors = {};
function setTheme(name) {
  root.dataset.theme = name;
  const style = getComputedStyle(root);
  colors = {};
  for (const key of ["bg", "card", "ink", "soft", "line", "node", "node2", "band", "flow", "accent", "constant", "unread", "track"])
    colors[key] = style.getPropertyValue("--" + key).trim();
  colors.dark = name === "dark";
  themeListeners.forEach((listener) => listener());
}
// Hue by group and slot: layers that share a coloring show it.
function fiberColor(layer, slot, alpha = 1) {
  // All hues but amber, which means constant.
  const hue = 60 + ((slot * PALETTE_GOLDEN + layer.group * 47 + 155) % 330);
  return `hsla(${hue.toFixed(0)}, ${colors.dark ? 62 : 62}%, ${colors.dark ? 60 : 47}%, ${alpha})`;
}
function runColor(layer, run) {
  if (run.kind === "fiber") return fiberColor(layer, run.hue);
  if (run.kind === "single") return run.slot % 2 ? colors.node2 : colors.node;
  return colors[run.kind];
}
function ranges(nodes, most = 24) {
  const parts = [];
  for (let at = 0; at < nodes.length && parts.length < most; ) {
    let end = at;
    while (end + 1 < nodes.length && nodes[end + 1] === nodes[end] + 1) end++;
    parts.push(end > at + 1 ? `${nodes[at]}–${nodes[end]}` : nodes.slice(at, end + 1).join(", "));
    at = end + 1;
  }
  const shown = parts.join(", ");
  return parts.length === most ? shown + " …" : shown;
}

const tip = $("tip");
function showTip(event, lines) {
  tip.replaceChildren();
  lines.forEach((line, index) => tip.append(element(index ? "div" : "b", { class: index ? "dim" : "" }, clipped(line, 240))));
  tip.style.opacity = 1;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(6, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(6, Math.min(event.clientY + 16, innerHeight - box.height - 8)) + "px";
}
const hideTip = () => (tip.style.opacity = 0);

function sized(canvas) {
  const ratio = Math.min(devicePixelRatio || 1, 2);
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}
