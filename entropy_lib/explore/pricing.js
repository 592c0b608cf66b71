// What one private forward pass costs by part, beside the baseline: counts of every operation, times unit prices.
// Operations of one pass over `length` tokens, as entropy_lib.private_inference.architecture has them: part, name and
// how many elements go in and out of a linear one, or elements and rows of another.
export function* operations(a, length) {
  const d = a.width, size = d / a.heads;
  const linear = (part, rows, inputs, outputs, name = "linear") => ({ part, name, in: rows * inputs, out: rows * outputs });
  const each = (part, name, rows, across) => ({ part, name, element: rows * across, row: rows });
  if (a.vocabulary) yield linear("embedding", length, a.vocabulary, d, "embed");
  for (let layer = 0; layer < a.layers; layer++) {
    const dynamic = a.dynamic_heads ? a.dynamic_heads[layer % a.dynamic_heads.length] : a.heads;
    const thin = dynamic * length * size, square = dynamic * length * length, fixed = a.heads - dynamic;
    if (a.layer_norm) yield each("LayerNorm", "layernorm", length, d);
    yield linear("attention linear", length, d, 2 * dynamic * size + d);
    if (a.tempered && dynamic) yield each("attention linear", "multiply", dynamic * length, size);
    if (dynamic) {
      yield { part: "attention linear", name: "scores", in: 2 * thin, out: square };
      yield each("softmax", a.attention, dynamic * length, length);
      yield { part: "attention linear", name: "mix", in: square + thin, out: thin };
    }
    if (fixed) yield { part: "attention linear", name: "static", out: fixed * length * size };
    yield linear("attention linear", length, d, d);
    if (a.layer_norm) yield each("LayerNorm", "layernorm", length, d);
    if (!a.fused) {
      yield linear("FFN linear", length, d, a.activation === "bilinear" ? 2 * a.ffn_width : a.ffn_width);
      if (a.activation !== "linear") yield each("activation", a.activation, length, a.ffn_width);
    }
    yield linear("FFN linear", length, a.fused ? d : a.ffn_width, d);
    if (a.scaled && a.layer_norm) yield each("FFN linear", "multiply", length, d); // else β goes into the weights
  }
  if (a.vocabulary) {
    if (a.final_layer_norm) yield each("LayerNorm", "layernorm", length, d);
    yield linear("vocabulary projection", length, d, a.vocabulary);
  }
}

// { bytes, minutes } by part; minutes are NaN where none were measured. Throws what cannot be priced, in words.
export const inferenceCost = (a, length, name, priced, network, parts) => {
  const most = Math.max(0, ...(a.dynamic_heads ?? []));
  if (most > a.heads) throw Error(`dynamic_heads must be numbers from 0 to heads = ${a.heads}, got ${most}`);
  if (a.width % a.heads) throw Error(`width must be a multiple of heads, got ${a.width} and ${a.heads}`);
  const price = (operation, table) => {
    if (!Object.keys(table).length) return NaN;
    const whole = operation.part === "vocabulary projection" && operation.part in table;
    const units = table[whole ? operation.part : operation.name];
    if (!units) throw Error(`'${name}' has no price for '${operation.name}'`);
    return Object.entries(units).reduce((sum, [unit, each]) => sum + each * operation[unit], 0);
  };
  const none = () => Object.fromEntries(parts.map((part) => [part, 0]));
  const bytes = none(), minutes = none();
  for (const operation of operations(a, length)) {
    const sent = price(operation, priced.bytes);
    bytes[operation.part] += sent;
    let seconds = price(operation, priced.seconds);
    if (network) seconds += (sent * 8) / network.bandwidth + priced.rounds[operation.name] * network.latency;
    minutes[operation.part] += seconds / 60;
  }
  return { bytes, minutes };
};

