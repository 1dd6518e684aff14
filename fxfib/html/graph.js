// The colored graph: columns of nodes on a canvas; only what is in view is drawn.
const PITCH = 132, BEFORE = 20, GAP = 30, AFTER = 20, FULL = 360, TOP = 54;
const graph = $("graph"), overview = $("overview");
const view = { x: 0, y: 0, scale: 1, yscale: 1 };
let selected = 0, lastColumn = 0;

function place() {
  // Columns by depth; layers of one depth are stacked.
  const columns = [];
  DATA.layers.forEach((layer) => {
    layer.column = layer.inputs.reduce((most, input) => Math.max(most, DATA.layers[input].column + 1), 0);
    (columns[layer.column] ||= []).push(layer);
  });
  lastColumn = columns.length - 1;
  const widest = DATA.layers.reduce((most, layer) => Math.max(most, prepared(layer).count), 1);
  for (const stack of columns) {
    if (!stack) continue;
    const share = FULL / stack.length;
    stack.forEach((layer, place) => {
      const room = share - (stack.length > 1 ? 16 : 0);
      const tall = widest <= 48 ? layer.count / widest : 0.22 + 0.78 * Math.sqrt(layer.count / widest);
      layer.x = layer.column * PITCH;
      layer.h = Math.max(room * Math.max(tall, 0.06), Math.min(room, 12));
      layer.hAfter = layer.h * (layer.count ? layer.fiberCount / layer.count : 1);
      layer.y = place * share + (share - layer.h) / 2;
      layer.yAfter = layer.y + (layer.h - layer.hAfter) / 2;
    });
  }
}
place();

const worldWidth = () => (lastColumn + 1) * PITCH - (PITCH - BEFORE - GAP - AFTER);
const toX = (x) => (x - view.x) * view.scale;
const toY = (y) => TOP + (y - view.y) * view.yscale;

function fit() {
  const width = graph.clientWidth - 56, height = graph.clientHeight - TOP - 34;
  view.yscale = height / FULL;
  view.y = 0;
  const whole = width / worldWidth();
  view.scale = Math.min(Math.max(whole, 0.84), 2.2);
  view.x = whole < 0.84 ? -28 / view.scale : -(28 + (width - worldWidth() * view.scale) / 2) / view.scale;
  draw();
}

function strip(layer, side) {
  // One pixel a node, stretched when drawn: thousands of nodes cost one call.
  const key = side + root.dataset.theme;
  layer.strips ||= {};
  if (layer.strips[key]) return layer.strips[key];
  const canvas = document.createElement("canvas");
  canvas.width = 1;
  canvas.height = Math.max(1, side === "before" ? layer.count : layer.fiberCount);
  const context = canvas.getContext("2d");
  for (const run of layer.runs) {
    if (side === "after" && run.slot < 0) continue;
    context.fillStyle = runColor(layer, run);
    if (side === "before") context.fillRect(0, run.start, 1, run.nodes.length);
    else context.fillRect(0, run.slot, 1, 1);
  }
  return (layer.strips[key] = canvas);
}

function cells(context, layer, x, y, width, height, count, side) {
  const cell = height / count;
  if (cell < 5) {
    context.imageSmoothingEnabled = false;
    context.drawImage(strip(layer, side), x, y, width, height);
    return;
  }
  const bottom = graph.clientHeight;
  const gap = Math.min(2, cell * 0.14);
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (const run of layer.runs) {
    if (side === "after" && run.slot < 0) continue;
    const length = side === "after" ? 1 : run.nodes.length;
    const start = side === "after" ? run.slot : run.start;
    if (y + (start + length) * cell < 0 || y + start * cell > bottom) continue;
    for (let place = 0; place < length; place++) {
      context.fillStyle = runColor(layer, run);
      context.beginPath();
      context.roundRect(x, y + (start + place) * cell + gap / 2, width, cell - gap, Math.min(4, cell / 3));
      context.fill();
      if (cell > 13 && width > 15 && side === "before") {
        context.fillStyle = run.kind === "single" ? colors.ink : colors.dark ? "#0d131a" : "#fff";
        context.font = `${Math.min(11, cell * 0.62)}px system-ui, sans-serif`;
        context.fillText(run.nodes[place], x + width / 2, y + (start + place + 0.5) * cell);
      }
    }
  }
}

