// Everything beside the graph.
const before = DATA.parameters_before, after = DATA.parameters_after;
const exact = DATA.eps === 0 && DATA.exact_error !== null;
document.title = `fxfib: ${DATA.model}`;
$("title").textContent = DATA.model;
const eps = typeof DATA.eps === "number" ? String(+DATA.eps.toPrecision(4)) : String(DATA.eps);
$("subtitle").textContent = `eps ${eps} · ${DATA.criterion} · ${DATA.dtype} on ${DATA.device}`;

function tile(label, value, detail, share, kind = "") {
  const made = element("div", { class: "tile" }, element("div", { class: "label" }, label), element("div", { class: "value " + kind }, value), element("div", { class: "detail" }, detail));
  if (share !== undefined) made.append(element("div", { class: "meter" }, element("i", { style: { width: Math.min(100, 100 * share) + "%" } })));
  $("tiles").append(made);
}
tile("parameters", percent(after, before), `${grouped(before)} → ${grouped(after)}`, before ? after / before : 1);
tile("multiply-accumulates", percent(DATA.macs_after, DATA.macs_before), `${short(DATA.macs_before)} → ${short(DATA.macs_after)} an example`, DATA.macs_before ? DATA.macs_after / DATA.macs_before : 1);
const nodes = DATA.groups.reduce((sum, group) => sum + group.nodes, 0), left = DATA.groups.reduce((sum, group) => sum + group.fibers, 0);
tile("nodes", percent(left, nodes), `${grouped(nodes)} → ${grouped(left)} in ${DATA.groups.length} groups`, nodes ? left / nodes : 1);
if (DATA.error === null) tile("error", "not measured", "verification was turned off", undefined, "warn");
else if (exact) tile("error", "exact", `${scientific(DATA.relative_error)} relative, ${scientific(DATA.exact_error)} in float64`, undefined, "good");
else tile("error", scientific(DATA.relative_error), "relative, on the example inputs: approximate", undefined, "warn");

function swatch(style, text) { $("legend").append(element("span", {}, element("i", { class: "key", style }), text)); }
function paintLegend() {
  $("legend").replaceChildren();
  const stops = [0, 1, 2, 3, 4].map((slot) => fiberColor({ group: 0 }, slot)).map((color, at) => `${color} ${at * 20}% ${at * 20 + 20}%`);
  swatch({ background: `linear-gradient(90deg, ${stops.join(",")})` }, "fiber: its nodes become one");
  swatch({ background: colors.node }, "a fiber of one node");
  if (DATA.groups.some((group) => group.constant)) swatch({ background: colors.constant }, "constant: folded into biases");
  if (DATA.groups.some((group) => group.unread)) swatch({ background: colors.unread }, "unread: dropped");
}
themeListeners.push(paintLegend);

