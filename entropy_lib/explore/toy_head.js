// One toy head under the entropy penalty alone: gradient descent moves its logits and its threshold.
export const entropies = (logits) =>
  logits.map((row) => {
    const top = Math.max(...row);
    const exponentials = row.map((z) => Math.exp(z - top));
    const sum = exponentials.reduce((a, b) => a + b, 0);
    const weights = exponentials.map((e) => e / sum);
    return { weights, entropy: -weights.reduce((E, a) => E + (a > 0 ? a * Math.log(a) : 0), 0) };
  });

// The penalty (mean over rows, or of the rows' mean) and its gradients; `per` as in EntropyRegularization.
export const penalty = ({ logits, theta, gamma, per }) => {
  const rows = entropies(logits), ceiling = Math.log(logits[0].length), n = rows.length;
  const mean = rows.reduce((sum, row) => sum + row.entropy, 0) / n;
  const outside = (deviation) => (Math.abs(deviation) > gamma * ceiling ? deviation : 0);
  const deviations = rows.map((row) => outside((per === "head" ? mean : row.entropy) - theta * ceiling));
  const value = deviations.reduce((sum, deviation) => sum + deviation ** 2, 0) / n;
  const forTheta = (-2 * ceiling * deviations.reduce((sum, deviation) => sum + deviation, 0)) / n;
  const forLogits = rows.map(({ weights, entropy }, i) =>
    weights.map((a) => (a > 0 ? ((-2 * deviations[i]) / n) * a * (Math.log(a) + entropy) : 0)),
  );
  return { value, forLogits, forTheta, entropies: rows.map((row) => row.entropy), weights: rows.map((r) => r.weights) };
};

export const step = (state) => {
  const { forLogits, forTheta } = penalty(state);
  const logits = state.logits.map((row, i) => row.map((z, j) => z - state.rate * forLogits[i][j]));
  return { ...state, logits, theta: Math.min(1, Math.max(0, state.theta - state.rate * forTheta)) };
};

const NAMES = ["logits", "theta", "gamma", "rate", "per"], STEPS = 400;
const WIDTH = 760, HEIGHT = 322, TOP = 40, BOTTOM = 290; // of the drawing, scaled to the cell
const BARS = 290, BAND = { x1: 340, x2: 490 }, HISTORY = { x1: 550, x2: 750 };
const LIMIT = 6; // of a logit that is dragged
const TITLE = { style: "font-weight: 600" };

