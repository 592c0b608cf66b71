"""Several runs at a time, and the experiments that expand to them. Training itself is tested elsewhere."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from entropy_lib.training import __main__ as command_line
from entropy_lib.training import parallel
from entropy_lib.training.corpus import load_corpus
from entropy_lib.training.identity import corpus_identity
from entropy_lib.training.parallel import Run, run_all
from entropy_lib.training.recipe import Recipe, get_recipe
from entropy_lib.training.records import RunRecord, compare, load_runs
from entropy_lib.variants import VARIANTS
from paper import experiments

# In one worker of pytest-xdist, one after the other: these start processes of their own and mind how long they take.
pytestmark = pytest.mark.xdist_group("training")

RECORDS = Path(__file__).parents[2] / "data" / "runs"
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


def on_record(run, tmp_path, **changes):
    """Write the record that `run` would leave, with fields changed, or left out if "gone"."""
    found = run.identity()
    summary = json.loads((RECORDS / "table3" / "SM+LN+G-seed0.json").read_text())
    summary |= {"variant": run.variant, "size": run.size, "seed": run.seed, "recipe": found["recipe"]}
    summary |= {
        "corpus": run.corpus,
        "max_tokens": run.max_tokens,
        "model_config": found["model_config"],
        "command": "",
    }
    if "sha256" in found["corpus"]:
        summary |= {"corpus": Path(run.corpus).name, "corpus_sha256": found["corpus"]["sha256"]}
        summary["vocab_size"] = found["corpus"]["vocab_size"]
    summary |= changes
    run.record.parent.mkdir(parents=True, exist_ok=True)
    run.record.write_text(json.dumps({name: value for name, value in summary.items() if value != "gone"}))
    return run


def test_a_record_is_of_a_run_only_if_all_that_determines_it_is_the_same(tmp_path):
    run = on_record(Run("SM+WNorm", tmp_path, recipe="smoke", size="tiny", corpus="sample"), tmp_path)
    assert run.finished()
    changes = {
        field.name: run.changes | {field.name: other(getattr(get_recipe("smoke"), field.name))}
        for field in fields(Recipe)
    }
    others = {f"recipe differ: {name} ": replace(run, changes=change) for name, change in changes.items()}
    others["size differ"] = replace(run, size="small")
    others["corpus differ: max_tokens None, wanted 50000"] = replace(run, max_tokens=50_000)
    others["corpus differ: name 'sample'"] = replace(run, corpus="english")
    others["variant differ: norm_placement 'FFN', wanted 'QK'"] = replace(run, norm_placement="QK")
    for message, another in others.items():
        with pytest.raises(ValueError, match=f"is of another run .*{message}"):
            another.finished()
    for message, field in {
        "variant differ: ffn_activation": {
            "variant_config": {**VARIANTS["SM+WNorm"].__dict__, "ffn_activation": "relu"}
        },
        "training_overrides differ: seed 5": {"training_overrides": {"seed": 5}},
        "model_config differ: n_layer 2": {"model_config": {"n_layer": 2}},
        "seed differ": {"seed": 1},
        "corpus differ: max_tokens 50000": {"max_tokens": 50_000},
        "corpus differ: max_tokens 50000, wanted None": {"max_tokens": "gone", "command": "python --max-tokens=50000"},
    }.items():
        with pytest.raises(ValueError, match=message):
            on_record(run, tmp_path, **field).finished()


def other(value):
    choices = {"mean": "sum", "query": "head", "context": "causal", "float32": "bfloat16", "adamw": "muon", None: 7}
    return (
        choices[value]
        if value in choices
        else not value
        if isinstance(value, bool)
        else value / 2 or 0.5
        if isinstance(value, float)
        else value + 16
    )


def test_a_field_that_an_old_record_lacks_has_its_default(tmp_path):
    run = Run("SM", tmp_path, recipe="paper", size="tiny", corpus="sample")
    old = {
        field.name: "gone" for field in fields(RunRecord) if field.default is None or field.name.endswith("overrides")
    }
    for name, default in Recipe().__dict__.items():
        if name == "scaled_residual_init":  # below
            continue
        recipe = {key: value for key, value in run.identity()["recipe"].items() if key != name}
        asked = replace(run, changes={name: other(default)})
        with pytest.raises(ValueError, match=f"recipe differ: {name} "):
            on_record(
                asked,
                tmp_path,
                **old,
                recipe=recipe | {k: v for k, v in asked.identity()["recipe"].items() if k != name},
            ).finished()
        assert on_record(replace(run, changes={name: default}), tmp_path, **old, recipe=recipe).finished()


def test_an_old_record_says_by_its_variant_how_residual_projections_started(tmp_path):
    """Unscaled, save for attention with parameters of its own, before a fused FFN, which is never scaled."""
    for variant in VARIANTS:
        run = Run(variant, tmp_path, recipe="paper", size="tiny", corpus="sample")
        recipe = {key: value for key, value in run.identity()["recipe"].items() if key != "scaled_residual_init"}
        run = replace(run, changes={"scaled_residual_init": "SM(t)" in variant})
        old = on_record(run, tmp_path, recipe=recipe)
        assert old.finished()
        with pytest.raises(ValueError, match="recipe differ: scaled_residual_init"):
            replace(old, changes={"scaled_residual_init": not old.changes["scaled_residual_init"]}).finished()


def test_a_corpus_given_by_path_is_its_content(tmp_path, text):
    run = Run("SM", tmp_path / "out", recipe="smoke", size="tiny", corpus=str(text), changes={"context_length": 16})
    assert on_record(run, tmp_path).finished()
    assert replace(run, max_tokens=10**9).finished()  # more than there is: all of it
    with pytest.raises(ValueError, match="corpus differ: sha256"):
        replace(run, max_tokens=2000).finished()
    text.write_text(text.read_text()[::-1])
    with pytest.raises(ValueError, match="corpus differ: sha256"):
        run.finished()
    folder = tmp_path / "sample"
    folder.mkdir()
    text.rename(folder / "text.txt")
    assert corpus_identity(load_corpus(folder, 16)[0], 1)["name"] == "./sample"
    assert corpus_identity(load_corpus("sample", 16)[0], 1)["name"] == "sample"
    with pytest.raises(
        ValueError, match=r"corpus differ: name '\./sample'"
    ):  # a folder of the user's that is called so
        on_record(replace(run, corpus="sample"), tmp_path, corpus="./sample").finished()


def test_a_torn_record_names_itself_and_again_replaces_it_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "command", lambda self: ["-c", "import sys; print('done', sys.argv[1:])"])
    run = on_record(Run("SM", tmp_path / "out", recipe="smoke", size="tiny", corpus="sample"), tmp_path, size="small")
    with pytest.raises(ValueError, match="size differ: size 'small', wanted 'tiny'"):
        run_all([run], 1)
    assert run_all([run], 1, again=True) == []
    assert f"to be replaced: {run.record} is of another run" in capsys.readouterr().out
    log = run.record.with_suffix(".log")
    assert log.read_text() == "done ['--again']\n"
    for torn in (run.record.read_text()[:500], "", "[]"):
        run.record.write_text(torn)
        with pytest.raises(ValueError, match=r"SM-seed0\.json is (torn|not a run record)"):
            run_all([run], 1)
    log.write_text("mine")
    assert run_all([run], 1, again=True) == []
    assert {log.read_text(), *(path.read_text() for path in log.parent.glob("*.[12].log"))} == {
        "done ['--again']\n",
        "mine",
    }
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot be made .*choose another folder"):
        run_all([replace(run, folder=tmp_path / "file")], 1)


def test_ctrl_c_saves_the_checkpoints_of_all_and_the_same_command_goes_on(tmp_path, text):
    small = [*SMALL, "--steps", "150", "--entropy-every", "1000"]
    command = [sys.executable, "-m", "entropy_lib.training", "--variants", "SM", "SM+LN", "--corpus", str(text),
               "--output", str(tmp_path / "out"), "--parallel", "2", *small]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    logs = [tmp_path / "out" / f"{name}-seed0.log" for name in ("SM", "SM+LN")]
    deadline = time.monotonic() + 240
    while not any(log.exists() and "step 30 of 150" in log.read_text() for log in logs):  # the other may start late
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert told.count("is asked to save a checkpoint and stop") == 2
    saved = [log for log in logs if "run the same call again to go on from there" in log.read_text()]
    far = [log for log in saved if "step 30 of 150" in log.read_text()]
    assert far
    assert len(list((tmp_path / "cache" / "runs").glob("*/checkpoint-*"))) == len(saved)
    assert command_line.main(command[3:]) == 0
    assert [record.steps for record in load_runs(tmp_path / "out")] == [150, 150]
    for log in far:
        assert "step 30 of 150" not in log.read_text()  # it went on from the checkpoint


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
    records = [load_runs(tmp_path / name)[0] for name in ("all", "part")]
    assert len({record.corpus_sha256 for record in records}) == 2
    assert [record.max_tokens for record in records] == [None, 2000]
    with pytest.raises(ValueError, match="within one corpus"):
        compare(records)
    run = Run("SM", tmp_path / "part", recipe="smoke", size="tiny", corpus=str(text), max_tokens=2000)
    run = replace(run, changes=command_line.recipe_changes(command_line.parser().parse_args(command)))
    assert run.finished()
    assert command_line.main([*command, "--output", str(tmp_path / "part")]) == 2  # not without --again


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


CHANGES = [["--recipe", "smoke"], ["--size", "tiny"], ["--corpus", "sample"], ["--max-tokens", "100000"]]
CHANGES += [
    [f"--{'' if value is not True else 'no-'}{name.replace('_', '-')}"]
    + ([] if isinstance(value, bool) else [str(other(value))])
    for name, value in Recipe(**experiments.FULL, precision="bfloat16", compile=True).__dict__.items()
    if name != "precision"
]
CHANGES += [["--precision", "float32"]]


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_every_option_that_changes_a_run_makes_a_rehearsal(change, capsys):
    rest = {"--micro-batch": ["--sequences-per-step", "528"]}.get(change[0], [])
    assert experiments.main(["table3", *change, *rest, "--dry-run"]) == 0
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()} == {"build/experiments/table3"}


@pytest.mark.parametrize(
    "choice", [["--only", "SM+LN+G"], ["--seeds", "0"], ["--parallel", "2"], ["--again"], ["--steps", "3052"]]
)
def test_options_that_choose_make_none(choice, capsys):
    assert experiments.main(["table3", *choice, "--dry-run"]) == 0
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()} == {"data/runs/table3"}


def test_choices_that_there_are_none_of_are_refused(capsys):
    for choice, message in (
        (["--seeds", "0", "7"], "unknown seed of these experiments 7; choose from 0, 1, 2"),
        (["--only", "SM+WNorm"], "unknown variant of these experiments SM+WNorm; choose from SM+LN+G"),
        (["--only", "SM(t)+ScFuFFN", "--seeds", "2"], "no run of these experiments"),
        (["--recipe", "large"], "unknown recipe 'large'"),
        (["--learning-rate", "nan"], "learning_rate must be finite"),
    ):
        assert experiments.main(["table3", *choice, "--dry-run"]) == 2
        assert message in capsys.readouterr().err


def test_again_takes_no_other_runs_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "run_all", lambda *args, **kwargs: pytest.fail("a record would be replaced"))
    shutil.copytree(RECORDS / "table3", tmp_path / "table3")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for change in (["--max-tokens", "100000"], ["--steps", "3"], ["--size", "tiny"], ["--corpus", "english"]):
        assert experiments.main(["table3", *change, "--again", "--output", str(tmp_path)]) == 2
        assert "is of another run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_experiments_that_do_not_compare_have_tables_of_their_own(capsys):
    assert experiments.main(["table3", "table7", "baselines_66M", "table2", "--output", str(RECORDS)]) == 0
    told = capsys.readouterr().out
    table = told[told.index("variant") :].splitlines()
    assert [line.split()[0] for line in table if line.startswith(("table", "base"))] == [
        "table3", "table7", "baselines_66M", "table2",
    ]  # fmt: skip
    perplexities = [line.split() for line in table if "SM+LN+G" in line]
    assert len(perplexities) == 4  # table 2 has table 3's first, and no mean over 66M and 200M tokens
    assert len({tuple(row[-12:]) for row in perplexities}) == 4


def test_a_rehearsed_experiment_prints_its_table(tmp_path, text, monkeypatch, capsys):
    command = ["figures7_8", "--size", "tiny", "--recipe", "smoke", "--corpus", str(text), *SMALL,
               "--output", str(tmp_path / "out"), "--parallel", "2"]  # fmt: skip
    sweep = experiments.EXPERIMENTS["figures7_8"]
    monkeypatch.setitem(experiments.EXPERIMENTS, "figures7_8", replace(sweep, listed=sweep.runs[3:4]))
    assert experiments.main(command) == 0
    told = capsys.readouterr().out
    assert "gamma0.15" in told
    folder = tmp_path / "out" / "figures7_8" / "gamma0.15"
    record = json.loads((folder / "EReg(SM(t)+ScFuFFN)-seed0.json").read_text())
    assert (record["recipe"]["tolerance_margin_factor"], record["steps"]) == (0.15, 2)
