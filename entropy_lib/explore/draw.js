// What every module draws with: native inputs, an SVG whose ink is the page's own, handles for mouse and keyboard.
// No import and no export: Python puts these lines above an explorer's module.
const COLLAPSE = "#3B6FB6", HEALTHY = "#8A9099", OVERLOAD = "#C8553D";
const QUERIES = ["#D55E00", "#0072B2", "#009E73", "#AA4499"];
const INK = "var(--jp-content-font-color1, var(--vscode-foreground, var(--colab-primary-text-color, currentColor)))";
const STYLE = `
.entropy-module { color: ${INK}; font: 13px/1.5 system-ui, sans-serif; max-width: 1100px }
.entropy-module .controls { display: flex; flex-wrap: wrap; gap: 4px 22px; align-items: center; margin-bottom: 4px }
.entropy-module label { display: inline-flex; gap: 8px; align-items: center; white-space: nowrap }
.entropy-module input[type=range] { width: 150px }
.entropy-module output { min-width: 3.2em; font-variant-numeric: tabular-nums }
.entropy-module svg { display: block; width: 100%; max-width: 950px; height: auto; overflow: visible; touch-action: pan-y }
.entropy-module svg text { fill: currentColor; font: 13px system-ui, sans-serif }
.entropy-module [role=status] { min-height: 3em }
.entropy-module [role=slider] { cursor: ns-resize; touch-action: none }
.entropy-module [role=slider]:focus-visible, .entropy-module g[tabindex]:focus-visible { outline: 2px solid ${OVERLOAD}; outline-offset: 2px }
.entropy-module .grid { stroke: currentColor; opacity: 0.18 }`;

const make = (tag, attributes = {}, ...children) => {
  const svg = /^(svg|g|path|line|rect|circle|text|image)$/.test(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  set(made, attributes);
  made.append(...children);
  return made;
};

// What stands already is not set again: a page of 300 marks would spend half a frame on it.
const written = new WeakMap();
const set = (element, attributes) => {
  if (!written.has(element)) written.set(element, {});
  const before = written.get(element);
  for (const [name, value] of Object.entries(attributes)) {
    if (before[name] !== value) element.setAttribute(name, (before[name] = value));
  }
  return element;
};

// What an explorer's parts stand in. JupyterLab takes arrow keys to move between cells unless a parent says that it
// must not, and prevents what they do to an input even then.
const module = (...parts) => make("div", { class: "entropy-module", "data-lm-suppress-shortcuts": "true" }, ...parts);
const keepArrows = (event) => {
  const moves = /^(Arrow|Home|End|Page)/.test(event.key);
  if (moves && event.target.matches?.(".entropy-module input, .entropy-module select")) event.stopPropagation();
};
if (!globalThis.entropyKeepsArrows) window.addEventListener("keydown", (globalThis.entropyKeepsArrows = keepArrows), true);

// A labelled range that follows the model and moves it; `form` writes its value. With `log`, step is in powers of ten.
const range = (model, name, label, low, high, step, form = (value) => value.toFixed(2), log = false) => {
  const [onTrack, ofTrack] = log ? [Math.log10, (place) => 10 ** place] : [Number, Number];
  const ends = { min: onTrack(low), max: onTrack(high), step };
  const input = make("input", { type: "range", ...ends, "aria-label": label, class: `entropy-${name}` });
  const output = make("output");
  const follow = () => ((input.value = onTrack(model.get(name))), (output.textContent = form(model.get(name))));
  input.addEventListener("input", () => change(model, { [name]: ofTrack(Number(input.value)) }));
  model.on(`change:${name}`, follow);
  follow();
  return make("label", {}, label, input, output);
};

// A list; `read` is of what an option's value, which is text, stands for.
const choice = (model, name, label, options, read = String) => {
  const select = make("select", { "aria-label": label, class: `entropy-${name}` });
  for (const [value, words] of Object.entries(options)) select.append(make("option", { value }, words));
  const follow = () => (select.value = model.get(name));
  select.addEventListener("change", () => change(model, { [name]: read(select.value) }));
  model.on(`change:${name}`, follow);
  follow();
  return make("label", {}, label, select);
};

const check = (model, name, label) => {
  const input = make("input", { type: "checkbox", "aria-label": label, class: `entropy-${name}` });
  const follow = () => (input.checked = model.get(name));
  input.addEventListener("change", () => change(model, { [name]: input.checked }));
  model.on(`change:${name}`, follow);
  follow();
  return make("label", {}, input, label);
};

const button = (words, pressed, name) => {
  const made = make("button", { class: `entropy-${name}` }, words);
  made.addEventListener("click", pressed);
  return made;
};

// A control that changes nothing is off.
const off = (label, unused) => (label.querySelector("input, select").disabled = unused);

// The round number above: 1, 2 or 5 times a power of ten.
const roundUp = (value) => {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= value * (1 - 1e-9));
};

