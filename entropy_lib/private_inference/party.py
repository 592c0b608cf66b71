"""One process of a private inference: `python party.py JOB.json`, with the interpreter that `make private` sets up.

The engine pins an old numpy and jax, so this file imports nothing of entropy_lib and entropy_lib does not import it:
`two_party` starts it, hands it a job as JSON and its own inputs as npz, and reads its steps and outputs back.

A job is a plan, the public part of an inference: named inputs with shape and owner, and steps that call the functions
of OPERATIONS on named values: a step's "function" or, if it has none, its "operation". Rank 0 is the client, rank 1
the server, rank 2 of ABY3 a helper; "all" runs them as threads (simulator).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from io import BytesIO
from itertools import pairwise, product
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import re

import jax
import jax.numpy as jnp
import numpy as np
from spu import api, libspu
from spu.utils import frontend

SECRET = libspu.Visibility.VIS_SECRET
LINK = re.compile(r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)")
FLOOR = -14.0  # exp below it is cut to 0: 8e-7, a fifth of the last of 18 fractional bits
FAST_FLOOR = -10.0  # of `packed_softmax`: 5e-5


# ---- the forward pass, one function a step; [T, d] activations, [heads, T, ...] inside attention


def embed(one_hot, tokens, positions=None):
    return one_hot @ tokens if positions is None else one_hot @ tokens + positions


def linear(x, weight, bias=None):
    return x @ weight if bias is None else x @ weight + bias


def heads(qkv, count, dynamic):
    """[T, 2·dynamic·size + d] -> query, key, [dynamic, T, size] each (none without dynamic heads), and value,
    [count, T, size]; moves data only."""
    size = qkv.shape[-1] // (2 * dynamic + count)
    parts = jnp.split(qkv, [dynamic * size, 2 * dynamic * size], axis=-1)
    parts = [part.reshape(part.shape[0], -1, size).swapaxes(0, 1) for part in parts]
    return tuple(parts) if dynamic else parts[-1]


def grouped_heads(qkv, size, keys, values):
    """[T, (queries + some groups + all groups)·size] -> queries and keys, unless there are none, and values, [heads, T,
    size] each: `keys` says which of the key groups each query has, `values` which value group each head. Moves data
    only."""
    queries, groups = len(keys), max(keys, default=-1) + 1
    parts = jnp.split(qkv, [queries * size, (queries + groups) * size], axis=-1)
    query, key, value = (part.reshape(part.shape[0], -1, size).swapaxes(0, 1) for part in parts)
    value = value[np.array(values)]
    return (query, key[np.array(keys)], value) if queries else value


def rotary(x, frequencies):
    """Turns pairs of columns, half a head apart, by the position times a frequency: the first 2·len(frequencies)
    columns, by public numbers."""
    turned = 2 * len(frequencies)
    angles = np.arange(x.shape[-2])[:, None] * np.array([*frequencies, *frequencies])
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second, rest = jnp.split(x, [turned // 2, turned], axis=-1)
    pairs, across = jnp.concatenate([first, second], -1), jnp.concatenate([-second, first], -1)
    return jnp.concatenate([pairs * cos + across * sin, rest], -1)


def head_gain(x, gain):
    """Scales the columns of every head, by the server's numbers as a matrix."""
    return (x.reshape(-1, x.shape[-1]) @ gain).reshape(x.shape)


def halves(x):
    return tuple(jnp.split(x, 2, axis=-1))


def multiply(x, y):
    return x * y


def scores(query, key):
    return query @ key.swapaxes(1, 2)


def mix(attention, value):
    """Of the first heads, as many as have attention; [T, heads·size]."""
    mixed = attention @ value[: len(attention)]
    return mixed.swapaxes(0, 1).reshape(mixed.shape[1], -1)


def static(value, filters):
    """Static heads, which are the last: `mix` by matrices of the server's."""
    return mix(filters, value[-len(filters) :])


def last(x, count):
    return x[-count:]


def join(x, y):
    return jnp.concatenate([x, y], axis=-1)


def add(x, y):
    return x + y


def softmax(scores):
    """Causal. Masked scores stay out of the maximum and of the sum by public selections, which cost nothing.

    The engine's Taylor exponential, (1 + z/64)^64, is garbage for z < -64; garbage times 0 is 0 in the ring, so that
    cutting afterwards is exact, whatever the scores are. They must stay above -4096.
    """
    visible = np.tril(np.ones(scores.shape[-2:], dtype=bool))
    z = jnp.where(visible, scores, np.float32(-4096.0))
    z = jnp.where(visible, scores - z.max(-1, keepdims=True), np.float32(0.0))
    weights = jnp.where(z > FLOOR, jnp.exp(z), np.float32(0.0))
    weights = jnp.where(visible, weights, np.float32(0.0))
    return weights / weights.sum(-1, keepdims=True)


