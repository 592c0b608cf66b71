"""Entropy of attention rows against scipy, autograd of the plain definition, and counts made by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import entr
from scipy.special import softmax as scipy_softmax

from entropy_lib import attention_entropy, diagnose, entropy_bands, entropy_from_logits, max_entropy
from entropy_lib.entropy import ROW_SUM_TOLERANCE, row_sum_error

SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=2)


def random_logits(shape, scale, seed=0):
    return np.random.default_rng(seed).standard_normal(shape) * scale


# attention_entropy


@given(lead=SHAPES, queries=st.integers(1, 5), keys=st.integers(1, 9), scale=st.sampled_from([0.0, 0.3, 3.0, 300.0]))
def test_attention_entropy_is_scipys(lead, queries, keys, scale):
    attention = scipy_softmax(random_logits((*lead, queries, keys), scale), axis=-1)
    expected = entr(attention).sum(-1)
    for eps, tolerance in ((0.0, 1e-12), (1e-9, keys * 1.1e-9)):  # a·log(a + eps) - a·log a < eps
        entropy = attention_entropy(torch.tensor(attention), eps=eps)
        assert entropy.dtype == torch.float64
        np.testing.assert_allclose(entropy, expected, rtol=0, atol=tolerance)


def test_eps_goes_inside_the_logarithm():
    attention = torch.tensor([[0.9, 0.1, 0.0]], dtype=torch.float64)
    expected = -(0.9 * math.log(0.95) + 0.1 * math.log(0.15))
    assert attention_entropy(attention, eps=0.05).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-9])
@pytest.mark.parametrize("keys", [1, 2, 7, 128])
def test_uniform_row_has_log_n_and_one_hot_has_zero(keys, eps):
    uniform = torch.full((keys,), 1 / keys, dtype=torch.float64)
    assert attention_entropy(uniform, eps=eps).item() == pytest.approx(
        math.log(keys), abs=keys * 2e-9 if eps else 1e-12
    )
    one_hot = torch.eye(keys, dtype=torch.float64, requires_grad=True)
    entropy = attention_entropy(one_hot, eps=eps)
    entropy.sum().backward()
    torch.testing.assert_close(entropy, torch.zeros_like(entropy), rtol=0, atol=1.1e-9 if eps else 0)
    off_diagonal = 0.0 if eps == 0 else -math.log(eps)  # 0·log 0 has gradient 0 by convention
    expected = torch.full_like(one_hot, off_diagonal).fill_diagonal_(-1.0)
    torch.testing.assert_close(one_hot.grad, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("empty", [0.0, math.nan])
@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_fully_masked_row_has_zero_entropy_and_finite_gradient(empty, eps):
    attention = torch.tensor([[0.25, 0.75, 0.0], [empty] * 3], dtype=torch.float64, requires_grad=True)
    entropy = attention_entropy(attention, eps=eps)
    entropy.sum().backward()
    expected = torch.tensor([entr([0.25, 0.75]).sum(), 0.0], dtype=torch.float64)
    torch.testing.assert_close(entropy, expected, rtol=0, atol=3e-9)
    assert torch.isfinite(attention.grad).all()


def test_nan_weights_count_as_zero():
    row = torch.tensor([0.5, math.nan, 0.5, math.nan])
    for eps in (0.0, 1e-9):
        assert attention_entropy(row, eps=eps).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_attention_entropy_gradient_is_that_of_the_definition(eps):
    attention = torch.tensor(scipy_softmax(random_logits((2, 3, 5), 1.0), axis=-1), requires_grad=True)
    weight = torch.randn(2, 3, dtype=torch.float64)
    (plain,) = torch.autograd.grad((-(attention * (attention + eps).log()).sum(-1) * weight).sum(), attention)
    (ours,) = torch.autograd.grad((attention_entropy(attention, eps=eps) * weight).sum(), attention)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda a: attention_entropy(a, eps=eps), attention)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    weights = torch.tensor(scipy_softmax(random_logits((4, 256), 1.0), axis=-1)).to(dtype)
    entropy = attention_entropy(weights)
    assert entropy.dtype == torch.float32
    # in half precision the sum over 256 keys would be off by 1e-3 and more
    np.testing.assert_allclose(entropy, entr(weights.double().numpy()).sum(-1), rtol=2e-6)
    logits = torch.tensor(random_logits((4, 256), 3.0)).to(dtype)
    expected = entr(scipy_softmax(logits.double().numpy(), axis=-1)).sum(-1)
    from_logits = entropy_from_logits(logits)
    assert from_logits.dtype == torch.float32
    np.testing.assert_allclose(from_logits, expected, rtol=5e-6)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (torch.full((2, 3), 0.5), "sum to 1"),
        (torch.tensor([[0.0, 0.9]]), "sum to 1"),
        (torch.tensor([[2.0, -1.0]]), "sum to 1"),  # sums to one, but is no distribution
        (torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), "entropy_from_logits"),
        (torch.ones(2, 0), "shape"),
        (torch.tensor(1.0), "shape"),
        (torch.ones(2, 1, dtype=torch.long), "floating"),
    ],
)
def test_attention_entropy_rejects(attention, message):
    with pytest.raises(ValueError, match=message):
        attention_entropy(attention)
    with pytest.raises(ValueError, match=message):
        attention_entropy(attention, eps=1e-9)


def test_row_sum_error():
    rows = torch.tensor([[0.5, 0.5], [0.5, 0.25], [1.5, -0.5], [0, 0], [math.nan, math.nan], [math.nan, 0.75]])
    torch.testing.assert_close(row_sum_error(rows), torch.tensor([0, 0.25, 1.0, 0, 0, 0.25]))


# entropy_from_logits


@given(
    lead=SHAPES,
    queries=st.integers(1, 5),
    keys=st.integers(1, 9),
    scale=st.sampled_from([0.0, 0.3, 3.0, 300.0, 1e30]),
    seed=st.integers(0, 3),
)
def test_entropy_from_logits_is_scipys(lead, queries, keys, scale, seed):
    logits = random_logits((*lead, queries, keys), scale, seed)
    visible = np.random.default_rng(seed + 100).random((queries, keys)) < 0.7  # broadcasts over the leading axes
    hidden = np.where(visible, logits, -np.inf)
    for mask, values in ((None, logits), (visible, hidden)):
        some_key = np.isfinite(values).any(-1, keepdims=True)  # scipy has no softmax over nothing
        expected = np.where(some_key[..., 0], entr(scipy_softmax(np.where(some_key, values, 0), axis=-1)).sum(-1), 0.0)
        entropy = entropy_from_logits(torch.tensor(logits), None if mask is None else torch.tensor(mask))
        np.testing.assert_allclose(entropy, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(entropy_from_logits(torch.tensor(values)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 1, 1, 5), (2, 1, 4, 5), (1, 3, 1, 1)])
def test_mask_broadcasts(shape):
    logits, mask = torch.randn(2, 3, 4, 5), torch.rand(shape) < 0.6
    full = mask.expand(2, 3, 4, 5)
    expected = [
        entr(scipy_softmax(row[keep].double().numpy())).sum() if keep.any() else 0.0
        for row, keep in zip(logits.view(-1, 5), full.reshape(-1, 5), strict=True)
    ]
    np.testing.assert_allclose(entropy_from_logits(logits, mask).flatten(), expected, atol=1e-6)


def test_entropy_from_logits_gradient():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    entropy = entropy_from_logits(logits, mask)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    a = torch.nan_to_num(logits.masked_fill(~mask, -math.inf).softmax(-1)).detach()
    log_a = torch.where(a > 0, a, 1.0).log()
    torch.testing.assert_close(grad, -a * (log_a + entropy.detach()[:, None]), rtol=1e-10, atol=1e-14)
    assert (grad[~mask] == 0).all()  # and so the fully masked row has gradient 0
    assert torch.autograd.gradcheck(lambda z: entropy_from_logits(z, mask), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "row",
    [
        [3e4, -3e4, 0.0],
        [-math.inf, 3e4, 3e4],
        [-math.inf, -3e4, -3e4],
        [-math.inf] * 3,
        [0.0] * 3,
        [3e4] * 3,
        [-3e4] * 3,
    ],
)
def test_extreme_logits_give_finite_entropy_and_gradient(row, dtype):
    logits = torch.tensor([row], dtype=dtype, requires_grad=True)
    entropy = entropy_from_logits(logits)
    entropy.sum().backward()
    top = row.count(max(row)) if max(row) > -math.inf else 1
    assert entropy.item() == pytest.approx(math.log(top), abs=1e-6)
    torch.testing.assert_close(
        logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-2 if dtype.itemsize == 2 else 1e-6
    )


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(3, dtype=torch.long)])
def test_mask_must_be_boolean(mask):
    with pytest.raises(ValueError, match="boolean"):
        entropy_from_logits(torch.randn(2, 3), mask)
    with pytest.raises(ValueError, match="floating"):
        entropy_from_logits(torch.ones(2, 3, dtype=torch.long))


# max_entropy


@given(queries=st.integers(1, 12), keys=st.integers(1, 12))
def test_max_entropy_is_that_of_uniform_attention(queries, keys):
    torch.testing.assert_close(max_entropy(queries, keys), torch.full((queries,), math.log(keys)))
    visible = [max(sum(j <= i + keys - queries for j in range(keys)), 1) for i in range(queries)]
    causal = max_entropy(queries, keys, causal=True, dtype=torch.float64)
    np.testing.assert_allclose(causal, np.log(visible), rtol=1e-15)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    uniform = entropy_from_logits(torch.zeros(queries, keys, dtype=torch.float64), mask)
    torch.testing.assert_close(causal, uniform, rtol=0, atol=1e-12)


def test_max_entropy_defaults_and_errors():
    assert max_entropy(5).tolist() == pytest.approx([math.log(5)] * 5)
    assert max_entropy(3, causal=True).tolist() == pytest.approx([0, math.log(2), math.log(3)])
    assert max_entropy(3).dtype == torch.float32
    for sizes in ((0,), (3, 0), (-1, 4)):
        with pytest.raises(ValueError, match="at least 1"):
            max_entropy(*sizes)
    # θ = 0.9, γ = 0.2, T = 128: with log T as the ceiling, 29 causal rows can never reach the band
    assert int((max_entropy(128, causal=True) < (0.9 - 0.2) * math.log(128)).sum()) == 29


# entropy_bands and diagnose


@pytest.mark.parametrize(
    ("entropy", "fractions"),
    [
        # max 4, so edges at 1, 2, 3: an entropy on an edge belongs to the band above, the maximum to the last
        ([[0.0, 0.999, 1.0, 1.5], [2.0, 3.0, 3.5, 4.0]], [2 / 8, 2 / 8, 1 / 8, 3 / 8]),
        ([[0.0, 0.0], [0.0, 0.0]], [1, 0, 0, 0]),
        ([[2.0, 2.0]], [0, 0, 0, 1]),
        ([[0.0, 1e-30]], [0.5, 0, 0, 0.5]),
        ([0.1, 0.3, 0.6, 1.0, 1.0], [0.2, 0.2, 0.2, 0.4]),
        ([[-1e-9, 1.0]], [0.5, 0, 0, 0.5]),  # rounding below zero is let through
    ],
)
def test_entropy_bands(entropy, fractions):
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(entropy_bands(torch.tensor(entropy, dtype=dtype)), torch.tensor(fractions).float())


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from([1.0, 2.0**-7]))
def test_entropy_bands_by_brute_force(entropy, unit):
    counts = [0] * 4
    for value in entropy:
        largest = max(entropy)
        counts[min(3, 4 * value // largest) if largest else 0] += 1
    bands = entropy_bands(torch.tensor([entropy], dtype=torch.float64) * unit)
    assert bands.tolist() == pytest.approx([count / len(entropy) for count in counts])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [2, 3, 7, 100, 129, 1000])
def test_whatever_rows_are_let_through_can_be_diagnosed(dtype, keys):
    uniform = torch.full((1, 2, 1, keys), 1 / keys).to(dtype)
    off = ROW_SUM_TOLERANCE[dtype] * 0.9
    one_hot = torch.eye(keys)[:1].expand(1, 2, 1, keys).to(dtype)
    slack = torch.finfo(dtype).eps
    for attention, state in ((uniform, "overloaded"), (one_hot, "collapsed")):
        for factor in (1 - off + slack, 1.0, 1 + off - slack):
            entropy = attention_entropy((attention.double() * factor).to(dtype)).mean(dim=(0, 2))[None]
            assert diagnose(entropy, keys)[state].tolist() == [2]
            assert entropy_bands(entropy).sum() == 1


def test_diagnose_by_hand():
    context = 16  # log 16 = 4 log 2: quarters at log 2, 2 log 2, 3 log 2
    q = math.log(2)
    entropy = torch.tensor([[0.0, 0.9 * q, 1.001 * q, 2 * q], [2.999 * q, 3.001 * q, 4 * q, q / 2]])
    counts = {state: heads.tolist() for state, heads in diagnose(entropy, context).items()}
    assert counts == {"collapsed": [2, 1], "healthy": [2, 1], "overloaded": [0, 2]}
    edges = torch.tensor([[0.25, 0.75, 1.0]], dtype=torch.float64) * math.log(8)
    counts = {state: heads.tolist() for state, heads in diagnose(edges, 8).items()}
    assert counts == {"collapsed": [0], "healthy": [1], "overloaded": [2]}


@pytest.mark.parametrize("bad", [[[-0.1, 1.0]], [[math.nan, 1.0]], [[math.inf, 1.0]], [[]]])
def test_head_entropies_must_be_finite_and_non_negative(bad):
    with pytest.raises(ValueError, match="non-negative"):
        entropy_bands(torch.tensor(bad))
    with pytest.raises(ValueError, match="non-negative"):
        diagnose(torch.tensor(bad), 16)


@pytest.mark.parametrize(
    ("entropy", "context", "message"),
    [([[0.1]], 1, "at least 2"), ([0.1, 0.2], 16, "shape"), ([[3.0]], 16, "exceeds log")],
)
def test_diagnose_rejects(entropy, context, message):
    with pytest.raises(ValueError, match=message):
        diagnose(torch.tensor(entropy), context)
