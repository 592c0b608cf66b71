// The entropy penalty on the heads of recorded runs: which it would push, which way, and how hard.
// What one head of mean entropy E adds to the loss under threshold theta, and d(that)/dE, as EntropyRegularization has
// it. Row i is at E · shares[i] and grows with E in proportion.
export const alone = (rules, length, E, theta, shares = reaches(length).shares) => {
  const { weight, gamma, context, ceiling, per, reduction } = rules, reach = reaches(length);
  const edge = (i) => (ceiling === "causal" ? reach.rows[i] : Math.log(context));
  if (per === "head") {
    const top = ceiling === "causal" ? reach.mean : Math.log(context), deviation = E - theta * top;
    const outside = Math.abs(deviation) > gamma * top ? deviation : 0;
    return [weight * outside ** 2, 2 * weight * outside];
  }
  let penalty = 0, slope = 0;
  for (let i = 0; i < length; i++) {
    const deviation = E * shares[i] - theta * edge(i);
    if (Math.abs(deviation) > gamma * edge(i)) (penalty += deviation ** 2), (slope += 2 * deviation * shares[i]);
  }
  const of = weight / (reduction === "sum" ? 1 : length);
  return [of * penalty, of * slope];
};

const meanOf = (values) => values.reduce((a, b) => a + b, 0) / values.length;

// What rows can reach, log(i+1). Of a recorded run rows are assumed at one share of it: E_i = E · log(i+1) / mean.
const known = {};
const reaches = (length) => {
  if (known[length]) return known[length];
  const rows = Array.from({ length }, (_, i) => Math.log(i + 1)), mean = meanOf(rows);
  return (known[length] = { rows, mean, shares: rows.map((nats) => nats / mean) });
};

// Of a run: heads with a softmax as { layer, head, E, shares, theta (its own, NaN where none was learned) }.
export const headsOf = (run) => {
  const numbers = (packed) => packed && new Float32Array(woven(packed, 4));
  const means = numbers(run.entropy), rows = numbers(run.rows), thetas = numbers(run.thresholds), T = run.context_length;
  const all = Array.from({ length: run.layers * run.heads }, (_, k) => {
    const own = rows && Float64Array.from(rows.subarray(k * T, (k + 1) * T)), E = own ? meanOf(own) : means[k];
    const shares = own && E > 0 ? own.map((nats) => nats / E) : reaches(T).shares;
    return { layer: Math.floor(k / run.heads), head: k % run.heads, E, shares, theta: thetas?.[k] };
  });
  return all.filter(({ E }) => !Number.isNaN(E));
};

// Everything that is shown of a run: of each head penalty, slope (the loss is the mean over all heads) and state (0
// below its band, 1 inside, 2 above), and the whole loss: the mean over layers of the mean over their heads.
export const penalties = (rules, run, heads = headsOf(run)) => {
  const top = rules.ceiling === "causal" ? reaches(run.context_length).mean : Math.log(rules.context);
  const layers = {}, own = rules.own && run.thresholds;
  const shown = heads.map(({ layer, head, E, shares, theta: learned }) => {
    const theta = own ? learned : rules.theta, deviation = E - theta * top;
    const [penalty, slope] = alone(rules, run.context_length, E, theta, shares);
    (layers[layer] ??= []).push(penalty);
    const state = deviation > rules.gamma * top ? 2 : deviation < -rules.gamma * top ? 0 : 1;
    return { layer, head, E, theta, deviation, penalty, slope: slope / heads.length, state };
  });
  return { heads: shown, total: meanOf(Object.values(layers).map(meanOf)), top, own: Boolean(own) };
};

const RULES = ["theta", "gamma", "weight", "context", "ceiling", "per", "reduction", "own"], POINTS = 161;
const WIDTH = 900, HEIGHT = 400, MAP = { x: 40, y: 30, size: 300 }, X = [440, 890];
const PANELS = [{ top: 30, bottom: 180 }, { top: 215, bottom: 350 }];
const HIDDEN = { visibility: "hidden" };
const COLORS = [COLLAPSE, HEALTHY, OVERLOAD], MARKS = ["▼", "", "▲"], WORDS = ["below", "inside", "above"];

