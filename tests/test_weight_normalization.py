"""Weight and spectral normalisation against the definition and torch's SVD, and the columns that Table 5 names."""

import pytest
import torch
from torch.nn.utils import parametrize

from entropy_lib.variants import NORM_PLACEMENTS
from entropy_lib.weight_normalization import SpectralNorm, WeightNorm, iterate_spectral_norms

D = 32
PLACES = {"QK": "QK", "FFN": "F", "QK+FFN": "QKF", "QKV+FFN": "QKVF", "QKVO+FFN": "QKVOF"}  # by hand


def layers_of(block):
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def matrices(block, original=False):
    """(letter, matrix) of everything a placement can name; `original` gives what lies under the normalisation."""
    weights = [
        layer.parametrizations.weight.original if original and parametrize.is_parametrized(layer) else layer.weight
        for layer in layers_of(block)
    ]
    return list(zip("QKVOFF", [*weights[0].split(D, dim=1), *weights[1:]], strict=True))


def test_every_placement_is_covered():
    assert set(PLACES) == set(NORM_PLACEMENTS)


@pytest.mark.parametrize("place", PLACES)
def test_weight_norm_in_place(place, tiny_model):
    for block in tiny_model("SM+WNorm", place).transformer.h:  # whose gains are off their initial values
        parametrized = [layer for layer in layers_of(block) if parametrize.is_parametrized(layer)]
        gains = iter([norm.gain for layer in parametrized for norm in layer.parametrizations.weight])
        for (letter, weight), (_, raw) in zip(matrices(block), matrices(block, original=True), strict=True):
            if letter not in PLACES[place]:
                assert torch.equal(weight, raw)
                continue
            gain = next(gains)
            assert gain.shape == (weight.shape[1],)
            columns = [gain[j] * raw[:, j] / raw[:, j].square().sum().sqrt() for j in range(raw.shape[1])]
            torch.testing.assert_close(weight, torch.stack(columns, dim=1), rtol=1e-12, atol=1e-12)
            assert (weight - raw).abs().max() > 1e-3
        assert next(gains, None) is None


@pytest.mark.parametrize("place", PLACES)
def test_spectral_norm_in_place(place, tiny_model):
    model = tiny_model("SM+SNorm", place, n_layer=1).train()
    for _ in range(500):  # one power iteration each training pass
        iterate_spectral_norms(model)
    with torch.no_grad():
        weights = [matrices(block) for block in model.transformer.h]
    for block, normalised in zip(model.transformer.h, weights, strict=True):
        for (letter, weight), (_, raw) in zip(normalised, matrices(block, original=True), strict=True):
            if letter in PLACES[place]:
                largest = torch.linalg.svdvals(raw)[0]
                assert abs(largest - 1) > 1e-2
                torch.testing.assert_close(weight, raw / largest, rtol=1e-5, atol=1e-7)
                assert torch.linalg.svdvals(weight)[0].item() == pytest.approx(1, abs=1e-5)
            else:
                assert torch.equal(weight, raw)


def test_weight_norm_starts_at_the_weight_and_ignores_its_length():
    weight = torch.randn(6, 9, dtype=torch.float64)
    norm = WeightNorm(weight, slice(3, 6))
    torch.testing.assert_close(norm.gain.data, weight[:, 3:6].square().sum(0).sqrt())
    torch.testing.assert_close(norm(weight), weight)
    longer = weight.clone()
    longer[:, 3:6] *= torch.tensor([2.0, 5.0, 0.1])
    torch.testing.assert_close(norm(longer), weight)
    (grad,) = torch.autograd.grad((norm(weight.requires_grad_())[:, 3:6] ** 3).sum(), weight)
    along = (grad * weight)[:, 3:6].sum(0)  # so the gradient has no part along V
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(norm, weight)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_spectral_norm_value_and_gradient_are_the_svds(shape):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = SpectralNorm(weight, slice(0, shape[1]))
    norm.power_iteration(weight, steps=500)
    target = torch.randn(shape, dtype=torch.float64)
    (ours,) = torch.autograd.grad((norm(weight) * target).sum(), weight)
    exact = weight / torch.linalg.matrix_norm(weight, 2)
    (expected,) = torch.autograd.grad((exact * target).sum(), weight)
    torch.testing.assert_close(norm(weight), exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_half_precision_does_not_shift_the_largest_singular_value(precision):
    weight = torch.randn(96, 384) * 0.02
    largest = torch.linalg.svdvals(weight)[0]
    norm = SpectralNorm(weight, slice(0, 384))
    if precision == "weights":
        norm, weight = norm.bfloat16(), weight.bfloat16()
        largest = torch.linalg.svdvals(weight.float())[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        norm.power_iteration(weight, steps=300)
        normalized = norm(weight)
    assert normalized.dtype == weight.dtype
    error = (normalized.float() * largest - weight.float()).norm() / weight.float().norm()
    assert error < (1e-4 if precision == "autocast" else 3e-3)  # bfloat16 weights are rounded one by one
    assert torch.linalg.svdvals(normalized.float())[0].item() == pytest.approx(1, abs=3e-4)


def test_spectral_norm_iterates_in_training_only(tiny_model):
    model = tiny_model("SM+SNorm")
    norm = model.transformer.h[0].mlp.c_fc.parametrizations.weight[0]
    state = {key: value.clone() for key, value in norm.state_dict().items()}
    assert set(state) == {"left", "right"}  # saved with the model
    tokens = torch.zeros(1, 3, dtype=torch.long)
    first = model(tokens).logits
    assert torch.equal(model(tokens).logits, first)
    assert all(torch.equal(value, state[key]) for key, value in norm.state_dict().items())
    model.train()(tokens)
    assert not torch.equal(norm.left, state["left"])
    assert not list(norm.parameters())


def test_spectral_norm_survives_two_forward_passes_before_backward():
    weight = torch.randn(6, 6, requires_grad=True)
    norm = SpectralNorm(weight, slice(0, 6))
    first = norm(weight).sum()
    norm.power_iteration(weight)
    (first + norm(weight).square().sum()).backward()
    assert torch.isfinite(weight.grad).all()
