// The softmax temperature on real logits: attention, entropy and its slope, for a temperature of every head.
// Logits as rows of what each query sees: [layer][head][query] of { z, keys } with the keys' indices.
export const rowsOf = ({ logits, shape: [layers, heads, queries, keys], causal }) => {
  const all = halves(woven(logits, 2));
  let at = 0;
  const row = (query) => {
    const width = causal ? query + 1 : keys, z = all.subarray(at, (at += width));
    const seen = Array.from(z.keys()).filter((key) => z[key] > -Infinity);
    return { z: Float64Array.from(seen, (key) => z[key]), keys: seen };
  };
  const times = (count, make) => Array.from({ length: count }, (_, k) => make(k));
  return times(layers, () => times(heads, () => times(queries, row)));
};

// softmax(z/t), its entropy and dE/d(log t), which is the variance of z/t. A row's largest z is 0.
export const attend = ({ z }, t, weights = new Float64Array(z.length)) => {
  let sum = 0, mean = 0, square = 0;
  for (let k = 0; k < z.length; k++) sum += weights[k] = Math.exp(z[k] / t);
  for (let k = 0; k < z.length; k++) {
    const a = (weights[k] /= sum);
    if (a > 0) (mean += (a * z[k]) / t), (square += a * (z[k] / t) ** 2);
  }
  return { weights, entropy: Math.max(0, Math.log(sum) - mean), slope: Math.max(0, square - mean ** 2) };
};

// Mean entropy and slope over rows.
export const over = (rows, t) => {
  let entropy = 0, slope = 0;
  for (const row of rows) {
    const found = attend(row, t);
    (entropy += found.entropy), (slope += found.slope);
  }
  return { entropy: entropy / rows.length, slope: slope / rows.length };
};

const LOW = 0.01, HIGH = 100, POINTS = 61;
const WIDTH = 900, HEIGHT = 560, MATRIX = { x: 40, y: 30, size: 300 }, MAP = { x: 40, y: 400, width: 300, height: 120 };
const X = [430, 840], PANELS = [{ top: 30, bottom: 300 }, { top: 370, bottom: 520 }];
const NAMES = ["layer", "head", "scope", "row", "single", "temperatures"];
const BLUE = [38, 132, 204], BOLD = { style: "font-weight: 600" }, MIDDLE = { "text-anchor": "middle" }, END = { "text-anchor": "end" };
const shown = (token) => token.replaceAll(" ", "·").replaceAll("\n", "⏎") || "·";

