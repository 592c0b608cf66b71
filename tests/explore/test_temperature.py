"""The temperature explorer shows the library's own entropies of the logits at the temperature of each head."""

import math
import re

import numpy as np
import pytest
import torch
from traitlets import TraitError

from entropy_lib import attention_entropy, build_model

pytest.importorskip("anywidget")
explore = pytest.importorskip("entropy_lib.explore")
from entropy_lib.explore import attention_logits  # noqa: E402
from entropy_lib.explore.module import keys_worth  # noqa: E402
from make.attention_logits import write_logits  # noqa: E402


def random_logits(layers=2, heads=3, size=8, scale=2.0):
    torch.manual_seed(0)
    logits = scale * torch.randn(layers, heads, size, size)
    return logits.masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(), -math.inf)


def entropy_at(logits, t):
    """Mean entropy over rows of softmax(logits/t), the long way: probabilities first."""
    return attention_entropy(torch.softmax(logits.double() / t, dim=-1)).mean(-1)


@pytest.fixture
def explorer():
    return explore.temperature_explorer(random_logits())


@pytest.mark.parametrize("t", [0.01, 0.3162, 1.0, 100.0])
def test_entropies_are_the_library_s_at_every_temperature(explorer, t):
    explorer.layer, explorer.head = 1, 2
    explorer.t = t
    logits = explorer.sample.logits
    np.testing.assert_allclose(logits, random_logits() - random_logits().amax(-1, keepdim=True), rtol=1e-3)
    expected = entropy_at(logits, 1.0)
    expected[1, 2] = entropy_at(logits, t)[1, 2]
    torch.testing.assert_close(explorer.entropy, expected, rtol=0, atol=1e-9)
    entropy, worth = re.search(r"E = (.*) nats, (.*) keys’ worth", explorer.words()).groups()
    assert float(entropy) == pytest.approx(expected[1, 2].item(), rel=5e-3, abs=1e-9)
    assert float(worth) == pytest.approx(math.exp(expected[1, 2].item()), rel=5e-3)
    assert explorer.ceiling == pytest.approx(np.log(np.arange(1, 9)).mean())
    curve = explorer.still().data[0]
    assert (np.diff(curve.y) >= 0).all()
    assert curve.y[-1] == pytest.approx(explorer.ceiling, abs=1e-3)


def test_slope_by_formula_by_autograd_and_by_differences_agree(explorer):
    t = torch.logspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    slope = explorer.slope(t.detach())
    (gradient,) = torch.autograd.grad(explorer.entropies(t).sum(), t)
    torch.testing.assert_close(slope, gradient * t.detach(), rtol=0, atol=1e-9)
    up, down = (explorer.entropies(t.detach() * math.exp(step)) for step in (1e-5, -1e-5))
    torch.testing.assert_close(slope, (up - down) / 2e-5, rtol=0, atol=1e-6)
    assert slope.max() > 0.1


@pytest.mark.parametrize(("scope", "changed"), [("head", [(1, 0)]), ("layer", [(1, 0), (1, 1), (1, 2)]), ("all", None)])
def test_a_temperature_is_of_a_head_a_layer_or_all(explorer, scope, changed):
    explorer.layer, explorer.scope = 1, scope
    explorer.t = 10.0
    expected, hot = (entropy_at(explorer.sample.logits, t) for t in (1.0, 10.0))
    for place in changed or np.ndindex(2, 3):
        expected[place] = hot[place]
    torch.testing.assert_close(explorer.entropy, expected, rtol=0, atol=1e-9)
    explorer.layer = 0  # shows the temperature of the head that it comes to
    assert explorer.t == (10.0 if scope == "all" else 1.0)


def test_one_row(explorer):
    explorer.layer, explorer.single = 0, True
    for row in (7, 3, 0):
        explorer.row = row
        assert explorer.rows().shape == (1, 8)
        assert explorer.ceiling == pytest.approx(math.log(row + 1))
    assert explorer.words().startswith("E = 0 nats, 1 keys’ worth, of 0 nats at most")  # a row that sees one key
    assert explorer.slope(torch.ones(1)).item() == 0


@pytest.mark.parametrize(
    ("trait", "value"), [("layer", 2), ("head", 3), ("row", 8), ("temperatures", [[1.0]]), ("temperatures", 0.0)]
)
def test_what_there_is_not_is_refused(explorer, trait, value):
    if value == 0.0:  # no temperature, of as many heads as there are
        value = [[0.0] * 3] * 2
    with pytest.raises(TraitError):
        setattr(explorer, trait, value)


def test_logits_that_are_not_causal_and_far_below():
    logits = torch.randn(1, 1, 2, 5)
    logits[0, 0, 0, 1] = -1e6  # seen, though no half precision holds it
    explorer = explore.temperature_explorer(logits)
    assert not explorer.causal
    assert explorer.ceiling == pytest.approx(math.log(5))
    assert explorer.words() == explore.temperature_explorer(explorer.sample).words()


def test_the_committed_sample_is_there_and_small(tmp_path):
    assert attention_logits.SAMPLE.stat().st_size < 300_000
    sample, explorer = attention_logits.read_logits(), explore.temperature_explorer()
    assert torch.equal(explorer.sample.logits, sample.logits)  # it is in half precision
    assert len(explorer.html()) < 200_000
    write_logits(sample, tmp_path / "again.npz")
    again = attention_logits.read_logits(tmp_path / "again.npz")
    assert torch.equal(again.logits, sample.logits)
    assert (again.tokens, again.origin) == (sample.tokens, sample.origin)


class Letters:
    """The part of a tokenizer that is needed: one token a letter."""

    def __call__(self, text, return_tensors):
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": torch.tensor([[ord(letter) for letter in text]])})

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def test_a_model_s_own_logits():
    torch.manual_seed(0)
    model = build_model("SM(t)+ScFuFFN", "tiny", temperature_init=0.5).train()
    before = model.config._attn_implementation
    explorer = explore.temperature_explorer(model=model, tokenizer=Letters(), text="softmax")
    assert explorer.sample.tokens == tuple("softmax")
    assert (model.config._attn_implementation, model.training) == (before, True)
    model.eval().set_attn_implementation("eager")
    attentions = model(torch.tensor([[ord(letter) for letter in "softmax"]]), output_attentions=True).attentions
    expected = torch.cat([attention_entropy(attention.detach()).mean(-1) for attention in attentions])
    own = attention_logits.logits_of(model, Letters(), "softmax").logits
    np.testing.assert_allclose(attention_entropy(own.softmax(-1)).mean(-1), expected, atol=1e-5)
    np.testing.assert_allclose(explorer.entropy, expected, atol=1e-3)  # half precision
    with pytest.raises(ValueError, match="at least two tokens"):
        explore.temperature_explorer(model=model, tokenizer=Letters(), text="x")
    with pytest.raises(ValueError, match="tokenizer and a text"):
        explore.temperature_explorer(model=model)


def test_bad_logits_are_refused():
    with pytest.raises(ValueError, match="layers, heads, queries, keys"):
        explore.temperature_explorer(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="no key at all"):
        explore.temperature_explorer(torch.full((1, 1, 2, 2), -math.inf))
    with pytest.raises(ValueError, match="layers, heads, queries, keys"):
        explore.temperature_explorer(torch.full((1, 1, 2, 2), math.nan))


def test_one_key_is_worth_zero_nats_without_a_sign():
    assert keys_worth(-0.0) == keys_worth(0.0) == "0 nats, 1 keys’ worth"