def _over_visible(weights):
    """Causal and divided by the number of visible keys, which is public: what stands in for a softmax."""
    visible = np.tril(np.ones(weights.shape[-2:], dtype=np.float32))
    return weights * (visible / visible.sum(-1, keepdims=True))


def relu_attention(scores):
    return _over_visible(jnp.maximum(scores, 0.0))


def relu2_attention(scores):
    return _over_visible(relu2(scores))


def square_attention(scores):
    return _over_visible(scores * scores)


def layernorm(x, gain, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * gain + bias


def rmsnorm(x, epsilon=1e-5):
    """Its gain is in the next matrix. As of all norms here a row's mean square must stay below 2¹⁷, a root of 362: the
    engine's rsqrt is wrong beyond."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)


def gelu(x):
    return jax.nn.gelu(x, approximate=True)


def silu(x):
    return jax.nn.silu(x)


def relu(x):
    return jnp.maximum(x, 0.0)


def relu2(x):
    kept = jnp.maximum(x, 0.0)
    return kept * kept


def square(x):
    return x * x


def _bilinear(x):
    left, right = jnp.split(x, 2, axis=-1)
    return left * right


# ---- the same for fewer bytes (see `methods`); they need the engine's fxp_exp_iters to be 1

SLOTS = 8192  # elements of a ciphertext; two threads fill one each, so that 3·SLOTS elements at once would take four


def _in_pieces(operation, *values):
    """`operation` elementwise: on whole pairs of ciphertexts, on a whole one that is left, and on the rest."""
    flat = [value.reshape(-1) for value in values]
    cuts = [0, *(flat[0].size // unit * unit for unit in (2 * SLOTS, SLOTS)), None]
    parts = [operation(*(value[slice(*ends)] for value in flat)) for ends in pairwise(cuts)]
    return jnp.concatenate(parts).reshape(values[0].shape)


def _product(x, y):
    return _in_pieces(jnp.multiply, x, y)


def fast_square(x):
    """x² by the engine's own squaring, 109 bytes against 168 of x·x. With fxp_exp_iters = 1 its exp(z) is (1 + z/2)²,
    and jax has no other way to ask for it. What fills less than half a ciphertext is cheaper as a product."""
    return _in_pieces(lambda part: part * part if part.size < SLOTS // 2 else jnp.exp(part + part - 2.0), x)


def fast_relu2(x):
    return fast_square(jnp.maximum(x, 0.0))


def _quartic(x, numbers):
    """Any polynomial of degree 4, in two squarings: q·((x + h)² + k)² + m·x + c."""
    q, h, k, m, c = map(np.float32, numbers)
    return q * fast_square(fast_square(x + h) + k) + m * x + c


def segments(x, quartic, bound):
    """GELU or SiLU: max(x, 0) less an even function of x, which is a polynomial of |x| up to `bound` and constant
    beyond."""
    kept = jnp.maximum(x, 0.0)
    return kept - _quartic(jnp.minimum(kept + kept - x, np.float32(bound)), quartic)


def _pack(square):
    """[heads, T, T] -> [heads, T·(T + 1)/2], the visible half, row by row; moves data only."""
    return square[(slice(None), *np.tril_indices(square.shape[-1]))]


def _unpack(packed, length):
    """The inverse of `_pack`, 0 where nothing is visible."""
    place = np.full((length, length), packed.shape[-1])
    place[np.tril_indices(length)] = np.arange(packed.shape[-1])
    return jnp.pad(packed, ((0, 0), (0, 1)))[:, place]


def _row_max(packed, length):
    """[heads, T]: each row halved until one is left, comparing only what is there."""
    lengths = np.arange(1, length + 1)
    while lengths.max() > 1:
        kept = (lengths + 1) // 2
        row = np.repeat(np.arange(length), kept)
        place = np.arange(len(row)) - (np.cumsum(kept) - kept)[row]
        left = place + (np.cumsum(lengths) - lengths)[row]
        paired = place + kept[row] < lengths[row]
        first, second = left[paired], (left + kept[row])[paired]
        found = jnp.concatenate([jnp.maximum(packed[:, first], packed[:, second]), packed[:, left[~paired]]], axis=1)
        packed = found[:, np.argsort(np.argsort(~paired, kind="stable"), kind="stable")]
        lengths = kept
    return packed


def _exponential(z, quartic, squarings):
    """Polynomial(z / 2ⁿ)^(2ⁿ), n = squarings."""
    power = _quartic(z * np.float32(0.5**squarings), quartic)
    for _ in range(squarings):
        power = fast_square(power)
    return power


def packed_softmax(scores, quartic, squarings):
    """`softmax` on the visible half, for any scores above -4096 and a polynomial that is good from FAST_FLOOR to 0."""
    length = scores.shape[-1]
    row = np.tril_indices(length)[0]
    packed = _pack(scores)
    z = packed - _row_max(packed, length)[:, row]
    weights = jnp.where(z > FAST_FLOOR, _exponential(z, quartic, squarings), np.float32(0.0))
    inverse = np.float32(1.0) / _unpack(weights, length).sum(-1)
    return _unpack(_product(weights, inverse[:, row]), length)


def bounded_softmax(scores, quartic, squarings):
    """The same without a comparison: the row's mean, which is public arithmetic, in place of its maximum. Only for
    scores whose distance to that mean is within what the polynomial is good for. It may give any fixed multiple of the
    exponential: a small one, so that neither large weights nor the reciprocals of their means lose their digits."""
    length = scores.shape[-1]
    row = np.tril_indices(length)[0]
    share = (1 / np.arange(1, length + 1)).astype(np.float32)  # of each key in its row's mean
    visible = np.tril(np.ones((length, length), dtype=bool))
    mean = jnp.where(visible, scores, np.float32(0.0)).sum(-1) * share
    weights = _exponential(_pack(scores) - mean[:, row], quartic, squarings)
    inverse = np.float32(1.0) / (_unpack(weights, length).sum(-1) * share)
    return _unpack(_product(weights, inverse[:, row]) * share[row], length)


def _packed_over_visible(weights, length):
    return _unpack(weights * (1 / (1 + np.tril_indices(length)[0])).astype(np.float32), length)


def packed_relu_attention(scores):
    return _packed_over_visible(jnp.maximum(_pack(scores), 0.0), scores.shape[-1])


def packed_relu2_attention(scores):
    return _packed_over_visible(fast_relu2(_pack(scores)), scores.shape[-1])


def packed_square_attention(scores):
    return _packed_over_visible(fast_square(_pack(scores)), scores.shape[-1])


def scale_rows(x, scale):
    """`multiply` by one number a row, as a product with a diagonal matrix: fewer bytes, more of the processor."""
    return jnp.where(np.eye(x.shape[-2], dtype=bool), scale, np.float32(0.0)) @ x


def normalize(x, centre=True, epsilon=1e-5):
    """`layernorm`, or `rmsnorm` if not `centre`, whose gain and bias went into the next matrix. The squares are summed
    as the diagonal of c·cᵀ, 128 rows at a time, and must stay below 2²⁷: rows of 768 may have a standard deviation of
    300.

    1/d has few digits in fixed point, so the mean is taken twice, which costs nothing, and 1/d in two factors.
    """
    width, rows = x.shape[-1], x.size // x.shape[-1]
    block = 128 if rows % 128 == 0 else x.shape[-2]
    power = 2 ** (width.bit_length() - 1)
    for _ in range(2 * centre):
        x = x - x.mean(-1, keepdims=True)
    centred = x.reshape(-1, block, width)
    diagonal = np.eye(block, dtype=np.float32) * np.float32(power / width)
    squares = (centred @ centred.swapaxes(1, 2) * diagonal).sum(-1, keepdims=True) / power
    return scale_rows(centred, jax.lax.rsqrt(squares + epsilon)).reshape(x.shape)


OPERATIONS = {
    f.__name__.lstrip("_"): f
    for f in (embed, linear, heads, grouped_heads, rotary, head_gain, halves, multiply, scores, mix, static, join, last,
              add, softmax, relu_attention, relu2_attention, square_attention, layernorm, rmsnorm, gelu, silu, relu,
              relu2, square, _bilinear, fast_square, fast_relu2, segments, packed_softmax, bounded_softmax,
              packed_relu_attention, packed_relu2_attention, packed_square_attention, scale_rows, normalize)
}  # fmt: skip


# ---- the engine


class Engine:
    """One rank of the engine: values by name, a compiled program a (function, shapes), and what each run cost."""

    def __init__(self, rank: int, ranks: int, link, config, options, log: Path):
        self.rank, self.others, self.link, self.log = rank, [r for r in range(ranks) if r != rank], link, log
        self.runtime, self.io = api.Runtime(link, config), api.Io(ranks, config)
        self.options, self.programs, self.shapes, self.read = options, {}, {}, 0

    def put(self, name: str, spec: dict, values: dict) -> None:
        """An input. The owner keeps its values to itself; with "shared" it sends the others random shares."""
        owner = ("client", "server").index(spec["owner"])
        array = values[name] if self.rank == owner else np.zeros(spec["shape"], spec["dtype"])
        if list(array.shape) != spec["shape"] or str(array.dtype) != spec["dtype"]:
            raise ValueError(f"input {name} is {array.dtype}{list(array.shape)}, the plan says {spec}")
        if not spec.get("shared"):
            share = self.io.make_shares(array, SECRET, owner)[self.rank]  # of zeros, on the other side: no data
        elif self.rank == owner:
            shares = self.io.make_shares(array, SECRET)
            share = shares[self.rank]
            for other in self.others:
                self.link.send(other, pack(shares[other]))
        else:
            share = unpack(self.link.recv(owner))
        self.runtime.set_var(name, share)
        self.shapes[name] = (tuple(spec["shape"]), spec["dtype"])

    def run(self, step: dict) -> dict:
        """Run one step; returns its bytes (what all parties sent), seconds, messages sent (by this rank; of three
        parties by all), and this process's CPU seconds."""
        shapes = [self.shapes[name] for name in step["inputs"]]
        key = (step.get("function", step["operation"]), json.dumps(step.get("constants", {})), *shapes)
        if key not in self.programs:
            self.programs[key] = self.compile(step, shapes)
        program, outputs = self.programs[key]
        for slot, name in zip(program.input_names, step["inputs"], strict=True):
            self.runtime.set_var(slot, self.runtime.get_var(name))
        self.link.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        self.runtime.run(program)
        self.link.barrier()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        for slot, name, shape in zip(program.output_names, step["outputs"], outputs, strict=True):
            self.runtime.set_var(name, self.runtime.get_var(slot))
            self.shapes[name] = shape
        for name in [*program.input_names, *program.output_names, *step.get("last_use", [])]:
            self.runtime.del_var(name)
        sent, messages = self.traffic()
        return {"seconds": wall, "cpu_seconds": cpu, "bytes": sent, "messages": messages}

    def compile(self, step: dict, shapes: list):
        function, constants = OPERATIONS[step.get("function", step["operation"])], step.get("constants", {})
        examples = [np.zeros(shape, dtype) for shape, dtype in shapes]
        names = [f"in{index}" for index in range(len(examples))]
        program, out = frontend.compile(
            frontend.Kind.JAX, lambda *values: function(*values, **constants), examples, {}, names,
            [SECRET] * len(names), lambda flat: [f"out{index}" for index in range(len(flat))], copts=self.options,
        )  # fmt: skip
        return program, [(tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree_util.tree_leaves(out)]

    def traffic(self) -> tuple[int, int]:
        """(bytes, messages) of the last run, from the engine's log: it has no other way to ask. Of two parties this one
        writes, what it sent and received; three write into one log, what each sent, since who sends how much is drawn.
        """
        if self.log is None:
            return 0, 0
        writers = len(self.others) + 1 if len(self.others) > 1 else 1
        for _ in range(1000):
            with self.log.open() as file:
                file.seek(self.read)
                text = file.read()
            found = LINK.findall(text)
            if len(found) >= writers and text.endswith("\n"):
                self.read += len(text.encode())
                last = [tuple(map(int, line)) for line in found[-writers:]]
                return sum(sent + received * (writers == 1) for sent, received, *_ in last), sum(
                    m for _, _, m, _ in last
                )
            time.sleep(0.002)
        raise RuntimeError(f"the engine's log {self.log.name} does not say what was sent: another version of spu?")

    def reveal(self, name: str) -> np.ndarray | None:
        """The value, at the client: the others send their shares and learn nothing."""
        mine = self.runtime.get_var(name)
        if self.rank:
            self.link.send(0, pack(mine))
            return None
        return self.io.reconstruct([mine, *(unpack(self.link.recv(other)) for other in self.others)])


def pack(share) -> bytes:
    """A share as bytes; npz, not pickle, since the other side is not trusted."""
    buffer = BytesIO()
    chunks = [np.frombuffer(chunk, np.uint8) for chunk in share.share_chunks]
    np.savez(buffer, np.frombuffer(share.meta, np.uint8), *chunks)
    return buffer.getvalue()


def unpack(data: bytes):
    with np.load(BytesIO(data), allow_pickle=False) as arrays:
        meta, *chunks = (arrays[f"arr_{index}"].tobytes() for index in range(len(arrays.files)))
    share = libspu.Share()
    share.meta, share.share_chunks = meta, chunks
    return share


def run_plan(engine: Engine, job: dict, values: dict, folder: Path) -> None:
    plan = job["plan"]
    for name, spec in plan["inputs"].items():
        engine.put(name, spec, values)
    for owner, (name, size) in product(("client", "server"), (("warm", 8), ("wide", 128))):
        spec = {"owner": owner, "shape": [size, size], "dtype": "float32"}
        engine.put(f"{name} {owner}", spec, {f"{name} {owner}": np.eye(size, dtype=np.float32)})
    for step in WARM_UP:
        engine.run(step)
    with (folder / "steps.jsonl").open("w") if engine.log else open(os.devnull, "w") as steps:
        for step in plan["steps"]:
            cost = engine.run(step)
            steps.write(json.dumps({"part": step["part"], "operation": step["operation"], **cost}) + "\n")
            steps.flush()
    outputs = {name: engine.reveal(name) for name in plan["outputs"]}
    if engine.rank == 0:
        np.savez(folder / "outputs.npz", **outputs)
    engine.link.barrier()


# Keys and correlations are set up at first use: not a cost of inference. A softmax uses every kind of them.
WARM_UP = [
    {"operation": "linear", "inputs": ["warm client", "warm server"], "outputs": ["warm"]},
    {"operation": "linear", "inputs": ["warm", "warm server"], "outputs": ["warm"]},
    {"operation": "linear", "inputs": ["warm", "warm"], "outputs": ["warm"]},
    {"operation": "softmax", "inputs": ["warm"], "outputs": ["warm"]},
    {"operation": "multiply", "inputs": ["wide client", "wide server"], "outputs": ["wide"]},  # wide enough for two
    {"operation": "relu", "inputs": ["wide"], "outputs": ["wide"]},  # threads, which have transfers of their own
]


def main(path: Path) -> None:
    job, folder = json.loads(path.read_text()), path.parent
    threading.Thread(target=end_with_parent, daemon=True).start()
    with np.load(folder / "inputs.npz", allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in arrays.files}
    log = folder / "engine.log"
    log.touch()
    logging = libspu.logging.LogOptions()
    logging.system_log_path, logging.enable_console_logger = str(log), False
    libspu.logging.setup_logging(logging)
    config, options = libspu.RuntimeConfig(), libspu.CompilerOptions()
    if not config.ParseFromJsonString(json.dumps(job["engine"])):
        raise ValueError(f"the engine does not understand {job['engine']}")
    options.enable_optimize_denominator_with_broadcast = True  # one reciprocal a row of the softmax, not T
    if job["rank"] == "all":
        arguments = job, config, options, values, folder
        threads = [threading.Thread(target=simulate, args=(rank, *arguments)) for rank in range(job["ranks"])]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return
    description = libspu.link.Desc()
    description.recv_timeout_ms = description.http_timeout_ms = int(job["timeout"] * 1000)
    description.connect_retry_times, description.connect_retry_interval_ms = 150, 200
    for rank, address in enumerate(job["addresses"]):
        description.add_party(f"party{rank}", address)
    link = libspu.link.create_brpc(description, job["rank"])
    run_plan(Engine(job["rank"], 2, link, config, options, log), job, values, folder)
    link.stop_link()


def simulate(rank, job, config, options, values, folder):
    try:
        description = libspu.link.Desc()
        description.recv_timeout_ms = int(job["timeout"] * 1000)
        for other in range(job["ranks"]):
            description.add_party(f"party{other}", f"thread{other}")
        own = libspu.RuntimeConfig(config)
        if rank and job["ranks"] == 2:  # one writer, so that the log says whose traffic it is
            own.enable_pphlo_profile = own.enable_hal_profile = False
        link, log = libspu.link.create_mem(description, rank), None if rank else folder / "engine.log"
        engine = Engine(rank, job["ranks"], link, own, options, log)
        run_plan(engine, job, values, folder)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)  # the other thread waits for this one


def end_with_parent() -> None:
    """Leave when the process that started this one has closed our standard input, or is gone."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
