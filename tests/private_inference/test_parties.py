"""Starting, watching and ending the parties: what goes wrong is said within seconds, and no process stays behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from running import private_environment, started_processes  # noqa: F401

from entropy_lib.clone import CLONE as ROOT
from entropy_lib.private_inference import parties
from entropy_lib.private_inference.costs import unit_prices
from entropy_lib.private_inference.network import Relay
from entropy_lib.private_inference.parties import private_python, run_plan

# In one worker of pytest-xdist, one after the other: these start processes of their own and mind how long they take.
pytestmark = pytest.mark.xdist_group("parties")

SERVER = {"owner": "server", "dtype": "float32"}
CLIENT = {"owner": "client", "dtype": "float32", "shared": True}


def plan_of(operation, *shapes, repeat=1, **constants):
    """`operation` on shared inputs a, b, ... of these shapes, `repeat` times."""
    names = [chr(ord("a") + index) for index in range(len(shapes))]
    step = {"part": "test", "operation": operation, "inputs": names, "outputs": ["out"], "constants": constants}
    inputs = {name: {**CLIENT, "shape": list(shape)} for name, shape in zip(names, shapes, strict=True)}
    return {"inputs": inputs, "steps": [step] * repeat, "outputs": ["out"]}


def values_of(plan):
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(spec["shape"]).astype("float32") for name, spec in plan["inputs"].items()}


LONG = plan_of("relu", (64, 64), repeat=400)


# ---- no environment, a wrong one


def fake_python(folder, version, engine):
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho {version} {engine}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("version", "engine", "words"),
    [
        ("3.12", "none", r"no wheel for Python 3\.12"),
        ("3.11", "none", r"has spu none, not 0\.9\.5"),
        ("3.11", "0.9.2b0", r"has spu 0\.9\.2b0, not 0\.9\.5"),
    ],
)
def test_an_interpreter_that_cannot_run_the_engine(tmp_path, monkeypatch, version, engine, words):
    monkeypatch.setenv(parties.VARIABLE, fake_python(tmp_path, version, engine))
    with pytest.raises(ImportError, match=words) as caught:
        private_python()
    assert "make private" in str(caught.value)


def test_no_interpreter_and_a_broken_one(tmp_path, monkeypatch):
    monkeypatch.setenv(parties.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ImportError, match="make private"):
        run_plan(LONG, values_of(LONG), "CHEETAH")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv(parties.VARIABLE, str(broken))
    with pytest.raises(ImportError, match="does not run"):
        private_python()
    monkeypatch.delenv(parties.VARIABLE)
    monkeypatch.setattr(parties, "CLONE", tmp_path)
    with pytest.raises(ImportError, match=r"\.venv-private"):
        private_python()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, "timeout must be positive"),
        ({"timeout": float("nan")}, "got nan and 0"),
        ({"timeout": float("inf")}, "got inf and 0"),
        ({"delay": -1}, "delay not negative, in seconds, got 600.0 and -1"),
        ({"delay": float("nan")}, "got 600.0 and nan"),
        ({"ports": (70_000, 5_000)}, r"from 1 to 65535, got \(70000, 5000\)"),
        ({"ports": (5_000,)}, r"ports must be two numbers"),
    ],
)
def test_impossible_times_and_ports_are_refused_first(monkeypatch, options, words):
    monkeypatch.setattr(parties, "private_python", lambda: pytest.fail("looked for the engine"))
    with pytest.raises(ValueError, match=words):
        run_plan(LONG, values_of(LONG), "CHEETAH", **options)


def test_make_private_without_an_old_python_gives_one_clear_line(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    requirements = tmp_path / "entropy_lib" / "private_inference" / "requirements.txt"
    requirements.parent.mkdir(parents=True)
    requirements.write_text("spu==0.9.5\n")
    tools = tmp_path / "bin"  # a PATH on which no Python is
    tools.mkdir()
    for tool in ("make", "bash", "test"):
        (tools / tool).symlink_to(f"/usr/bin/{tool}")
    make = [str(tools / "make"), "-s", "private", "PYTHON=python3.99", f"SHELL={tools / 'bash'}"]
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, env={"PATH": str(tools)}, check=False)
    assert done.returncode != 0
    assert done.stdout.strip().splitlines()[0].startswith("error: the two-party engine needs Python 3.10 or 3.11")
    assert not (tmp_path / ".venv-private").exists()


def test_the_engine_s_version_is_pinned_once(monkeypatch):
    lines = (ROOT / "entropy_lib" / "private_inference" / "requirements.txt").read_text().splitlines()
    assert f"spu=={parties.ENGINE}" in lines
    assert f'"spu=={parties.ENGINE};' in (ROOT / "pyproject.toml").read_text()
    assert all("==" in line for line in lines if not line.startswith("#"))


# ---- what goes wrong while it runs


def test_unknown_protocol():
    with pytest.raises(ValueError, match=r"must be one of .*SEMI2K.*CHEETAH.*ABY3.*got 'SPDZ'"):
        run_plan(LONG, {}, "SPDZ")


def test_a_taken_port_is_said_at_once(private, started):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, begin = taken.getsockname()[1], time.monotonic()
        with pytest.raises(OSError, match=f"port {port} .*taken"):
            run_plan(LONG, values_of(LONG), "CHEETAH", ports=(port, port))
        assert time.monotonic() - begin < 5
    assert not [process for process in started if "party.py" in str(process.args)]


@pytest.mark.parametrize("victim", [0, 1], ids=["client", "server"])
def test_a_party_killed_half_way_ends_the_other_cleanly(private, started, victim):
    killed = []

    def kill(done, total):
        if done >= 2 and not killed:
            running = [process for process in started if "party.py" in str(process.args)]
            assert len(running) == 2
            running[victim].kill()
            killed.append(time.monotonic())

    who = ("client", "server")[victim]
    with pytest.raises(RuntimeError, match=rf"the {who}'s process was ended by SIGKILL after \d+ of 400 steps"):
        run_plan(LONG, values_of(LONG), "CHEETAH", progress=kill)
    assert time.monotonic() - killed[0] < 5
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize("protocol", ["SEMI2K", "CHEETAH", "ABY3"])
def test_timeout(private, started, protocol):
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"of 400 steps were done after 3 s: pass a larger timeout"):
        run_plan({**LONG, "steps": LONG["steps"]}, values_of(LONG), protocol, timeout=3)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("protocol", ["SEMI2K", "CHEETAH", "ABY3"])
def test_a_party_s_own_error_is_passed_on(private, started, protocol):
    plan = plan_of("add", (4, 4), (3, 3))
    with pytest.raises(RuntimeError, match=r"(?s)process ended with status 1.*incompatible shapes"):
        run_plan(plan, values_of(plan), protocol, timeout=60)


def test_three_parties_send_what_a_product_of_replicated_shares_takes(private, started):
    """Each sends one ring element of 8 bytes a product, the truncation takes as much again; an addition nothing."""
    each = []
    for size in (32, 64):
        plan = plan_of("multiply", (size, size), (size, size))
        values = values_of(plan)
        outputs, steps = run_plan(plan, values, "ABY3")
        np.testing.assert_allclose(outputs["out"], values["a"] * values["b"], atol=1e-4)
        each.append(steps[0]["bytes"] / size**2)
    assert each[0] == each[1]
    assert 48 <= each[0] < 56
    plan = plan_of("add", (32, 32), (32, 32))
    assert run_plan(plan, values_of(plan), "ABY3")[1][0]["bytes"] == 0


RUN = """
import numpy as np, sys
from entropy_lib.private_inference.parties import run_plan
from test_parties import LONG, values_of
run_plan(LONG, values_of(LONG), "CHEETAH", progress=lambda done, total: print("step", done, flush=True))
"""


def party_processes(parent):
    """Ids of the running parties that `parent` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"party.py" in command and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_no_party_outlives_ctrl_c_or_the_end_of_its_parent(private):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    command = [sys.executable, "-c", RUN]
    parents = {how: subprocess.Popen(command, **pipes) for how in (signal.SIGINT, signal.SIGKILL)}  # both start slowly
    try:
        for how, parent in parents.items():
            while "step 1" not in (line := parent.stdout.readline()):
                assert line, parent.stderr.read()
            running = party_processes(parent.pid)
            assert len(running) == 2
            parent.send_signal(how)
            _, errors = parent.communicate(timeout=60)
            assert how == signal.SIGKILL or "KeyboardInterrupt" in errors
            end = time.monotonic() + 20
            while any(Path(f"/proc/{party}").exists() for party in running) and time.monotonic() < end:
                time.sleep(0.05)
            assert not [party for party in running if Path(f"/proc/{party}").exists()], how
    finally:
        for parent in parents.values():
            parent.kill()
            parent.wait()