function render({ model, el }) {
  const [layers, heads, queries, keys] = model.get("shape"), tokens = model.get("tokens"), colors = model.get("colors");
  const all = rowsOf({ logits: model.get("logits"), shape: model.get("shape"), causal: model.get("causal") });
  const place = () => [model.get("layer"), model.get("head")];
  const temperature = () => model.get("temperatures")[model.get("layer")][model.get("head")];
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "attention, heads, entropy and its slope" });
  const text = (x, y, words, more = {}) => svg.appendChild(make("text", { x, y, ...more }, words));
  const line = (more) => svg.appendChild(make("line", more));

  const matrixTitle = text(MATRIX.x, 18, "", BOLD);
  const canvas = make("canvas", { width: keys, height: queries });
  const picture = svg.appendChild(make("image", { x: MATRIX.x, y: MATRIX.y, width: MATRIX.size, height: MATRIX.size,
    preserveAspectRatio: "none", style: "image-rendering: pixelated; cursor: pointer" }));
  svg.append(make("rect", { x: MATRIX.x, y: MATRIX.y, width: MATRIX.size, height: MATRIX.size, fill: "none", class: "edge" }));
  const chosen = svg.appendChild(make("rect", { x: MATRIX.x, width: MATRIX.size, height: Math.max(MATRIX.size / queries, 2),
    fill: "none", stroke: OVERLOAD, "stroke-width": 1.5, "pointer-events": "none" }));
  text(MATRIX.x + MATRIX.size / 2, MATRIX.y + MATRIX.size + 18, "key", MIDDLE);
  text(MATRIX.x - 8, MATRIX.y + MATRIX.size / 2, "query", END);
  const under = (event) => {
    const box = picture.getBoundingClientRect();
    const within = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    return [within((event.clientY - box.top) / box.height, queries), within((event.clientX - box.left) / box.width, keys)];
  };
  picture.addEventListener("click", (event) => change(model, { row: under(event)[0], single: true }));
  const hover = picture.appendChild(title(""));
  picture.addEventListener("pointermove", (event) => {
    const [query, key] = under(event), row = all[model.get("layer")][model.get("head")][query], at = row.keys.indexOf(key);
    const weight = at < 0 ? "not seen" : significant(attend(row, temperature()).weights[at]);
    hover.textContent = `${query} ${shown(tokens[query] ?? "")} to ${key} ${shown(tokens[key])}: ${weight}`;
  });

  text(MAP.x, MAP.y - 10, "mean entropy of every head at its t (nats): click one", BOLD);
  const w = MAP.width / heads, h = MAP.height / layers, most = Math.log(keys);
  const cells = all.map((row, layer) => {
    if (layers <= 8 || layer % 4 === 0) text(MAP.x - 8, MAP.y + (layer + 0.5) * h + 4, layer, END);
    return row.map((_, head) => {
      const cell = svg.appendChild(make("rect", { x: MAP.x + head * w + 1, y: MAP.y + layer * h + 1, width: w - 2, height: h - 2, style: "cursor: pointer" }));
      const name = cell.appendChild(title(""));
      const number = heads <= 8 && layers <= 6 ? text(MAP.x + (head + 0.5) * w, MAP.y + (layer + 0.5) * h + 5, "", { ...MIDDLE, class: "entropy-mark" }) : undefined;
      cell.addEventListener("click", () => change(model, { layer, head }));
      return { cell, name, number };
    });
  });
  for (let head = 0; head < heads; head += heads <= 8 ? 1 : 2) text(MAP.x + (head + 0.5) * w, MAP.y + MAP.height + 16, head, MIDDLE);
  text(MAP.x + MAP.width / 2, MAP.y + MAP.height + 34, "head, of layers from top to bottom", MIDDLE);
  const here = svg.appendChild(make("rect", { width: w, height: h, fill: "none", stroke: OVERLOAD, "stroke-width": 2.5, "pointer-events": "none" }));

  const x = (t) => X[0] + ((Math.log10(t) + 2) / 4) * (X[1] - X[0]);
  const names = ["entropy E (nats)", "dE / d(log t) = Var(z/t) (nats)"];
  const panels = PANELS.map(({ top, bottom }, k) => {
    text(X[0], top - 12, names[k], BOLD);
    for (const t of [0.01, 0.1, 1, 10, 100]) {
      line({ x1: x(t), x2: x(t), y1: top, y2: bottom, class: "grid" });
      text(x(t), bottom + 18, t, MIDDLE);
    }
    line({ x1: X[0], x2: X[1], y1: bottom, y2: bottom, class: "grid" });
    text(X[0] - 8, bottom + 4, 0, END);
    const scale = text(X[0] - 8, 0, "", END);
    const curve = svg.appendChild(make("path", { fill: "none", stroke: "currentColor", "stroke-width": 2 }));
    const dot = svg.appendChild(make("circle", { r: 6, fill: OVERLOAD }));
    return { scale, curve, dot };
  });
  text((X[0] + X[1]) / 2, HEIGHT - 6, "temperature t", MIDDLE);
  const edge = line({ x1: X[0], x2: X[1], stroke: "currentColor", "stroke-dasharray": "4 4", opacity: 0.6 });
  const edgeName = text(X[1], 0, "", END);
  const words = make("div", { role: "status", "aria-live": "polite", class: "entropy-status" });

  const strip = make("div", { class: "entropy-text", "aria-label": "the text: click a token to see where it looks" });
  const marks = tokens.map((token, key) => {
    const mark = make("span", {}, shown(token));
    if (queries === keys) mark.addEventListener("click", () => change(model, { row: key, single: true }));
    strip.append(mark, ...(token.includes("\n") ? [make("br")] : []));
    return mark;
  });

  let curve; // of the head or row that is shown: it changes with that alone
  const trace = (rows) => {
    const at = Array.from({ length: POINTS }, (_, k) => LOW * 10 ** ((4 * k) / (POINTS - 1)));
    const values = at.map((t) => over(rows, t));
    const ceiling = rows.reduce((sum, row) => sum + Math.log(row.z.length), 0) / rows.length;
    const tops = [1.12 * Math.max(ceiling, 0.1), roundUp(Math.max(0.01, ...values.map(({ slope }) => slope)))];
    return { at, values, ceiling, tops };
  };
  const y = (k, value) => PANELS[k].bottom - (value / curve.tops[k]) * (PANELS[k].bottom - PANELS[k].top);

  const map = {}, last = {}; // the temperature that each head is drawn at; what else was drawn
  const draw = () => {
    const [layer, head] = place(), row = model.get("row"), single = model.get("single"), t = temperature();
    const own = all[layer][head], rows = single ? [own[row]] : own, key = `${layer} ${head} ${single ? row : "all"}`;
    if (last.key !== key) {
      curve = trace(rows);
      panels.forEach(({ scale, curve: path }, k) => {
        const pull = (value) => (k ? value.slope : value.entropy);
        set(path, { d: curve.values.map((v, i) => `${i ? "L" : "M"}${x(curve.at[i]).toFixed(1)} ${y(k, pull(v)).toFixed(1)}`).join("") });
        const top = k ? curve.tops[1] : curve.ceiling;
        set(scale, { y: y(k, top) + 4, visibility: top ? "visible" : "hidden" }).textContent = significant(top);
      });
      set(edge, { y1: y(0, curve.ceiling), y2: y(0, curve.ceiling) });
      set(edgeName, { y: y(0, curve.ceiling) - 6 }).textContent = "every key the same";
      last.key = key;
    }
    const { entropy, slope } = over(rows, t);
    [entropy, slope].forEach((value, k) => set(panels[k].dot, { cx: x(t).toFixed(1), cy: y(k, value).toFixed(1) }));
    paint(own, t);
    set(chosen, { y: MATRIX.y + (row * MATRIX.size) / queries, visibility: single ? "visible" : "hidden" });
    const found = attend(own[row], t);
    const weights = new Float64Array(keys);
    own[row].keys.forEach((at, k) => (weights[at] = found.weights[k]));
    marks.forEach((mark, at) => {
      const looks = row === at && queries === keys ? `; outline: 2px solid ${OVERLOAD}` : "";
      set(mark, { style: `background: rgba(${BLUE}, ${(0.85 * Math.sqrt(weights[at])).toFixed(3)})${looks}`,
                  title: `${at}: ${significant(weights[at])}` });
    });
    model.get("temperatures").forEach((of, l) => of.forEach((own, k) => {
      const name = `${l} ${k}`;
      if (map[name] === own) return;
      map[name] = own;
      const E = over(all[l][k], own).entropy, { cell, name: tip, number } = cells[l][k];
      set(cell, { fill: colors[Math.round((Math.min(E, most) / most) * (colors.length - 1))] || colors[0] });
      tip.textContent = `layer ${l}, head ${k}: ${E.toFixed(3)} nats at t = ${significant(own)}`;
      if (number) number.textContent = E.toFixed(2);
    }));
    set(here, { x: MAP.x + head * w, y: MAP.y + layer * h });
    matrixTitle.textContent = `attention of layer ${layer}, head ${head}: click a query`;
    words.textContent = `E = ${worth(entropy)}, of ${significant(curve.ceiling)} nats at most · dE/d(log t) = Var(z/t) = ${significant(slope)} nats`;
  };
  const paint = (rows, t) => {
    const key = `${place()} ${t}`;
    if (last.painted === key) return;
    last.painted = key;
    const context = canvas.getContext("2d"), pixels = context.createImageData(keys, queries);
    rows.forEach((row, query) => {
      const { weights } = attend(row, t);
      row.keys.forEach((at, k) => {
        const pixel = 4 * (query * keys + at);
        pixels.data.set([...BLUE, Math.round(255 * Math.sqrt(weights[k]))], pixel);
      });
    });
    context.putImageData(pixels, 0, 0);
    set(picture, { href: canvas.toDataURL() });
  };

  // The slider shows the temperature of the head that is shown and sets those that are meant.
  const shownT = {
    get: temperature,
    set: (_, value) => {
      const [layer, head] = place(), scope = model.get("scope");
      const meant = (l, k) => scope === "all" || (l === layer && (scope === "layer" || k === head));
      model.set("temperatures", model.get("temperatures").map((of, l) => of.map((t, k) => (meant(l, k) ? value : t))));
    },
    on: (_, follow) => ["temperatures", "layer", "head"].forEach((name) => model.on(`change:${name}`, follow)),
    save_changes: () => model.save_changes(),
  };
  const whole = (name, label, count, form = String) => range(model, name, label, 0, Math.max(count - 1, 0), 1, form);
  const of = (row) => (queries === keys ? `${row} ${shown(tokens[row])}` : String(row));
  const only = whole("row", "query", queries, of);
  el.replaceChildren(
    make("style", {}, STYLE + TEXT),
    module(
      make("div", { class: "controls" }, whole("layer", "layer", layers), whole("head", "head", heads),
        range(shownT, "t", "temperature t", LOW, HIGH, 0.02, significant, true),
        choice(model, "scope", "of", { head: "this head", layer: "this layer", all: "all heads" }), only,
        check(model, "single", "this query alone")),
      words, strip, svg),
  );
  const queue = onceAFrame(draw);
  for (const name of NAMES) model.on(`change:${name}`, queue);
  draw();
}

const TEXT = `
.entropy-text { max-width: 950px; margin: 2px 0 10px; line-height: 1.75; font: 12px/1.75 ui-monospace, monospace }
.entropy-text span { padding: 1px 0; cursor: pointer; white-space: pre; outline-offset: -1px }
.entropy-module .edge { stroke: currentColor; opacity: 0.3 }
.entropy-module svg text.entropy-mark { fill: white; stroke: black; stroke-width: 2px; paint-order: stroke; pointer-events: none }`;

export default { initialize: letChangesIn, render };