function render({ model, el }) {
  const runs = model.get("runs"), colors = model.get("colors");
  const rules = () => Object.fromEntries(RULES.map((name) => [name, model.get(name)]));
  let run, heads, marks, dots;
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": "map of heads, penalty, slope" });
  const text = (x, y, words, more = {}, to = svg) => to.appendChild(make("text", { x, y, ...more }, words));
  const BOLD = { style: "font-weight: 600" };
  const heading = text(MAP.x, 18, "", BOLD);
  const names = ["penalty λδ² (nats)", "d loss / dE (nats per nat)"].map((name, k) => text(X[0], PANELS[k].top - 12, name, BOLD));
  const bands = [0, 2].map((state) => svg.appendChild(make("rect", {
    y: PANELS[0].top, height: PANELS[1].bottom - PANELS[0].top, fill: COLORS[state], opacity: 0.13 })));
  const middle = svg.appendChild(make("line", { y1: PANELS[0].top, y2: PANELS[1].bottom, stroke: "currentColor", "stroke-dasharray": "4 4" }));
  const theta = text(0, PANELS[0].top + 12, "θ");
  const uniform = [svg.appendChild(make("line", { y1: PANELS[0].top, y2: PANELS[1].bottom, class: "grid" })), text(0, PANELS[0].top - 12, "uniform", { "text-anchor": "middle" })];
  const places = [0, 2].map((state) => text(0, PANELS[1].bottom - 8, state ? "overload" : "collapse",
    { "text-anchor": "middle", style: `fill: ${COLORS[state]}; font-weight: 600` }));
  const curves = PANELS.map(() => svg.appendChild(make("path", { fill: "none", stroke: "currentColor", "stroke-width": 1.5 })));
  const zeros = PANELS.map(() => svg.appendChild(make("line", { x1: X[0], x2: X[1], class: "grid" })));
  const scales = PANELS.map(() => [0, 1].map(() => text(X[0] - 8, 0, "", { "text-anchor": "end" })));
  const ticks = Array.from({ length: 7 }, () => text(0, PANELS[1].bottom + 18, "", { "text-anchor": "middle" }));
  const below = text((X[0] + X[1]) / 2, HEIGHT - 10, "", { "text-anchor": "middle" });
  const grid = svg.appendChild(make("g")), cloud = svg.appendChild(make("g"));
  const outline = { fill: "none", stroke: OVERLOAD, "stroke-width": 2.5, "pointer-events": "none", class: "entropy-selected" };
  const here = svg.appendChild(make("rect", outline)), rings = PANELS.map(() => svg.appendChild(make("circle", { ...outline, r: 7 })));
  const tell = (layer, head) => {
    const { group, name } = run;
    window.dispatchEvent(new CustomEvent("entropy-head", { detail: { group, name, layer, head } })); // the run explorer hears it
  };
  const pick = selecting(model, grid, () => heads.map(({ layer, head }) => [layer, head]), tell);
  const words = make("div", { role: "status", "aria-live": "polite", class: "entropy-status" });

  const load = () => {
    run = runs[model.get("run")];
    heads = headsOf(run);
    const w = MAP.size / run.heads, h = MAP.size / run.layers, most = Math.log(run.context_length);
    grid.replaceChildren();
    cloud.replaceChildren();
    const every = run.layers > 8 ? 2 : 1;
    for (let layer = 0; layer < run.layers; layer += every) text(MAP.x - 6, MAP.y + (layer + 0.5) * h + 4, layer, { "text-anchor": "end" }, grid);
    for (let head = 0; head < run.heads; head += run.heads > 8 ? 2 : 1) text(MAP.x + (head + 0.5) * w, MAP.y + MAP.size + 16, head, { "text-anchor": "middle" }, grid);
    text(MAP.x + MAP.size / 2, MAP.y + MAP.size + 34, "head", { "text-anchor": "middle" }, grid);
    text(0, MAP.y - 6, "layer", {}, grid);
    marks = heads.map(({ layer, head, E }) => {
      const box = { x: MAP.x + head * w + 1, y: MAP.y + layer * h + 1, width: w - 2, height: h - 2 };
      const cell = grid.appendChild(make("rect", { ...box, class: "entropy-cell",
        fill: colors[Math.round((Math.min(E, most) / most) * (colors.length - 1))] }));
      cell.append(title(`layer ${layer}, head ${head}: ${E.toFixed(2)} nats`));
      cell.addEventListener("click", () => pick(layer, head));
      return text(box.x + box.width / 2, box.y + box.height / 2 + 5, "", { "text-anchor": "middle", class: "entropy-mark" }, grid);
    });
    dots = heads.map(({ layer, head, E }) => PANELS.map(() => {
      const dot = cloud.appendChild(make("circle", { r: 4, class: "entropy-dot" }));
      dot.addEventListener("click", () => pick(layer, head));
      dot.append(title(`layer ${layer}, head ${head}: ${E.toFixed(2)} nats`));
      return dot;
    }));
    heading.textContent = `entropy of every head, 0 to ${most.toFixed(2)} nats`;
    off(ownTheta, !run.thresholds);
    if (model.get("selected").length && place() < 0) change(model, { selected: [] });
  };

  // The index of the selected head, -1 of none.
  const place = () => {
    const [layer, head] = model.get("selected");
    return heads.findIndex((h) => h.layer === layer && h.head === head);
  };

  const draw = () => {
    const now = rules(), found = penalties(now, run, heads), chosen = found.heads[place()], reach = reaches(run.context_length).mean;
    off(context, now.ceiling === "causal");
    off(reduction, now.per === "head");
    off(shared, found.own);
    const nats = found.own ? "deviation" : "E", margin = now.gamma * found.top, at = found.own ? 0 : now.theta * found.top;
    const ends = found.own ? [-Math.max(...found.heads.map((h) => Math.abs(h.deviation)), margin) * 1.05] : [0];
    ends.push(found.own ? -ends[0] : Math.max(found.top, reach) * 1.02);
    const x = (value) => X[0] + ((value - ends[0]) / (ends[1] - ends[0])) * (X[1] - X[0]);
    const clip = (value) => Math.min(ends[1], Math.max(ends[0], value));
    const low = clip(at - margin), high = clip(at + margin);
    set(bands[0], { x: X[0], width: x(low) - X[0] });
    set(bands[1], { x: x(high), width: X[1] - x(high) });
    set(middle, { x1: x(at), x2: x(at) });
    set(theta, { x: x(at) + 5 });
    theta.textContent = found.own ? "own θ" : "θ";
    const most = { x: x(reach), x1: x(reach), x2: x(reach), visibility: found.own ? "hidden" : "visible" };
    for (const part of uniform) set(part, most);
    for (const [k, [from, to]] of [[ends[0], low], [high, ends[1]]].entries()) {
      set(places[k], { x: x((from + to) / 2), visibility: to - from > 0.14 * (ends[1] - ends[0]) ? "visible" : "hidden" });
    }
    // At own thresholds, and with rows of their own, heads are on one curve only where they pay for their means alone.
    const [from, to] = found.own ? ends : [0, reach];
    const points = now.per === "query" && (found.own || run.rows) ? [] : along(from, to, at - margin, at + margin);
    const curve = points.map((value) => {
      const [E, theta] = found.own ? [value + found.top, 1] : [value, now.theta];
      const [penalty, slope] = alone(now, run.context_length, E, theta);
      return [value, [penalty, slope / heads.length]];
    });
    PANELS.forEach(({ top, bottom }, k) => {
      const values = found.heads.map((h) => (k ? h.slope : h.penalty));
      const all = [...values, ...curve.map(([, pair]) => pair[k])];
      const most = roundUp(Math.max(1e-12, ...all.map(Math.abs)));
      const y = (value) => (k ? (top + bottom) / 2 - (value / most) * ((bottom - top) / 2) : bottom - (value / most) * (bottom - top));
      set(zeros[k], { y1: y(0), y2: y(0) });
      set(scales[k][0], { y: y(0) + 4 }).textContent = "0";
      set(scales[k][1], { y: y(most) + 4 }).textContent = most >= 0.01 ? String(+most.toPrecision(1)) : most.toExponential(0);
      const path = curve.map(([value, pair], i) => `${i ? "L" : "M"}${x(value).toFixed(1)} ${y(pair[k]).toFixed(1)}`);
      set(curves[k], { d: path.join("") });
      found.heads.forEach((h, i) => set(dots[i][k], { cx: x(h[nats]).toFixed(1), cy: y(values[i]).toFixed(1), fill: COLORS[h.state] }));
      set(rings[k], chosen ? { cx: x(chosen[nats]), cy: y(k ? chosen.slope : chosen.penalty), visibility: "visible" } : HIDDEN);
    });
    const w = MAP.size / run.heads, h = MAP.size / run.layers;
    set(here, chosen ? { x: MAP.x + chosen.head * w, y: MAP.y + chosen.layer * h, width: w, height: h, visibility: "visible" } : HIDDEN);
    found.heads.forEach((h, i) => marks[i].textContent !== MARKS[h.state] && (marks[i].textContent = MARKS[h.state]));
    const span = ends[1] - ends[0], every = [0.1, 0.2, 0.5, 1, 2].find((n) => span / n <= 6) ?? 5;
    ticks.forEach((tick, k) => {
      const value = Math.ceil(ends[0] / every) * every + k * every;
      set(tick, { x: x(value), visibility: value <= ends[1] ? "visible" : "hidden" }).textContent = +value.toFixed(1);
    });
    below.textContent = found.own ? "entropy minus the head's own θ·E_max (nats)" : "mean entropy of the head (nats)";
    const count = [0, 1, 2].map((state) => found.heads.filter((h) => h.state === state).length);
    words.textContent = `${WORDS.map((word, k) => `${count[k]} ${word}`).join(" · ")} · penalty ${significant(found.total)}`;
    if (run.eval_loss) words.textContent += `, ${significant((100 * found.total) / run.eval_loss, 2)}% of this run’s loss of ${significant(run.eval_loss)}`;
    words.textContent += " nats";
    if (chosen) {
      words.textContent += `\nlayer ${chosen.layer}, head ${chosen.head}: ${significant(chosen.E)} nats, ` +
        `penalty ${significant(chosen.penalty)} nats, slope ${significant(chosen.slope)} nats per nat`;
    }
  };
  const along = (from, to, ...edges) => {
    const points = Array.from({ length: POINTS }, (_, k) => from + ((to - from) * k) / (POINTS - 1));
    for (const edge of edges) for (const nudge of [-1e-9, 1e-9]) if (edge > from && edge < to) points.push(edge + nudge);
    return points.sort((a, b) => a - b);
  };

  const groups = {};
  const list = make("select", { "aria-label": "recorded run", class: "entropy-run" });
  runs.forEach(({ group, name }, index) => {
    groups[group] ??= list.appendChild(make("optgroup", { label: group }));
    groups[group].append(make("option", { value: index }, name));
  });
  const follow = () => ((list.value = model.get("run")), load());
  list.addEventListener("change", () => change(model, { run: Number(list.value) }));
  const shared = range(model, "theta", "threshold θ", 0, 1, 0.01);
  const context = range(model, "context", "context length T", 8, Math.max(1024, ...runs.map((r) => r.context_length)), 8, String);
  const reduction = choice(model, "reduction", "reduction", { mean: "mean", sum: "sum" });
  const ownTheta = check(model, "own", "each head at its own learned θ");
  el.replaceChildren(
    make("style", {}, STYLE + MARK),
    module(
      make("div", { class: "controls" }, ...(runs.length > 1 ? [make("label", {}, "recorded run", list)] : []),
        shared, range(model, "gamma", "margin γ", 0, 0.5, 0.01),
        range(model, "weight", "weight λ", 1e-7, 1, 0.1, (value) => value.toExponential(1), true), context,
        choice(model, "ceiling", "ceiling", { context: "log T (paper)", causal: "log of seen keys" }),
        choice(model, "per", "per", { head: "head (Algorithm 1)", query: "query (published code)" }), reduction, ownTheta),
      words, svg),
  );
  const queue = onceAFrame(draw);
  model.on("change:run", () => (follow(), queue()));
  for (const name of [...RULES, "selected"]) model.on(`change:${name}`, queue);
  follow();
  draw();
}

const MARK = `
.entropy-module .entropy-status { white-space: pre-line }
.entropy-module .entropy-cell, .entropy-module .entropy-dot { cursor: pointer }
.entropy-module svg text.entropy-mark { fill: white; stroke: black; stroke-width: 2px; paint-order: stroke; font-size: 11px; pointer-events: none }
.entropy-module select.entropy-run { max-width: 460px }`;

export default { initialize: letChangesIn, render };