const BASELINE = "SM+LN+G", SIZES = ["layers", "heads", "width", "vocabulary"];
const NAMES = [...SIZES, "context", "variant", "prices", "network"];
const WIDTH = 900, HEIGHT = 260, ROWS = [52, 112], THICK = 34, PANELS = [[170, 480], [540, 850]], BOTTOM = 158;
const total = (values) => Object.values(values).reduce((sum, value) => sum + value, 0);

function render({ model, el }) {
  const colors = model.get("colors"), parts = Object.keys(colors);
  const value = (name) => model.get(name);
  const paid = () => {
    const priced = value("price_tables")[value("prices")];
    return !priced.includes_network && Object.keys(priced.seconds).length > 0;
  };
  const cost = (variant) => {
    const a = value("architectures")[variant], sizes = Object.fromEntries(SIZES.map((name) => [name, value(name)]));
    const resized = { ...a, ...sizes, ffn_width: (a.ffn_width / a.width) * sizes.width };
    const network = paid() ? value("networks")[value("network")] : undefined;
    return inferenceCost(resized, value("context"), value("prices"), value("price_tables")[value("prices")], network, parts);
  };
  const printed = (variant) =>
    value("cells").find((cell) => cell.variant === variant && [...SIZES, "context"].every((name) => cell[name] === value(name)));

  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "bytes and minutes by part" });
  const text = (x, y, words, more = {}) => svg.appendChild(make("text", { x, y, ...more }, words));
  const heading = text(0, 16, "", { style: "font-weight: 600; font-size: 15px" });
  const names = ROWS.map((y) => text(PANELS[0][0] - 10, y + THICK / 2 + 5, "", { "text-anchor": "end" }));
  const panels = PANELS.map(([left, right], k) => {
    text((left + right) / 2, BOTTOM + 40, ["communication (GB)", "latency (minutes)"][k], { "text-anchor": "middle" });
    const ticks = Array.from({ length: 6 }, () => [
      svg.appendChild(make("line", { y1: ROWS[0] - 8, y2: BOTTOM, class: "grid" })), text(0, BOTTOM + 18, "", { "text-anchor": "middle" })]);
    svg.append(make("line", { x1: left, x2: left, y1: ROWS[0] - 8, y2: BOTTOM, stroke: "currentColor" }));
    const rows = ROWS.map((y) => {
      const bars = parts.map((part) => {
        const bar = svg.appendChild(make("rect", { y, height: THICK, fill: colors[part], class: "entropy-part" }));
        return { bar, name: bar.appendChild(title("")) };
      });
      return { bars, sum: text(0, y + THICK / 2 + 5, ""), cross: text(0, y + THICK / 2 + 6, "✕", { "text-anchor": "middle", class: "entropy-cross" }) };
    });
    return { ticks, rows };
  });
  let x = 0, line = 0;
  for (const part of parts) { // the legend, in as many lines as it needs
    const wide = 42 + 7 * part.length;
    if (x + wide > WIDTH) (x = 0), line++;
    svg.append(make("rect", { x, y: BOTTOM + 62 + 20 * line, width: 12, height: 12, fill: colors[part] }));
    text(x + 18, BOTTOM + 73 + 20 * line, part);
    x += wide;
  }
  const words = make("div", { role: "status", "aria-live": "polite", class: "entropy-status" });

  const draw = () => {
    off(network, !paid());
    let costs;
    const variants = [value("variant"), BASELINE];
    try {
      costs = variants.map(cost);
    } catch (error) {
      words.textContent = error.message; // the bars of the last setting that has a price stay
      return;
    }
    const cells = variants.map(printed), sums = [];
    names.forEach((name, row) => (name.textContent = variants[row]));
    ["bytes", "minutes"].forEach((quantity, k) => {
      const scale = k ? 1 : 1e9, [left, right] = PANELS[k], { ticks, rows } = panels[k];
      const totals = costs.map((cost) => total(cost[quantity]) / scale);
      const marks = cells.map((cell) => cell?.values[k ? "latency_min" : "communication_gb"]);
      sums.push(totals);
      const known = !Number.isNaN(totals[0] + totals[1]);
      const reach = known ? 1.25 * Math.max(...totals, ...marks.map((mark) => mark ?? 0)) : 1;
      const at = (amount) => left + (amount / reach) * (right - left);
      const every = roundUp(reach / 6);
      ticks.forEach(([grid, label], n) => {
        const place = { visibility: known && n * every <= reach ? "visible" : "hidden" };
        set(grid, { ...place, x1: at(n * every), x2: at(n * every) });
        set(label, { ...place, x: at(n * every) }).textContent = significant(n * every);
      });
      rows.forEach(({ bars, sum, cross }, row) => {
        let from = 0;
        bars.forEach(({ bar, name }, n) => {
          const amount = known ? costs[row][quantity][parts[n]] / scale : 0;
          set(bar, { x: at(from), width: Math.max(0, at(from + amount) - at(from)) });
          name.textContent = `${parts[n]}: ${significant(amount)} ${k ? "min" : "GB"}`;
          from += amount;
        });
        const mark = known && marks[row] !== undefined ? marks[row] : undefined;
        set(cross, { x: at(mark ?? 0), visibility: mark === undefined ? "hidden" : "visible" });
        set(sum, { x: known ? Math.max(at(totals[row]), mark === undefined ? 0 : at(mark) + 8) + 7 : left + 8 });
        sum.textContent = known ? significant(totals[row]) : "not measured on this engine";
      });
    });
    const [[gb, baseGb], [minutes, baseMinutes]] = sums, [{ bytes }] = costs;
    heading.textContent = `${variants[0]} sends ${Math.round((100 * gb) / baseGb)}% of what ${BASELINE} sends`;
    const said = [`${significant(gb)} GB against ${significant(baseGb)}`];
    if (!Number.isNaN(minutes)) {
      const { includes_network: included } = value("price_tables")[value("prices")];
      const where = included ? "network included" : value("network") || "computation only";
      said.push(`${significant(minutes)} min against ${significant(baseMinutes)} (${where})`);
    }
    const dearest = Object.keys(bytes).reduce((best, part) => (bytes[part] > bytes[best] ? part : best));
    said.push(`${dearest} is ${Math.round((100 * bytes[dearest]) / total(bytes))}% of the bytes`);
    const tables = [...new Set(cells.filter(Boolean).map((cell) => cell.table))].sort();
    if (tables.length) said.push(`✕ printed in Table ${tables.join(", ")}`);
    words.textContent = said.join(" · ");
  };

  const same = (values, write = String) => Object.fromEntries(values.map((v) => [v, write(v)]));
  const number = (name, label, write) => choice(model, name, label, same(value("choices")[name], write), Number);
  const labels = Object.fromEntries(Object.entries(value("price_tables")).map(([name, { label }]) => [name, label]));
  const networks = { "": "none: computation only" };
  for (const { name, bandwidth, latency } of Object.values(value("networks"))) {
    networks[name] = `${name}: ${bandwidth / 1e6} Mbit/s, ${latency * 1e3} ms`;
  }
  const network = choice(model, "network", "network", networks);
  el.replaceChildren(
    make("style", {}, STYLE + BARS),
    module(
      make("div", { class: "controls" }, range(model, "layers", "layers L", 1, 48, 1, String), number("heads", "heads H"),
        number("width", "width d"), number("context", "tokens T"),
        number("vocabulary", "vocabulary V", (v) => (v ? v.toLocaleString("en") : "0: blocks only")),
        choice(model, "variant", "variant", same(Object.keys(value("architectures")))),
        choice(model, "prices", "prices", labels), network),
      words, svg),
  );
  const queue = onceAFrame(draw);
  for (const name of NAMES) model.on(`change:${name}`, queue);
  draw();
}

const BARS = `
.entropy-module rect.entropy-part { stroke: white; stroke-width: 1 }
.entropy-module svg text.entropy-cross { font-weight: 600; paint-order: stroke; stroke: white; stroke-width: 3px; fill: black }`;

export default { initialize: letChangesIn, render };
