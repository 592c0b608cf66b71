"""The toy head of the tug of war: its penalty is the library's, its HTML needs nothing else."""

import math
import re

import pytest
import torch

pytest.importorskip("anywidget")
from entropy_lib.explore import tug_of_war
from entropy_lib.explore.module import module_source


def by_hand(logits, theta, gamma, per):
    """Penalty of [queries][keys] logits in float64, from the formula alone."""
    a = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1)
    entropy, ceiling = -(a * a.log()).sum(-1), math.log(a.shape[1])
    deviation = (entropy.mean()[None] if per == "head" else entropy) - theta * ceiling
    return torch.where(deviation.abs() > gamma * ceiling, deviation**2, 0).mean().item()


@pytest.mark.parametrize("per", ["head", "query"])
def test_the_penalty_is_the_formula_s(per):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).tolist()
    head = tug_of_war(logits, theta=0.4, gamma=0.05)
    head.per = per
    value, for_logits, for_theta = head.penalty()
    assert value.item() == pytest.approx(by_hand(logits, 0.4, 0.05, per))
    nudged = (by_hand(logits, 0.4 + 1e-6, 0.05, per) - by_hand(logits, 0.4 - 1e-6, 0.05, per)) / 2e-6
    assert for_theta.item() == pytest.approx(nudged, rel=1e-5)
    assert for_logits.sum(-1).abs().max() < 1e-12  # a shift of a row changes nothing


def test_the_threshold_comes_further_than_the_entropy():
    head = tug_of_war()
    start = head.penalty()[0]
    logits, theta = head.logits, head.theta
    head.step(10)
    assert head.penalty()[0] < start
    moved = torch.tensor(head.logits).sub(torch.tensor(logits)).abs().max().item()
    assert 0 < moved < abs(head.theta - theta)
    assert tug_of_war().logits == logits  # another one starts anew


def test_within_the_band_nothing_moves():
    head = tug_of_war([[0.0, 0.0], [0.0, 0.0]], theta=1.0, gamma=0.1)  # uniform rows, asked for log 2
    before = head.state()
    head.step(3)
    assert head.state() == before


@pytest.mark.parametrize("logits", [[1.0, 2.0], [[1.0]], [[1.0, math.inf]], [[0.0, 0.0]] * 5])
def test_other_logits_are_refused(logits):
    with pytest.raises(ValueError, match="1 to 4 queries"):
        tug_of_war(logits)


@pytest.mark.parametrize("shares", [{"theta": 1.1}, {"gamma": -0.1}])
def test_shares_out_of_range_are_refused(shares):
    with pytest.raises(ValueError, match="expected θ of 0 to 1"):
        tug_of_war(**shares)


def test_its_html_asks_for_nothing_and_closes_no_script():
    html = tug_of_war().html()
    assert html.count("</script>") == 1
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    assert html == tug_of_war().html()  # no random name: the same output in a committed notebook
    assert html != tug_of_war(theta=0.7).html()
    assert "http" not in module_source("toy_head").replace("http://www.w3.org/2000/svg", "")  # a name, not an address


def test_a_cell_shows_the_widget_and_its_html():
    shown = tug_of_war()._repr_mimebundle_()
    data = shown[0] if isinstance(shown, tuple) else shown
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(data)
