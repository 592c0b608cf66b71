"""The entropy penalty against the authors' published values and against loops over single numbers.

golden/reference_loss.json was computed by the published class in float64. Inputs are rebuilt from each case's seed:
rng = numpy.random.default_rng(seed); per layer z = rng.standard_normal((batch, heads, seq, seq)) * logit_scale, -inf
above the diagonal if causal, attention = softmax(z); then thresholds = rng.uniform(0.2, 0.8, heads).
"""

import json
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from entropy_lib import EntropyRegularization, attention_entropy

GOLDEN = json.loads((Path(__file__).parent / "golden" / "reference_loss.json").read_text())
CHOICES = list(product(("sum", "mean"), ("query", "head"), ("context", "causal")))


def random_attention(layers=2, batch=3, heads=2, queries=5, keys=None, scale=2.0):
    """Causal attention of the last `queries` of `keys` positions, one float64 leaf a layer."""
    keys = keys or queries
    hidden = torch.ones(queries, keys).tril(keys - queries) == 0
    logits = [scale * torch.randn(batch, heads, queries, keys, dtype=torch.float64) for _ in range(layers)]
    return [z.masked_fill(hidden, -math.inf).softmax(-1).requires_grad_() for z in logits]


def brute_force(entropies, thresholds, *, loss_coeff, margin, reduction, per, ceiling, keys, context_size=None):
    """λ · mean_l mean_h reduce_{b,i} penalty, one number at a time; autograd works through it."""
    layers = []
    for layer, entropy in enumerate(entropies):
        batch, heads, queries = entropy.shape
        tops = [math.log(context_size or keys)] * queries
        if ceiling == "causal":
            tops = [math.log(i + 1 + keys - queries) for i in range(queries)]
        penalties = []
        for head in range(heads):
            theta = thresholds[head] if thresholds.dim() == 1 else thresholds[layer, head]
            rows = [(entropy[b, head, i], tops[i]) for b in range(batch) for i in range(queries)]
            if per == "head":
                rows = [(sum(e for e, _ in rows) / len(rows), sum(top for _, top in rows) / len(rows))]
            total = 0.0
            for e, top in rows:
                delta = e - theta * top
                if abs(delta.item()) > margin * top:
                    total = total + delta * delta
            penalties.append(total / len(rows) if reduction == "mean" else total)
        layers.append(sum(penalties) / heads)
    return loss_coeff * sum(layers) / len(layers)


# The published interface


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["seed"]))
def test_published_values(case):
    rng = np.random.default_rng(case["seed"])
    shape = (case["batch"], case["heads"], case["seq"], case["seq"])
    attentions = []
    for _ in range(case["layers"]):
        z = rng.standard_normal(shape) * case["logit_scale"]
        if case["causal"]:
            z = np.where(np.tril(np.ones(shape[2:])) == 0, -np.inf, z)
        attentions.append(torch.tensor(softmax(z, axis=-1), requires_grad=True))
    thresholds = torch.tensor(rng.uniform(0.2, 0.8, size=case["heads"]), requires_grad=True)

    regularizer = EntropyRegularization(case["loss_coeff"], case["tolerance_margin_factor"], case["context_size"])
    loss = regularizer.compute_loss(attentions, thresholds, case["heads"], case["layers"])
    assert loss.dim() == 0
    loss.backward()
    entropy = [regularizer.compute_entropy(a).mean(dim=(0, 2)).tolist() for a in attentions]
    agree = {"rtol": 1e-6, "atol": 0}
    np.testing.assert_allclose(loss.item(), case["loss"], **agree)
    np.testing.assert_allclose(thresholds.grad, case["grad_threshold"], **agree)
    np.testing.assert_allclose([a.grad.norm() for a in attentions], case["grad_attention_l2"], **agree)
    np.testing.assert_allclose(entropy, case["mean_entropy_per_layer_head"], **agree)


def test_defaults_are_the_published_ones():
    ours = EntropyRegularization()
    assert (ours.loss_coeff, ours.tolerance_margin_factor, ours.context_size) == (1e-5, 0.2, None)
    assert (ours.reduction, ours.per, ours.ceiling) == ("sum", "query", "context")
    assert "reduction='sum'" in repr(ours)
    assert not list(ours.parameters())
    assert not ours.state_dict()


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.nn.Parameter, list, torch.Tensor.numpy])
def test_thresholds_may_be_a_parameter_or_a_list(convert):
    attentions, theta = random_attention(layers=2, heads=3), torch.tensor([0.25, 0.5, 0.75])
    for thresholds in (theta, theta.expand(2, 3).clone() + torch.tensor([[0.0], [0.125]])):
        expected = EntropyRegularization(1.0).compute_loss(attentions, thresholds, 3, 2)
        loss = EntropyRegularization(1.0).compute_loss(attentions, convert(thresholds), 3, 2)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss > 0


