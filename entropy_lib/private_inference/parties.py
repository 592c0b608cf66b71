"""Start the parties of a private inference, watch them, and leave no process behind."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from entropy_lib.clone import CLONE
from entropy_lib.private_inference.network import Relay

PARTY = Path(__file__).with_name("party.py")
VARIABLE = "ENTROPY_LIB_PRIVATE_PYTHON"
ENGINE = "0.9.5"
PROTOCOLS = ("SEMI2K", "CHEETAH", "ABY3")

# Lean settings: an error in the last bit of a product allowed, which halves its cost; products with a
# value that one party knows done by that party; (1 + z/64)^64 for the exponential.
SETTINGS = {
    "field": "FM64",
    "fxp_fraction_bits": 18,
    "fxp_exp_mode": "EXP_TAYLOR",
    "fxp_exp_iters": 6,
    "cheetah_2pc_config": {"enable_mul_lsb_error": True},
    "experimental_enable_colocated_optimization": True,
    "enable_pphlo_profile": True,
    "enable_hal_profile": True,
}


def private_python() -> str:
    """The interpreter of the parties: $ENTROPY_LIB_PRIVATE_PYTHON, else the one that `make private` sets up.

    Raises ImportError, saying what to do, if there is none or the engine (spu 0.9.5) is not installed there.
    """
    chosen = os.environ.get(VARIABLE)
    python = Path(chosen) if chosen else (CLONE or Path.cwd()) / ".venv-private" / "bin" / "python"
    advice = f"run `make private`, or set {VARIABLE} to a Python 3.10 or 3.11 with spu=={ENGINE}"
    ask = (
        "import sys, importlib.metadata as m\n"
        "try: engine = m.version('spu')\n"
        "except m.PackageNotFoundError: engine = 'none'\n"
        "print('%d.%d' % sys.version_info[:2], engine)"
    )
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=30, env=_environment())
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImportError(
            f"private inference needs an environment of its own and {python} is none: {advice}"
        ) from error
    version, _, engine = done.stdout.strip().partition(" ")
    if engine == ENGINE:
        return str(python)
    if done.returncode:
        raise ImportError(f"{python} does not run: {advice}")
    if version not in ("3.10", "3.11"):
        raise ImportError(f"the engine has no wheel for Python {version} ({python}): {advice}")
    raise ImportError(f"{python} has spu {engine}, not {ENGINE}: {advice}")


def run_plan(
    plan: dict,
    values: dict[str, np.ndarray],
    protocol: str,
    *,
    host: str = "127.0.0.1",
    ports: tuple[int, int] | None = None,
    timeout: float = 600.0,
    delay: float = 0.0,
    record: list | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Run a plan (see `party`) and return its outputs by name and one dict a step: part, operation, bytes, seconds...

    Each party gets its own folder with the plan and the values that it owns, and no other. CHEETAH runs two processes
    on `host`; SEMI2K one process with both parties as threads, the engine's simulator. ABY3 is simulated
    too and has a third party, a helper with shares and no values of its own; its bytes are what all three sent.

    Args:
        ports: of client and server; free ones if None.
        delay: seconds that every message takes one way, through a relay on loopback.
        record: a list that receives two bytes objects, what reached the client and what reached the server.
        progress: called with (steps done, steps in all).

    Raises:
        ValueError: an unknown protocol, an impossible time or port.   ImportError: no private environment.
        OSError: a port is taken.   TimeoutError: not done in `timeout` seconds.
        RuntimeError: a party died; ends with its last words.
    Whatever happens, Ctrl-C included, both processes have ended when this returns.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}")
    if not (0 < timeout < math.inf and 0 <= delay < math.inf):
        raise ValueError(f"timeout must be positive and delay not negative, in seconds, got {timeout} and {delay}")
    if ports is not None and not (len(ports) == 2 and all(0 < port < 65536 for port in ports)):
        raise ValueError(f"ports must be two numbers from 1 to 65535, got {ports}")
    python, deadline = private_python(), time.monotonic() + timeout
    ranks = [0, 1] if protocol == "CHEETAH" else ["all"]
    ports = _free_ports(host) if ports is None else ports
    if protocol == "CHEETAH":
        for port in ports:
            _check_port(host, port)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="entropy_lib_private_")))
        addresses = [[f"{host}:{port}" for port in ports] for _ in ranks]
        relays = []
        if len(ranks) == 2 and (delay or record is not None):
            relays = [stack.enter_context(Relay(port, delay, record is not None)) for port in ports]
            for rank in ranks:
                addresses[rank][1 - rank] = f"127.0.0.1:{relays[1 - rank].port}"
        folders = [folder / str(rank) for rank in ranks]
        for rank, own, reach in zip(ranks, folders, addresses, strict=True):
            own.mkdir()
            owners = ("client", "server") if rank == "all" else (("client", "server")[rank],)
            np.savez(own / "inputs.npz", **{n: values[n] for n, s in plan["inputs"].items() if s["owner"] in owners})
            job = {"rank": rank, "addresses": reach, "timeout": timeout, "plan": plan}
            job["ranks"] = 3 if protocol == "ABY3" else 2
            engine = {**SETTINGS, **plan.get("engine", {}), "protocol": protocol}
            (own / "job.json").write_text(json.dumps({**job, "engine": engine}))
        processes = [stack.enter_context(_Party(python, own)) for own in folders]
        _wait(processes, deadline, timeout, len(plan["steps"]), progress)
        steps = _steps(folders[0])
        for step, other in zip(steps, _steps(folders[-1]), strict=True):
            step["cpu_seconds"] = max(step["cpu_seconds"], other["cpu_seconds"])
        with np.load(folders[0] / "outputs.npz", allow_pickle=False) as arrays:
            outputs = {name: arrays[name] for name in arrays.files}
        if record is not None:
            record += [bytes(relay.received) for relay in relays]
    return outputs, steps


class _Party:
    """A party's process, in a session of its own: Ctrl-C reaches this process, which ends the parties in order."""

    def __init__(self, python: str, folder: Path):
        self.folder = folder
        self.errors = (folder / "errors.txt").open("wb")
        self.process = subprocess.Popen(
            [python, str(PARTY), str(folder / "job.json")], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=self.errors, cwd=folder, env=_environment(), start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> _Party:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()  # it has nothing to tidy up but this folder, which goes next
        self.process.wait()
        self.process.stdin.close()
        self.errors.close()

    def last_words(self) -> str:
        lines = (self.folder / "errors.txt").read_text(errors="replace").splitlines()
        lines += (self.folder / "engine.log").read_text(errors="replace").splitlines() if not lines else []
        return "\n".join(line for line in lines if line.strip())[-600:]


def _wait(parties: list[_Party], deadline: float, timeout: float, total: int, progress) -> None:
    names, done = ["client", "server"] if len(parties) == 2 else ["simulator"], -1
    while True:
        statuses = [party.process.poll() for party in parties]
        now = len(_steps(parties[0].folder))
        for name, party, status in zip(names, parties, statuses, strict=True):
            if status:
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                raise RuntimeError(f"the {name}'s process {how} after {now} of {total} steps. {party.last_words()}")
        if statuses == [0] * len(parties):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{now} of {total} steps were done after {timeout:g} s: pass a larger timeout")
        if progress and now != done:
            done = now
            progress(done, total)
        time.sleep(0.05)


def _steps(folder: Path) -> list[dict]:
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines(True) if line[-1] == "\n"]
    return []


def _environment() -> dict[str, str]:
    """This process's, without what would lead the other interpreter to this one's packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MPLBACKEND")}


def _free_ports(host: str) -> tuple[int, int]:
    with socket.create_server((host, 0)) as first, socket.create_server((host, 0)) as second:
        return first.getsockname()[1], second.getsockname()[1]


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise OSError(
            f"port {port} on {host} is taken or not allowed ({error.strerror}): choose another one"
        ) from error
