"""The temperature explorer shows the library's own entropies of the logits at the temperature of each head."""

import math

import numpy as np
import pytest
import torch

from entropy_lib import attention_entropy, build_model, entropy_from_logits

pytest.importorskip("ipywidgets")
explore = pytest.importorskip("entropy_lib.explore")
from entropy_lib.explore import attention_logits  # noqa: E402
from make.attention_logits import write_logits  # noqa: E402

MATRIX, ROW, HEADS, CURVE, DOT, SLOPE, AUTOGRAD = 0, 1, 2, 3, 4, 5, 6  # traces


def random_logits(layers=2, heads=3, size=8, scale=2.0):
    torch.manual_seed(0)
    logits = scale * torch.randn(layers, heads, size, size)
    return logits.masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(), -math.inf)


def entropy_at(logits, t):
    """Mean entropy over rows of softmax(logits/t), the long way: probabilities first."""
    return attention_entropy(torch.softmax(logits.double() / t, dim=-1)).mean(-1)


@pytest.mark.parametrize("t", [0.01, 0.3162, 1.0, 100.0])
def test_figure_is_the_library_s_entropy_at_every_temperature(t):
    logits = random_logits()
    explorer = explore.temperature_explorer(logits)
    explorer.controls["layer"].value, explorer.controls["head"].value = 1, 2
    explorer.controls["t"].value = t
    data = explorer.figure.data
    expected = entropy_at(logits, 1.0)
    expected[1, 2] = entropy_at(logits, t)[1, 2]
    np.testing.assert_allclose(data[HEADS].z, expected, atol=1e-5)
    assert data[DOT].y[0] == pytest.approx(expected[1, 2].item(), abs=1e-5)
    np.testing.assert_allclose(data[MATRIX].z, torch.softmax(logits[1, 2] / t, dim=-1), atol=1e-6)
    curve = [entropy_at(logits[1, 2], x).item() for x in data[CURVE].x]
    np.testing.assert_allclose(data[CURVE].y, curve, atol=1e-5)
    assert (np.diff(data[CURVE].y) >= -1e-5).all()
    ceiling = np.log(np.arange(1, 9)).mean()
    assert explorer.figure.layout.shapes[0].y0 == pytest.approx(ceiling)
    assert data[CURVE].y[-1] == pytest.approx(ceiling, abs=1e-3)


def test_slope_by_formula_by_autograd_and_by_differences_agree():
    explorer = explore.temperature_explorer(random_logits())
    data = explorer.figure.data
    line = np.interp(np.log(data[AUTOGRAD].x), np.log(data[SLOPE].x), data[SLOPE].y)
    np.testing.assert_allclose(data[AUTOGRAD].y, line, atol=1e-5)
    assert np.max(data[AUTOGRAD].y) > 0.1
    logits = explorer.rows().double()
    for t, slope in zip(data[SLOPE].x[::7], data[SLOPE].y[::7], strict=True):
        t, h = float(t), 1e-5
        up, down = (entropy_from_logits(logits / (t * math.exp(step))).mean().item() for step in (h, -h))
        assert slope == pytest.approx((up - down) / (2 * h), abs=1e-4)


@pytest.mark.parametrize(("scope", "changed"), [("head", [(1, 0)]), ("layer", [(1, 0), (1, 1), (1, 2)]), ("all", None)])
def test_a_temperature_is_of_a_head_a_layer_or_all(scope, changed):
    logits = random_logits()
    explorer = explore.temperature_explorer(logits)
    explorer.controls["layer"].value = 1
    explorer.controls["scope"].value = scope
    explorer.controls["t"].value = 10.0
    expected, hot = entropy_at(logits, 1.0), entropy_at(logits, 10.0)
    for place in changed or np.ndindex(2, 3):
        expected[place] = hot[place]
    np.testing.assert_allclose(explorer.figure.data[HEADS].z, expected, atol=1e-5)
    explorer.controls["layer"].value = 0  # shows the temperature of the head that it comes to
    assert explorer.controls["t"].value == pytest.approx(10.0 if scope == "all" else 1.0)


def test_one_row():
    logits = random_logits()
    explorer = explore.temperature_explorer(logits)
    explorer.controls["layer"].value = 0
    assert explorer.controls["row"].disabled
    explorer.controls["single"].value = True
    for row in (7, 3, 0):
        explorer.controls["row"].value = row
        data = explorer.figure.data
        assert (data[MATRIX].visible, data[ROW].visible) == (False, True)
        np.testing.assert_allclose(data[ROW].y, torch.softmax(logits[0, 0, row], dim=-1), atol=1e-6)
        assert data[DOT].y[0] == pytest.approx(entropy_from_logits(logits[0, 0, row]).item(), abs=1e-6)
        assert explorer.figure.layout.shapes[0].y0 == pytest.approx(math.log(row + 1))
    assert explorer.figure.data[DOT].y[0] == 0  # a row that sees one key
    assert np.isfinite(explorer.figure.data[AUTOGRAD].y).all()


def test_the_committed_sample_is_there_and_small(tmp_path):
    assert attention_logits.SAMPLE.stat().st_size < 300_000
    sample = attention_logits.read_logits()
    explorer = explore.temperature_explorer()
    np.testing.assert_allclose(explorer.figure.data[HEADS].z, entropy_at(sample.logits, 1.0), atol=1e-5)
    assert "nan" not in explorer.status.value
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
    np.testing.assert_allclose(explorer.figure.data[HEADS].z, expected, atol=1e-5)
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
