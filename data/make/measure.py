"""`python data/make/measure.py`: bytes, seconds and rounds of operations and blocks under CHEETAH.

Every measurement is written as soon as it is done, and one that is on record is not repeated: Ctrl-C, then the same
command, goes on. Bytes and rounds are exact or nearly so on any machine; seconds are those of both parties on this
one, so the processor seconds of the busier party and the machine's load are recorded beside them.

A method (see `methods`) has a record of its own, of the operations that it computes in another way, and of blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Container, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path

import numpy as np

from entropy_lib.private_inference.architecture import Architecture, Operation, operations
from entropy_lib.private_inference.blocks import block_architectures, private_architectures
from entropy_lib.private_inference.methods import METHODS, apply_method, own_operations, prices_name
from entropy_lib.private_inference.parties import ENGINE, SETTINGS, run_plan
from entropy_lib.private_inference.two_party import forward_plan

DATA = Path(__file__).resolve().parent.parent
VOCABULARY = 4096  # of the embedding; prices are per element, and the engine takes over 20 GB of memory for 50,257
DELAY = 0.05  # seconds one way, injected to count rounds


def weight_shapes(a: Architecture, context_length: int) -> dict[str, list[int]]:
    """The server's weights for blocks without embedding and vocabulary, by the names of `forward_plan`."""
    d, inner, shapes = a.width, a.ffn_width, {}
    for layer in range(a.layers):
        dynamic = a.heads_of_layer(layer)
        pairs = {"qkv": (d, d + 2 * dynamic * (d // a.heads)), "attention_out": (d, d)}
        pairs["ffn_out"] = (d if a.fused else inner, d)
        if not a.fused:
            pairs["ffn_in"] = (d, 2 * inner if a.gated or a.activation == "bilinear" else inner)
        if dynamic < a.heads:
            shapes[f"{layer}.filters"] = [a.heads - dynamic, context_length, context_length]
        for name, (inputs, outputs) in pairs.items():
            shapes |= {f"{layer}.{name}.weight": [inputs, outputs], f"{layer}.{name}.bias": [outputs]}
        for name in ("norm1", "norm2") * (a.layer_norm and a.norm == "layernorm"):
            shapes |= {f"{layer}.{name}.weight": [d], f"{layer}.{name}.bias": [d]}
        if a.tempered:
            shapes[f"{layer}.query_scale"] = [a.heads, context_length, 1]
        if a.scaled and a.layer_norm:
            shapes[f"{layer}.beta"] = [context_length, 1]
    return shapes


def operation_plan(operation: Operation) -> dict:
    """One operation alone, its activations shared between the parties and its weights the server's."""
    shape, name = list(operation.shape), operation.name
    server = {}
    if name in ("linear", "embed"):
        rows, inputs, outputs = shape
        shared = {"x": [rows, inputs]}
        server = {"weight": [inputs, outputs], "bias": [rows, outputs] if name == "embed" else [outputs]}
    elif name in ("scores", "mix"):
        square = [shape[0], shape[1], shape[1]]
        shared = {"x": shape if name == "scores" else square, "y": shape}
    elif name == "bilinear":
        shared = {"x": [*shape[:-1], 2 * shape[-1]]}
    else:
        shared = {"x": shape}
        if name == "layernorm":
            server = {"gain": shape[-1:], "bias": shape[-1:]}
        elif name == "static":
            server = {"filters": [*shape[:-1], shape[-2]]}
        elif name == "multiply":
            server = {"scale": [*shape[:-1], 1]}
    inputs = {
        n: {"owner": "client", "shape": s, "dtype": "float32", "shared": name != "embed"} for n, s in shared.items()
    }
    inputs |= {n: {"owner": "server", "shape": s, "dtype": "float32"} for n, s in server.items()}
    step = {"part": operation.part, "operation": name, "inputs": list(inputs), "outputs": ["y"]}
    return {"inputs": inputs, "steps": [step], "outputs": []}


def random_values(plan: dict) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    values = {}
    for name, spec in plan["inputs"].items():
        values[name] = generator.standard_normal(spec["shape"], dtype=np.float32)
        if spec["owner"] == "server":
            values[name] *= 0.02
    return values


def tasks(context_length: int, method: str = "as given") -> Iterator[tuple[str, str, dict, float]]:
    """(section, name, plan, delay): operations at the paper's shapes; for T = 128 also blocks, and rounds in small."""
    own = own_operations(method)
    blocks, private = block_architectures(), private_architectures()
    kinds = [Architecture(vocabulary=VOCABULARY), *(a for a in blocks.values() if a.norm == "layernorm")]
    more = [*(a for a in blocks.values() if a.norm != "layernorm"), *private.values()]
    wanted = {(o.name, o.shape): o for a in kinds for o in operations(a, context_length)}
    if method == "as given":  # of Llama's and the private family's, what no other has
        named = {name for name, _ in wanted}
        beyond = [o for a in more for o in operations(a, context_length) if o.name not in named]
        wanted |= {(o.name, o.shape): o for o in beyond}
    else:
        blocks |= private
        wanted |= {(o.name, o.shape): o for a in more for o in operations(a, context_length)}
    kinds += more
    wanted = {key: o for key, o in wanted.items() if o.part != "vocabulary projection"}  # linear like the others
    wanted = {key: o for key, o in wanted.items() if o.shape != (256, 768, 6144)}  # takes over 20 GB of memory
    if context_length == 128:
        for extra in (  # other widths, to tell the units apart
            Operation("LayerNorm", "layernorm", (128, 256)),
            Operation("RMSNorm", "rmsnorm", (128, 256)),
            Operation("embedding", "embed", (128, 1024, 768)),
        ):
            wanted[extra.name, extra.shape] = extra
    if method != "as given":
        wanted = {key: o for key, o in wanted.items() if o.name in own}
    for operation in sorted(wanted.values(), key=lambda o: (o.name in ("linear", "embed"), math.prod(o.shape))):
        yield "operations", label(operation), operation_plan(operation), 0.0
    if context_length == 128:  # a block costs what its operations cost: those at one length show that
        for name, architecture in blocks.items():
            plan = forward_plan(architecture, weight_shapes(architecture, context_length), context_length)
            yield "blocks", f"{name}, T={context_length}", {**plan, "outputs": []}, 0.0
        for delay in (0.0, DELAY):
            yield "rounds", f"{delay:g} s one way", rounds_plan(kinds, own), delay


def rounds_plan(kinds: list[Architecture], only: Container[str] = ()) -> dict:
    """Every operation (or `only` some) once, on a small shape: rounds do not grow with the size, but for the maximum
    over T keys."""
    total = {"inputs": {}, "steps": [], "outputs": []}
    for name, operation in {o.name: o for a in kinds for o in operations(a, 128)}.items():
        if only and name not in only:
            continue
        shape = (1, *operation.shape[1:]) if len(operation.shape) == 3 else (16, 64)
        plan = operation_plan(Operation(operation.part, name, (16, 64, 64) if name in ("linear", "embed") else shape))
        total["inputs"] |= {f"{name} {source}": spec for source, spec in plan["inputs"].items()}
        step = plan["steps"][0]
        total["steps"].append({**step, "inputs": [f"{name} {source}" for source in step["inputs"]]})
    return total


def label(operation: Operation) -> str:
    return f"{operation.name} {'×'.join(map(str, operation.shape))}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python data/make/measure.py", description=__doc__)
    parser.add_argument("--context-length", type=int, nargs="+", default=[128, 256], metavar="T")
    parser.add_argument("--only", default="", help="measurements whose section and name contain this")
    parser.add_argument("--methods", nargs="+", default=["as given"], choices=METHODS)
    parser.add_argument("--output", type=Path, help="the record; by default each method has its own in data/")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds a measurement may take")
    options = parser.parse_args(arguments)
    if options.output and len(options.methods) > 1:
        parser.error("--output holds the record of one method")
    try:
        for method in options.methods:
            record = DATA / "private_inference" / f"measured-{prices_name(method)}.json"
            measure_method(method, options.output or record, options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure_method(method: str, output: Path, options: argparse.Namespace) -> None:
    record = {"operations": {}, "rounds": {}, "blocks": {}}
    if output.exists():
        record |= read_record(output)
    record |= {
        "engine": f"spu {ENGINE}, CHEETAH", "method": method, "settings": {**SETTINGS, **METHODS[method].engine},
        "command": "python data/make/measure.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
        "date": str(date.today()),
    }  # fmt: skip
    if method != "as given":
        record["command"] += f' --methods "{method}"'
    todo = [t for length in options.context_length for t in tasks(length, method) if options.only in " ".join(t[:2])]
    todo = [task for task in todo if task[1] not in record[task[0]]]
    for number, (section, name, plan, delay) in enumerate(todo, 1):
        load, where = os.getloadavg()[0], f"[{number}/{len(todo)}] {name}"
        plan, values = apply_method(plan, random_values(plan), method)

        def progress(done, total, where=where):
            print(f"{where}: step {done} of {total}", file=sys.stderr, flush=True)

        _, steps = run_plan(
            plan, values, "CHEETAH", timeout=options.timeout, delay=delay,
            progress=progress if len(plan["steps"]) > 1 else None,
        )  # fmt: skip
        sums = {key: sum(step[key] for step in steps) for key in ("bytes", "seconds", "cpu_seconds", "messages")}
        sums = {key: round(value, 3) for key, value in sums.items()} | {"load_before": round(load, 2)}
        if section == "operations":
            step = plan["steps"][0]
            shape = [int(size) for size in name.split(" ")[1].split("×")]
            sums = {"part": step["part"], "operation": step["operation"], "shape": shape, **sums}
        else:
            sums["steps"] = [{k: round(v, 3) if isinstance(v, float) else v for k, v in s.items()} for s in steps]
            sums["delay"] = delay
        record[section][name] = sums
        write(output, record)
        print(f"{where}: {sums['bytes'] / 1e6:.2f} MB, {sums['seconds']:.1f} s", flush=True)


def read_record(path: Path) -> dict:
    with suppress(ValueError):
        record = json.loads(path.read_text())
        if isinstance(record, dict) and {"operations", "rounds", "blocks"} <= set(record):
            return record
    raise ValueError(f"{path} is no whole record of measurements: move it away, or choose another --output")


def write(path: Path, record: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    draft.replace(path)


if __name__ == "__main__":
    sys.exit(main())