function paintMatrix(canvas, caption, picture, text) {
  const parent = canvas.parentElement;
  parent.style.visibility = picture ? "visible" : "hidden";
  if (!picture) return;
  const bytes = atob(picture.pixels);
  canvas.width = picture.columns;
  canvas.height = picture.rows;
  const context = canvas.getContext("2d"), image = context.createImageData(picture.columns, picture.rows);
  const low = colors.dark ? [22, 29, 38] : [246, 248, 251], high = colors.dark ? [125, 190, 255] : [20, 66, 170];
  for (let at = 0; at < bytes.length; at++) {
    const value = Math.sqrt(bytes.charCodeAt(at) / 255);
    for (let part = 0; part < 3; part++) image.data[4 * at + part] = low[part] + (high[part] - low[part]) * value;
    image.data[4 * at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  caption.textContent = `${text}: ${grouped(picture.shape[0])} × ${grouped(picture.shape[1])}`;
}

function describe(layer, run) {
  const lines = [layer.name];
  if (!run) return [...lines, `${layer.op}: ${grouped(layer.count)} nodes, ${grouped(layer.fiberCount)} after`];
  const readers = layer.readers.map((reader) => DATA.layers[reader].name);
  const to = readers.length ? (readers.length > 2 ? `${readers[0]} and ${readers.length - 1} more` : readers.join(" and ")) : "the output";
  if (run.kind === "fiber") {
    lines.push(`fiber of ${run.nodes.length} nodes, one after: ${run.slot}`, `members ${ranges(run.nodes)}`);
    lines.push(`rows averaged; columns ${ranges(run.nodes, 8).replaceAll(", ", " + ")} of ${clipped(to, 80)} summed`);
  } else if (run.kind === "single") lines.push(`node ${run.nodes[0]}, a fiber of its own; ${run.slot} after`);
  else if (run.kind === "constant") lines.push(`${run.nodes.length} constant, folded into the biases of ${clipped(to, 80)}`, `nodes ${ranges(run.nodes)}`);
  else lines.push(`${run.nodes.length} that nothing reads, dropped`, `nodes ${ranges(run.nodes)}`);
  return lines;
}

function showLayer(layer) {
  $("layer-card").hidden = false;
  $("layer-name").textContent = layer.name;
  $("layer-name").title = layer.name;
  $("layer-facts").textContent = `${layer.op} · ${grouped(layer.count)} nodes → ${grouped(layer.fiberCount)}`;
  paintMatrix($("matrix-before"), $("caption-before"), layer.before, "weight, fibers side by side");
  paintMatrix($("matrix-after"), $("caption-after"), layer.after, "after");
  // Both to one scale, so that the smaller one looks smaller.
  if (layer.before && layer.after) {
    const [rows, columns] = layer.before.shape, [rowsAfter, columnsAfter] = layer.after.shape;
    const most = 280, aspect = Math.max(0.3, Math.min(3, rows / columns));
    const width = aspect > 1 ? most / aspect : most, height = aspect > 1 ? most : most * aspect;
    const set = (canvas, part, across) => { canvas.style.width = Math.max(14, width * across) + "px"; canvas.style.height = Math.max(14, height * part) + "px"; canvas.style.maxWidth = "100%"; };
    set($("matrix-before"), 1, 1);
    set($("matrix-after"), rowsAfter / rows, columnsAfter / columns);
  }
  document.querySelector(".matrices").style.display = layer.before ? "" : "none";
  const list = $("fibers");
  list.replaceChildren();
  const shown = layer.runs.filter((run) => run.kind !== "single").sort((a, b) => b.nodes.length - a.nodes.length);
  for (const run of shown.slice(0, 200)) {
    const what = run.kind === "fiber" ? `${run.nodes.length} nodes → ${run.slot}` : `${run.nodes.length} ${run.kind}`;
    list.append(element("div", { class: "fiber" }, element("i", { class: "key", style: { background: runColor(layer, run) } }), element("span", { class: "members" }, ranges(run.nodes, 40)), element("span", { class: "count" }, what)));
  }
  if (shown.length > 200) list.append(element("div", { class: "fiber" }, `and ${shown.length - 200} more fibers`));
  if (!shown.length) {
    const group = DATA.groups[layer.group];
    list.append(element("p", { class: "facts", style: { textAlign: "left" } }, group && group.reason ? `Kept at full width: ${group.reason}.` : "No two nodes of this layer are in one fiber."));
  }
}
themeListeners.push(() => { if (DATA.layers[selected]) showLayer(DATA.layers[selected]); });

(function paintGroups() {
  const order = DATA.groups.map((group, index) => ({ group, index })).sort((a, b) => (b.group.nodes - b.group.fibers) - (a.group.nodes - a.group.fibers) || a.index - b.index);
  const widest = DATA.groups.reduce((most, group) => Math.max(most, group.nodes), 1);
  let shown = 0;
  const box = $("groups");
  const button = element("button", { class: "more", type: "button" });
  function show(count) {
    for (const { group } of order.slice(shown, shown + count)) {
      const bar = element("div", { class: "bar", style: { width: Math.max(4, 100 * Math.sqrt(group.nodes / widest)) + "%" } });
      for (const [number, color] of [[group.fibers, "var(--accent)"], [group.constant, "var(--constant)"], [group.unread, "var(--unread)"]])
        if (number) bar.append(element("i", { style: { width: (100 * number) / group.nodes + "%", background: color } }));
      const names = group.members.length > 2 ? `${group.members[0]} and ${group.members.length - 1} more` : group.members.join(", ");
      const row = element("div", { class: "group" }, element("span", { class: "name" }, clipped(names, 120)), bar, element("span", { class: "numbers" }, group.fibers < group.nodes ? `${grouped(group.nodes)} → ${grouped(group.fibers)}` : `${grouped(group.nodes)} kept`));
      row.onpointermove = (event) => showTip(event, [names, `${group.merged} merged, ${group.scaled} of them with a factor, ${group.constant} constant, ${group.unread} unread`, ...(group.reason ? [`kept at full width: ${group.reason}`] : []), ...(group.members.length > 2 ? [group.members.slice(0, 12).join(", ")] : [])]);
      row.onpointerleave = hideTip;
      box.append(row);
    }
    shown = Math.min(order.length, shown + count);
    button.remove();
    if (shown < order.length) { button.textContent = `show ${Math.min(200, order.length - shown)} more, ${grouped(order.length)} in all`; box.append(button); }
  }
  button.onclick = () => show(200);
  show(14);
  if (!order.length) box.append(element("p", {}, "No layer whose nodes could merge was found."));
})();

(function paintCertificate() {
  const table = element("table");
  const row = (name, value) => table.append(element("tr", {}, element("th", {}, name), element("td", {}, value)));
  const badge = DATA.error === null ? element("span", { class: "badge bad" }, "not verified") : exact ? element("span", { class: "badge" }, "exact") : element("span", { class: "badge warn" }, "approximate");
  row("result", badge);
  row("largest error", DATA.error === null ? "–" : `${scientific(DATA.error)} absolute, ${scientific(DATA.relative_error)} of the largest output`);
  if (DATA.exact_error !== null) row("in float64", `${scientific(DATA.exact_error)} relative; allowed in ${DATA.dtype}: ${scientific(DATA.tolerance)}`);
  if (DATA.error !== null) row("measured on", "the example inputs, original and result side by side");
  row("eps", `${eps} (${DATA.criterion})`);
  for (const note of DATA.notes) row("note", note);
  for (const [name, seconds] of Object.entries(DATA.seconds)) row(`${name} took`, `${(+seconds).toFixed(2)} s`);
  row("made with", Object.entries(DATA.versions).map((pair) => pair.join(" ")).join(", "));
  $("certificate").append(table);
})();

(function paintRefusals() {
  const box = $("refusals");
  const kept = DATA.groups.filter((group) => group.reason);
  for (const refusal of DATA.refusals.slice(0, 60))
    box.append(element("div", { class: "refusal" }, element("b", {}, clipped(refusal.node, 120)), " ", element("code", {}, clipped(refusal.op, 60)), element("div", {}, refusal.reason), element("div", { class: "remedy" }, refusal.remedy)));
  if (DATA.refusals.length > 60) box.append(element("div", { class: "refusal" }, `and ${DATA.refusals.length - 60} more`));
  const reasons = new Map();
  for (const group of kept) reasons.set(group.reason, [...(reasons.get(group.reason) || []), ...group.members]);
  for (const [reason, members] of [...reasons].slice(0, 30))
    box.append(element("div", { class: "refusal" }, element("b", {}, clipped(members.length > 3 ? `${members.slice(0, 3).join(", ")} and ${members.length - 3} more` : members.join(", "), 160)), element("div", {}, `kept at full width: ${reason}`)));
  if (!box.childElementCount) box.append(element("p", {}, "Nowhere: every operation was followed."));
})();

function chart(series, options) {
  const width = 900, height = 300, pad = { left: 64, right: 18, top: 14, bottom: 44 };
  const points = series.flatMap((one) => one.points);
  const span = (values) => { const low = Math.min(...values), high = Math.max(...values); const more = (high - low || Math.abs(high) || 1) * 0.06; return [low < 0 ? low - more : Math.max(0, low - more), high + more]; };
  const [x0, x1] = options.places ? [-0.3, options.places - 0.7] : span(points.map((point) => point[0])), [y0, y1] = span(points.map((point) => point[1]));
  const x = (value) => pad.left + ((value - x0) / (x1 - x0)) * (width - pad.left - pad.right);
  const y = (value) => height - pad.bottom - ((value - y0) / (y1 - y0)) * (height - pad.top - pad.bottom);
  const svg = drawing("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (let at = 0; at <= 4; at++) {
    const vy = y0 + ((y1 - y0) * at) / 4;
    svg.append(drawing("line", { x1: pad.left, x2: width - pad.right, y1: y(vy), y2: y(vy), stroke: "var(--line)" }));
    svg.append(drawing("text", { x: pad.left - 8, y: y(vy) + 4, "text-anchor": "end" }, options.y(vy)));
  }
  const ticks = options.places ? [...Array(options.places).keys()] : [0, 1, 2, 3, 4].map((at) => x0 + ((x1 - x0) * at) / 4);
  ticks.forEach((value, at) => svg.append(drawing("text", { x: x(value), y: height - pad.bottom + 18, "text-anchor": !options.places && at === 4 ? "end" : "middle" }, options.x(value))));
  svg.append(drawing("text", { x: (width + pad.left) / 2, y: height - 6, "text-anchor": "middle" }, options.label));
  series.forEach((one, number) => {
    const color = number ? "var(--warn)" : "var(--accent)";
    const path = one.points.map((point, at) => `${at ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("");
    svg.append(drawing("path", { d: path, fill: "none", stroke: color, "stroke-width": 2, "stroke-dasharray": number ? "5 4" : "none" }));
    for (const point of one.points) {
      const mark = drawing("circle", { cx: x(point[0]), cy: y(point[1]), r: point[3] ? 7 : 4, fill: color });
      mark.addEventListener("pointermove", (event) => showTip(event, [one.name, `${options.x(point[0])}, ${options.y(point[1])}`, ...(point[2] ? [point[2]] : [])]));
      mark.addEventListener("pointerleave", hideTip);
      svg.append(mark);
    }
    svg.append(drawing("text", { x: width - pad.right, y: pad.top + 4 + 16 * number, "text-anchor": "end", style: `fill: ${color}` }, one.name));
  });
  return svg;
}

(function paintFrontier() {
  const points = (DATA.frontier || []).filter((point) => point && typeof point.parameters === "number");
  $("frontier-card").hidden = !points.length;
  if (!points.length) return;
  points.sort((a, b) => a.parameters - b.parameters);
  // What was measured; where nothing was, what was predicted (another quantity).
  const measured = points.filter((point) => typeof point.loss === "number");
  const predicted = points.filter((point) => typeof point.predicted === "number");
  const [name, found, key] = measured.length ? ["measured loss", measured, "loss"] : ["predicted: share of energy lost", predicted, "predicted"];
  const series = found.length ? [{ name, points: found.map((point) => [point.parameters, point[key], [`${short(point.macs)} multiply-accumulates`, `eps up to ${+point.eps.toPrecision(3)}`, ...(typeof point.latency === "number" ? [`${point.latency.toFixed(2)} of the original's time`] : []), ...(point.chosen ? ["chosen"] : [])].join("; "), point.chosen]) }] : [];
  if (series.length) $("frontier").append(chart(series, { x: (value) => short(Math.round(value)), y: (value) => String(+value.toPrecision(3)), label: "parameters" }));
})();

(function paintCurve() {
  const points = DATA.curve || [];
  $("curve-card").hidden = !points.length;
  if (!points.length) return;
  // One place for every eps: a scale that holds 0 and five powers of ten has no other.
  const percent = (value) => (value && Math.abs(value) < 1e-5 ? (100 * value).toExponential(0) : String(+(100 * value).toPrecision(3))) + " %";
  const eps = (place) => String(+points[Math.min(points.length - 1, Math.max(0, Math.round(place)))].eps.toPrecision(3));
  const about = (point) => `${short(point.parameters)} parameters, ${short(point.macs)} multiply-accumulates`;
  for (const [name, key] of [["parameters kept", "parameters_kept"], ["relative error", "error"]]) {
    const known = points.map((point, place) => [place, point[key], about(point)]).filter((point) => typeof point[1] === "number");
    if (known.length) $("curve").append(chart([{ name, points: known }], { x: eps, y: percent, label: "eps", places: points.length }));
  }
})();

(function paintLatency() {
  const rows = (DATA.benchmark && DATA.benchmark.rows) || [];
  $("latency-card").hidden = !rows.length;
  if (!rows.length) return;
  const most = Math.max(...rows.flatMap((row) => [row.original_ms, row.small_ms]));
  const table = element("table", {}, element("tr", {}, ...["runtime", "batch", "", "original", "small", "speed-up"].map((name, at) => element("th", { class: at > 2 || at === 1 ? "number" : "" }, name))));
  for (const row of rows) {
    const bars = element("td", { style: { width: "38%" } });
    for (const [value, color] of [[row.original_ms, "var(--node)"], [row.small_ms, "var(--accent)"]])
      bars.append(element("div", { style: { height: "8px", margin: "2px 0", borderRadius: "3px", background: color, width: Math.max(0.5, (100 * value) / most) + "%" } }));
    const time = (value, low, high) => `${value.toPrecision(3)} ms (${low.toPrecision(3)}–${high.toPrecision(3)})`;
    table.append(element("tr", {}, element("td", {}, row.runtime), element("td", { class: "number" }, String(row.batch)), bars, element("td", { class: "number" }, time(row.original_ms, row.original_low_ms, row.original_high_ms)), element("td", { class: "number" }, time(row.small_ms, row.small_low_ms, row.small_high_ms)), element("td", { class: "number" }, row.ratio.toFixed(2) + " ×")));
  }
  $("latency").append(table, element("p", { class: "hint" }, DATA.benchmark.setting || ""));
})();

$("footer").textContent = "Made by fxfib. This page holds all its data and loads nothing.";
$("graph-card").hidden = $("layer-card").hidden = !DATA.layers.length;
$("theme").onclick = () => setTheme(root.dataset.theme === "dark" ? "light" : "dark");
const asked = new URLSearchParams(location.search).get("theme");
setTheme(asked === "dark" || asked === "light" ? asked : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
if (DATA.layers.length) {
  const first = DATA.layers.findIndex((layer) => layer.merged);
  select(Math.max(0, first));
  fit();
}
root.dataset.ready = "yes";
