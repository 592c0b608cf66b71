"""The paper's tables beside recorded runs: exact gaps, spreads and counts from records written for the test."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from entropy_lib.private_inference.costs import paper_tables
from entropy_lib.training.recipe import get_recipe
from entropy_lib.training.records import RunRecord, compare
from entropy_lib.variants import get_variant
from paper.experiments import EXPERIMENTS
from paper.tables import (
    TABLES,
    examples,
    gaps,
    main,
    markdown,
    on_record,
    outcomes,
    paper_ppl,
    readable,
    reproduction,
    sweep,
    table_runs,
)

RECORDS = Path(__file__).parents[2] / "data" / "runs"
EREG = "EReg(SM(t)+ScFuFFN)"
LOG_T = math.log(128)


def record(run, root, perplexity, *, status="finished", heads=(1, 2, 1), **changes):
    """Write the record of a planned run: `heads` are collapsed, healthy and overloaded ones, in one layer."""
    recipe = get_recipe(run.recipe, **run.changes)
    collapsed, healthy, overloaded = heads
    entropy = [[0.1 * LOG_T] * collapsed + [0.5 * LOG_T] * healthy + [0.8 * LOG_T] * overloaded]
    fields = {
        "variant": run.variant, "variant_config": asdict(get_variant(run.variant)),
        "size": run.size, "corpus": run.corpus, "seed": run.seed,
        "tokens": recipe.steps * recipe.sequences_per_step * recipe.context_length,
        "eval_loss": perplexity and math.log(perplexity), "eval_perplexity": perplexity, "status": status,
        "minutes": 2.0, "device": "none", "steps": recipe.steps, "skipped_steps": 0, "parameters": 1,
        "tokens_per_second": 1.0, "peak_memory_gib": 0.0, "corpus_sha256": "0", "context_length": 128,
        "vocab_size": 9, "processes": 1, "entropy": entropy, "recipe": asdict(recipe),
        "model_config": {"norm_placement": run.norm_placement} if run.norm_placement else {}, "command": "",
        "versions": {}, "history": pd.DataFrame({"step": [1], "loss": [1.0], "entropy": [entropy]}),
    }  # fmt: skip
    saved = RunRecord(**(fields | changes))
    saved.save(root / run.folder)
    return saved


def planned(experiment, variant, seed=0, folder=""):
    runs = [r for r in EXPERIMENTS[experiment].runs if (r.variant, r.seed) == (variant, seed)]
    tail = Path(folder).parts
    (run,) = [r for r in runs if not tail or r.folder.parts[-len(tail) :] == tail]
    return run


def test_gaps_and_spreads_are_those_of_the_formula(tmp_path):
    for seed, perplexity in enumerate((10.0, 12.0, 11.0)):
        record(planned("table3", "SM+LN+G", seed), tmp_path, perplexity)
    record(planned("table3", EREG, 0), tmp_path, 12.0, heads=(0, 4, 0))
    record(planned("table3", EREG, 2), tmp_path, 14.4, heads=(2, 0, 2))
    table = reproduction("table3", tmp_path)
    assert list(table.index) == ["SM+LN+G", EREG]  # what is on record
    row = table.loc[EREG]
    assert row["gap"] == pytest.approx(13.2 / 11 - 1, abs=1e-12)
    assert row["spread"] == pytest.approx(2.4 / math.sqrt(2))
    assert (row["runs"], row["collapsed_runs"], row["minutes"]) == (2, 0, 2.0)
    assert row["tokens"] == 3052 * 65_536
    assert tuple(row[["collapsed", "healthy", "overloaded", "heads"]]) == (1.0, 2.0, 1.0, 4.0)
    assert row["paper_gap"] == pytest.approx(3.21 / 2.69 - 1, abs=1e-12)
    assert table.loc["SM+LN+G", "spread"] == pytest.approx(1.0)
    assert table.loc["SM+LN+G", ["gap", "paper_gap"]].tolist() == [0, 0]
    words = readable(table).loc[EREG]
    assert words.tolist() == ["3.21", "+19.3%", "13.2 ± 1.7", "+20.0%", "1 / 2 / 1", 2]


def test_where_nothing_is_on_record_the_error_says_what_makes_it(tmp_path):
    for table in (reproduction, examples, markdown):
        with pytest.raises(ValueError, match=r"no run of table3 .*: python notebooks/paper experiments table3"):
            table("table3", tmp_path)
    assert sweep("ablation", tmp_path).empty
    with pytest.raises(ValueError, match="no folder of run records"):
        reproduction("table3", tmp_path / "elsewhere")


def test_a_row_that_the_paper_does_not_print_has_no_gap_of_its(tmp_path):
    for variant in ("SM+LN+G", "SM(t)+ScFuFFN"):
        record(planned("table3", variant), tmp_path, 10.0)
    table = reproduction("table3", tmp_path)
    assert table["printed"].tolist() == [True, False]
    assert readable(table).loc["SM(t)+ScFuFFN"].tolist()[:3] == ["–", "–", "10.0"]


def test_a_collapsed_run_has_no_perplexity_and_keeps_its_heads(tmp_path):
    record(planned("table3", "SM+LN+G"), tmp_path, 10.0)
    # its last finite weights may still give one
    record(planned("table2", "SM"), tmp_path, 50.0, status="collapsed", heads=(4, 0, 0))
    record(planned("table2", "SM+R"), tmp_path, None, status="collapsed", heads=(4, 0, 0))
    table = reproduction("table2", tmp_path)
    assert table.loc["SM", ["runs", "collapsed_runs", "collapsed"]].tolist() == [1, 1, 4]
    assert table.loc[["SM", "SM+R"], ["ppl", "gap"]].isna().all(axis=None)
    assert readable(table).loc["SM"].tolist() == ["collapsed", "–", "collapsed", "–", "4 / 0 / 0", 1]
    assert readable(table).loc["SM+R", "here"] == "collapsed"
    assert gaps(table)["SM"] == (math.inf, math.inf)
    assert gaps(table)["SM+R"] == (pytest.approx(2.94 / 2.69 - 1), math.inf)

    record(planned("table3", EREG, 0), tmp_path, 12.0)
    record(planned("table3", EREG, 1), tmp_path, 900.0, status="collapsed")
    assert readable(reproduction("table3", tmp_path)).loc[EREG, "here"] == "12.0, 1 of 2 collapsed"


def test_baselines_are_shared_between_experiments(tmp_path):
    for seed, perplexity in enumerate((10.0, 20.0)):
        record(planned("table3", "SM+LN+G", seed), tmp_path, perplexity)
    record(planned("table6", "SM+SNorm"), tmp_path, 15.0)
    assert reproduction("table6", tmp_path).loc["SM+SNorm", "gap"] == pytest.approx(0.5)  # seed 0, as planned there
    # Table 5 trains no baseline of its own: that of the same recipe, and of no other warm-up
    record(planned("warmup", "SM+LN+G", folder="0.2"), tmp_path, 5.0)
    record(planned("baselines_66M", "SM+LN+G"), tmp_path, 8.0)
    record(planned("table5", "SM+WNorm", folder="QK"), tmp_path, 16.0)
    record(planned("table5", "SM+WNorm", folder="QKVO+FFN"), tmp_path, 24.0)
    table = reproduction("table5", tmp_path)
    assert table["gap"].to_dict() == {"SM+LN+G": 0.0, "SM+WNorm, QK": 1.0, "SM+WNorm, QKVO+FFN": 2.0}
    # Table 3's SM+LN+R is Table 2's run
    record(planned("table2", "SM+LN+R"), tmp_path, 30.0)
    table = reproduction("table3", tmp_path)
    assert table.loc["SM+LN+R", "gap"] == pytest.approx(1.0)


def test_records_of_other_runs_are_refused(tmp_path):
    run = planned("table3", "SM+LN+G")
    record(run, tmp_path, 10.0, corpus="pypi-small")
    with pytest.raises(ValueError, match="corpus differ"):
        reproduction("table3", tmp_path)
    record(run, tmp_path, 10.0, recipe=asdict(get_recipe("paper", steps=7)))
    with pytest.raises(ValueError, match="recipe differ"):
        reproduction("table2", tmp_path)
    record(run, tmp_path, 10.0)
    record(planned("table2", "SM+G"), tmp_path, 12.0, context_length=64)  # of the same name and recipe all the same
    with pytest.raises(ValueError, match="within one corpus"):
        reproduction("table2", tmp_path)


def test_a_sweep_is_tidy(tmp_path):
    record(planned("baselines_66M", "SM+LN+G"), tmp_path, 8.0)
    record(planned("ablation", EREG, folder="t0.01-lambda0"), tmp_path, 16.0, heads=(0, 0, 4))
    record(planned("ablation", EREG, folder="t1.0-lambda0.16-causal-head"), tmp_path, 12.0)
    record(planned("ablation", EREG, folder="t0.1-lambda0"), tmp_path, None, status="collapsed", heads=(3, 1, 0))
    frame = sweep("ablation", tmp_path)
    assert list(frame.columns[2:6]) == ["loss_coeff", "per", "ceiling", "temperature_init"]
    assert len(frame) == 3  # on record
    found = frame[frame["perplexity"].notna()].set_index("temperature_init")
    assert found.loc[0.01, ["loss_coeff", "gap", "entropy", "overloaded", "top_band"]].tolist() == pytest.approx(
        [0.0, 1.0, 0.8 * LOG_T, 4, 1.0]
    )
    assert found.loc[1.0, ["loss_coeff", "per", "ceiling", "gap"]].tolist() == [0.16, "head", "causal", 0.5]
    (collapsed,) = frame[frame["status"] == "collapsed"].to_dict("records")
    assert collapsed["collapsed"] == 3
    assert math.isnan(collapsed["perplexity"])


def test_budgets_and_learning_rates_take_their_standard_setting_from_the_tables(tmp_path):
    for seed, perplexity in enumerate((10.0, 12.0)):
        record(planned("table3", "SM+LN+G", seed), tmp_path, perplexity)
    record(planned("table3", EREG), tmp_path, 22.0)
    record(planned("budget", "SM+LN+G", folder="33M"), tmp_path, 50.0)
    record(planned("budget", EREG, folder="33M"), tmp_path, 60.0)
    record(planned("learning_rates", "SM", folder="0.0003"), tmp_path, 33.0)
    frame = sweep("budget", tmp_path).dropna(subset="perplexity")
    gaps = frame[frame["variant"] == EREG].set_index("steps")["gap"].to_dict()
    assert gaps == {500: pytest.approx(0.2), 3052: pytest.approx(1.0)}
    baseline = frame[(frame["variant"] == "SM+LN+G") & (frame["steps"] == 3052)]
    assert baseline["gap"].mean() == pytest.approx(0)
    rates = sweep("learning_rates", tmp_path).set_index(["variant", "learning_rate", "seed"])
    assert rates.loc[("SM", 3e-4, 0), "gap"] == pytest.approx(2.0)
    assert rates.loc[(EREG, 1e-3, 0), "gap"] == pytest.approx(1.0)
    assert ("SM+LN", 1e-3, 0) not in rates.index
    assert np.sort(rates.index.unique("learning_rate")).tolist() == [3e-4, 1e-3]


def test_a_gap_is_to_baselines_that_started_as_the_tables_did_and_read_in_the_same_order(tmp_path):
    run = planned("figures7_8", EREG, folder="gamma0.00")
    record(run, tmp_path, 40.0)
    record(planned("noise", "SM+LN+G", folder="order1"), tmp_path, 80.0)  # of another order: no baseline of it

    def gap():
        return sweep("figures7_8", tmp_path).dropna(subset="perplexity")["gap"].item()

    assert math.isnan(gap())
    for seed, perplexity in enumerate((15.0, 17.0)):
        record(planned("initialization", "SM+LN+G", seed), tmp_path, perplexity)
    assert gap() == pytest.approx(1.5)
    record(planned("baselines_66M", "SM+LN+G"), tmp_path, 20.0)
    assert gap() == pytest.approx(1.0)


def test_the_budgets_hold_runs_of_other_experiments(tmp_path):
    for experiment, folder, baseline, regularised in (
        ("budget", "33M", 50.0, 60.0), ("warmup_33M", "0.3", 40.0, 50.0), ("table3", "table3", 10.0, 15.0),
    ):  # fmt: skip
        record(planned(experiment, "SM+LN+G", folder=folder), tmp_path, baseline)
        record(planned(experiment, EREG, folder=folder), tmp_path, regularised)
    record(planned("baselines_66M", "SM+LN+G"), tmp_path, 20.0)
    record(planned("figures7_8", EREG, folder="gamma0.20"), tmp_path, 32.0)
    record(planned("figures7_8", EREG, folder="gamma0.00"), tmp_path, 99.0)  # of another margin: not one of them
    frame = sweep("budget", tmp_path).query("variant == @EREG").dropna(subset="gap")
    gaps = frame.set_index(["steps", "warmup_ratio"])["gap"].round(6).to_dict()
    assert gaps == {(500, 0.1): 0.2, (500, 0.3): 0.25, (1000, 0.2): 0.6, (3052, 0.1): 0.5}


def test_lower_rates_stand_beside_the_tables_own(tmp_path):
    record(planned("baselines_66M", "SM+LN+G"), tmp_path, 20.0)
    record(planned("table5", "SM+SNorm", folder="QK"), tmp_path, None, status="collapsed")
    record(planned("table5_learning_rates", "SM+SNorm", folder="0.0006/QK"), tmp_path, 30.0)
    record(planned("table5_learning_rates", "SM+WNorm", folder="0.0003/FFN"), tmp_path, 25.0)
    found = sweep("table5_learning_rates", tmp_path).set_index(["variant", "learning_rate"])
    assert found.loc[("SM+SNorm, QK", 1e-3), "status"] == "collapsed"
    assert found.loc[("SM+SNorm, QK", 6e-4), "gap"] == pytest.approx(0.5)
    assert found.loc[("SM+WNorm, FFN", 3e-4), "gap"] == pytest.approx(0.25)
    record(planned("table8", "SM+LN+G"), tmp_path, 40.0)
    record(planned("table8", EREG), tmp_path, None, status="collapsed")
    record(planned("table8_learning_rates", EREG, folder="0.0003"), tmp_path, 50.0)
    found = sweep("table8_learning_rates", tmp_path).set_index(["variant", "learning_rate"])
    assert found.loc[(EREG, 3e-4), "gap"] == pytest.approx(0.25)
    assert found.loc[(EREG, 1e-3), "status"] == "collapsed"


def test_a_milder_start_stands_beside_the_papers(tmp_path):
    for name, perplexity in (("table3", 25.0), ("temperature_start", 24.0)):
        record(planned(name, EREG), tmp_path, perplexity)
    found = sweep("temperature_start", tmp_path).query("seed == 0 and variant == @EREG")
    assert found.set_index("temperature_init")["perplexity"].to_dict() == pytest.approx({0.01: 25.0, 0.1: 24.0})


def test_outcomes_in_words(tmp_path):
    record(planned("table3", EREG, seed=1), tmp_path, 99.0)
    record(planned("table3", EREG), tmp_path, 22.25)
    record(planned("learning_rates", "SM", folder="0.0003"), tmp_path, None, status="collapsed")
    grid = outcomes(sweep("learning_rates", tmp_path), "variant", "learning_rate", decimals=2)
    assert grid.loc[EREG].tolist() == ["", "22.25"]  # of the first seed
    assert grid.loc["SM", 3e-4] == "collapsed"
    assert grid.index[[0, -1]].tolist() == ["SM", EREG]  # in the order of VARIANTS


def test_figures_take_one_run_a_row(tmp_path):
    for seed in (0, 1):
        record(planned("table3", "SM+LN+G", seed), tmp_path, 10.0)
    record(planned("table2", "SM"), tmp_path, None, status="collapsed", tokens=1)
    found, caption = examples("table2", tmp_path)
    assert [(r.variant, r.seed) for r in found.values()] == [("SM+LN+G", 0), ("SM", 0)]
    assert caption == "data/runs/table2, 200M tokens of pypi-medium"


@pytest.mark.parametrize("experiment", TABLES)
def test_every_printed_row_has_runs_and_the_printed_figure(experiment):
    printed, rows = paper_ppl(experiment), table_runs(experiment)
    assert set(printed) <= set(rows)
    assert all(rows.values())
    figures = paper_tables()[TABLES[experiment]]
    assert {f"{v:.3f}" for v in printed.values() if v == v} - {"2.690"} <= {f"{v:.3f}" for v in _numbers(figures)}
    assert printed["SM+LN+G"] == min(v for v in printed.values() if v == v)


def _numbers(tree):
    values = tree.values() if isinstance(tree, dict) else [tree]
    for value in values:
        yield from _numbers(value) if isinstance(value, dict) else [value] if isinstance(value, float) else []


def test_the_printed_special_cases():
    assert math.isnan(paper_ppl("table2")["SM"])
    assert paper_ppl("table4", "4.8B")["SM+LN+G"] == 21.29
    assert paper_ppl("table5")["SM+SNorm, QKVO+FFN"] == 4.34
    assert paper_ppl("table6")["SM+ScFFN"] == 3.478
    with pytest.raises(ValueError, match="no table"):
        paper_ppl("warmup")
    with pytest.raises(ValueError, match="unknown experiment"):
        sweep("warm-up")


def test_the_committed_records():
    for experiment in TABLES:
        table = reproduction(experiment, RECORDS)
        assert table["runs"].to_dict() == {row: len(runs) for row, runs in table_runs(experiment).items()}
        assert readable(table).notna().all(axis=None)
    table = reproduction("table3", RECORDS)
    baseline = [RunRecord.load(path) for path in sorted((RECORDS / "table3").glob("SM+LN+G-seed*.json"))]
    assert table.loc["SM+LN+G", "ppl"] == pytest.approx(compare(baseline)["perplexity"].item())
    assert table.loc["SM+LN+G", "heads"] == 144
    for name in EXPERIMENTS:
        if name not in TABLES:
            assert len(sweep(name, RECORDS)) >= len(on_record(EXPERIMENTS[name].runs, RECORDS)) > 0


def test_what_collapses_at_the_papers_rate_is_on_record_at_lower_ones():
    def model(run):
        return run.variant, run.norm_placement, run.size

    tables = [run for name in TABLES for run in EXPERIMENTS[name].runs]
    collapsed = {model(run) for run in tables if RunRecord.load(RECORDS / run.record).status == "collapsed"}
    assert len(collapsed) == 12
    rates = {lost: set() for lost in collapsed}
    for run in (run for name, experiment in EXPERIMENTS.items() if "learning_rates" in name for run in experiment.runs):
        rates.get(model(run), set()).add(RunRecord.load(RECORDS / run.record).recipe["learning_rate"])
    assert all(tried == {6e-4, 3e-4} for tried in rates.values())


def test_markdown_from_the_command_line(capsys):
    assert main(["table2", "table6", "--runs", str(RECORDS)]) == 0
    told = capsys.readouterr().out
    assert told == f"{markdown('table2', RECORDS)}\n{markdown('table6', RECORDS)}"
    row = next(line for line in told.splitlines() if line.startswith("| SM+LN+R |"))
    assert row.startswith("| SM+LN+R | 2.76 | +2.6% |")
    assert {line.count("|") for line in told.splitlines() if line.startswith("|")} == {10}
    assert main(["figure1"]) == 2
    assert "no table" in capsys.readouterr().err