function render({ model, el }) {
  const state = () => Object.fromEntries(NAMES.map((name) => [name, model.get(name)]));
  let trace = [], timer;
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "attention, band and history" });
  const words = make("div", { role: "status", "aria-live": "polite", class: "entropy-status" });
  const rows = model.get("logits").length, keys = model.get("logits")[0].length;
  const ceiling = Math.log(keys);
  const y = (E) => BOTTOM - (E / ceiling) * (BOTTOM - TOP);

  const left = BARS / keys, zero = (TOP + BOTTOM) / 2, scale = (BOTTOM - TOP) / 2 / LIMIT;
  const text = (x, y, words, more = {}) => svg.appendChild(make("text", { x, y, ...more }, words));
  text(0, 18, "logits of a head: drag them", TITLE);
  text(BAND.x1 - 24, 18, "entropy, and its band", TITLE);
  text(HISTORY.x1, 18, "who moved", TITLE);
  svg.append(make("line", { x1: 0, x2: BARS, y1: zero, y2: zero, class: "grid" }));
  for (let j = 0; j < keys; j++) text((j + 0.5) * left, 312, `key ${j}`, { "text-anchor": "middle", style: "font-size: 11px" });
  const bars = model.get("logits").map((_, i) =>
    Array.from({ length: keys }, (_, j) => {
      const bar = make("rect", { fill: QUERIES[i], rx: 2, width: left / rows - 3, x: j * left + (i * left) / rows + 3 });
      const grip = { get: () => model.get("logits")[i][j], step: 0.25, low: -LIMIT, high: LIMIT };
      handle(bar, `logit of query ${i} for key ${j}`, {
        ...grip,
        at: (clientY) => {
          const box = svg.getBoundingClientRect();
          return (zero - ((clientY - box.top) / box.height) * HEIGHT) / scale;
        },
        put: (z) => {
          stop();
          const logits = model.get("logits").map((row, a) => row.map((old, b) => (a === i && b === j ? z : old)));
          change(model, { logits });
        },
      });
      return svg.appendChild(bar);
    }),
  );
  const band = svg.appendChild(make("rect", { x: BAND.x1, width: BAND.x2 - BAND.x1, fill: "currentColor", opacity: 0.13 }));
  const middle = svg.appendChild(make("line", { ...BAND, stroke: "currentColor", "stroke-dasharray": "4 4" }));
  const label = text(BAND.x2 + 5, 0, "θ");
  for (let E = 0; E <= ceiling; E += 0.5) {
    svg.append(make("line", { ...BAND, y1: y(E), y2: y(E), class: "grid" }));
    text(BAND.x1 - 6, y(E) + 4, E.toFixed(1), { "text-anchor": "end" });
  }
  svg.append(make("line", { ...BAND, y1: y(ceiling), y2: y(ceiling), stroke: "currentColor" }));
  text(BAND.x2 + 5, y(ceiling) + 4, `log ${keys}`);
  text((BAND.x1 + BAND.x2) / 2, 312, "nats, by query", { "text-anchor": "middle" });
  const dots = model.get("logits").map((_, i) =>
    svg.appendChild(make("circle", { r: 7, cx: BAND.x1 + ((i + 0.5) * (BAND.x2 - BAND.x1)) / rows, fill: QUERIES[i] })),
  );
  const mean = svg.appendChild(make("line", { ...BAND, stroke: OVERLOAD, "stroke-width": 2 }));
  for (const E of [0, ceiling]) svg.append(make("line", { ...HISTORY, y1: y(E), y2: y(E), class: "grid" }));
  const lines = { theta: make("path", { fill: "none", stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": "4 4" }),
                  entropy: make("path", { fill: "none", stroke: OVERLOAD, "stroke-width": 2 }) };
  svg.append(lines.theta, lines.entropy);
  const end = text(HISTORY.x2, 312, "", { "text-anchor": "end" });
  const ends = { theta: text(0, 0, `θ·log ${keys}`), entropy: text(0, 0, "entropy", { style: `fill: ${OVERLOAD}` }) };

  const draw = () => {
    const now = state(), { value, entropies } = penalty(now);
    const average = entropies.reduce((a, b) => a + b, 0) / rows;
    now.logits.forEach((row, i) =>
      row.forEach((z, j) => {
        const shown = Math.min(LIMIT, Math.max(-LIMIT, z)); // gradient descent may go further than a hand
        const place = { y: shown > 0 ? zero - shown * scale : zero, height: Math.max(Math.abs(shown) * scale, 4) };
        set(bars[i][j], { ...place, "aria-valuenow": z.toFixed(2) });
      }),
    );
    const [low, high] = [now.theta - now.gamma, now.theta + now.gamma].map((share) => Math.min(1, Math.max(0, share)) * ceiling);
    set(band, { y: y(high), height: Math.max(y(low) - y(high), 1) });
    set(middle, { y1: y(now.theta * ceiling), y2: y(now.theta * ceiling) });
    set(label, { y: y(now.theta * ceiling) + 4 });
    set(mean, { y1: y(average), y2: y(average), visibility: now.per === "head" ? "visible" : "hidden" });
    entropies.forEach((E, i) => set(dots[i], { cy: y(E), opacity: now.per === "head" ? 0.45 : 1 }));
    const span = Math.max(20, trace.length - 1), last = trace.length - 1;
    const x = (k) => HISTORY.x1 + ((HISTORY.x2 - HISTORY.x1) * k) / span;
    end.textContent = `${span} steps`;
    for (const [name, pull] of [["theta", (past) => past.theta * ceiling], ["entropy", (past) => past.entropy]]) {
      set(lines[name], { d: trace.map((past, k) => `${k ? "L" : "M"}${x(k)} ${y(pull(past))}`).join("") });
      const at = { x: x(0) + 4, y: trace.length ? y(pull(trace[0])) - 6 : 0, visibility: last > 0 ? "visible" : "hidden" };
      set(ends[name], at);
    }
    words.textContent = `penalty ${value.toPrecision(3)} nats² · mean entropy ${average.toFixed(2)} · θ·log ${keys} = ${(now.theta * ceiling).toFixed(2)}`;
    if (trace.length > 1) {
      const moved = Math.abs(average - trace[0].entropy), gave = Math.abs(now.theta - trace[0].theta) * ceiling;
      words.textContent += ` · after ${trace.length - 1} steps the entropy moved ${moved.toFixed(2)} nats, the threshold ${gave.toFixed(2)}`;
    }
  };
  const note = (now) => {
    const E = entropies(now.logits).map((row) => row.entropy);
    trace.push({ theta: now.theta, entropy: E.reduce((a, b) => a + b, 0) / rows });
  };
  const stop = () => (cancelAnimationFrame(timer), (timer = undefined), (trace = []), (play.textContent = "▶ let go"));
  const frameOf = () => {
    const next = step(state());
    note(next);
    change(model, { logits: next.logits, theta: next.theta });
    if (trace.length <= STEPS && penalty(next).value > 0) timer = requestAnimationFrame(frameOf);
    else (timer = undefined), (play.textContent = "▶ let go");
  };
  const play = button("▶ let go", () => {
    if (timer) return (cancelAnimationFrame(timer), (timer = undefined), (play.textContent = "▶ let go"));
    trace = [];
    note(state());
    play.textContent = "❚❚ hold";
    timer = requestAnimationFrame(frameOf);
  }, "play");
  const start = state();
  const again = button("from the start", () => (stop(), change(model, start)), "start");
  el.replaceChildren(
    make("style", {}, STYLE),
    module(
      make("div", { class: "controls" }, play, again,
        range(model, "theta", "threshold θ", 0, 1, 0.01), range(model, "gamma", "margin γ", 0, 0.5, 0.01),
        range(model, "rate", "step size", 0.001, 0.02, 0.001, (value) => value.toFixed(3)),
        choice(model, "per", "per", { head: "head (Algorithm 1)", query: "query (published code)" })),
      words, svg),
  );
  const queue = onceAFrame(draw);
  for (const name of NAMES) model.on(`change:${name}`, queue);
  draw();
  return () => cancelAnimationFrame(timer);
}

export default { initialize: letChangesIn, render };
