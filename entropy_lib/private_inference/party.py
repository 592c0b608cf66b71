"""One process of a private inference: `python party.py JOB.json`, with the interpreter that `make private` sets up.

The engine pins an old numpy and jax, so this file imports nothing of entropy_lib and entropy_lib does not import it:
`two_party` starts it, hands it a job as JSON and its own inputs as npz, and reads its steps and outputs back.

A job is a plan, the public part of an inference: named inputs with shape and owner, and steps that call the functions
of OPERATIONS on named values. Rank 0 is the client, rank 1 the server; "both" runs the two as threads (simulator).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from io import BytesIO
from itertools import product
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


# ---- the forward pass, one function a step; [T, d] activations, [heads, T, ...] inside attention


def embed(one_hot, tokens, positions):
    return one_hot @ tokens + positions


def linear(x, weight, bias=None):
    return x @ weight if bias is None else x @ weight + bias


def heads(qkv, count):
    """[T, 3d] -> query, key, value, [count, T, d/count] each; moves data only."""
    parts = jnp.split(qkv, 3, axis=-1)
    return tuple(part.reshape(part.shape[0], count, -1).swapaxes(0, 1) for part in parts)


def multiply(x, y):
    return x * y


def scores(query, key):
    return query @ key.swapaxes(1, 2)


def mix(attention, value):
    mixed = attention @ value
    return mixed.swapaxes(0, 1).reshape(mixed.shape[1], -1)


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


def square_attention(scores):
    return _over_visible(scores * scores)


def layernorm(x, gain, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * gain + bias


def gelu(x):
    return jax.nn.gelu(x, approximate=True)


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


OPERATIONS = {
    f.__name__.lstrip("_"): f
    for f in (embed, linear, heads, multiply, scores, mix, add, softmax, relu_attention, square_attention, layernorm,
              gelu, relu, relu2, square, _bilinear)
}  # fmt: skip


# ---- the engine


class Engine:
    """One rank of the engine: values by name, a compiled program a (function, shapes), and what each run cost."""

    def __init__(self, rank: int, link, config, options, log: Path):
        self.rank, self.link, self.log = rank, link, log
        self.runtime, self.io = api.Runtime(link, config), api.Io(2, config)
        self.options, self.programs, self.shapes, self.read = options, {}, {}, 0

    def put(self, name: str, spec: dict, values: dict) -> None:
        """An input. The owner keeps its values to itself; with "shared" it sends the other rank a random share."""
        owner = ("client", "server").index(spec["owner"])
        array = values[name] if self.rank == owner else np.zeros(spec["shape"], spec["dtype"])
        if list(array.shape) != spec["shape"] or str(array.dtype) != spec["dtype"]:
            raise ValueError(f"input {name} is {array.dtype}{list(array.shape)}, the plan says {spec}")
        if not spec.get("shared"):
            share = self.io.make_shares(array, SECRET, owner)[self.rank]  # of zeros, on the other side: no data
        elif self.rank == owner:
            shares = self.io.make_shares(array, SECRET)
            share = shares[self.rank]
            self.link.send(1 - self.rank, pack(shares[1 - self.rank]))
        else:
            share = unpack(self.link.recv(owner))
        self.runtime.set_var(name, share)
        self.shapes[name] = (tuple(spec["shape"]), spec["dtype"])

    def run(self, step: dict) -> dict:
        """Run one step; returns its bytes both ways, seconds, messages sent, and this process's CPU seconds."""
        shapes = [self.shapes[name] for name in step["inputs"]]
        key = (step["operation"], json.dumps(step.get("constants", {})), *shapes)
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
        sent, received, messages = self.traffic()
        return {"seconds": wall, "cpu_seconds": cpu, "bytes": sent + received, "messages": messages}

    def compile(self, step: dict, shapes: list):
        function, constants = OPERATIONS[step["operation"]], step.get("constants", {})
        examples = [np.zeros(shape, dtype) for shape, dtype in shapes]
        names = [f"in{index}" for index in range(len(examples))]
        program, out = frontend.compile(
            frontend.Kind.JAX, lambda *values: function(*values, **constants), examples, {}, names,
            [SECRET] * len(names), lambda flat: [f"out{index}" for index in range(len(flat))], copts=self.options,
        )  # fmt: skip
        return program, [(tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree_util.tree_leaves(out)]

    def traffic(self) -> tuple[int, int, int]:
        """(sent, received, messages) of the last run, from the engine's log: it has no other way to ask."""
        if self.log is None:
            return 0, 0, 0
        for _ in range(1000):
            with self.log.open() as file:
                file.seek(self.read)
                text = file.read()
            found = LINK.findall(text)
            if found and text.endswith("\n"):
                self.read += len(text.encode())
                return int(found[-1][0]), int(found[-1][1]), int(found[-1][2])
            time.sleep(0.002)
        raise RuntimeError(f"the engine's log {self.log.name} does not say what was sent: another version of spu?")

    def reveal(self, name: str) -> np.ndarray | None:
        """The value, at the client: the server sends its share and learns nothing."""
        mine = self.runtime.get_var(name)
        if self.rank == 1:
            self.link.send(0, pack(mine))
            return None
        return self.io.reconstruct([mine, unpack(self.link.recv(1))])


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
    if job["rank"] == "both":
        threads = [
            threading.Thread(target=simulate, args=(rank, job, config, options, values, folder)) for rank in (0, 1)
        ]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return
    description = libspu.link.Desc()
    description.recv_timeout_ms = description.http_timeout_ms = int(job["timeout"] * 1000)
    description.connect_retry_times, description.connect_retry_interval_ms = 150, 200
    for rank, address in enumerate(job["addresses"]):
        description.add_party(f"party{rank}", address)
    link = libspu.link.create_brpc(description, job["rank"])
    run_plan(Engine(job["rank"], link, config, options, log), job, values, folder)
    link.stop_link()


def simulate(rank, job, config, options, values, folder):
    try:
        description = libspu.link.Desc()
        description.recv_timeout_ms = int(job["timeout"] * 1000)
        for other in (0, 1):
            description.add_party(f"party{other}", f"thread{other}")
        own = libspu.RuntimeConfig(config)
        if rank:  # one writer, so that the log says whose traffic it is
            own.enable_pphlo_profile = own.enable_hal_profile = False
        engine = Engine(
            rank, libspu.link.create_mem(description, rank), own, options, None if rank else folder / "engine.log"
        )
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