// A number as Python's format(value, ".3g") writes it.
const significant = (value, digits = 3) => {
  const short = +value.toPrecision(digits);
  const plain = !short || (Math.abs(short) >= 1e-4 && Math.abs(short) < 10 ** digits);
  return plain ? String(short) : short.toExponential().replace(/(e[+-])(\d)$/, "$10$2");
};

const title = (words) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "title");
  made.textContent = words;
  return made;
};

// Bytes from base64; those of numbers that stand in planes, as Python's in_planes has them; numbers from float16.
const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer;
const woven = (base64, width) => {
  const raw = new Uint8Array(bytes(base64)), count = raw.length / width;
  return raw.map((_, k) => raw[(k % width) * count + Math.floor(k / width)]).buffer;
};
const halves = (buffer) =>
  Float32Array.from(new Uint16Array(buffer), (bits) => {
    const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  });

// The last recorded step that is not after `step`, as an index; the first if there is none.
const frameAt = (steps, step) => {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return low;
};

// `draw` once a frame, however often it is asked for.
const onceAFrame = (draw) => {
  let queued = false;
  return () => {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => ((queued = false), draw()));
  };
};

const change = (model, values) => {
  for (const [name, value] of Object.entries(values)) model.set(name, value);
  model.save_changes();
};

// A vertical handle: dragged, or moved by the arrow keys. `at(clientY)` is the value under the mouse.
const handle = (element, label, { get, put, at, step, low, high }) => {
  set(element, { role: "slider", tabindex: 0, "aria-label": label, "aria-valuemin": low, "aria-valuemax": high });
  const within = (value) => Math.min(high, Math.max(low, value));
  element.addEventListener("pointerdown", (down) => (element.setPointerCapture(down.pointerId), element.focus()));
  element.addEventListener("pointermove", (moved) => {
    if (element.hasPointerCapture(moved.pointerId)) put(within(at(moved.clientY)));
  });
  element.addEventListener("keydown", (pressed) => {
    const move = { ArrowUp: step, ArrowRight: step, ArrowDown: -step, ArrowLeft: -step }[pressed.key];
    if (!move) return;
    pressed.preventDefault(); // the page would scroll
    put(within(get() + move));
  });
};

// A map of heads as a control of the trait `selected`, which is [layer, head] or empty. Arrow keys move through `places`,
// all there are; Escape leaves. Returns what a click on one does: the same again leaves it. `told` hears of clicks and
// of Enter.
const selecting = (model, map, places, told = () => {}) => {
  set(map, { tabindex: 0, role: "group", "aria-label": "heads: the arrow keys select one, Escape none" });
  const select = (place) => change(model, { selected: place });
  map.addEventListener("keydown", (pressed) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[pressed.key] ?? [];
    const [layer, head] = model.get("selected"), none = layer === undefined;
    if (pressed.key === "Escape") select([]);
    else if (pressed.key === "Enter" && !none) told(layer, head);
    else if (down === undefined) return;
    else {
      const ahead = places().filter(([l, n]) => Math.sign(l - layer) === down && Math.sign(n - head) === right);
      const distance = ([l, n]) => Math.abs(l - layer) + Math.abs(n - head); // over static heads, which are no places
      const next = none ? places()[0] : ahead.sort((a, b) => distance(a) - distance(b))[0];
      if (next) select(next);
    }
    pressed.preventDefault(); // the page would scroll
  });
  return (layer, head) => {
    if (String(model.get("selected")) === String([layer, head])) return select([]);
    select([layer, head]);
    told(layer, head);
  };
};

// As Python's keys_worth.
const worth = (entropy) => `${significant(entropy)} nats, ${significant(Math.exp(entropy))} keys’ worth`;

// `initialize` of the modules. anywidget drops all that comes from Python for good where a module did not start within
// two seconds, as on a busy page. What was dropped before is asked for again.
const letChangesIn = async ({ model }) => {
  const real = await model.widget_manager?.get_model?.(model.get("_own_id"));
  if (!real?.comm?.on_msg) return; // no front end of ipywidgets, and no gate of anywidget's
  const widgetModel = Object.getPrototypeOf(Object.getPrototypeOf(real)); // beneath anywidget's
  real.comm.on_msg(widgetModel._handle_comm_msg.bind(real));
  real._handle_comm_msg({ content: { data: {} } }).catch(() => real.comm.send({ method: "request_state" }));
};
