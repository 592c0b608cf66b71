// The training playground: settings and buttons over the losses of the runs, and the shown one's layers and heads.
const STATES = [["collapsed", COLLAPSE], ["healthy", ""], ["overloaded", OVERLOAD]];

// Entropies of a run by row, and their means by layer, kept from one frame to the next: rows are only ever added.
const known = new WeakMap();
export const rowsOf = (run) => {
  if (!known.has(run)) known.set(run, { maps: [], means: [] });
  const { maps, means } = known.get(run);
  for (let row = maps.length; row < run.entropy.length; row++) {
    const map = new Float32Array(bytes(run.entropy[row]));
    maps.push(map);
    means.push(Array.from({ length: run.layers }, (_, layer) =>
      map.subarray(layer * run.heads, (layer + 1) * run.heads).reduce((sum, E) => sum + E, 0) / run.heads));
  }
  return { maps, means };
};

export const rowAt = (run, step) => (step === null ? run.steps.length - 1 : run.steps.length ? frameAt(run.steps, step) : -1);

// What Python tells while a run trains, put into `drawn`; false where a page has missed rows.
export const told = (drawn, { numbers, axis, run }) => {
  for (const number of Object.keys(drawn.runs)) if (!numbers.includes(Number(number))) delete drawn.runs[number];
  drawn.axis = axis;
  if (!run) return true;
  const { first, steps, loss, entropy, ...now } = run;
  const kept = (drawn.runs[run.number] ??= { steps: [], loss: [], entropy: [] });
  if (first > kept.steps.length) return false;
  for (const [name, values] of Object.entries({ steps, loss, entropy })) kept[name].splice(first, values.length, ...values);
  Object.assign(kept, now);
  return true;
};

// What is said of the shown run, in parts of words and colours.
export const sentence = (run, step, kernel) => {
  if (!run) return [["Press Run. At learning rate 0.1, SM collapses within 20 steps; does SM+LN+G?", ""]];
  const lost = `${run.lost} steps in a row without a finite gradient${run.lost === run.usual ? "" : ` (the library’s own rule is ${run.usual})`}`;
  const loss = (value) => (value === null ? "not finite" : significant(value));
  const stands = {
    failed: [`Failed: ${run.error}.`, OVERLOAD],
    collapsed: [`Collapsed: ${lost}.`, COLLAPSE],
    finished: [`Finished in ${significant(run.minutes ?? 0, 2)} min, validation loss ${loss(run.eval_loss)}.`, "inherit"],
    stopped: [kernel ? "Stopped; Resume goes on from here." : "Stopped.", "inherit"],
  };
  const parts = [stands[run.state] ?? [run.step ? "Training." : "Loading the corpus.", "inherit"]];
  parts.push([` step ${run.step} of ${run.planned}`, ""]);
  const row = rowAt(run, step);
  if (row < 0) return parts;
  const then = row < run.steps.length - 1 ? `at step ${run.steps[row]}: ` : "";
  parts.push([` · ${then}loss ${loss(run.loss[row])}${run.loss[row] === null ? "" : " nats a token"} · heads: `, ""]);
  const shares = Array.from(rowsOf(run).maps[row], (E) => E / Math.log(run.context));
  const states = shares.map((share) => (share < 0.25 ? 0 : share < 0.75 ? 1 : share >= 0.75 ? 2 : -1));
  STATES.forEach(([name, color], state) => {
    const heads = states.flatMap((found, k) => (found === state ? [Math.floor(k / run.heads)] : []));
    const layers = color && heads.length ? ` (layer ${[...new Set(heads)].join(", ")})` : "";
    parts.push([`${state ? ", " : ""}`, ""], [`${heads.length} ${name}${layers}`, layers && color]);
  });
  return parts;
};

const WIDTH = 900, HEIGHT = 553, LOSS = { x: [56, 890], y: [26, 246] };
const LAYERS = { x: [56, 470], y: [328, 494] }, MAP = { x: [560, 890], y: [328, 494] };
const BOLD = { style: "font-weight: 600" }, MIDDLE = { "text-anchor": "middle" }, END = { "text-anchor": "end" };

function initialize({ model }) {
  letChangesIn({ model });
  model.on("msg:custom", (message) => {
    if (!told(model.get("drawn"), message)) model.send({ missed: true });
  });
}