function ribbon(context, x1, top1, bottom1, x2, top2, bottom2) {
  const middle = (x1 + x2) / 2;
  context.beginPath();
  context.moveTo(x1, top1);
  context.bezierCurveTo(middle, top1, middle, top2, x2, top2);
  context.lineTo(x2, bottom2);
  context.bezierCurveTo(middle, bottom2, middle, bottom1, x1, bottom1);
  context.closePath();
  context.fill();
}

let pending = false;
function draw() {
  if (!pending) { pending = true; requestAnimationFrame(() => { pending = false; paint(); }); }
}

function paint() {
  const { context, width, height } = sized(graph);
  const inView = (layer, slack = 1) => toX(layer.x + PITCH * slack) > -40 && toX(layer.x - PITCH * (slack - 1)) < width + 40;
  const visible = DATA.layers.filter((layer) => inView(layer));
  context.save();
  context.beginPath();
  context.rect(0, 0, width, height);
  context.clip();
  // Flows from layer to layer; what skips layers is a thin arc, so that chains stay readable.
  for (const layer of DATA.layers) {
    const x1 = toX(layer.x + BEFORE + GAP + AFTER);
    for (const reader of layer.readers) {
      const other = DATA.layers[reader], x2 = toX(other.x);
      if (x2 < 0 || x1 > width) continue;
      const near = layer.index === selected || reader === selected;
      if (other.column - layer.column <= 1) {
        context.globalAlpha = near ? 1 : 0.75;
        context.fillStyle = colors.flow;
        ribbon(context, x1, toY(layer.yAfter), toY(layer.yAfter + layer.hAfter), x2, toY(other.y), toY(other.y + other.h));
        continue;
      }
      const y1 = toY(layer.yAfter + layer.hAfter), y2 = toY(other.y + other.h);
      const deep = Math.min(height - 8, Math.max(y1, y2) + 14 + 16 * Math.min(5, other.column - layer.column));
      context.globalAlpha = near ? 0.95 : 0.28;
      context.strokeStyle = near ? colors.accent : colors.soft;
      context.lineWidth = near ? 2 : 1;
      context.beginPath();
      context.moveTo(x1 - (AFTER * view.scale) / 2, y1 + 2);
      context.bezierCurveTo(x1 + 12, deep, x2 - 12, deep, x2 + (BEFORE * view.scale) / 2, y2 + 2);
      context.stroke();
    }
  }
  context.globalAlpha = 1;
  for (const layer of visible) {
    const x = toX(layer.x), top = toY(layer.y), tall = layer.h * view.yscale;
    const xAfter = toX(layer.x + BEFORE + GAP), topAfter = toY(layer.yAfter), tallAfter = layer.hAfter * view.yscale;
    const wide = BEFORE * view.scale;
    const inner = x + wide;
    // From the nodes before to the one after: a funnel for every fiber.
    const cell = tall / Math.max(layer.count, 1), cellAfter = tallAfter / Math.max(layer.fiberCount, 1);
    context.fillStyle = colors.band;
    ribbon(context, inner, top, top + tall, xAfter, topAfter, topAfter + tallAfter);
    const funnels = layer.runs.filter((run) => run.kind === "fiber");
    const step = Math.max(1, Math.ceil(funnels.length / 160));
    for (let at = 0; at < funnels.length; at += step) {
      const run = funnels[at];
      context.fillStyle = fiberColor(layer, run.hue, 0.3);
      ribbon(context, inner, top + run.start * cell, top + (run.start + run.nodes.length) * cell, xAfter, topAfter + run.slot * cellAfter, topAfter + (run.slot + 1) * cellAfter);
    }
    if (layer.count) cells(context, layer, x, top, wide, tall, layer.count, "before");
    if (layer.fiberCount) cells(context, layer, xAfter, topAfter, AFTER * view.scale, tallAfter, layer.fiberCount, "after");
    if (layer.index === selected) {
      context.strokeStyle = colors.accent;
      context.lineWidth = 2;
      context.beginPath();
      context.roundRect(x - 5, top - 5, (BEFORE + GAP + AFTER) * view.scale + 10, tall + 10, 7);
      context.stroke();
    }
  }
  labels(context, visible, width);
  context.restore();
  paintOverview();
}

