import json
from dataclasses import replace

import pytest

from entropy_lib.training.benchmarks import Answer
from entropy_lib.training.recipe import get_recipe
from paper import abilities


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    small = {"sequences_per_step": 4, "micro_batch": 4, "eval_blocks": 4, "precision": "float32", "compile": False}
    monkeypatch.setattr(abilities, "get_recipe", lambda name, **fields: replace(get_recipe(name, **fields), **small))
    monkeypatch.setattr(abilities, "gold_answers", lambda name: [Answer("def f():\n", f" return {name!r}\n")])


def test_a_rehearsal_is_on_record_and_in_the_table(tmp_path, capsys):
    models = ["SM+ScFuFFN", "SM(1)+LN(a)+R+V"]
    options = ["--only", *models, "--size", "tiny", "--steps", "2", "--corpus", "sample", "--output", str(tmp_path)]
    assert abilities.main(options) == 0
    assert "SM+ScFuFFN, sample, 200M, seed 0: finished" in capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert {result["model"] for result in results} == set(models)
    for result in results:
        assert result["summary"]["recipe"]["scaled_residual_init"]
        assert set(result["bits"]) == set(abilities.BENCHMARKS)
        assert all(0 < bits < 10 for bits in result["bits"].values())
    assert abilities.main(options) == 0
    assert "SM+ScFuFFN, sample, 200M, seed 0: on record" in capsys.readouterr().out
    assert abilities.main(["--table", "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.index("SM+ScFuFFN") < told.index("SM(1)")  # more bytes
    assert "HumanEval" in told


def test_a_rehearsal_is_none_of_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(abilities, "RESULTS", tmp_path / "results")
    assert abilities.main(["--only", "SM+ScFuFFN", "--size", "tiny", "--steps", "2", "--corpus", "sample"]) == 0
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path / "build" / "abilities"]


def test_a_run_that_collapsed_is_in_the_table_too():
    summary = {"eval_perplexity": None, "recall": None, "associative_recall": None, "patterns": None}
    result = {"model": "SM", "corpus": "sample", "tokens": "200M", "seed": 0, "bits": {}, "summary": summary}
    row = abilities.table([result]).iloc[0]
    assert row["runs"] == 1
    assert row[["perplexity", "recall", "copy"]].isna().all()
