"""The parties' environment, or the reason why there is none; every process that a test started must have ended."""

import subprocess
import time

import pytest

from entropy_lib.private_inference import parties


@pytest.fixture(name="private")
def private_environment():
    try:
        return parties.private_python()
    except ImportError as error:
        pytest.skip(f"no two-party environment: {error}")


@pytest.fixture(name="started")
def started_processes(monkeypatch):
    """The processes that `parties` starts; after the test all of them must be gone."""
    processes, popen = [], subprocess.Popen

    def start(*arguments, **options):
        processes.append(popen(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(parties.subprocess, "Popen", start)
    yield processes
    end = time.monotonic() + 5
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(process.poll() is not None for process in processes)
