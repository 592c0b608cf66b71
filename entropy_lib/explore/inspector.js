// Where each head looks in a text, how sharply, and what becomes of it at another temperature.
// Weights of a packed reading as rows of what each query sees: rows(layer, head)[query].
export const unpacked = async (reading) => {
  const { layers, heads, tokens, causal, levels, data } = reading, size = tokens.length;
  const deflated = new Blob([bytes(data)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = await new Response(deflated).arrayBuffer();
  const whole = levels > 255 ? new Uint16Array(raw) : new Uint8Array(raw);
  const all = Float64Array.from(whole, (level) => (Math.max(level, 0.25) / levels) ** 4);
  const widths = tokens.map((_, query) => (causal ? query + 1 : size));
  const ofHead = widths.reduce((sum, width) => sum + width, 0), views = [];
  for (let at = 0, head = 0; head < layers * heads; head++) {
    views.push(widths.map((width) => {
      const row = all.subarray(at, (at += width)), sum = row.reduce((sum, a) => sum + a, 0);
      for (let k = 0; k < width; k++) row[k] /= sum;
      return row;
    }));
  }
  return { ...reading, ofHead, rows: (layer, head) => views[layer * heads + head] };
};

const entropyOf = (row) => {
  let sum = 0;
  for (const a of row) if (a > 0) sum -= a * Math.log(a);
  return Math.max(0, sum);
};
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// softmax((log a) / t).
const tempered = (row, t) => {
  if (t === 1) return row;
  const top = Math.log(Math.max(...row)), powers = row.map((a) => Math.exp((Math.log(a) - top) / t));
  const sum = powers.reduce((sum, a) => sum + a, 0);
  return powers.map((a) => a / sum);
};

// The entropy of a row with as much on the first token and the rest uniform.
const habitOf = (row) => {
  const first = row[0], rest = Math.max(0, 1 - first);
  return entropyOf([first, rest]) + rest * Math.log(Math.max(row.length - 1, 1));
};

// One head at temperature t: rows, entropies by query, their mean, mean weight of later queries on the first token.
export const headAt = (rows, t) => {
  const seen = rows.map((row) => tempered(row, t)), entropies = seen.map(entropyOf), later = seen.slice(1);
  return { rows: seen, entropies, habits: seen.map(habitOf), mean: mean(entropies),
           first: later.length ? mean(later.map((row) => row[0])) : 0 };
};

const LOW = 0.25, HIGH = 4, TURN = 0.47; // share of Cividis up to which white words read better on it than black ones
const WIDTH = 900, HEIGHT = 420;
const MAP = { x: 34, y: 44, width: 210, height: 290 }, MATRIX = { x: 310, y: 44, size: 290 };
const CURVE = { x: 660, y: 44, width: 226, height: 290 };
const BLUE = [38, 132, 204], BOLD = { style: "font-weight: 600" }, MIDDLE = { "text-anchor": "middle" }, END = { "text-anchor": "end" };
const shown = (token) => token.replaceAll("\n", "⏎").replaceAll(" ", "·").replaceAll("\t", "→") || "∅";
const quoted = (token) => `‘${shown(token)}’`;

function render({ model, el }) {
  const colors = model.get("colors"), parked = model.get("parked");
  let reading, key, all, head, last = {};
  const within = (name, count) => Math.min(model.get(name), count - 1);
  const place = () => [within("layer", reading.layers), within("head", reading.heads)];
  const position = () => within("position", reading.tokens.length);
  // Without the digits that a weight in one byte does not give.
  const nats = (entropy) => (reading.levels > 255 ? entropy : Math.round(entropy * 1e3) / 1e3);
  const color = (entropy) => colors[Math.round((Math.min(entropy, all.most) / all.most) * (colors.length - 1))];

  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": "mean entropy of every head; who looks at whom in the chosen head; its entropy by query" });
  const text = (x, y, words, more = {}, to = svg) => to.appendChild(make("text", { x, y, ...more }, words));
  const line = (more, to = svg) => to.appendChild(make("line", more));
  text(MAP.x, 20, "mean entropy of every head", BOLD);
  const map = svg.appendChild(make("g"));
  text(MAP.x + MAP.width / 2, MAP.y + MAP.height + 34, "head, of layers from top to bottom", MIDDLE);
  const dotted = MAP.y + MAP.height + 60;
  svg.append(make("circle", { cx: MAP.x + 5, cy: dotted - 4, r: 4, class: "entropy-parked" }));
  const parking = text(MAP.x + 15, dotted, "", { class: "entropy-parking" });
  text(MAP.x + 15, dotted + 17, `on the first token, as a mean over later ones`);

  const matrixTitle = text(MATRIX.x, 20, "", BOLD), canvas = make("canvas");
  const picture = svg.appendChild(make("image", { x: MATRIX.x, y: MATRIX.y, width: MATRIX.size, height: MATRIX.size,
    preserveAspectRatio: "none", style: "image-rendering: pixelated; cursor: pointer", class: "entropy-matrix" }));
  svg.append(make("rect", { x: MATRIX.x, y: MATRIX.y, width: MATRIX.size, height: MATRIX.size, fill: "none", class: "edge" }));
  const chosen = svg.appendChild(make("rect", { x: MATRIX.x, width: MATRIX.size, fill: "none", stroke: OVERLOAD,
    "stroke-width": 1.5, "pointer-events": "none", class: "entropy-query" }));
  text(MATRIX.x + MATRIX.size / 2, MATRIX.y + MATRIX.size + 18, "key (token)", MIDDLE);
  text(MATRIX.x - 8, MATRIX.y + MATRIX.size / 2, "query", END);

  text(CURVE.x, 20, "its entropy by query (nats)", BOLD);
  const bottom = CURVE.y + CURVE.height;
  line({ x1: CURVE.x, x2: CURVE.x + CURVE.width, y1: bottom, y2: bottom, class: "grid" });
  text(CURVE.x - 6, bottom + 4, 0, END);
  const top = text(CURVE.x - 6, CURVE.y + 4, "", END), lastQuery = text(CURVE.x + CURVE.width, bottom + 18, "", END);
  text(CURVE.x, bottom + 18, 0);
  text(CURVE.x + CURVE.width / 2, bottom + 18, "query (token)", MIDDLE);
  const curve = (name, words, n, more) => {
    const y = dotted - 20 + 17 * n;
    line({ x1: CURVE.x, x2: CURVE.x + 26, y1: y - 4, y2: y - 4, ...more });
    text(CURVE.x + 33, y, words);
    return svg.appendChild(make("path", { fill: "none", ...more, class: `entropy-${name}` }));
  };
  const INKED = { stroke: "currentColor", "stroke-width": 1.5 };
  const curves = {
    uniform: curve("uniform", "uniform: log of its keys", 0, { ...INKED, "stroke-dasharray": "6 4", opacity: 0.6 }),
    habit: curve("habit", "uniform but for the first token", 1, { stroke: HEALTHY, "stroke-width": 2, "stroke-dasharray": "2 3" }),
    entropy: curve("entropy", "this head", 2, { stroke: "#2684CC", "stroke-width": 2.5 }),
  };
  const dot = svg.appendChild(make("circle", { r: 5, fill: OVERLOAD, class: "entropy-here" }));
  const cursor = line({ y1: CURVE.y, y2: bottom, stroke: OVERLOAD, opacity: 0.5 });
  const x = (query) => CURVE.x + (query / Math.max(reading.tokens.length - 1, 1)) * CURVE.width;
  const y = (nats) => bottom - (nats / all.most) * CURVE.height;

  const strip = make("div", { class: "entropy-tokens", role: "group", "aria-label": "the text: hover over a token to choose the query" });
  const words = make("div", { role: "status", "aria-live": "polite", class: "entropy-status" });
  const next = make("div", { class: "entropy-next" });
  let marks = [], cells = [];

  // What is the same for all heads and queries of a reading.
  const lay = () => {
    const { tokens, layers, heads } = reading;
    all = { most: Math.log(Math.max(tokens.length, 2)) };
    strip.replaceChildren();
    marks = tokens.map((token, query) => {
      const bar = make("i"), mark = make("span", {}, shown(token), bar);
      // Not "pointerover": a page that scrolls moves the text under a mouse that rests.
      for (const event of ["pointermove", "click"]) mark.addEventListener(event, () => ask({ position: query }));
      strip.append(mark, ...(token.includes("\n") ? [make("br")] : []));
      return { mark, bar };
    });
    map.replaceChildren();
    const w = MAP.width / heads, h = MAP.height / layers, gap = Math.min(2, h / 5), every = Math.ceil(layers / 10);
    const apart = Math.ceil(heads / 12);
    cells = Array.from({ length: layers }, (_, layer) => {
      if (layer % every === 0) text(MAP.x - 8, MAP.y + (layer + 0.5) * h + 4, layer, END, map);
      return Array.from({ length: heads }, (_, n) => {
        if (!layer && n % apart === 0) text(MAP.x + (n + 0.5) * w, MAP.y + MAP.height + 16, n, MIDDLE, map);
        const cell = map.appendChild(make("rect", { x: MAP.x + n * w + gap / 2, y: MAP.y + layer * h + gap / 2,
          width: w - gap, height: h - gap, style: "cursor: pointer", class: "entropy-cell" }));
        const tip = cell.appendChild(title(""));
        const parks = map.appendChild(make("circle", { cx: MAP.x + (n + 0.5) * w, cy: MAP.y + (layer + 0.5) * h,
          r: Math.min(5, w / 5, h / 3.4), class: "entropy-parked" }));
        cell.addEventListener("click", () => change(model, { layer, head: n }));
        return { cell, tip, parks };
      });
    });
    const here = map.appendChild(make("rect", { width: w, height: h, fill: "none", stroke: OVERLOAD, "stroke-width": 2.5, "pointer-events": "none" }));
    all.here = (layer, n) => set(here, { x: MAP.x + n * w, y: MAP.y + layer * h });
    const parks = cells.flatMap((row, layer) => row.map((_, n) => colour(layer, n, 1).first > parked)).filter(Boolean);
    parking.textContent = `${parks.length} of ${layers * heads} heads park: over ${significant(parked)} of their weight is`;
    set(canvas, { width: tokens.length, height: tokens.length });
    (canvas.width = tokens.length), (canvas.height = tokens.length);
    set(chosen, { height: Math.max(MATRIX.size / tokens.length, 2) });
    top.textContent = significant(all.most);
    lastQuery.textContent = tokens.length - 1;
    const ceilings = reading.rows(0, 0).map((row) => Math.log(row.length));
    all.uniform = mean(ceilings);
    set(curves.uniform, { d: path(ceilings) });
    for (const [label, count] of [[layerRange, layers], [headRange, heads], [queryRange, tokens.length]]) {
      label.querySelector("input").max = count - 1;
    }
    last = {};
  };
  const path = (values) => values.map((nats, query) => `${query ? "L" : "M"}${x(query).toFixed(1)} ${y(nats).toFixed(1)}`).join("");
  const colour = (layer, n, t) => {
    const found = headAt(reading.rows(layer, n), t), { cell, tip, parks } = cells[layer][n];
    set(cell, { fill: color(found.mean) });
    set(parks, { visibility: found.first > parked ? "visible" : "hidden" });
    tip.textContent = `layer ${layer}, head ${n}: ${significant(nats(found.mean))} nats, ${found.first.toFixed(2)} on the first token`;
    return found;
  };
  const paint = (rows) => {
    const size = rows.length, context = canvas.getContext("2d"), pixels = context.createImageData(size, size);
    rows.forEach((row, query) => row.forEach((a, at) => {
      pixels.data.set([...BLUE, Math.round(255 * Math.sqrt(a))], 4 * (query * size + at));
    }));
    context.putImageData(pixels, 0, 0);
    set(picture, { href: canvas.toDataURL() });
  };

  const draw = () => {
    words.textContent = model.get("trouble");
    words.classList.toggle("entropy-trouble", Boolean(model.get("trouble")));
    predict();
    if (!reading) return;
    const [layer, n] = place(), query = position(), t = model.get("temperature"), at = `${key} ${layer} ${n} ${t}`;
    if (last.at !== at) {
      if (last.cell && last.cell.join() !== `${layer},${n}`) colour(...last.cell, 1);
      head = colour(layer, n, t);
      last = { ...last, at, cell: [layer, n] };
      all.here(layer, n);
      paint(head.rows);
      set(curves.entropy, { d: path(head.entropies) });
      set(curves.habit, { d: path(head.habits) });
      matrixTitle.textContent = `layer ${layer}, head ${n}: who looks at whom`;
      marks.forEach(({ mark }, k) => (marks[k].fill = `background: ${color(head.entropies[k])}; color: ${head.entropies[k] < TURN * all.most ? "white" : "black"}`));
    }
    const row = head.rows[query], most = row.indexOf(Math.max(...row)), { tokens, total } = reading;
    marks.forEach(({ mark, bar, fill }, k) => {
      const weight = row[k] ?? 0;
      set(bar, { style: `height: ${((9 * weight) / row[most]).toFixed(2)}px` });
      set(mark, { style: k === query ? `${fill}; outline: 2px solid ${OVERLOAD}` : fill, title: `${k}: ${weight.toFixed(3)} of the query’s weight` });
    });
    set(chosen, { y: MATRIX.y + (query * MATRIX.size) / tokens.length });
    set(dot, { cx: x(query).toFixed(1), cy: y(head.entropies[query]).toFixed(1) });
    set(cursor, { x1: x(query).toFixed(1), x2: x(query).toFixed(1) });
    if (model.get("trouble")) return;
    if (key.split("\n")[0] !== model.get("model")) return (words.textContent = `${model.get("model")} reads the text …`);
    const parks = head.first > parked ? ": it parks there" : "";
    const before = t === 1 ? "" : ` · at t = 1: ${significant(nats(headAt(reading.rows(layer, n), 1).mean))} nats`;
    words.textContent = [
      ...(total > tokens.length ? [`The first ${tokens.length} of ${total} tokens.`] : []),
      `Token ${query}, ${quoted(tokens[query])}, looks with ${worth(nats(head.entropies[query]))} of ${row.length} ` +
        `(at most ${significant(Math.log(row.length))} nats) · most on ${quoted(tokens[most])}, ${row[most].toFixed(2)}`,
      `Layer ${layer}, head ${n}: ${worth(nats(head.mean))} on average, uniform ${significant(all.uniform)} nats · ` +
        `${head.first.toFixed(2)} on the first token, which leaves at most ${significant(nats(mean(head.habits)))} nats${parks}${before}`,
    ].join("\n");
    // It does not shrink again: what is below would go away from under the mouse, whose place it follows.
    if (words.offsetHeight > (last.height ?? 0)) set(words, { style: `min-height: ${(last.height = words.offsetHeight)}px` });
  };

  // What the model expects after the query, as it is and with the chosen head at its temperature.
  const predict = () => {
    const found = model.get("predictions") ?? { why: "what comes next needs a running kernel" };
    if (found.why || !found.before || !reading) return next.replaceChildren(found.why ? `Next tokens: ${found.why}.` : "");
    const query = position(), t = model.get("temperature"), [layer, n] = place();
    const told = JSON.stringify([query, t, layer, n, found.before[query], found.after[query]]);
    if (last.told === told) return;
    last.told = told;
    const list = (name, pairs) => make("div", { class: "entropy-expected" }, make("b", {}, name), ...pairs.map(([token, p]) =>
      make("div", { style: `background: linear-gradient(to right, rgba(${BLUE}, 0.45) ${(100 * p).toFixed(2)}%, transparent 0)` },
        make("code", {}, shown(token)), make("span", {}, p.toFixed(3)))));
    next.replaceChildren(list(`after ${quoted(reading.tokens[query])}`, found.before[query] ?? []),
      ...(found.after.length ? [list(`with layer ${layer}, head ${n} at t = ${significant(t)}`, found.after[query] ?? [])] : []));
  };

  const under = (event) => {
    const box = picture.getBoundingClientRect(), size = reading.tokens.length;
    const into = (share) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
    return [into((event.clientY - box.top) / box.height), into((event.clientX - box.left) / box.width)];
  };
  const hover = picture.appendChild(title(""));
  picture.addEventListener("pointermove", (event) => {
    if (!reading) return;
    const [query, at] = under(event), weight = head.rows[query][at];
    hover.textContent = `${query} ${shown(reading.tokens[query])} to ${at} ${shown(reading.tokens[at])}: ${weight === undefined ? "not seen" : weight.toFixed(3)}`;
    ask({ position: query });
  });
  const ask = (values) => Object.entries(values).some(([name, value]) => model.get(name) !== value) && change(model, values);

  const box = make("textarea", { rows: 4, spellcheck: "false", "aria-label": "text", class: "entropy-text" });
  box.addEventListener("input", () => model.get("slow") || ask({ text: box.value }));
  box.addEventListener("change", () => ask({ text: box.value }));
  box.addEventListener("keydown", (event) => event.stopPropagation());
  const why = make("span", { class: "entropy-why" });
  const list = make("select", { "aria-label": "try this", class: "entropy-try" });
  list.addEventListener("change", () => change(model, { text: list.value }));
  const models = choice(model, "model", "model", Object.fromEntries(model.get("models").map((name) => [name, name])));
  const follow = () => {
    if (box.value !== model.get("text")) box.value = model.get("text");
    list.value = model.get("text");
  };
  const offer = () => {
    list.replaceChildren(...model.get("texts").map(([name, value]) => make("option", { value }, name)));
    box.readOnly = Boolean(model.get("read_only"));
    why.textContent = model.get("read_only") || (model.get("slow") ? "read when you leave the box" : "");
    follow();
  };
  const whole = (name, label, form = String) => range(model, name, label, 0, 1e6, 1, form);
  const token = (query) => `${query} ${shown(reading?.tokens[query] ?? "")}`;
  const layerRange = whole("layer", "layer"), headRange = whole("head", "head"), queryRange = whole("position", "token", token);
  const some = colors.filter((_, k) => k % 9 === 0).join(", ");
  const scale = make("div", { class: "entropy-scale", style: `background: linear-gradient(to right, ${some})` });
  const ceiling = make("span");
  el.replaceChildren(
    make("style", {}, STYLE + LOOK),
    module(
      make("div", { class: "controls" }, make("label", {}, "try this", list), models, make("label", {}, "0 nats: one token", scale, ceiling)),
      make("div", { class: "controls" }, box, why),
      make("div", { class: "controls" }, layerRange, headRange, queryRange,
        range(model, "temperature", "temperature t of this head", LOW, HIGH, Math.log10(2) / 12, significant, true)),
      strip, words, svg, next),
  );

  const queue = onceAFrame(draw);
  // Takes the reading of the text, once it is there; until then what was shown stays.
  const load = async () => {
    const wanted = `${model.get("model")}\n${model.get("text")}`, found = model.get("readings")[wanted];
    if (!found || (wanted === key && found.data === reading.data)) return queue();
    const read = await unpacked(found);
    if (wanted !== `${model.get("model")}\n${model.get("text")}`) return;
    const ended = !reading || position() === reading.tokens.length - 1, alone = model.get("predictions") === undefined;
    [reading, key] = [read, wanted];
    lay();
    ceiling.textContent = `${significant(all.most)}: all ${reading.tokens.length} alike`;
    // without a kernel nobody else keeps the query at the end
    if (alone) change(model, { trouble: "", position: ended ? reading.tokens.length - 1 : position() });
    for (const [label, name] of [[layerRange, "layer"], [headRange, "head"], [queryRange, "position"]]) {
      label.querySelector("input").value = model.get(name);
    }
    queryRange.querySelector("output").textContent = token(position());
    draw();
  };
  for (const name of ["model", "text", "readings"]) model.on(`change:${name}`, load);
  model.on("change:text", follow);
  for (const name of ["texts", "read_only", "slow"]) model.on(`change:${name}`, offer);
  for (const name of ["layer", "head", "position", "temperature", "predictions", "trouble"]) model.on(`change:${name}`, queue);
  offer();
  draw();
  load();
}

const LOOK = `
.entropy-module textarea.entropy-text { flex: 1 1 420px; max-width: 640px; min-width: 0; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; color: inherit; background: transparent; border: 1px solid ${HEALTHY}; box-sizing: border-box }
.entropy-module .entropy-position + output { width: 7em; overflow: hidden; white-space: pre; text-overflow: ellipsis }
.entropy-module .entropy-why { opacity: 0.8 }
.entropy-module .entropy-trouble { color: ${OVERLOAD} }
.entropy-module .entropy-status { white-space: pre-line }
.entropy-tokens { max-width: 950px; margin: 4px 0 12px; font: 13px/1.6 ui-monospace, Menlo, Consolas, monospace }
.entropy-tokens span { display: inline-block; position: relative; margin: 0 2px 3px 0; padding: 0 2px 10px; white-space: pre; cursor: pointer; outline-offset: -1px }
.entropy-tokens i { position: absolute; left: 0; right: 0; bottom: 0; background: #3B9AD9 }
.entropy-module .edge { stroke: currentColor; opacity: 0.3 }
.entropy-module .entropy-parked { fill: white; stroke: black; stroke-width: 1; pointer-events: none }
.entropy-module .entropy-next { display: flex; flex-wrap: wrap; gap: 6px 30px; margin-top: 6px }
.entropy-expected { width: 320px }
.entropy-expected div { display: flex; justify-content: space-between; margin-top: 2px; padding: 0 4px }
.entropy-expected code { background: none; color: inherit; white-space: pre }
.entropy-scale { width: 120px; height: 10px }`;

export default { initialize: letChangesIn, render };