function render({ model, el }) {
  const colors = model.get("colors"), shades = model.get("shades"), kernel = model.get("kernel");
  const runs = () => Object.values(model.get("drawn").runs).sort((a, b) => a.number - b.number);
  const shown = () => model.get("drawn").runs[model.get("show")];
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": "losses of the runs; entropies of the shown run by layer and of every head" });
  const text = (x, y, words, more = {}, to = svg) => to.appendChild(make("text", { x, y, ...more }, words));
  const write = (element, words) => element.textContent !== words && (element.textContent = words);
  const group = () => svg.appendChild(make("g"));

  text(LOSS.x[0], LOSS.y[0] - 12, "Loss of every run (nats per token)", BOLD);
  const layersTitle = text(LAYERS.x[0], LAYERS.y[0] - 12, "", BOLD), mapTitle = text(MAP.x[0], MAP.y[0] - 12, "", BOLD);
  for (const { x, y } of [LOSS, LAYERS]) text((x[0] + x[1]) / 2, y[1] + 36, "training step", MIDDLE);
  text((MAP.x[0] + MAP.x[1]) / 2, MAP.y[1] + 36, "head", MIDDLE);
  text(MAP.x[0] - 8, MAP.y[1] + 18, "layer", END);
  const depths = text(LAYERS.x[0], HEIGHT - 7, "");
  const grids = [LOSS, LAYERS].map(group), losses = group(), layers = group(), map = group();
  const unigram = svg.appendChild(make("line", { x1: LOSS.x[0], x2: LOSS.x[1], stroke: "currentColor",
    "stroke-dasharray": "6 4", opacity: 0.5, class: "entropy-unigram" }));
  const unigramName = text(LOSS.x[1], 0, "unigram entropy: no use of context", END);
  const cursor = svg.appendChild(make("path", { stroke: OVERLOAD, "stroke-width": 1.5, class: "entropy-cursor" }));
  const dots = [LOSS, LAYERS].map(() => svg.appendChild(make("circle", { r: 5, fill: "none", stroke: "currentColor", "stroke-width": 2 })));
  const tips = [LOSS, LAYERS].map(({ x, y }) => text(x[1], y[0] - 12, "", END)).concat(text(MAP.x[1], HEIGHT - 7, "", END));

  const across = ({ x: [from, to] }, step, last) => from + ((to - from) * step) / last;
  const up = ({ y: [top, bottom] }, share) => bottom - (bottom - top) * share;
  const heightOf = (loss) => {
    const { log, low, high, limit } = model.get("drawn").axis, on = log ? Math.log : Number;
    return up(LOSS, (on(Math.min(loss, limit)) - on(low)) / (on(high) - on(low)));
  };
  const path = (points) => { // in pieces where there is no number
    let pen = "M";
    return points.map(([x, y]) => {
      const part = y === null ? "" : `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = part ? "L" : "M";
      return part;
    }).join("");
  };
  const lastOf = (them) => Math.max(1, ...(them.length ? them.map((run) => run.planned) : [model.get("steps")]));
  const ticks = (panel, last, levels, y, into) => {
    into.replaceChildren();
    for (let step = 0, every = roundUp(last / 6); step <= last; step += Math.max(1, every)) {
      text(across(panel, step, last), panel.y[1] + 18, step, MIDDLE, into);
    }
    for (const level of levels) {
      into.append(make("line", { x1: panel.x[0], x2: panel.x[1], y1: y(level), y2: y(level), class: "grid" }));
      text(panel.x[0] - 6, y(level) + 4, +level.toPrecision(3), END, into);
    }
  };
  const between = (low, high, every) => {
    const first = Math.ceil(low / every);
    return Array.from({ length: Math.max(0, Math.floor(high / every) - first + 1) }, (_, k) => (first + k) * every);
  };

  // What the last frame drew, for the mouse: points of each curve with their words.
  const places = [[], []];
  const drawLosses = () => {
    const { axis } = model.get("drawn"), them = runs(), last = lastOf(them);
    const decades = between(Math.log10(axis.low || 1e-9), Math.log10(axis.high), 1).flatMap((power) => [1, 2, 5].map((n) => n * 10 ** power));
    const wide = decades.length > 9 ? decades.filter((_, k) => k % 3 === 0) : decades;
    const levels = axis.log ? wide.concat([2, 5].map((n) => n * 10 ** Math.floor(Math.log10(axis.low)))) : between(axis.low, axis.high, roundUp((axis.high - axis.low) / 6));
    ticks(LOSS, last, levels.filter((level) => level >= axis.low && level <= axis.high), heightOf, grids[0]);
    losses.replaceChildren();
    legend.replaceChildren();
    places[0] = [];
    for (const run of them) {
      const points = run.steps.map((step, k) => [across(LOSS, step, last), run.loss[k] === null ? null : heightOf(run.loss[k])]);
      const look = { stroke: run.color, "stroke-width": 2, "stroke-dasharray": run.dash, fill: "none" };
      losses.append(make("path", { d: path(points), ...look, class: "entropy-loss" }));
      points.forEach(([x, y], k) => y !== null && places[0].push([x, y, `${run.name}: step ${run.steps[k]}, loss ${significant(run.loss[k])}`]));
      if (run.state === "collapsed") {
        const finite = run.loss.filter((loss) => loss !== null);
        const x = across(LOSS, run.step, last), y = heightOf(finite.at(-1) ?? axis.limit);
        const d = `M${(x - 5).toFixed(1)} ${(y - 5).toFixed(1)}l10 10m0 -10l-10 10`;
        losses.append(make("path", { d, stroke: run.color, "stroke-width": 3, fill: "none", class: "entropy-cross" }));
        places[0].push([x, y, `${run.name}: collapsed at step ${run.step}`]);
      }
      const sample = make("svg", { viewBox: "0 0 40 10" }, make("path", { d: "M0 5H40", ...look }));
      legend.append(make("span", {}, sample, run.name + (run.state === "collapsed" ? " ✕" : "")));
    }
    const level = them.map((run) => run.unigram).find(Boolean), seen = { visibility: level ? "visible" : "hidden" };
    const y = level ? heightOf(level).toFixed(1) : 0;
    set(unigram, { y1: y, y2: y, ...seen });
    set(unigramName, { y: y - 8, ...seen });
  };

  let size = ""; // of the map whose cells there are
  let cells = [];
  const makeCells = (run) => {
    if (size === `${run.layers} ${run.heads}`) return;
    size = `${run.layers} ${run.heads}`;
    map.replaceChildren();
    const w = (MAP.x[1] - MAP.x[0]) / run.heads, h = (MAP.y[1] - MAP.y[0]) / run.layers;
    const every = (count) => (count > 8 ? 2 : 1);
    for (let layer = 0; layer < run.layers; layer += every(run.layers)) text(MAP.x[0] - 8, MAP.y[0] + (layer + 0.5) * h + 4, layer, END, map);
    for (let head = 0; head < run.heads; head += every(run.heads)) text(MAP.x[0] + (head + 0.5) * w, MAP.y[1] + 18, head, MIDDLE, map);
    cells = Array.from({ length: run.layers * run.heads }, (_, k) => {
      const x = MAP.x[0] + (k % run.heads) * w, y = MAP.y[0] + Math.floor(k / run.heads) * h;
      const cell = map.appendChild(make("rect", { x: x + 1, y: y + 1, width: w - 2, height: h - 2, class: "entropy-cell" }));
      cell.addEventListener("pointerover", () => ((pointed = k), queue()));
      const number = run.heads <= 8 && run.layers <= 6 ? text(x + w / 2, y + h / 2 + 5, "", { ...MIDDLE, class: "entropy-mark" }, map) : undefined;
      return { cell, number };
    });
  };
  const drawLayers = () => {
    const run = shown(), last = lastOf(run ? [run] : []), top = Math.log(run?.context ?? 128);
    const height = (nats) => up(LAYERS, nats / top);
    ticks(LAYERS, last, between(0, top, 1), height, grids[1]);
    layers.replaceChildren();
    places[1] = [];
    write(layersTitle, "Mean entropy by layer (nats)");
    if (!run) return write(depths, "");
    const { means } = rowsOf(run);
    write(depths, `light: layer 0 · dark: layer ${run.layers - 1} · of ${run.name}`);
    for (let layer = 0; layer < run.layers; layer++) {
      const points = means.map((row, k) => [across(LAYERS, run.steps[k], last), height(row[layer])]);
      const stroke = shades[Math.round((layer / Math.max(1, run.layers - 1)) * (shades.length - 1))];
      layers.append(make("path", { d: path(points), stroke, "stroke-width": 2, fill: "none", class: "entropy-layer" }));
      points.forEach(([x, y], k) => places[1].push([x, y, `layer ${layer}, step ${run.steps[k]}: ${significant(means[k][layer])} nats`]));
    }
  };
  let pointed;
  const drawStep = () => {
    const run = shown(), row = run ? rowAt(run, model.get("step")) : -1, step = run?.steps[row];
    set(position, { max: Math.max(0, (run?.steps.length ?? 0) - 1), "aria-valuetext": row < 0 ? "no step yet" : `step ${step}` });
    position.value = Math.max(0, row);
    position.disabled = row < 0;
    write(at, row < 0 ? "" : String(step));
    if (run) makeCells(run);
    set(map, { visibility: run ? "visible" : "hidden" });
    write(mapTitle, row < 0 ? "Every head" : `Every head at step ${step} (nats)`);
    const entropy = row < 0 ? [] : rowsOf(run).maps[row], top = Math.log(run?.context ?? 128);
    cells.forEach(({ cell, number }, k) => {
      const shade = colors[Math.round((Math.min(entropy[k], top) / top) * (colors.length - 1))];
      set(cell, { fill: shade ?? "none" });
      if (number) write(number, shade ? entropy[k].toFixed(2) : "");
    });
    const x = row < 0 ? 0 : across(LAYERS, step, lastOf([run])).toFixed(1);
    set(cursor, { d: row < 0 ? "" : `M${x} ${LAYERS.y[0]}V${LAYERS.y[1]}` });
    const place = `layer ${Math.floor(pointed / run?.heads)}, head ${pointed % run?.heads}`;
    write(tips[2], pointed === undefined || row < 0 ? "" : `${place}: ${significant(entropy[pointed])} nats`);
  };

  const words = make("div", { role: "status", "aria-live": "polite", class: "entropy-status" });
  const drawWords = () => {
    const run = shown(), parts = sentence(run, model.get("step"), kernel);
    set(words, { "aria-live": run?.state === "running" ? "off" : "polite" }); // not every step is read out
    if (parts.map(([said]) => said).join("") !== words.textContent) {
      words.replaceChildren(...parts.map(([said, color]) => make("span", color ? { style: `font-weight: 600; color: ${color}` } : {}, said)));
    }
    write(trouble, model.get("trouble"));
    const bar = { collapsed: OVERLOAD, failed: OVERLOAD, finished: "#009E73" }[run?.state] ?? COLLAPSE;
    set(progress, { max: run?.planned ?? 1, value: run?.step ?? 0, style: `accent-color: ${bar}` });
  };
  const drawControls = () => {
    const running = runs().some((run) => run.state === "running");
    const able = { run: !running, stop: running, resume: !running && shown()?.state === "stopped", clear: runs().length > 0 };
    const focused = Object.values(buttons).includes(el.ownerDocument.activeElement) && el.ownerDocument.activeElement;
    for (const [name, made] of Object.entries(buttons)) made.disabled = !(kernel && able[name]);
    if (focused?.disabled) Object.values(buttons).find((made) => !made.disabled)?.focus(); // not lost to the page
    const lacking = model.get("lacking")[model.get("variant")];
    for (const [name, label] of Object.entries(settings)) off(label, !kernel || lacking.includes(name));
    const listed = JSON.stringify(runs().map(({ number, name }) => [number, name]));
    if (list.dataset.listed !== listed) {
      list.dataset.listed = listed;
      const options = runs().map(({ number, name }) => make("option", { value: number }, name));
      list.replaceChildren(...(options.length ? options : [make("option", { value: 0 }, "no run yet")]));
    }
    list.value = model.get("show");
  };

  const two = (value) => significant(value, 2), plain = (value) => value.toFixed(2);
  const settings = {
    variant: choice(model, "variant", "Variant", Object.fromEntries(Object.keys(model.get("lacking")).map((name) => [name, name]))),
    learning_rate: range(model, "learning_rate", "Learning rate", 1e-4, 1, 0.1, two, true),
    steps: range(model, "steps", "Steps", 1, model.get("most_steps"), 1, String),
    temperature: range(model, "temperature", "t₀", 1e-3, 10, 0.1, two, true),
    threshold: range(model, "threshold", "θ₀", 0, 1, 0.05, plain),
    margin: range(model, "margin", "γ", 0, 0.5, 0.01, plain),
    coefficient: range(model, "coefficient", "λ", 1e-3, 10, 0.1, two, true),
  };
  const tells = {
    temperature: "temperature of every head and position before the first step",
    threshold: "threshold of every head before the first step, as a fraction of log T",
    margin: "tolerance margin, as a fraction of log T",
    coefficient: "weight of the penalty, a mean over heads and queries; the paper's 1e-5 of the sum is 0.16 here",
  };
  for (const [name, told] of Object.entries(tells)) set(settings[name], { title: told });
  const press = (name) => () => {
    const now = Object.keys(settings).concat("show").map((setting) => [setting, model.get(setting)]);
    model.send({ press: name, settings: Object.fromEntries(now) });
  };
  const buttons = Object.fromEntries(["Run", "Stop", "Resume", "Clear"].map((label) => {
    const name = label.toLowerCase();
    return [name, button(label, press(name), name)];
  }));
  const progress = make("progress", { class: "entropy-progress", "aria-label": "steps made" });
  const list = make("select", { "aria-label": "Show", class: "entropy-show" });
  list.addEventListener("change", () => change(model, { show: Number(list.value) }));
  const position = make("input", { type: "range", min: 0, max: 0, step: 1, "aria-label": "Map at step", class: "entropy-step" });
  const at = make("output");
  position.addEventListener("input", () => {
    const { steps } = shown(), row = Number(position.value);
    change(model, { step: row === steps.length - 1 ? null : steps[row] }); // who looks at the newest follows the training
  });
  const trouble = make("div", { role: "alert", class: "entropy-trouble", style: `color: ${OVERLOAD}` });
  const legend = make("div", { class: "controls entropy-legend" });
  const some = colors.filter((_, k) => k % 9 === 0).join(", ");
  const scale = make("div", { class: "entropy-scale", style: `background: linear-gradient(to right, ${some})` });
  const asleep = "Training needs a kernel: run this cell in JupyterLab or Colab. These runs were made before.";
  const row = (...parts) => make("div", { class: "controls" }, ...parts);
  const { variant, learning_rate, steps, ...rest } = settings;
  el.replaceChildren(
    make("style", {}, STYLE + OWN),
    module(row(variant, learning_rate, steps), row(...Object.values(rest)), row(...Object.values(buttons), progress,
      ...(kernel ? [] : [make("span", { class: "entropy-asleep" }, asleep)])),
      row(make("label", {}, "Show", list), make("label", {}, "Map at step", position, at),
        make("label", {}, "0: one token", scale, "log T: all alike")),
      words, trouble, legend, svg),
  );

  // The nearest point of a curve, within reach of the mouse.
  const under = [undefined, undefined];
  const nearest = (n, x, y) => {
    const [best] = places[n].map((place) => [Math.hypot(place[0] - x, place[1] - y), place]).sort((a, b) => a[0] - b[0]);
    return best && best[0] < 30 ? best[1] : undefined;
  };
  const drawTips = () => dots.forEach((dot, n) => {
    const found = under[n] && nearest(n, ...under[n]);
    set(dot, found ? { cx: found[0], cy: found[1], visibility: "visible" } : { visibility: "hidden" });
    write(tips[n], found ? found[2] : "");
  });
  svg.addEventListener("pointermove", ({ clientX, clientY }) => {
    const box = svg.getBoundingClientRect(), unit = WIDTH / box.width;
    const [x, y] = [(clientX - box.left) * unit, (clientY - box.top) * unit];
    [LOSS, LAYERS].forEach((panel, n) => {
      const inside = x > panel.x[0] - 10 && x < panel.x[1] + 10 && y > panel.y[0] - 10 && y < panel.y[1] + 10;
      under[n] = inside ? [x, y] : undefined;
    });
    queue();
  });
  svg.addEventListener("pointerleave", () => ((pointed = under[0] = under[1] = undefined), queue()));
  map.addEventListener("pointerleave", () => ((pointed = undefined), queue()));

  const stale = { losses: true, layers: true };
  const draw = () => {
    if (stale.losses) drawLosses();
    if (stale.layers) drawLayers();
    stale.losses = stale.layers = false;
    drawStep(), drawWords(), drawControls(), drawTips();
  };
  const queue = onceAFrame(draw);
  const redraw = (...parts) => () => (parts.forEach((part) => (stale[part] = true)), queue());
  model.on("msg:custom", redraw("losses", "layers"));
  model.on("change:drawn", redraw("losses", "layers"));
  model.on("change:steps", redraw("losses", "layers"));
  model.on("change:show", redraw("layers"));
  for (const name of ["step", "variant", "trouble"]) model.on(`change:${name}`, queue);
  draw();
}

const OWN = `
.entropy-module svg text.entropy-mark { fill: white; stroke: black; stroke-width: 2px; paint-order: stroke; pointer-events: none }
.entropy-module select.entropy-show { max-width: 330px }
.entropy-module progress { width: 140px }
.entropy-module input.entropy-step { width: 200px }
.entropy-legend span { display: inline-flex; gap: 8px; align-items: center }
.entropy-module .entropy-legend svg { width: 40px; height: 10px }
.entropy-scale { width: 120px; height: 10px }`;

export default { initialize, render };