def test_list_of_the_layers_parameters_gets_gradients():
    theta = [torch.nn.Parameter(torch.tensor([0.9, 0.8])), torch.nn.Parameter(torch.tensor([0.1, 0.9]))]
    attentions = random_attention(layers=2, heads=2)
    EntropyRegularization(1.0, 0.0).compute_loss(attentions, theta, 2, 2).backward()
    assert all((parameter.grad != 0).all() for parameter in theta)


# forward, every combination of choices


@pytest.mark.parametrize("keys", [6, 9])
@pytest.mark.parametrize("per_layer", [False, True], ids=["theta[H]", "theta[L,H]"])
@pytest.mark.parametrize(("reduction", "per", "ceiling"), CHOICES)
def test_value_and_gradients_by_brute_force(reduction, per, ceiling, per_layer, keys):
    layers, heads, queries = 3, 2, 6
    attentions = random_attention(layers, 2, heads, queries, keys)
    entropies = [attention_entropy(a).detach().requires_grad_() for a in attentions]
    shape = (layers, heads) if per_layer else heads  # a low and a high head: something is outside the band
    thresholds = (torch.tensor([0.0, 0.95]) + 0.1 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    inputs = [thresholds, *entropies]
    kwargs = {"reduction": reduction, "per": per, "ceiling": ceiling}
    for context_size, margin in ((12, 0.2), (None, 0.0), (None, 0.1)):
        regularizer = EntropyRegularization(0.7, margin, context_size, **kwargs)
        brute = {"loss_coeff": 0.7, "margin": margin, "context_size": context_size, **kwargs}

        expected = brute_force(entropies, thresholds, **brute, keys=queries)  # forward knows no keys but the queries
        loss = regularizer(entropies, thresholds)
        assert expected > 0
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        wanted = torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), wanted, rtol=1e-12, atol=1e-12)

        # From the attention matrices, which carry the number of keys; ε and the float32 log cost the last digits.
        rows = [attention_entropy(a) for a in attentions]
        expected = brute_force(rows, thresholds, **brute, keys=keys)
        loss = regularizer.compute_loss(attentions, thresholds, heads, layers)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        # where a > 0: where it is exactly 0, the published ε gives a gradient of its own
        ours, wanted = (
            torch.autograd.grad(x, [thresholds, *attentions], allow_unused=True, materialize_grads=True)
            for x in (loss, expected)
        )
        torch.testing.assert_close(ours[0], wanted[0], rtol=1e-5, atol=1e-6)
        for a, one, other in zip(attentions, ours[1:], wanted[1:], strict=True):
            torch.testing.assert_close(one[a > 1e-4], other[a > 1e-4], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ceiling", ["context", "causal"])
def test_sum_is_batch_times_queries_times_mean(ceiling):
    entropies = [attention_entropy(a) for a in random_attention(batch=3, queries=5)]
    total, mean = (EntropyRegularization(1.0, reduction=r, ceiling=ceiling) for r in ("sum", "mean"))
    thresholds = torch.tensor([0.2, 0.9])
    assert total(entropies, thresholds).item() == pytest.approx(15 * mean(entropies, thresholds).item())
    head = [EntropyRegularization(1.0, reduction=r, per="head", ceiling=ceiling) for r in ("sum", "mean")]
    assert head[0](entropies, thresholds) == head[1](entropies, thresholds) > 0


def padded(lengths, side, layers=2, heads=3, queries=9):
    """(entropies of one batch with nonsense at padding, its query mask, the same sequences one by one)."""
    alone = [[attention_entropy(a) for a in random_attention(layers, 1, heads, n)] for n in lengths]
    real = torch.zeros(len(lengths), queries, dtype=torch.bool)
    batch = [torch.full((len(lengths), heads, queries), math.nan, dtype=torch.float64) for _ in range(layers)]
    for row, n in enumerate(lengths):
        place = slice(queries - n, queries) if side == "left" else slice(0, n)
        real[row, place] = True
        for layer in range(layers):
            batch[layer][row, :, place] = alone[row][layer].detach()[0]
    return [entropy.requires_grad_() for entropy in batch], real, alone


@pytest.mark.parametrize("context_size", [None, 16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ceiling", ["context", "causal"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_padded_batch_pays_what_its_sequences_pay_alone(reduction, ceiling, side, context_size):
    lengths = (9, 1, 4, 6)
    batch, real, alone = padded(lengths, side)
    theta = torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64, requires_grad=True)
    regularizer = EntropyRegularization(1.0, 0.05, context_size, reduction=reduction, ceiling=ceiling)
    weights = [1.0] * len(lengths) if reduction == "sum" else [n / sum(lengths) for n in lengths]
    expected = sum(w * regularizer(entropies, theta) for w, entropies in zip(weights, alone, strict=True))
    loss = regularizer(batch, theta, real)
    assert expected > 0
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(regularizer(batch, theta, [real, real.clone()]), loss)
    wanted = torch.autograd.grad(expected, theta)[0]
    grads = torch.autograd.grad(loss, [theta, *batch])
    torch.testing.assert_close(grads[0], wanted, rtol=1e-12, atol=1e-14)
    for grad in grads[1:]:
        assert (grad.transpose(1, 2)[~real] == 0).all()
        assert grad.transpose(1, 2)[real].abs().sum() > 0


@pytest.mark.parametrize("context_size", [None, 16])
@pytest.mark.parametrize("ceiling", ["context", "causal"])
def test_head_means_are_over_real_queries(ceiling, context_size):
    lengths = (5, 2, 7)
    batch, real, alone = padded(lengths, "left", layers=1)
    theta, queries = torch.tensor([0.0, 0.5, 0.95], dtype=torch.float64), sum(lengths)
    tops = [math.log(context_size or n) if ceiling == "context" else math.log(i + 1) for n in lengths for i in range(n)]
    means = sum(entropies[0].sum(-1)[0] for entropies in alone) / queries  # [H]
    deviation = means - theta * sum(tops) / queries
    expected = deviation.square().mean()
    for reduction in ("sum", "mean"):
        regularizer = EntropyRegularization(1.0, 0.0, context_size, reduction=reduction, per="head", ceiling=ceiling)
        torch.testing.assert_close(regularizer(batch, theta, real), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("reduction", "per", "ceiling"), CHOICES)
def test_masks_that_hide_nothing_or_all(reduction, per, ceiling):
    entropies = [attention_entropy(a) for a in random_attention(batch=3, queries=5)]
    theta = torch.tensor([0.2, 0.9])
    regularizer = EntropyRegularization(1.0, 0.05, reduction=reduction, per=per, ceiling=ceiling)
    plain, ones = regularizer(entropies, theta), torch.ones(3, 5, dtype=torch.bool)
    assert plain > 0
    for mask in (ones, ones[:1], [None, ones], [None, None]):
        torch.testing.assert_close(regularizer(entropies, theta, mask), plain)
    assert regularizer(entropies, theta, ~ones) == 0
    one_layer = regularizer(entropies[1:], theta)  # nothing of the first layer is real
    torch.testing.assert_close(regularizer(entropies, theta, [~ones, None]), one_layer / 2)
    for wrong, message in ((ones.long(), "boolean"), (ones[:, :4], r"\[3, 5\]"), ([ones], "1 masks for 2 layers")):
        with pytest.raises(ValueError, match=message):
            regularizer(entropies, theta, wrong)


@pytest.mark.parametrize("side", [1, -1])
def test_penalty_jumps_at_the_edge_of_the_band(side):
    top, margin = math.log(16), 0.25 * math.log(16)
    regularizer = EntropyRegularization(1.0, 0.25, context_size=16)
    theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)

    def loss_at(distance):
        entropy = torch.tensor([[[0.5 * top + side * distance]]], dtype=torch.float64, requires_grad=True)
        loss = regularizer([entropy], theta)
        return loss.item(), *(grad.item() for grad in torch.autograd.grad(loss, (entropy, theta)))

    assert loss_at(0.0) == (0, 0, 0)
    assert loss_at(margin * (1 - 1e-9)) == pytest.approx((0, 0, 0))
    just_outside = margin**2, 2 * side * margin, -2 * side * margin * top
    assert loss_at(margin * (1 + 1e-9)) == pytest.approx(just_outside, rel=1e-8)
    # exactly on the edge counts as inside (|δ| > γ·E_max is strict): θ = γ and entropy 0
    on_edge = torch.zeros(1, 1, 1, dtype=torch.float64)
    assert regularizer([on_edge], [0.25]).item() == 0
    assert regularizer([on_edge], [0.250001]).item() > 0


def test_penalty_vanishes_inside_the_band_and_scales_with_lambda():
    entropies = [attention_entropy(a) for a in random_attention(queries=6)]
    thresholds = torch.tensor([0.5, 0.3])
    assert EntropyRegularization(1.0, 1.0)(entropies, thresholds) == 0
    assert EntropyRegularization(0.0, 0.0)(entropies, thresholds) == 0
    one, many = (EntropyRegularization(c, 0.1)(entropies, thresholds).item() for c in (1.0, 7.0))
    assert many == pytest.approx(7 * one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_loss_is_computed_in_float32(dtype):
    attentions = [a.detach().to(dtype) for a in random_attention(queries=8)]
    exact = [a.double() / a.double().sum(-1, keepdim=True) for a in attentions]
    theta = torch.tensor([0.9, 0.3])  # not θ = γ: there the first row, entropy 0, is on the edge of the band
    loss = EntropyRegularization(1.0).compute_loss(attentions, theta, 2, 2)
    assert loss.dtype == torch.float32
    expected = EntropyRegularization(1.0).compute_loss(exact, theta, 2, 2).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 2e-2)
    entropies = [attention_entropy(a).to(dtype) for a in exact]
    assert EntropyRegularization(1.0)(entropies, theta).dtype == torch.float32


def test_fully_masked_rows_give_finite_loss_and_gradients():
    for empty in (0.0, math.nan):
        attention = torch.eye(4).repeat(1, 1, 1, 1)
        attention[0, 0, 0] = empty
        attention.requires_grad_()
        theta = torch.tensor([0.9], requires_grad=True)
        loss = EntropyRegularization(1.0).compute_loss([attention], theta, 1, 1)
        loss.backward()
        assert loss.item() == pytest.approx(4 * (0.9 * math.log(4)) ** 2, rel=1e-6)
        assert torch.isfinite(attention.grad).all()
        assert torch.isfinite(theta.grad).all()


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_coeff": -1e-5}, "loss_coeff .*-1e-05"),
        ({"loss_coeff": math.nan}, "loss_coeff"),
        ({"tolerance_margin_factor": -0.1}, "tolerance_margin_factor .*-0.1"),
        ({"tolerance_margin_factor": math.inf}, "tolerance_margin_factor"),
        ({"context_size": 0}, "context_size .*0"),
        ({"reduction": "none"}, "reduction .*'sum', 'mean'.*'none'"),
        ({"per": "layer"}, "per .*'layer'"),
        ({"ceiling": "max"}, "ceiling .*'max'"),
    ],
)
def test_constructor_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        EntropyRegularization(**arguments)


