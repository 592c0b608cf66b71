"""Static heads, ReLU² attention, annealed LayerNorm and value residuals, against the equations written out."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM

from entropy_lib import build_model, fold_for_inference, record_entropy
from entropy_lib.annealed_layer_norm import AnnealedLayerNorm, anneal
from entropy_lib.private_inference.architecture import Architecture, operations
from entropy_lib.regularization import EntropyRegularization
from entropy_lib.static_heads import StaticHeads
from entropy_lib.variants import PRIVATE_VARIANTS, VARIANTS, get_variant
from tests.test_modeling import eager_copy, traced_ops

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 97, "n_positions": 24}


def tokens(batch=2, length=12):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def written_out(model, ids):
    """Logits and {(layer, head): entropies} of one sequence [T], row by row, from the weights alone."""
    config, body = model.config, model.transformer
    x = body.wte.weight[ids] + body.wpe.weight[: len(ids)]
    size, entropies, first = config.n_embd // config.n_head, {}, None

    def norm(module, x):
        centred = x - x.mean(-1, keepdim=True)
        if isinstance(module, AnnealedLayerNorm):
            return centred * module.log_scale.exp() * module.weight + module.bias
        std = (centred.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        return centred / std * module.weight + module.bias

    for layer, block in enumerate(body.h):
        attention, dynamic = block.attn, config.heads_of_layer(layer)
        qkv = norm(block.ln_1, x) @ attention.c_attn.weight + attention.c_attn.bias
        value = qkv[:, 2 * dynamic * size :].reshape(len(ids), config.n_head, size)
        if config.value_residual:
            first = value if layer == 0 else first
            value = value if layer == 0 else attention.value_mix[0] * value + attention.value_mix[1] * first
        output = torch.zeros(len(ids), config.n_head, size, dtype=x.dtype)
        for head in range(config.n_head):
            for i in range(len(ids)):
                if head >= dynamic:
                    weights = attention.static.filter[head - dynamic, : i + 1].flip(0)
                else:
                    query = qkv[i, head * size : (head + 1) * size]
                    keys = qkv[: i + 1, (dynamic + head) * size : (dynamic + head + 1) * size]
                    z = keys @ query / math.sqrt(size)
                    weights = z.softmax(0) if config.attention == "softmax" else z.clamp(min=0) ** 2 / (i + 1)
                    if config.attention == "softmax":
                        entropies[layer, head, i] = -(weights * weights.log()).sum()
                output[i, head] = weights @ value[: i + 1, head]
        x = x + output.reshape(len(ids), -1) @ attention.c_proj.weight + attention.c_proj.bias
        inner = norm(block.ln_2, x) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
        assert inner.shape[1] == config.ffn_multiple * config.n_embd
        inner = inner.clamp(min=0) if config.activation_function == "relu" else nn.GELU(approximate="tanh")(inner)
        x = x + inner @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    return norm(body.ln_f, x) @ body.wte.weight.T, entropies


def test_logits_and_entropies_are_those_of_the_equations(private_model):
    ids = tokens()
    output = private_model(ids, output_entropies=True)
    assert [e.shape[1] for e in output.entropies] == private_model.config.entropy_heads()
    for sequence in range(len(ids)):
        logits, entropies = written_out(private_model, ids[sequence])
        torch.testing.assert_close(output.logits[sequence], logits, **EXACT)
        found = {
            (layer, head, i): value
            for layer, rows in enumerate(output.entropies)
            for head, row in enumerate(rows[sequence])
            for i, value in enumerate(row)
        }
        assert found.keys() == entropies.keys()
        for key, value in entropies.items():
            torch.testing.assert_close(found[key], value, **EXACT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "entropy"])
def test_cache_and_padding_change_nothing(private_model, implementation):
    ids, whole = tokens(2, 15), private_model(tokens(2, 15)).logits
    private_model.set_attn_implementation(implementation)
    first = private_model(ids[:, :6], use_cache=True)
    second = private_model(ids[:, 6:9], past_key_values=first.past_key_values, use_cache=True)
    third = private_model(ids[:, 9:], past_key_values=second.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits, third.logits], 1), whole, **EXACT)
    for place in (slice(0, 4), slice(6, 10), slice(15, 19)):  # before, in the middle, behind
        mask = torch.ones(2, 19, dtype=torch.long)
        mask[:, place] = 0
        padded = torch.zeros(2, 19, dtype=torch.long)
        padded[:, mask[0].bool()] = ids
        kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        torch.testing.assert_close(private_model(padded, **kwargs).logits[:, mask[0].bool()], whole, **EXACT)


def test_generation_is_the_same_with_any_cache(private_model):
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    without = private_model.generate(ids, use_cache=False, **options)
    assert torch.equal(private_model.generate(ids, **options), without)
    static = private_model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, without)
    beams = {**options, "num_beams": 3}
    assert torch.equal(private_model.generate(ids, **beams), private_model.generate(ids, use_cache=False, **beams))


def test_save_and_load(private_model, tmp_path):
    private_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded(tokens()).logits, private_model(tokens()).logits)
    assert loaded.config.entropy_heads() == private_model.config.entropy_heads()


def test_fold(private_model):
    ids = tokens()
    folded = fold_for_inference(private_model)
    torch.testing.assert_close(folded(ids).logits, private_model(ids).logits, **EXACT)
    torch.testing.assert_close(fold_for_inference(folded)(ids).logits, private_model(ids).logits, **EXACT)
    single = copy.deepcopy(private_model).float()
    torch.testing.assert_close(fold_for_inference(single)(ids).logits, single(ids).logits, rtol=1e-5, atol=1e-4)
    assert not any(isinstance(module, AnnealedLayerNorm) for module in folded.modules())


def test_graph_has_only_the_nonlinearities_of_the_name(private_model):
    config, ops = private_model.config, traced_ops(eager_copy(fold_for_inference(private_model)))
    with_heads = sum(config.heads_of_layer(layer) > 0 for layer in range(config.n_layer))
    softmax = config.attention == "softmax"
    assert ops["softmax"] == with_heads * softmax
    assert ops["layer_norm"] == (1 if config.annealed_layer_norm else 2 * config.n_layer + 1)
    relu = config.n_layer * (config.activation_function == "relu") + with_heads * (not softmax)
    assert ops["relu"] == relu
    assert ops["pow"] + ops["square"] == (0 if softmax else with_heads) + ops["tanh"]
    assert ops["exp"] == ops["log"] == ops["rsqrt"] == 0


def test_an_unfinished_layer_norm_is_not_folded(tiny_model):
    model = tiny_model("SM+LN(a)+R")
    model.transformer.h[1].ln_2.blend.fill_(0.5)
    with pytest.raises(ValueError, match=r"blend 0\.5"):
        fold_for_inference(model)


def losses(model, ids):
    output = model(ids, labels=ids, output_entropies=True)
    thresholds, penalty = model.entropy_thresholds(), output.norm_penalty
    total = output.loss + (0 if penalty is None else penalty)
    if thresholds is not None:
        total = total + EntropyRegularization(0.5, 0.0, 24, reduction="mean")(output.entropies, thresholds)
    return total


def test_every_parameter_learns_and_checkpointing_changes_nothing(private_model):
    private_model.train()
    for module in private_model.modules():
        if isinstance(module, AnnealedLayerNorm):
            module.blend.fill_(0.5)
    again = copy.deepcopy(private_model)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (private_model, again):
        losses(model, tokens()).backward()
    for (name, parameter), other in zip(private_model.named_parameters(), again.parameters(), strict=True):
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, other.grad, **EXACT)
    anneal(private_model, 0.6)
    anneal(again, 0.6)  # whose passes were all counted twice
    for first, second in zip(private_model.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(first, second, **EXACT)


def test_reentrant_checkpoints_are_refused(tiny_model):
    with pytest.raises(ValueError, match="use_reentrant=False"):
        tiny_model("SM(1)+LN(a)+R+V").gradient_checkpointing_enable({"use_reentrant": True})


def test_blocks_hand_each_other_nothing_that_fsdp_copies(private_model):
    """FSDP takes a block's arguments apart and puts them together anew, in bf16 those of every block."""
    private_model.train()
    expected = losses(private_model, tokens())
    for block in private_model.transformer.h:
        block.register_forward_pre_hook(lambda _, args, kwargs: tree_map(lambda x: x, (args, kwargs)), with_kwargs=True)
    torch.testing.assert_close(losses(private_model, tokens()), expected)