function labels(context, visible, width) {
  const room = PITCH * view.scale;
  context.textBaseline = "alphabetic";
  const used = new Set();
  context.fillStyle = colors.card;
  context.globalAlpha = 0.86;
  context.fillRect(0, 0, width, TOP - 12);
  context.globalAlpha = 1;
  for (const layer of visible) {
    if (used.has(layer.column)) continue;
    used.add(layer.column);
    const first = layer.column === DATA.layers[selected]?.column ? DATA.layers[selected] : layer;
    const center = toX(first.x + (BEFORE + GAP + AFTER) / 2);
    context.textAlign = "center";
    const active = first.index === selected;
    context.fillStyle = active ? colors.accent : colors.ink;
    context.font = `${active ? 650 : 550} 12px system-ui, "DejaVu Sans", sans-serif`;
    let name = first.name;
    const limit = Math.max(room - 12, 30);
    if (context.measureText(name.slice(0, 80)).width > limit || name.length > 80) {
      // The end of a path tells layers apart.
      let tail = name.slice(-40);
      while (tail.length > 3 && context.measureText("…" + tail).width > limit) tail = tail.slice(1);
      name = "…" + tail;
    }
    context.fillText(name, center, 19);
    context.fillStyle = colors.soft;
    context.font = '11.5px system-ui, "DejaVu Sans", sans-serif';
    const count = first.fiberCount === first.count ? `${first.count}` : `${first.count} → ${first.fiberCount}`;
    context.fillText(count, center, 34);
  }
}

function paintOverview() {
  const { context, width, height } = sized(overview);
  const total = worldWidth() || 1, scale = width / total;
  const most = DATA.layers.reduce((most, layer) => Math.max(most, layer.count), 1);
  const columns = new Map();
  for (const layer of DATA.layers) {
    const known = columns.get(layer.column) || { count: 0, fibers: 0 };
    known.count += layer.count; known.fibers += layer.fiberCount;
    columns.set(layer.column, known);
  }
  const wide = Math.max(1, Math.min(PITCH * scale * 0.72, 60));
  for (const [column, { count, fibers }] of columns) {
    const x = (column * PITCH + (BEFORE + GAP + AFTER) / 2) * scale - wide / 2;
    const tall = Math.max(3, Math.min(1, Math.sqrt(count / most)) * (height - 6));
    context.fillStyle = colors.track;
    context.fillRect(x, height - tall, wide, tall);
    context.fillStyle = colors.accent;
    context.globalAlpha = 0.75;
    context.fillRect(x, height - tall * (fibers / Math.max(count, 1)), wide, tall * (fibers / Math.max(count, 1)));
    context.globalAlpha = 1;
  }
  context.strokeStyle = colors.ink;
  context.globalAlpha = 0.55;
  context.lineWidth = 1.5;
  const left = Math.max(0.75, view.x * scale), right = Math.min(width - 0.75, (view.x + graph.clientWidth / view.scale) * scale);
  context.strokeRect(left, 1, Math.max(4, right - left), height - 2);
  context.globalAlpha = 1;
}

function layerAt(px, py) {
  const x = px / view.scale + view.x;
  let best = null, distance = Infinity;
  for (const layer of DATA.layers) {
    if (x < layer.x - 14 || x > layer.x + BEFORE + GAP + AFTER + 14) continue;
    const top = toY(layer.y), bottom = toY(layer.y + layer.h);
    const off = py < top ? top - py : py > bottom ? py - bottom : 0;
    if (off < distance) { best = layer; distance = off; }
  }
  return distance < 18 ? best : null;
}

