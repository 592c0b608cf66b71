"""Which heads keep their softmax: the rules on a record whose rankings are known."""

from types import SimpleNamespace

import pytest
from test_tables import record

from entropy_lib.variants import get_variant
from paper import experiments
from paper.head_choice import COUNTS, RULES, heads_by_layer, variant_name

RECORD = SimpleNamespace(
    name="known", entropy=[[0.1, 4.0], [3.0, 0.2], [2.0, 1.0]], input_dependence=[[0.0, 0.9], [0.5, 0.6], [0.1, 0.55]]
)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("low entropy", (1, 1, 0)),  # 0.1, 0.2
        ("high entropy", (1, 1, 0)),  # 4.0, 3.0
        ("input dependence", (1, 1, 0)),  # 0.9, 0.6
        ("both", (0, 1, 1)),  # sums of ranks: 5 5, 7 2, 7 4
    ],
)
def test_the_best_two_of_six(rule, wanted):
    assert heads_by_layer(RECORD, rule, 2) == wanted


@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_heads_is_placed(rule):
    for count in range(7):
        assert sum(heads_by_layer(RECORD, rule, count)) == count
    assert heads_by_layer(RECORD, rule, 6) == (2, 2, 2)


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ValueError, match="unknown rule 'best'; choose from low entropy"):
        heads_by_layer(RECORD, "best", 2)
    with pytest.raises(ValueError, match="0 to 6 heads, got 7"):
        heads_by_layer(RECORD, "both", 7)
    with pytest.raises(ValueError, match="no input dependence on record"):
        heads_by_layer(SimpleNamespace(name="old", entropy=[[1.0]], input_dependence=None), "both", 1)


def test_its_variant_is_built_by_name():
    assert COUNTS == (4, 12, 36)
    variant = get_variant(variant_name((0, 2, 1)))
    assert variant.dynamic_heads == (0, 2, 1)
    assert variant.annealed_layer_norm


def test_the_experiment_lists_its_runs_once_the_ranking_is_on_record(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CLONE", tmp_path)
    assert experiments.EXPERIMENTS["head_choice"].runs == ()
    (ranked,) = experiments.EXPERIMENTS["head_choice_ranked"].runs
    scores = [[float(12 * layer + head) for head in range(12)] for layer in range(12)]
    record(ranked, tmp_path / "data" / "runs", 26.0, entropy=scores, input_dependence=scores)
    names = {run.variant for run in experiments.EXPERIMENTS["head_choice"].runs}
    assert variant_name((4, *[0] * 11)) in names  # the four of lowest entropy, all in layer 0
    assert variant_name((*[0] * 9, 12, 12, 12)) in names  # the 36 of highest entropy, and of most dependence
    assert all(sum(get_variant(name).dynamic_heads) in COUNTS for name in names)
    asked = experiments.expand(experiments.parser().parse_args(["head_choice"]))  # by the command that trains them
    assert {run.variant for runs in asked.values() for run in runs} == names
    (one,) = experiments.expand(experiments.parser().parse_args(["head_choice", "--only", min(names)])).values()
    assert [(run.variant, run.seed) for run in one] == [(min(names), 0), (min(names), 1)]