def test_bf16_is_close_and_finite(private_model):
    ids = tokens()
    half = copy.deepcopy(private_model).bfloat16()
    logits = half(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.double() - private_model(ids).logits).abs().max() < 0.05 * private_model(ids).logits.abs().max()


@pytest.mark.parametrize("variant", ["SM(0,0,1)+LN(a)+R+V", "R2(0,0,1)+LN(a)+R+V", "EReg(SM(3)+LN(a)+R+V)"])
def test_torch_compile(variant, tiny_model):
    model, ids = tiny_model(variant).train(), tokens()
    expected = losses(model, ids)
    expected_grad = torch.autograd.grad(expected, model.transformer.wte.weight)[0]
    before = [buffer.clone() for buffer in model.buffers()]
    compiled = torch.compile(lambda ids: losses(model, ids), fullgraph=True, backend="aot_eager")
    loss = compiled(ids)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss, model.transformer.wte.weight)[0], expected_grad, **EXACT)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))  # the norms' sums


def test_recorder_hears_the_softmax_heads(tiny_model):
    model, ids = tiny_model("SM(0,0,1)+LN(a)+R+V"), tokens()
    with record_entropy(model) as recorder:
        model(ids)
    torch.testing.assert_close(recorder.entropies[0], model(ids, output_entropies=True).entropies[2], **EXACT)
    assert len(recorder.entropies) == 1