function runAt(layer, px, py) {
  const x = px / view.scale + view.x - layer.x;
  const before = x < BEFORE + GAP / 2;
  const top = toY(before ? layer.y : layer.yAfter), tall = (before ? layer.h : layer.hAfter) * view.yscale;
  const count = before ? layer.count : layer.fiberCount;
  const place = Math.floor(((py - top) / tall) * count);
  if (!(place >= 0 && place < count)) return null;
  if (!before) return layer.runs.find((run) => run.slot === place);
  return layer.runs.find((run) => place >= run.start && place < run.start + run.nodes.length);
}

function zoom(factor, px, py) {
  const x = px / view.scale + view.x, y = (py - TOP) / view.yscale + view.y;
  view.scale = Math.min(12, Math.max(0.04, view.scale * factor));
  view.yscale = Math.min(80, Math.max((graph.clientHeight - TOP - 34) / FULL, view.yscale * factor));
  view.x = x - px / view.scale;
  view.y = y - (py - TOP) / view.yscale;
  bound();
  draw();
}
function bound() {
  const slack = graph.clientWidth / view.scale;
  view.x = Math.max(-slack * 0.6, Math.min(worldWidth() - slack * 0.4, view.x));
  const tall = (graph.clientHeight - TOP - 34) / view.yscale;
  view.y = Math.max(0, Math.min(FULL - tall, view.y));
}
function select(index, reveal = false) {
  const layer = DATA.layers[index];
  if (!layer) return;
  selected = index;
  if (reveal) {
    const x = toX(layer.x);
    if (x < 40 || x > graph.clientWidth - 120) view.x = layer.x - graph.clientWidth / view.scale / 2;
    bound();
  }
  showLayer(layer);
  draw();
}

(function listen() {
  let drag = null;
  graph.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, y: event.clientY, vx: view.x, vy: view.y, moved: false };
    graph.setPointerCapture(event.pointerId);
  });
  graph.addEventListener("pointermove", (event) => {
    const box = graph.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
    if (drag) {
      if (Math.abs(event.clientX - drag.x) + Math.abs(event.clientY - drag.y) > 4) drag.moved = true;
      if (drag.moved) {
        graph.classList.add("dragging");
        view.x = drag.vx - (event.clientX - drag.x) / view.scale;
        view.y = drag.vy - (event.clientY - drag.y) / view.yscale;
        bound(); hideTip(); draw();
      }
      return;
    }
    const layer = layerAt(px, py);
    if (layer) showTip(event, describe(layer, runAt(layer, px, py)));
    else hideTip();
  });
  const release = (event) => {
    if (drag && !drag.moved && event.type === "pointerup") {
      const box = graph.getBoundingClientRect();
      const layer = layerAt(event.clientX - box.left, event.clientY - box.top);
      if (layer) select(layer.index);
    }
    drag = null;
    graph.classList.remove("dragging");
  };
  graph.addEventListener("pointerup", release);
  graph.addEventListener("pointercancel", release);
  graph.addEventListener("pointerleave", hideTip);
  graph.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = graph.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY * 0.0016), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  graph.addEventListener("dblclick", fit);
  graph.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    select(Math.max(0, Math.min(DATA.layers.length - 1, selected + step)), true);
  });
  const jump = (event) => {
    const box = overview.getBoundingClientRect();
    view.x = ((event.clientX - box.left) / box.width) * worldWidth() - graph.clientWidth / view.scale / 2;
    bound(); draw();
  };
  overview.addEventListener("pointerdown", (event) => { overview.setPointerCapture(event.pointerId); jump(event); });
  overview.addEventListener("pointermove", (event) => { if (event.buttons) jump(event); });
  $("zoom-in").onclick = () => zoom(1.5, graph.clientWidth / 2, graph.clientHeight / 2);
  $("zoom-out").onclick = () => zoom(1 / 1.5, graph.clientWidth / 2, graph.clientHeight / 2);
  $("fit").onclick = fit;
  $("find").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    const found = wanted && DATA.layers.find((layer) => layer.name.toLowerCase().includes(wanted));
    if (found) select(found.index, true);
  });
  addEventListener("resize", draw);
  themeListeners.push(draw);
})();