A = torch.full((2, 3, 4, 4), 0.25)
E = torch.zeros(2, 3, 4)
THETA = torch.full((3,), 0.5)


@pytest.mark.parametrize(
    ("attentions", "thresholds", "heads", "layers", "message"),
    [
        ([], THETA, 3, 0, "empty"),
        ([A[0]], THETA, 3, 1, r"\[batch, heads, queries, keys\], got \(3, 4, 4\)"),
        ([A, None], THETA, 3, 2, r"attentions\[1\].*NoneType"),
        ([A, A[:, :2]], THETA, 3, 2, "2 heads"),
        ([A], THETA, 3, 2, "num_layers=2"),
        ([A], THETA, 4, 1, "num_heads=4"),
        ([A * 2], THETA, 3, 1, "sum to 1"),
        ([torch.randn(2, 3, 4, 4)], THETA, 3, 1, "entropy_from_logits"),
        ([A[:0]], THETA, 3, 1, "got"),
        ([A], THETA[:2], 3, 1, r"\[3\] or \[1, 3\].*got \[2\]"),
        ([A, A], THETA.expand(3, 3), 3, 2, r"\[2, 3\]"),
        ([A], [], 3, 1, "empty"),
        ([A], torch.tensor(0.5), 3, 1, "thresholds"),
    ],
)
def test_compute_loss_rejects(attentions, thresholds, heads, layers, message):
    with pytest.raises(ValueError, match=message):
        EntropyRegularization().compute_loss(attentions, thresholds, heads, layers)