# ---- the wire


def test_relay_delays_both_ways_and_records_one():
    with socket.create_server(("127.0.0.1", 0)) as server, Relay(server.getsockname()[1], 0.1, record=True) as relay:

        def echo():
            connection, _ = server.accept()
            connection.sendall(connection.recv(100).upper())
            connection.close()

        threading.Thread(target=echo, daemon=True).start()
        with socket.create_connection(("127.0.0.1", relay.port)) as client:
            begin = time.monotonic()
            client.sendall(b"hello")
            assert client.recv(100) == b"HELLO"
            assert 0.2 <= time.monotonic() - begin < 2  # a busy machine adds its own
            assert client.recv(100) == b""
    assert bytes(relay.received) == b"hello"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", relay.port), timeout=1)


def test_rounds_times_latency_is_what_an_injected_delay_adds(private, started):
    """The network model against a run: eight ReLUs, whose messages each take 0.03 s longer.

    On a busy machine a ReLU takes tenths of a second more: of eight the fastest counts, and the delay adds 0.66 s. The
    set-up, of 400 messages that wait for each other, takes it too.
    """
    plan, delay = plan_of("relu", (16, 64), repeat=8), 0.03
    runs = [run_plan(plan, values_of(plan), "CHEETAH", delay=seconds)[1] for seconds in (0.0, delay)]
    plain, late = (min(step["seconds"] for step in steps) for steps in runs)
    assert late - plain == pytest.approx(unit_prices("spu-0.9.5-cheetah").rounds["relu"] * delay, rel=0.3)
    assert runs[0][3]["bytes"] == pytest.approx(runs[1][3]["bytes"], rel=0.02)
