// Two recorded runs side by side at one training step: maps of heads, means of layers, what was learned, loss, bands.
// Numbers of so many steps from whole shares, 0 is `low` and `levels` - 1 is `high`; `levels` itself is none, a static
// head's, say. They come as differences from one step to the next, which wrap.
export const unpacked = ({ low, high, levels, data }, steps) => {
  const whole = levels > 255 ? new Uint16Array(woven(data, 2)) : new Uint8Array(bytes(data)), size = whole.length / steps;
  for (let k = size; k < whole.length; k++) whole[k] += whole[k - size];
  return Float64Array.from(whole, (level) => (level === levels ? NaN : low + ((high - low) * level) / (levels - 1)));
};

// Of a history, what is drawn of all steps: entropy [N, layers, heads], its means over the softmax heads of a layer and
// those of the learned parameters over the heads, both [N, layers].
export const series = (history) => {
  const { layers, heads, steps } = history, entropy = unpacked(history.entropy, steps.length);
  const means = Float64Array.from({ length: steps.length * layers }, (_, row) => {
    const real = entropy.subarray(row * heads, (row + 1) * heads).filter((E) => !Number.isNaN(E));
    return real.reduce((sum, E) => sum + E, 0) / real.length; // NaN of none
  });
  const learned = Object.entries(history.learned).map(([column, packed]) => [column, unpacked(packed, steps.length)]);
  const digits = history.entropy.levels > 255 ? 2 : 1; // that are certain
  return { ...history, digits, entropy, means, learned: Object.fromEntries(learned) };
};

const SIDES = ["left", "right"], DASHES = ["none", "5 3"], STATES = ["collapsed", "healthy", "overloaded"];
const WIDTH = 900, HEIGHT = 652, COLUMNS = [[56, 440], [506, 890]];
const MAP = { top: 24, bottom: 214 }, LAYERS = { top: 282, bottom: 372 }, BELOW = { top: 412, bottom: 496 };
const BARS = { x: [200, 890], y: [562, 588], height: 20 };
const STATIC = "rgba(140, 146, 156, 0.25)"; // a head without entropy
const HIDDEN = { visibility: "hidden" };
const SECONDS = 15; // of a whole run, played

