"""Perplexity against bytes, from records written for the test: gaps, rates apart, goals and what misses them."""

import math

import pytest
from test_tables import planned, record

from entropy_lib.private_inference.costs import inference_cost
from paper import frontier as command
from paper.frontier import GOALS, block_megabytes, frontier, goals

EREG = "EReg(SM(t)+ScFuFFN)"
TWO, ONE, NONE = "SM(2)+LN(a)+R+V", "SM(1)+LN(a)+R+V", "R2(0,0,1)+LN(a)+R(2d)+V"


@pytest.fixture(name="runs")
def written_records(tmp_path):
    for seed, perplexity in enumerate((20.0, 19.0, 21.0)):
        record(planned("initialization_200M", "SM+LN+G", seed), tmp_path, perplexity)
        record(planned("private_200M", TWO, seed), tmp_path, perplexity - 0.2)
    record(planned("private_200M", ONE, 0), tmp_path, 21.0)
    record(planned("private_200M", NONE, 0), tmp_path, None, status="collapsed")
    return tmp_path


def test_gaps_are_those_of_the_formula_and_prices_those_of_the_blocks(runs):
    table = frontier("200M", runs)
    assert list(table.index) == ["SM+LN+G", TWO, ONE, NONE]
    row = table.loc[TWO]
    assert row["gap"] == pytest.approx(-0.01)
    assert row["spread"] == pytest.approx(1.0)
    assert row["standard error"] == pytest.approx(math.sqrt(1 / 3 + 1 / 3) / 20)
    assert (row["runs"], row["collapsed"], row["softmax heads"]) == (3, 0, 24)
    assert table.loc[ONE, "gap"] == pytest.approx(0.05)
    assert math.isnan(table.loc[ONE, "standard error"])  # of one seed
    assert (table.loc[NONE, "runs"], table.loc[NONE, "collapsed"]) == (0, 1)
    assert table.loc["SM+LN+G", "of GPT-2 at its best"] == 1.0
    assert row["MB"] == pytest.approx(row["of GPT-2 as given"] * block_megabytes("SM+LN+G", command.AS_GIVEN))
    whole = inference_cost(command.config_of(TWO), 128, command.AT_BEST).communication_gb * 1e3
    assert row["MB"] + row["MB beside"] == pytest.approx(whole)
    assert row["MB beside, one token"] < row["MB beside"] / 2


def test_other_rates_have_rows_of_their_own_and_records_of_the_paper_s_start_none(runs):
    record(planned("learning_rates", EREG, folder="0.0006"), runs, 20.5)
    record(planned("table3", "SM+ScFuFFN"), runs, 25.0)  # which did not start as GPT-2 does
    table = frontier("200M", runs)
    assert list(table.index) == ["SM+LN+G", f"{EREG} at 0.0006", TWO, ONE, NONE]
    assert table.loc[f"{EREG} at 0.0006", "gap"] == pytest.approx(0.025)


def test_goals_name_the_nearest_stable_model_and_by_how_much_it_misses(runs):
    table = goals(frontier("200M", runs))
    assert list(table.index) == list(GOALS)
    assert (table.loc["A", "model"], table.loc["A", "outcome"]) == (TWO, "reached")
    assert (table.loc["B", "model"], table.loc["B", "outcome"]) == (ONE, "missed by 2.0%, one seed")
    assert NONE in table.loc["C", "outcome"]
    record(planned("private_200M", ONE, 1), runs, 20.8)
    assert goals(frontier("200M", runs)).loc["B", "outcome"] == "missed by 1.5%, less than the standard error"
    record(planned("private_200M", ONE, 1), runs, 21.0)
    record(planned("private_200M", TWO, 2), runs, None, status="collapsed")
    assert goals(frontier("200M", runs)).loc["A", "outcome"] == "missed by 5.0%"  # by the one that never collapsed


def test_a_seed_that_was_run_again_counts_once(tmp_path):
    record(planned("initialization", "SM+LN+G", 0), tmp_path, 26.0)
    record(planned("initialization", "SM+LN+G", 1), tmp_path, 25.0)
    record(planned("head_choice_ranked", "SM+LN+G", 0), tmp_path, 28.0, recall=0.5)
    row = frontier("66M", tmp_path).loc["SM+LN+G"]
    assert (row["perplexity"], row["runs"], row["recall"], row["gap"]) == (25.5, 2, 0.5, 0)


def test_heads_placed_by_a_rule_come_after_the_named_models(tmp_path):
    record(planned("initialization", "SM+LN+G", 0), tmp_path, 26.0)
    chosen = "SM(0,5,1,1,2,1,0,1,1,0,0,0)+LN(a)+R+V"  # as the committed ranking places twelve
    record(planned("head_choice", chosen, 0), tmp_path, 25.0)
    record(planned("private", "SM(1)+LN(a)+R+V", 0), tmp_path, 24.0)
    table = frontier("66M", tmp_path)
    assert list(table.index) == ["SM+LN+G", "SM(1)+LN(a)+R+V", chosen]
    assert (table.loc[chosen, "softmax heads"], table.loc[chosen, "MB"]) == (12, pytest.approx(table["MB"].iloc[1]))


def test_the_command_prints_both_tables_or_what_is_missing(runs, tmp_path, capsys):
    assert command.main(["--runs", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert TWO in printed
    assert "missed by 2.0%" in printed
    (tmp_path / "none").mkdir()
    assert command.main(["--runs", str(tmp_path / "none")]) == 2
    assert "no record of SM+LN+G with 200M tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown budget '1B'"):
        frontier("1B")


def test_the_baseline_on_record_stands():
    table = frontier("200M")
    assert table.loc["SM+LN+G", "runs"] >= 3
    assert table.loc["SM+LN+G", "perplexity"] == pytest.approx(19.86, abs=0.3)
    assert table.loc["SM+LN+G", "gap"] == 0