@pytest.mark.parametrize(
    ("entropies", "thresholds", "message"),
    [
        ([], THETA, "empty"),
        ([A], THETA, r"\[batch, heads, queries\]"),
        ([E, E[:, :1]], THETA, "1 heads"),
        ([E], THETA[:1], r"got \[1\]"),
        ([E], THETA.expand(2, 3), r"got \[2, 3\]"),
    ],
)
def test_forward_rejects(entropies, thresholds, message):
    with pytest.raises(ValueError, match=message):
        EntropyRegularization()(entropies, thresholds)


# As the authors use it: with a stock GPT-2, inside a Trainer subclass


class PublishedPatternTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.penalties = []
        self.entropy_reg = EntropyRegularization(loss_coeff=1e-2, tolerance_margin_factor=0.2, context_size=None)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs, output_attentions=True)
        config = model.config
        thresholds = model.transformer.h[0].attn.reg_threshold_weights  # one layer's for all, as published
        penalty = self.entropy_reg.compute_loss(outputs.attentions, thresholds, config.n_head, config.n_layer)
        self.penalties.append(penalty.item())
        self.entropy_reg.log_entropy_metrics(outputs.attentions, self.state.global_step, None)
        loss = outputs.loss + penalty
        return (loss, outputs) if return_outputs else loss