def test_a_head_s_penalty_does_not_depend_on_static_ones():
    torch.manual_seed(0)
    layers = [torch.rand(2, heads, 24, dtype=torch.float64) * 3 for heads in (3, 0, 1)]
    thresholds = torch.rand(3, 3, dtype=torch.float64)
    thresholds[1] = thresholds[2, 1:] = math.nan
    penalty = EntropyRegularization(0.5, 0.1, 24, reduction="mean")
    whole = [penalty([e], thresholds[i : i + 1, : e.shape[1]]) for i, e in enumerate(layers) if e.shape[1]]
    torch.testing.assert_close(penalty(layers, thresholds), (whole[0] + whole[1]) / 2, **EXACT)
    with pytest.raises(ValueError, match="no entropy to regularise"):
        penalty([layers[1]] * 3, thresholds)
    with pytest.raises(ValueError, match="thresholds must have shape"):
        penalty(layers, torch.rand(3, 4, dtype=torch.float64))


def test_thresholds_and_temperatures_of_static_heads_are_nan(tiny_model):
    pattern = {"dynamic_heads": [2, 0, 4], "learnable_temperature": True}
    model = tiny_model("EReg(SM(3)+LN(a)+R+V)", **pattern)
    for values in (model.entropy_thresholds(), model.temperatures()[..., 0]):
        assert (~values.isnan()).sum(-1).tolist() == [2, 0, 4]
    torch.testing.assert_close(fold_for_inference(model)(tokens()).logits, model(tokens()).logits, **EXACT)


# -- the parts ------------------------------------------------------------------------------------------------------


def test_static_matrix_by_brute_force():
    heads = StaticHeads(3, 9)
    matrix = heads.matrix(4, 7)
    for head in range(3):
        for i in range(4):
            for j in range(7):
                distance = i + 3 - j
                expected = heads.filter[head, distance] if distance >= 0 else 0.0
                assert matrix[head, i, j] == expected
    torch.testing.assert_close(heads.filter.sum(-1), torch.ones(3))
    assert StaticHeads(1, 1).matrix(1).tolist() == [[[1.0]]]
    with pytest.raises(ValueError, match="10 keys exceed the 9 distances"):
        heads.matrix(10)
    assert (heads(torch.ones(2, 3, 4, 5), 4, torch.zeros(2, 1, 4, 4, dtype=torch.bool)) == 0).all()  # nothing visible


