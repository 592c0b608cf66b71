// The collapse film: entropy maps of a few runs, step by step, over their losses and the learning rate.
// [n][layers * heads] bytes of a run, shares of the ceiling in 255ths.
export const decoded = ({ entropy, layers, heads }) => {
  const bytes = Uint8Array.from(atob(entropy), (letter) => letter.charCodeAt(0)), size = layers * heads;
  return Array.from({ length: bytes.length / size }, (_, k) => bytes.subarray(k * size, (k + 1) * size));
};

const WIDTH = 900, HEIGHT = 262, LEFT = 44, RIGHT = 760, LOSS = { top: 20, bottom: 150 }, RATE = { top: 198, bottom: 232 };
const FILM = `
.entropy-maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 8px 14px; max-width: 950px }
.entropy-maps canvas { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block }
.entropy-maps div { min-width: 0; font-size: 12px }
.entropy-maps b, .entropy-maps span { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.entropy-scale { width: 180px; height: 10px }
.entropy-module input.entropy-step { width: 260px }`;
const SECONDS = 15; // of a whole film

function render({ model, el }) {
  const runs = model.get("runs"), last = model.get("last_step"), ceiling = model.get("ceiling");
  const colors = model.get("colors").map((color) => color.match(/\d+/g).map(Number));
  const films = runs.map(decoded);
  let timer, started;

  const maps = runs.map((run, r) => {
    const canvas = make("canvas", { width: run.heads, height: run.layers, role: "img" });
    const below = make("span");
    canvas.addEventListener("pointermove", ({ offsetX, offsetY }) => {
      const layer = Math.min(run.layers - 1, Math.floor((offsetY / canvas.clientHeight) * run.layers));
      const head = Math.min(run.heads - 1, Math.floor((offsetX / canvas.clientWidth) * run.heads));
      pointed = { r, layer: Math.max(0, layer), head: Math.max(0, head) };
      queue();
    });
    canvas.addEventListener("pointerleave", () => ((pointed = undefined), queue()));
    return { canvas, below, context: canvas.getContext("2d"), image: new ImageData(run.heads, run.layers) };
  });
  let pointed;

  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "losses and learning rate by step" });
  const text = (x, y, words, more = {}) => svg.appendChild(make("text", { x, y, ...more }, words));
  const x = (step) => LEFT + ((RIGHT - LEFT) * (step - 1)) / Math.max(1, last - 1);
  const finite = runs.flatMap((run) => run.loss.filter((loss) => loss !== null));
  const top = Math.ceil(Math.max(...runs.map((run) => run.loss[0] ?? 0))), low = Math.floor(Math.min(...finite, top - 1));
  const y = (loss) => LOSS.bottom - ((loss - low) / (top - low)) * (LOSS.bottom - LOSS.top);
  text(0, 10, "loss (nats per token; ✕: the first step that is not finite)", { style: "font-weight: 600" });
  for (let loss = low; loss <= top; loss += top - low > 5 ? 2 : 1) {
    svg.append(make("line", { x1: LEFT, x2: RIGHT, y1: y(loss), y2: y(loss), class: "grid" }));
    text(LEFT - 8, y(loss) + 4, loss, { "text-anchor": "end" });
  }
  text(0, RATE.top - 10, "learning rate", { style: "font-weight: 600" });
  const rates = model.get("learning_rate"), highest = Math.max(...rates.map(([, rate]) => rate)) || 1;
  const path = (points) => points.map(([a, b], k) => `${k ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
  const rateAt = (rate) => RATE.bottom - (rate / highest) * (RATE.bottom - RATE.top);
  svg.append(make("path", { d: path(rates.map(([s, rate]) => [x(s), rateAt(rate)])), fill: "none", stroke: "currentColor" }));
  svg.append(make("line", { x1: LEFT, x2: RIGHT, y1: RATE.bottom, y2: RATE.bottom, class: "grid" }));
  text(RIGHT + 8, RATE.top + 4, highest.toExponential(0));
  for (let s = 0; s <= last; s += last > 150 ? 50 : 10) if (s) text(x(s), HEIGHT - 12, s, { "text-anchor": "middle" });
  text(RIGHT + 8, HEIGHT - 12, "step");
  const place = runs.map((run) => Math.min(top, run.loss.at(-1) ?? top)).map(y);
  const order = [...place.keys()].sort((a, b) => place[a] - place[b]);
  order.forEach((r, k) => k && (place[r] = Math.max(place[r], place[order[k - 1]] + 15))); // names beside, not over another
  runs.forEach((run, r) => {
    const points = run.steps.map((s, k) => [x(s), y(Math.min(top, run.loss[k] ?? top))]);
    svg.append(make("path", { d: path(points), fill: "none", stroke: run.color, "stroke-width": 2 }));
    text(RIGHT + 8, place[r] + 4, run.name, { style: `fill: ${run.color}; font-size: 12px` });
    if (run.broke !== null) text(x(run.broke), y(top) + 5, "✕", { "text-anchor": "middle", style: `fill: ${run.color}` });
  });
  const cursor = svg.appendChild(make("line", { y1: LOSS.top - 6, y2: RATE.bottom, stroke: "currentColor", "stroke-dasharray": "3 3" }));

  const words = make("div", { role: "status", "aria-live": "off", class: "entropy-status" });
  const nats = (byte) => ((byte / 255) * ceiling).toFixed(2);
  const draw = () => {
    const step = Math.min(last, model.get("step"));
    set(cursor, { x1: x(step), x2: x(step) });
    runs.forEach((run, r) => {
      const { context, image, below, canvas } = maps[r], at = frameAt(run.steps, step), frame = films[r][at];
      frame.forEach((byte, k) => image.data.set([...colors[byte], 255], 4 * k));
      context.putImageData(image, 0, 0);
      const mean = frame.reduce((sum, byte) => sum + byte, 0) / frame.length, loss = run.loss[at];
      const broken = run.broke !== null && step >= run.broke;
      const height = loss === null || loss > 1000 ? "off the scale" : loss.toFixed(2);
      below.textContent = broken ? `broke at step ${run.broke}` : `loss ${height} · mean ${nats(mean)} nats`;
      set(below, { style: broken ? `color: ${OVERLOAD}; font-weight: 600` : "" });
      set(canvas, { "aria-label": `${run.name}: mean entropy ${nats(mean)} nats` });
    });
    const rate = rates[frameAt(rates.map(([s]) => s), step)][1];
    words.textContent = `step ${step} of ${last} · learning rate ${rate.toExponential(1)}`;
    if (pointed) {
      const { r, layer, head } = pointed, run = runs[r], byte = films[r][frameAt(run.steps, step)][layer * run.heads + head];
      words.textContent += ` · ${run.name}, layer ${layer}, head ${head}: ${nats(byte)} nats of ${ceiling.toFixed(2)}`;
    }
  };
  const queue = onceAFrame(draw);

  const stop = () => (cancelAnimationFrame(timer), (timer = undefined), (play.textContent = "▶ play"));
  const frameOf = (now) => {
    started ??= now - ((model.get("step") - 1) / last) * SECONDS * 1000;
    const step = Math.min(last, 1 + Math.floor(((now - started) / SECONDS / 1000) * last));
    change(model, { step });
    if (step < last) timer = requestAnimationFrame(frameOf);
    else stop();
  };
  const play = button("▶ play", () => {
    if (timer) return stop();
    if (model.get("step") >= last) change(model, { step: 1 });
    started = undefined;
    play.textContent = "❚❚ pause";
    timer = requestAnimationFrame(frameOf);
  }, "play");
  const scrubber = range(model, "step", "step", 1, last, 1, (step) => String(step));
  scrubber.addEventListener("pointerdown", stop);
  const shades = model.get("colors").filter((_, k) => k % 15 === 0).join(", ");
  const scale = make("div", { class: "entropy-scale", style: `background: linear-gradient(to right, ${shades})` });
  el.replaceChildren(
    make("style", {}, STYLE + FILM),
    module(
      make("div", { class: "controls" }, play, scrubber,
        make("label", {}, "0: one token", scale, `${ceiling.toFixed(2)} nats: all alike · a row is a layer, 0 on top`)),
      make("div", { class: "entropy-maps" }, ...runs.map((run, r) =>
        make("div", {}, make("b", { title: run.name }, run.name), maps[r].canvas, maps[r].below))),
      words, svg),
  );
  model.on("change:step", queue);
  draw();
  if (model.get("opens_page")) {
    setTimeout(() => el.scrollIntoView({ block: "center", behavior: "smooth" }), 500); // after all cells have come
    model.set("opens_page", false); // once, not with every view
  }
  return stop;
}

export default { initialize: letChangesIn, render };