def stock_gpt2(**config):
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=16,
            vocab_size=31,
            n_positions=16,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=0.3,
            **config,
        )
    )
    for block in model.transformer.h:
        block.attn.reg_threshold_weights = torch.nn.Parameter(torch.full((2,), 0.1))
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_authors_pattern_in_a_trainer(dropout, tmp_path):
    model = stock_gpt2(attn_pdrop=dropout)
    before = [block.attn.reg_threshold_weights.detach().clone() for block in model.transformer.h]
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 31, (4, 16))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[]
    )
    trainer = PublishedPatternTrainer(model=model, args=arguments, train_dataset=data)
    if dropout:  # GPT-2's default: its attentions have been through dropout, which is no reason to stop
        with pytest.warns(UserWarning, match="attn_pdrop=0"):
            trainer.train()
    else:
        trainer.train()
    assert len(trainer.penalties) == 2
    assert all(math.isfinite(penalty) and penalty > 0 for penalty in trainer.penalties)
    first, second = (block.attn.reg_threshold_weights for block in model.transformer.h)
    assert (first != before[0]).all()  # θ of the first layer learns
    assert torch.equal(second, before[1])  # and that of the second is not used by this pattern


def test_attention_after_dropout_gives_the_published_number():
    model = stock_gpt2(attn_pdrop=0.1).train()
    attentions = model(torch.randint(0, 31, (2, 16)), output_attentions=True).attentions
    theta = model.transformer.h[0].attn.reg_threshold_weights
    with pytest.warns(UserWarning, match="dropout"):
        loss = EntropyRegularization(1.0).compute_loss(attentions, theta, 2, 2)
    rows = [-(a * (a + 1e-9).log()).sum(-1) for a in attentions]
    deltas = [(row - theta[:, None] * math.log(16)).double() for row in rows]
    expected = sum((d[d.abs() > 0.2 * math.log(16)] ** 2).sum() / 2 for d in deltas) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_dropout_is_recognised_however_few_weights_it_took():
    attention = torch.full((1, 1, 3, 3), 1 / 3).tril()
    attention = attention / attention.sum(-1, keepdim=True) / 0.9  # what dropout of 0.1 leaves ...
    attention[0, 0, 2, 0] = 0.0  # ... when it takes one weight beside the diagonal
    with pytest.warns(UserWarning, match="dropout"):
        EntropyRegularization().compute_loss([attention], [0.5], 1, 1)


# Logging


class FakeWandb:
    def __init__(self):
        self.calls = []

    def log(self, metrics, step=None):
        self.calls.append((metrics, step))


def test_log_entropy_metrics_to_wandb_and_none():
    attentions, wandb = random_attention(layers=2, heads=3), FakeWandb()
    metrics = EntropyRegularization.log_entropy_metrics(attentions, 7, wandb)
    assert wandb.calls == [(metrics, 7)]
    assert metrics == EntropyRegularization.log_entropy_metrics(attentions, 7)
    assert metrics == EntropyRegularization().log_entropy_metrics(tuple(attentions), step=7, logger=None)
    expected = {
        f"attn.{layer}.head.{head}.entropy": attention_entropy(attentions[layer][:, head]).mean().item()
        for layer in range(2)
        for head in range(3)
    }
    assert metrics == pytest.approx(expected, abs=1e-8)
    assert all(type(value) is float for value in metrics.values())


def test_log_entropy_metrics_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        metrics = EntropyRegularization.log_entropy_metrics(random_attention(), 11, writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(metrics)
    for key, value in metrics.items():
        (event,) = events.Scalars(key)
        assert (event.step, event.value) == (11, pytest.approx(value, rel=1e-6))


def test_log_entropy_metrics_rejects():
    with pytest.raises(ValueError, match="logger needs"):
        EntropyRegularization.log_entropy_metrics(random_attention(), 0, SimpleNamespace())
    with pytest.raises(ValueError, match="empty"):
        EntropyRegularization.log_entropy_metrics([], 0)