def test_static_heads_count_hundreds_of_visible_keys_exactly_under_autocast():
    """Counts above 256 are not all numbers of bfloat16."""
    heads, value = StaticHeads(2, 600), torch.randn(1, 2, 600, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        heads.filter.normal_()
        found = heads(value, 600, torch.ones(1, 1, 600, 600, dtype=torch.bool).tril())
        torch.testing.assert_close(found, heads(value, 600), rtol=0.02, atol=0.3)


def test_annealed_norm_starts_as_layer_norm_and_ends_linear():
    torch.manual_seed(0)
    norm, x = AnnealedLayerNorm(16, 1e-5).double(), torch.randn(3, 5, 16, dtype=torch.float64) * 2
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    plain = nn.functional.layer_norm(x, (16,), norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(norm(x)[0], plain, **EXACT)
    norm.anneal(0.25)
    inverse = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(norm.log_scale[0], inverse.log().mean())
    constant = norm.log_scale.exp()
    centred = x - x.mean(-1, keepdim=True)
    blended, penalty = norm(x)
    expected = centred * (0.75 * inverse + 0.25 * constant) * norm.weight + norm.bias
    torch.testing.assert_close(blended, expected, **EXACT)
    torch.testing.assert_close(penalty, (inverse / constant).log().square().mean(), **EXACT)
    norm(7 * x)
    norm.anneal(1.0)  # two passes since: their mean moves the constant by 0.02·(1 - 0.25)
    means = inverse.log().mean(), (((7 * x).var(-1, unbiased=False) + 1e-5).rsqrt()).log().mean()
    moved = means[0] + 0.015 * (sum(means) / 2 - means[0])
    torch.testing.assert_close(norm.log_scale[0], moved, **EXACT)
    norm.eval()
    y = torch.randn_like(x)
    additive = norm(x + y)[0] + norm(torch.zeros_like(x))[0]
    torch.testing.assert_close(additive, norm(x)[0] + norm(y)[0], **EXACT)
    norm.anneal(1.0)  # no pass in training: nothing moves
    torch.testing.assert_close(norm.log_scale[0], moved, **EXACT)


@pytest.mark.parametrize("worst", [float("inf"), float("nan")])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_pass_that_overflows_leaves_the_constant_alone(worst, first):
    norm, x = AnnealedLayerNorm(16, 1e-5).double(), torch.randn(3, 16, dtype=torch.float64)
    overflowed = x.index_fill(0, torch.tensor([1]), worst)
    if not first:
        norm(x)
        norm.anneal(0.25)
    before = norm.log_scale.clone()
    norm(x), norm(overflowed)
    norm.anneal(0.5)
    assert torch.equal(norm.log_scale, before)
    assert bool(norm.seen) is not first
    norm(x)
    norm.anneal(0.5)
    assert norm.log_scale.isfinite().all()
    assert norm(x)[0].isfinite().all()


def test_names_say_what_is_in_them():
    assert not set(PRIVATE_VARIANTS) & set(VARIANTS)
    for name, variant in PRIVATE_VARIANTS.items():
        assert variant.name == name
        parts = name.removeprefix("EReg(").removesuffix(")" if name.startswith("EReg") else "").split("+")
        heads = parts[0].partition("(")[2].removesuffix(")")
        assert variant.dynamic_heads == (tuple(map(int, heads.split(","))) if heads else None)
        assert variant.attention == {"SM": "softmax", "R2": "relu2"}[parts[0].partition("(")[0]]
        assert variant.annealed_layer_norm == ("LN(a)" in parts)
        assert variant.value_residual == ("V" in parts)
        assert variant.ffn_multiple == (2 if "R(2d)" in parts else 4)
        assert variant.entropy_regularization == name.startswith("EReg")
        assert get_variant(name) is variant


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamic_heads": (5,)}, "from 0 to n_head = 4"),
        ({"dynamic_heads": ()}, "from 0 to n_head = 4"),
        ({"attention": "relu"}, "attention must be one of"),
        ({"attention": "relu2", "learnable_temperature": True}, "only a softmax"),
        ({"annealed_layer_norm": True, "layer_norm": False}, "none to anneal"),
        ({"ffn_multiple": 2, "fused_ffn": True}, "no width of its own"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model("SM+LN+R", **SIZES, **changes)


def test_without_the_last_layer_norm():
    model = build_model("SM+LN(a)+R", **SIZES, final_layer_norm=False)
    assert isinstance(model.transformer.ln_f, nn.Identity)
    assert isinstance(model.transformer.h[0].ln_1, AnnealedLayerNorm)


def test_inputs_longer_than_the_filter_are_refused(tiny_model):
    with pytest.raises(ValueError, match="25 tokens exceeds the model's 24 positions"):
        tiny_model("SM(0)+LN(a)+R+V")(tokens(1, 25))


def test_prices_count_the_operations_that_are_left(private_model):
    config, found = private_model.config, Counter()
    for operation in operations(Architecture.of(config), 8):
        found[operation.name] += operation.shape[0] if len(operation.shape) == 3 and operation.name != "linear" else 1
    heads = [config.heads_of_layer(layer) for layer in range(3)]
    attention = {"softmax": "softmax", "relu2": "relu2_attention"}[config.attention]
    assert found[attention] == found["scores"] == found["mix"] == sum(heads)
    assert found["static"] == 12 - sum(heads)
    assert found["layernorm"] == (1 if config.annealed_layer_norm else 7)
    assert found["relu"] + found["gelu"] == 3
    assert found["linear"] == 4 * 3 + 1
    assert found["multiply"] == 0
    if "(2d)" in config.variant:
        assert all(o.shape == (8, 64) for o in operations(Architecture.of(config), 8) if o.name == "relu")
