"""Several runs at a time, and the experiments that expand to them. Training itself is tested elsewhere."""

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from entropy_lib.study import __main__ as command_line
from entropy_lib.study import experiments, parallel
from entropy_lib.study.parallel import Run, run_all
from entropy_lib.study.recipes import get_recipe
from entropy_lib.study.runs import load_runs
from entropy_lib.variants import VARIANTS

# In one worker of pytest-xdist, one after the other: these start processes of their own and mind how long they take.
pytestmark = pytest.mark.xdist_group("training")

SMALL = ["--steps", "2", "--micro-batch", "2", "--sequences-per-step", "2", "--context-length", "16",
         "--eval-blocks", "2", "--eval-every", "0"]  # fmt: skip


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROPY_LIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(1).choice(["alpha", "beta", "gamma", "delta", "rho"], size=6000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return tmp_path / "text.txt"


def test_a_failing_run_stops_no_other_and_the_same_command_goes_on(tmp_path, text, capsys):
    command = ["--variants", "SM", "SM+WNorm", "--seeds", "1", "--norm-placement", "QK", "--corpus", str(text),
               "--output", str(tmp_path / "out"), "--parallel", "2", *SMALL]  # fmt: skip
    assert command_line.main(command) == 1  # SM has nothing to place
    told = capsys.readouterr()
    assert "[2/2]" in told.out
    assert "SM-seed1 FAILED" in told.out
    assert "SM+WNorm-seed1: finished, perplexity" in told.out
    assert "no weight or spectral normalisation" in (tmp_path / "out" / "SM-seed1.log").read_text()
    assert "SM-seed1.log" in told.err
    records = load_runs(tmp_path / "out")
    assert [record.name for record in records] == ["SM+WNorm-seed1"]
    assert "--variant SM+WNorm --seed 1" in records[0].command

    before = (tmp_path / "out" / "SM+WNorm-seed1.json").stat().st_mtime_ns
    command.remove("SM")
    assert command_line.main(command) == 0
    assert "1 of 1 runs are on record" in capsys.readouterr().out
    assert (tmp_path / "out" / "SM+WNorm-seed1.json").stat().st_mtime_ns == before
    assert command_line.main([*command, "--steps", "3"]) == 2
    assert "recipe differ" in capsys.readouterr().err
    assert command_line.main([*command, "--steps", "3", "--again"]) == 0
    assert {record.steps for record in load_runs(tmp_path / "out")} == {3}


def test_ctrl_c_saves_the_checkpoints_of_all_and_the_same_command_goes_on(tmp_path, text):
    small = [*SMALL, "--steps", "300", "--entropy-every", "1000"]
    command = [sys.executable, "-m", "entropy_lib.study", "--variants", "SM", "SM+LN", "--corpus", str(text),
               "--output", str(tmp_path / "out"), "--parallel", "2", *small]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    logs = [tmp_path / "out" / f"{name}-seed0.log" for name in ("SM", "SM+LN")]
    deadline = time.monotonic() + 240
    while not any(log.exists() and "step 60 of 300" in log.read_text() for log in logs):  # the other may start late
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert told.count("is asked to save a checkpoint and stop") == 2
    saved = [log for log in logs if "run the same call again to go on from there" in log.read_text()]
    far = [log for log in saved if "step 60 of 300" in log.read_text()]
    assert far
    assert len(list((tmp_path / "cache" / "runs").glob("*/checkpoint-*"))) == len(saved)
    assert command_line.main(command[3:]) == 0
    assert [record.steps for record in load_runs(tmp_path / "out")] == [300, 300]
    for log in far:
        assert "step 60 of 300" not in log.read_text()  # it went on from the checkpoint


def test_runs_are_spread_over_the_visible_gpus(tmp_path, monkeypatch):
    """Stand-ins for the processes: each tells the GPU that it sees."""
    script = (
        "import os, time; time.sleep(0.3); print(*map(os.environ.get, ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')))"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(Run, "command", lambda self: ["-c", script])
    monkeypatch.setattr(parallel, "visible_gpus", lambda: ["2", "5"])
    runs = [Run("SM", tmp_path / "out", seed, recipe="smoke", corpus="sample") for seed in range(4)]
    started = time.monotonic()
    assert run_all(runs) == []
    assert time.monotonic() - started < 4 * 0.3 + 30
    seen = [(tmp_path / "out" / f"{run.name}.log").read_text().split() for run in runs]
    assert {threads for _, threads in seen} == {"3"}  # the cores are shared, not each taken by every process
    seen = [gpu for gpu, _ in seen]
    assert seen[:2] == ["2", "5"]
    assert sorted(seen) == ["2", "2", "5", "5"]


def test_visible_gpus_are_those_of_the_environment(monkeypatch):
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert parallel.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert parallel.visible_gpus() == ["3", "1"]


def test_without_gpu_the_number_of_processes_must_be_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "visible_gpus", list)
    assert command_line.main(["--variant", "SM", "--output", str(tmp_path), "--parallel"]) == 2
    assert "--parallel 2" in capsys.readouterr().err


def test_part_of_a_corpus(tmp_path, text):
    command = ["--variant", "SM", "--corpus", str(text), *SMALL]
    assert command_line.main([*command, "--output", str(tmp_path / "all")]) == 0
    assert command_line.main([*command, "--output", str(tmp_path / "part"), "--max-tokens", "2000"]) == 0
    hashes = {load_runs(tmp_path / name)[0].corpus_sha256 for name in ("all", "part")}
    assert len(hashes) == 2


# -- experiments


def test_every_run_of_every_experiment_is_a_command_that_parses():
    for experiment in experiments.EXPERIMENTS.values():
        assert len({run.record for run in experiment.runs}) == len(experiment.runs)
        for run in experiment.runs:
            options = command_line.parser().parse_args(run.command()[2:])
            assert options.variants == [run.variant]
            assert options.seeds == [run.seed]
            assert (options.size, options.corpus, options.output) == (run.size, run.corpus, str(run.folder))
            assert options.norm_placement == run.norm_placement
            recipe = get_recipe(options.recipe, **command_line.recipe_changes(options))
            assert recipe == get_recipe(run.recipe, **run.changes)
            assert recipe.accumulation_steps(1) == 1
            assert recipe.sequences_per_step * recipe.context_length == 65_536
            if run.norm_placement:
                VARIANTS[run.variant].placed(run.norm_placement)


def test_what_the_tables_hold():
    runs = {name: experiment.runs for name, experiment in experiments.EXPERIMENTS.items()}
    assert {run.variant for run in runs["table2"]} == {"SM+LN+G", "SM+LN+R", "SM+LN", "SM+G", "SM+R", "SM"}
    assert sorted(run.seed for run in runs["table3"]) == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    kinds = {tuple(sorted(run.changes.items())) for run in runs["ablation"]}
    assert len(kinds) == len(runs["ablation"]) == 3 + 3 * 2 * 2 * 2
    assert {run.changes["temperature_init"] for run in runs["ablation"]} == {0.01, 0.1, 1.0}
    assert {run.changes["loss_coeff"] for run in runs["ablation"]} == {0.0, 0.01, 0.16}
    margins = {run.changes["tolerance_margin_factor"] for run in runs["figures7_8"]}
    assert margins == {0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3}
    assert {run.size for run in runs["table8"]} == {"gpt2-18l"}
    assert {run.changes["context_length"] for run in runs["table7"]} == {256}
    assert {(run.changes["context_length"], run.corpus) for run in runs["table4"]} == {(512, "english")}
    budgets = {65_536 * run.changes["steps"] for run in runs["budget"]}
    assert min(budgets) < 33e6
    assert max(budgets) >= 600e6
    for name in ("table2", "table3", "table6"):
        assert {65_536 * run.changes["steps"] >= 200e6 for run in runs[name]} == {True}
    shared = {run.record for run in runs["table2"]} & {run.record for run in runs["table3"]}
    assert shared == {Path("table3/SM+LN+G-seed0.json")}


def test_dry_run_prints_the_commands(capsys):
    assert experiments.main(["table3", "table2", "--only", "SM+LN+G", "SM", "--dry-run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[line.index("--variant") + 1] for line in lines] == ["SM+LN+G"] * 3 + ["SM"]
    assert [line[-1] for line in lines] == ["data/runs/table3"] * 3 + ["data/runs/table2"]
    assert experiments.main(["table3", "--steps", "3", "--seeds", "2", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("--seed 2" in line and "--steps 3 " in line and "build/experiments/table3" in line for line in lines)
    assert experiments.main(["table9", "--dry-run"]) == 2
    assert "unknown experiment table9" in capsys.readouterr().err
    assert experiments.main(["--list"]) == 0
    assert set(experiments.EXPERIMENTS) == {line.split()[0] for line in capsys.readouterr().out.splitlines()}


def test_a_rehearsed_experiment_prints_its_table(tmp_path, text, monkeypatch, capsys):
    command = ["figures7_8", "--size", "tiny", "--recipe", "smoke", "--corpus", str(text), *SMALL,
               "--output", str(tmp_path / "out"), "--parallel", "2"]  # fmt: skip
    sweep = experiments.EXPERIMENTS["figures7_8"]
    monkeypatch.setitem(experiments.EXPERIMENTS, "figures7_8", replace(sweep, runs=sweep.runs[3:4]))
    assert experiments.main(command) == 0
    told = capsys.readouterr().out
    assert "gamma0.15" in told
    folder = tmp_path / "out" / "figures7_8" / "gamma0.15"
    record = json.loads((folder / "EReg(SM(t)+ScFuFFN)-seed0.json").read_text())
    assert (record["recipe"]["tolerance_margin_factor"], record["steps"]) == (0.15, 2)