function render({ model, el }) {
  const runs = model.get("runs"), colors = model.get("colors"), shades = model.get("shades");
  const symbols = model.get("symbols"), bands = Object.entries(model.get("bands"));
  const known = {};
  let shown = [], steps, top, pointed, timer, started;

  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group",
    "aria-label": "two runs: maps of heads, layer entropies, learned parameter, loss, bands" });
  const text = (x, y, words, more = {}, to = svg) => to.appendChild(make("text", { x, y, ...more }, words));
  const BOLD = { style: "font-weight: 600" }, END = { "text-anchor": "end" }, MIDDLE = { "text-anchor": "middle" };
  text(COLUMNS[0][0], LAYERS.top - 12, "layer entropy (nats)", BOLD);
  const deepest = text(COLUMNS[1][1], LAYERS.top - 12, "", END);
  const symbol = text(COLUMNS[0][0], BELOW.top - 10, "", BOLD);
  text(COLUMNS[1][0], BELOW.top - 10, "loss (nats per token)", BOLD);
  text(COLUMNS[1][1], BELOW.top - 10, "solid: left run · dashed: right run", END);
  const sides = COLUMNS.map(([from, to], n) => {
    const name = text(from, 15, ""), told = text(to, 15, "", END);
    const map = svg.appendChild(make("g")), curves = svg.appendChild(make("g"));
    const line = { fill: "none", "stroke-width": 2.5, "pointer-events": "none" };
    const here = svg.appendChild(make("rect", { ...line, stroke: OVERLOAD, class: "entropy-selected" }));
    const one = svg.appendChild(make("path", { ...line, stroke: "currentColor", class: "entropy-one" }));
    const oneName = text(n ? from : to, LAYERS.top - 12, "", { "text-anchor": n ? "start" : "end", class: "entropy-one-name" });
    map.addEventListener("pointerover", ({ target }) => point(target.dataset.k && { n, k: Number(target.dataset.k) }));
    map.addEventListener("pointerleave", () => point());
    const placeOf = (k) => [Math.floor(k / shown[n].heads), k % shown[n].heads];
    const pick = selecting(model, map, () => (shown[n]?.cells ?? []).map((_, k) => placeOf(k)));
    map.addEventListener("click", ({ target }) => target.dataset.k && pick(...placeOf(Number(target.dataset.k))));
    return { from, to, name, told, map, curves, here, one, oneName };
  });
  const learned = svg.appendChild(make("g")), losses = svg.appendChild(make("g")), ticks = svg.appendChild(make("g"));
  for (const [from, to] of COLUMNS) text((from + to) / 2, BELOW.bottom + 34, "training step", MIDDLE);
  const cursors = COLUMNS.map(() => svg.appendChild(make("path", { stroke: OVERLOAD, "stroke-width": 2, class: "entropy-cursor" })));
  text(BARS.x[0], BARS.y[0] - 10, "share of heads by quarter of the largest head entropy (%)", BOLD);
  const bars = SIDES.map((_, n) => ({
    name: text(BARS.x[0] - 10, BARS.y[n] + 15, "", END),
    parts: bands.map(([name, fill]) => {
      const part = svg.appendChild(make("rect", { y: BARS.y[n], height: BARS.height, fill, class: "entropy-band" }));
      part.append(title(name));
      return [part, text(0, BARS.y[n] + 15, "", { ...MIDDLE, class: "entropy-mark" })];
    }),
  }));
  bands.reduce((x, [name, fill]) => {
    svg.append(make("rect", { x, y: BARS.y[1] + 33, width: 12, height: 12, fill }));
    text(x + 18, BARS.y[1] + 44, name);
    return x + 60 + 7 * name.length;
  }, BARS.x[0]);

  const across = ([from, to], step) => from + ((to - from) * Math.min(step, steps.at(-1))) / steps.at(-1);
  const path = (points) => { // in pieces where there is no number
    let pen = "M";
    const parts = points.map(([x, y]) => {
      const part = Number.isNaN(y) ? "" : `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = part ? "L" : "M";
      return part;
    });
    return parts.join("");
  };
  const curve = (points, look, to) => to.appendChild(make("path", { d: path(points), fill: "none", ...look }));
  const axis = ([from, to], values, y, into, form) => {
    for (const value of values) {
      into.append(make("line", { x1: from, x2: to, y1: y(value), y2: y(value), class: "grid" }));
      text(from - 6, y(value) + 4, form(value), END, into);
    }
  };

  // What depends on the runs alone. False while the kernel has not sent both.
  const load = () => {
    Object.assign(known, model.get("histories"));
    const indices = SIDES.map((side) => model.get(side));
    if (!indices.every((index) => known[index])) return false;
    const atEnd = steps && model.get("step") >= steps.at(-1); // who looks at the end stays there
    shown = indices.map((index) => ({ ...(known[index].series ??= series(known[index])), ...runs[index] }));
    steps = [...new Set(shown.flatMap((run) => run.steps))].sort((a, b) => a - b);
    top = Math.max(...shown.map((run) => run.ceiling));
    ceiling.textContent = `${top.toFixed(2)} nats: all alike`;
    const last = steps.at(-1), depth = Math.max(...shown.map((run) => run.layers));
    set(position, { max: steps.length - 1 });
    if (atEnd || model.get("step") > last) change(model, { step: last });
    deepest.textContent = `light: layer 0 · dark: layer ${depth - 1}`;
    const every = roundUp(last / 5);
    ticks.replaceChildren();
    for (const column of COLUMNS) {
      for (let step = 0; step <= last; step += every) text(across(column, step), BELOW.bottom + 18, step, MIDDLE, ticks);
    }
    shown.forEach((run, n) => {
      const { from, to, name, map, curves } = sides[n], w = (to - from) / run.heads, h = (MAP.bottom - MAP.top) / run.layers;
      set(name, { style: `font-weight: 600; fill: ${run.color}` }).textContent = run.variant;
      bars[n].name.textContent = run.variant;
      map.replaceChildren();
      for (let layer = 0; layer < run.layers; layer += run.layers > 8 ? 2 : 1) {
        text(from - 6, MAP.top + (layer + 0.5) * h + 4, layer, END, map);
      }
      for (let head = 0; head < run.heads; head += run.heads > 8 ? 2 : 1) {
        text(from + (head + 0.5) * w, MAP.bottom + 16, head, MIDDLE, map);
      }
      text((from + to) / 2, MAP.bottom + 34, "head", MIDDLE, map);
      text(from - 30, MAP.bottom + 16, "layer", {}, map);
      run.cells = Array.from({ length: run.layers * run.heads }, (_, k) => map.appendChild(make("rect", {
        x: from + (k % run.heads) * w + 1, y: MAP.top + Math.floor(k / run.heads) * h + 1, width: w - 2, height: h - 2,
        "data-k": k, class: "entropy-cell" })));
      curves.replaceChildren();
      const y = (nats) => LAYERS.bottom - (nats / top) * (LAYERS.bottom - LAYERS.top);
      axis(COLUMNS[n], [0, 2, 4, 6].filter((nats) => nats < top), y, curves, String);
      for (let layer = 0; layer < run.layers; layer++) {
        const points = run.steps.map((step, k) => [across(COLUMNS[n], step), y(run.means[k * run.layers + layer])]);
        const stroke = shades[Math.round((layer / Math.max(1, depth - 1)) * (shades.length - 1))];
        curve(points, { stroke, "stroke-width": 1.6, class: "entropy-layer" }, curves).append(title(`layer ${layer}`));
      }
    });
    losses.replaceChildren();
    const all = shown.flatMap((run) => run.loss.filter((loss) => loss !== null));
    const highest = Math.ceil(Math.max(...shown.map((run) => run.loss[0] ?? 0), 1)); // what breaks flattens no other
    const lowest = Math.floor(Math.min(...all, highest - 1));
    const y = (loss) => BELOW.bottom - ((Math.min(loss, highest) - lowest) / (highest - lowest)) * (BELOW.bottom - BELOW.top);
    const between = Math.ceil((highest - lowest) / 4);
    const values = Array.from({ length: 5 }, (_, k) => lowest + k * between).filter((loss) => loss <= highest);
    axis(COLUMNS[1], values, y, losses, String);
    shown.forEach((run, n) => {
      const points = run.steps.map((step, k) => [across(COLUMNS[1], step), run.loss[k] === null ? NaN : y(run.loss[k])]);
      curve(points, { stroke: run.color, "stroke-width": 2, "stroke-dasharray": DASHES[n], class: "entropy-loss" }, losses);
    });
    const [layer, head] = model.get("selected");
    if (layer !== undefined && !shown.some((run) => layer < run.layers && head < run.heads)) change(model, { selected: [] });
    drawLearned();
    drawSelected();
    return true;
  };

  // The selected head's cells and its entropy through training, in each run that has it.
  const drawSelected = () => shown.forEach((run, n) => {
    const { from, to, here, one, oneName } = sides[n], [layer, head] = model.get("selected");
    const w = (to - from) / run.heads, h = (MAP.bottom - MAP.top) / run.layers;
    run.selected = layer < run.layers && head < run.heads ? layer * run.heads + head : undefined;
    const some = run.selected !== undefined, size = run.layers * run.heads;
    set(here, some ? { x: from + head * w, y: MAP.top + layer * h, width: w, height: h, visibility: "visible" } : HIDDEN);
    const nats = some ? run.steps.map((_, k) => run.entropy[k * size + run.selected]) : [];
    const y = (value) => LAYERS.bottom - (value / top) * (LAYERS.bottom - LAYERS.top);
    set(one, { d: path(nats.map((value, k) => [across(COLUMNS[n], run.steps[k]), y(value)])) });
    const drawn = nats.some((value) => !Number.isNaN(value));
    oneName.textContent = some ? `${drawn ? "━ " : ""}layer ${layer}, head ${head}${drawn ? "" : ": static"}` : "";
  });

  const drawLearned = () => {
    const column = model.get("learned"), found = shown.map((run) => run.learned[column]);
    learned.replaceChildren();
    symbol.textContent = `learned ${symbols[column]} by layer`;
    const all = found.flatMap((values) => [...(values ?? [])]).filter((value) => !Number.isNaN(value));
    if (!all.length) {
      text((COLUMNS[0][0] + COLUMNS[0][1]) / 2, (BELOW.top + BELOW.bottom) / 2, "neither run learned it", MIDDLE, learned);
      return;
    }
    let low = Math.min(...all), high = Math.max(...all);
    if (high - low < 1e-9) (low -= 0.5), (high += 0.5);
    const y = (value) => BELOW.bottom - 3 - ((value - low) / (high - low)) * (BELOW.bottom - BELOW.top - 6);
    axis(COLUMNS[0], [low, (low + high) / 2, high], y, learned, (value) => significant(value));
    shown.forEach((run, n) => found[n] && Array.from({ length: run.layers }, (_, layer) => {
      const points = run.steps.map((step, k) => [across(COLUMNS[0], step), y(found[n][k * run.layers + layer])]);
      const look = { stroke: run.color, "stroke-width": 1.3, "stroke-dasharray": DASHES[n], class: "entropy-learnt" };
      curve(points, look, learned).append(title(`${run.variant}, layer ${layer}`));
    }));
  };

  const words = make("div", { role: "status", "aria-live": "polite", class: "entropy-status" });
  const lines = SIDES.map((_, n) => {
    const made = make("div"), parts = ["b", "span", "b", "span", "b", "span"].map((tag) => made.appendChild(make(tag)));
    set(parts[2], { style: `color: ${COLLAPSE}` });
    set(parts[4], { style: `color: ${OVERLOAD}` });
    words.append(...(n ? ["\n"] : []), made);
    return parts;
  });
  const draw = () => {
    const step = model.get("step"), now = steps[frameAt(steps, step)];
    position.value = frameAt(steps, step);
    set(position, { "aria-valuetext": `step ${now}` });
    at.textContent = now;
    cursors.forEach((cursor, n) => {
      const x = across(COLUMNS[n], step).toFixed(1);
      set(cursor, { d: [LAYERS, BELOW].map(({ top, bottom }) => `M${x} ${top}V${bottom}`).join("") });
    });
    shown.forEach((run, n) => {
      const k = frameAt(run.steps, step), size = run.layers * run.heads, map = run.entropy.subarray(k * size, (k + 1) * size);
      run.cells.forEach((cell, head) => {
        const shade = Math.round((Math.min(map[head], top) / top) * (colors.length - 1));
        set(cell, { fill: colors[shade] ?? STATIC });
      });
      const loss = run.loss[k] === null ? "not finite" : run.loss[k].toFixed(3), [low, middle, high] = run.states[k];
      const without = size - low - middle - high, one = run.selected;
      const told = (k) => `layer ${Math.floor(k / run.heads)}, head ${k % run.heads}: ` +
        (Number.isNaN(map[k]) ? "static" : `${map[k].toFixed(run.digits)} nats`);
      const said = [run.variant, ` at step ${run.steps[k]}: loss ${loss} · `, `${low} ${STATES[0]}`,
                    ` · ${middle} ${STATES[1]} · `, `${high} ${STATES[2]}`,
                    (without ? ` · ${without} static` : "") + (one === undefined ? "" : ` · ${told(one)}`)];
      said.forEach((part, i) => lines[n][i].textContent !== part && (lines[n][i].textContent = part));
      let x = BARS.x[0];
      run.bands[k].forEach((share, band) => {
        const width = (share / 100) * (BARS.x[1] - BARS.x[0]), [part, label] = bars[n].parts[band];
        set(part, { x, width });
        set(label, { x: x + width / 2 });
        const percent = share >= 6 ? `${share.toFixed(0)}%` : "";
        if (label.textContent !== percent) label.textContent = percent;
        x += width;
      });
      const over = pointed?.n === n && pointed.k < size ? told(pointed.k) : "";
      if (sides[n].told.textContent !== over) sides[n].told.textContent = over;
    });
  };
  const queue = onceAFrame(draw);
  const point = (place) => ((pointed = place || undefined), queue());

  const list = (side) => {
    const groups = {}, select = make("select", { "aria-label": `${side} run`, class: `entropy-${side}` });
    runs.forEach(({ group, name }, index) => {
      groups[group] ??= select.appendChild(make("optgroup", { label: group }));
      groups[group].append(make("option", { value: index }, name));
    });
    const follow = () => (select.value = model.get(side));
    select.addEventListener("change", () => change(model, { [side]: Number(select.value) }));
    model.on(`change:${side}`, follow);
    follow();
    return make("label", {}, side, select);
  };
  const position = make("input", { type: "range", min: 0, step: 1, "aria-label": "training step", class: "entropy-step" });
  const at = make("output");
  position.addEventListener("input", () => (stop(), change(model, { step: steps[Number(position.value)] })));
  const stop = () => {
    cancelAnimationFrame(timer);
    timer = undefined;
    set(words, { "aria-live": "polite" });
    play.textContent = "▶ play";
  };
  const frameOf = (now) => {
    started ??= now - (frameAt(steps, model.get("step")) / steps.length) * SECONDS * 1000;
    const place = Math.min(steps.length - 1, Math.floor(((now - started) / SECONDS / 1000) * steps.length));
    if (steps[place] !== model.get("step")) change(model, { step: steps[place] });
    if (place < steps.length - 1) timer = requestAnimationFrame(frameOf);
    else stop();
  };
  const play = button("▶ play", () => {
    if (timer) return stop();
    if (model.get("step") >= steps.at(-1)) change(model, { step: steps[0] });
    started = undefined;
    set(words, { "aria-live": "off" });
    play.textContent = "❚❚ pause";
    timer = requestAnimationFrame(frameOf);
  }, "play");
  const some = colors.filter((_, k) => k % 9 === 0).join(", ");
  const scale = make("div", { class: "entropy-scale", style: `background: linear-gradient(to right, ${some})` });
  const ceiling = make("span"), more = model.get("left_out");
  el.replaceChildren(
    make("style", {}, STYLE + MARK),
    module(
      make("div", { class: "controls" }, ...SIDES.map(list),
        ...(more ? [make("span", { class: "entropy-more" }, `${more} more with a kernel`)] : [])),
      make("div", { class: "controls" }, play, make("label", {}, "step", position, at),
        choice(model, "learned", "learned", symbols), make("label", {}, "0: one token", scale, ceiling)),
      words, svg),
  );
  const reload = () => load() && queue();
  for (const name of [...SIDES, "histories"]) model.on(`change:${name}`, reload);
  model.on("change:learned", drawLearned);
  model.on("change:step", queue);
  model.on("change:selected", () => (drawSelected(), queue()));
  // A head that was selected in another explorer of the page, the penalty's, say.
  const hear = ({ detail: { group, name, layer, head } }) => {
    const left = runs.findIndex((run) => run.group === group && run.name === name);
    if (left < 0) return;
    change(model, { left, selected: [layer, head] });
    el.scrollIntoView({ block: "nearest" });
  };
  window.addEventListener("entropy-head", hear);
  if (load()) draw();
  return () => (stop(), window.removeEventListener("entropy-head", hear));
}

const MARK = `
.entropy-module .entropy-cell { cursor: pointer }
.entropy-module svg text.entropy-mark { fill: white; stroke: black; stroke-width: 2px; paint-order: stroke; font-size: 11px; pointer-events: none }
.entropy-module select.entropy-left, .entropy-module select.entropy-right { max-width: 330px }
.entropy-module input.entropy-step { width: 260px }
.entropy-scale { width: 120px; height: 10px }`;

export default { initialize: letChangesIn, render };
