"""The model of every variant: the mathematics, and what transformers users expect of any model.

The `model` fixture (conftest) goes through all variants and all placements of weight and spectral normalisation.
"""

import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache
from transformers.pytorch_utils import Conv1D

from entropy_lib import (
    VARIANTS,
    EntropyGPT2Config,
    EntropyRegularization,
    attention_entropy,
    build_model,
    fold_for_inference,
    record_entropy,
)
from entropy_lib.explore.tiny_model import TINY
from entropy_lib.modeling import MODEL_SIZES, EntropyGPT2LMHeadModel

VOCAB, CONTEXT = 97, 24
EREG = "EReg(SM(t)+ScFuFFN)"
EXACT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}  # transformers takes losses and generated logits in float32


def tokens(batch=2, length=12):
    return torch.randint(1, VOCAB, (batch, length))  # 0 is the padding of generate()


def eager_copy(model):
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


def training_loss(model, ids, with_penalty=True):
    output = model(ids, labels=ids, output_entropies=True)
    thresholds = model.entropy_thresholds()
    if thresholds is None:
        thresholds = torch.full((model.config.n_head,), 0.9, dtype=model.dtype)
    penalty = EntropyRegularization(0.05, 0.05)(output.entropies, thresholds)
    return output.loss + penalty if with_penalty else output.loss


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# The mathematics


def test_stock_variant_is_transformers_gpt2(tiny_model):
    model = tiny_model("SM+LN+G", dtype=torch.float32)
    stock = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=VOCAB, n_positions=CONTEXT, attn_pdrop=0)
    ).eval()
    stock.load_state_dict(model.state_dict())  # strict: the same names
    ids = tokens()
    expected = stock(ids, labels=ids)
    for kwargs in ({}, {"output_entropies": True}):
        output = model(ids, labels=ids, **kwargs)
        torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=1e-5)


def plain_forward(model, ids):
    """Table 1, Eq. 8 and Appendix A on the model's parameters, with explicit softmax and no transformers code."""
    config, body = model.config, model.transformer
    (batch, length), heads, dim = ids.shape, config.n_head, config.n_embd // config.n_head
    activation = {"gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "relu": torch.relu}

    def norm(layer, x):
        if not config.layer_norm:
            return x
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    x = body.wte.weight[ids] + body.wpe.weight[:length]
    entropies = []
    for block in body.h:
        qkv = norm(block.ln_1, x) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        q, k, v = (part.view(batch, length, heads, dim).transpose(1, 2) for part in qkv.chunk(3, -1))
        logits = q @ k.mT / math.sqrt(dim)
        if config.learnable_temperature:
            logits = logits / block.attn.log_temperature.exp()[None, :, :length, None]
        attention = logits.masked_fill(torch.ones(length, length).triu(1) > 0, -math.inf).softmax(-1)
        entropies.append(attention_entropy(attention))
        output = (attention @ v).transpose(1, 2).reshape(x.shape)
        x = x + output @ block.attn.c_proj.weight + block.attn.c_proj.bias  # X_SA
        ffn = norm(block.ln_2, x)
        if not config.fused_ffn:
            ffn = ffn @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
            ffn = activation.get(config.activation_function, lambda x: x)(ffn)
        ffn = ffn @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
        x = block.beta * x + ffn / block.alpha if config.ffn_scaling else x + ffn
    return norm(body.ln_f, x) @ body.wte.weight.T, entropies


def test_logits_and_entropies_are_those_of_the_equations(model):
    ids = tokens()
    logits, entropies = plain_forward(model, ids)
    for candidate in (model, eager_copy(model)):
        torch.testing.assert_close(candidate(ids).logits, logits, **EXACT)
        output = candidate(ids, output_entropies=True)
        torch.testing.assert_close(output.logits, logits, **EXACT)
        torch.testing.assert_close(list(output.entropies), entropies, **EXACT)


def test_causality(model):
    ids = tokens(1, 10)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % VOCAB
    for kwargs in ({}, {"output_entropies": True}):
        before, after = model(ids, **kwargs), model(changed, **kwargs)
        assert (before.logits - after.logits)[:, :6].abs().max() < 1e-12
        assert (before.logits - after.logits)[:, 6:].abs().amin(dim=(0, 1)).max() > 1e-6
        for one, other in zip(before.entropies or (), after.entropies or (), strict=True):
            assert (one - other)[..., :6].abs().max() < 1e-12
            assert (one - other)[..., 6:].abs().max() > 1e-9


def test_every_parameter_learns_from_cross_entropy_and_penalty(model):
    model.train()
    training_loss(model, tokens(2, CONTEXT)).backward()  # as long as the context: every t[h, i] takes part
    for name, grad in gradients(model).items():
        assert grad is not None, name
        assert torch.isfinite(grad).all(), name
        assert (grad != 0).any(), name
    if model.config.learnable_temperature:  # row 0 sees one key: its temperature cannot matter
        grads = torch.stack([block.attn.log_temperature.grad for block in model.transformer.h])
        assert ((grads != 0) == (torch.arange(CONTEXT) > 0)).all()


def test_penalty_alone_moves_what_makes_entropy(tiny_model):
    model = tiny_model(EREG)
    output = model(tokens(), output_entropies=True)
    EntropyRegularization(1.0, 0.0)(output.entropies, model.entropy_thresholds()).backward()
    # the last layer's entropy does not depend on its values or its FFN, everything else does
    last = model.transformer.h[-1]
    assert (last.attn.c_attn.weight.grad[:, :64] != 0).any()
    assert (last.attn.c_attn.weight.grad[:, 64:] == 0).all()
    assert last.mlp.c_proj.weight.grad is None
    assert (model.transformer.h[0].mlp.c_proj.weight.grad != 0).any()
    for block in model.transformer.h:
        assert (block.attn.reg_threshold_weights.grad != 0).all()


def test_entropies_only_when_asked_for(model):
    output = model(tokens())
    assert output.entropies is None
    assert output.attentions is None
    output = model(tokens(2, 7), output_entropies=True)
    assert [tuple(entropy.shape) for entropy in output.entropies] == [(2, 2, 7)] * 2
    assert all(entropy.requires_grad for entropy in output.entropies)


def test_entropies_are_those_of_the_attention_weights(model):
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        attentions = eager_copy(model)(ids, output_attentions=True, **kwargs).attentions
        entropies = model(ids, output_entropies=True, **kwargs).entropies
        real = kwargs.get("attention_mask", torch.ones_like(ids))[:, None].bool()
        assert len(attentions) == len(entropies) == 2
        for attention, entropy in zip(attentions, entropies, strict=True):
            expected = attention_entropy(attention)
            torch.testing.assert_close(*(e.masked_fill(~real, 0) for e in (entropy, expected)), **EXACT)
            assert torch.isfinite(entropy).all()


# What is in the graph

NORM_OPS = "layer_norm native_layer_norm rms_norm batch_norm group_norm rsqrt sqrt var std".split()
ACTIVATION_OPS = "gelu relu tanh pow erf sigmoid silu leaky_relu elu clamp clamp_min threshold maximum".split()


def traced_ops(model):
    program = torch.export.export(model.requires_grad_(False), (tokens(1, 8),), {"use_cache": False}, strict=False)
    return Counter(
        node.target.overloadpacket.__name__
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_graph_has_the_nonlinearities_the_variant_names_and_no_other(name, tiny_model):
    model = tiny_model(name, n_layer=1)
    if model.config.weight_normalization:
        model = fold_for_inference(model)  # normalising weights takes a norm and a clamp, but not at inference
    ops, parts = traced_ops(eager_copy(model)), name.split("+")
    layers = model.config.n_layer
    assert ops["softmax"] == layers  # the counter does see nonlinearities
    assert {op: n for op, n in ops.items() if op in NORM_OPS} == (
        {"layer_norm": 2 * layers + 1} if "LN" in parts else {}
    )
    activations = {"tanh": layers, "pow": layers} if "G" in parts else {"relu": layers} if "R" in parts else {}
    assert {op: n for op, n in ops.items() if op in ACTIVATION_OPS} == activations
    assert ops["exp"] == (layers if model.config.learnable_temperature else 0)  # t = exp(log t)
    matrices = 3 if model.config.fused_ffn else 4  # c_attn, c_proj, and one or two in the FFN
    assert ops["addmm"] == layers * matrices


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def expected_count(config, placement=None):
    L, H, d, V, P = config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.n_positions
    attention = (3 * d * d + 3 * d) + (d * d + d)
    ffn = d * d + d if config.fused_ffn else (4 * d * d + 4 * d) + (4 * d * d + d)
    layer = attention + ffn
    layer += 2 * config.ffn_scaling + H * P * config.learnable_temperature + H * config.entropy_regularization
    layer += 2 * 2 * d * config.layer_norm
    if config.weight_normalization == "weight":  # one gain a column
        qkvo = placement.removesuffix("FFN").removesuffix("+")
        layer += d * len(qkvo) + 5 * d * placement.endswith("FFN")
    return V * d + P * d + L * layer + 2 * d * config.layer_norm  # the vocabulary matrix is shared


def test_parameter_count(model):
    assert parameter_count(model) == expected_count(model.config, model.config.norm_placement)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("size", ["tiny", "small", "gpt2", "gpt2-18l"])
def test_sizes(size):
    with torch.device("meta"):
        stock, final = build_model("SM+LN+G", size), build_model(EREG, size)
    layers, heads, width = {
        "tiny": (4, 4, 64),
        "small": (6, 8, 256),
        "gpt2": (12, 12, 768),
        "gpt2-18l": (18, 12, 768),
    }[size]
    assert (stock.config.n_layer, stock.config.n_head, stock.config.n_embd) == (layers, heads, width)
    assert parameter_count(stock) == expected_count(stock.config)
    assert parameter_count(final) == expected_count(final.config)
    if size == "gpt2":
        assert parameter_count(stock) == 124_439_808  # GPT-2 small


# What transformers users expect


def test_save_and_load_through_auto_classes(model, tmp_path):
    ids = tokens()
    expected = model(ids, output_entropies=True)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is EntropyGPT2LMHeadModel
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    output = loaded(ids, output_entropies=True)
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    torch.testing.assert_close(output.entropies, expected.entropies, **EXACT)
    fields, saved = (m.config.to_dict() for m in (loaded, model))
    assert {key for key in saved.keys() | fields.keys() if fields.get(key) != saved.get(key)} <= {
        "_name_or_path",
        "architectures",
        "dtype",
    }
    assert type(AutoConfig.from_pretrained(tmp_path)) is EntropyGPT2Config
    state = model.state_dict()
    assert set(loaded.state_dict()) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    # and it goes on training
    training_loss(loaded.train(), ids).backward()
    assert all(grad is not None for grad in gradients(loaded).values())


def torch_save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("save", [torch_save_and_load, lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_a_model_is_copied_whole(model, save, monkeypatch):
    """After use and in the middle of training, with all that it can do, into a process with hooks of its own."""
    ids = tokens()
    with record_entropy(model):
        model(ids, output_hidden_states=True)
    model.gradient_checkpointing_enable()
    model.transformer.wpe.requires_grad_(False)
    model.train()
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)  # as in a process that only loads
    copied = save(model)
    attention = copied.transformer.h[0].attn
    attention.register_forward_hook(lambda *args: None)
    assert len(attention._forward_hooks) == 3
    assert [n for n, p in copied.named_parameters()] == [n for n, p in model.named_parameters()]
    assert not copied.transformer.wpe.weight.requires_grad
    assert copied.lm_head.weight is copied.transformer.wte.weight
    results = []
    for candidate in (model, copied):
        loss = training_loss(candidate, ids)
        loss.backward()
        results.append((loss.detach(), {n: g for n, g in gradients(candidate).items() if g is not None}))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    output, expected = (m.eval()(ids, output_entropies=True, output_hidden_states=True) for m in (copied, model))
    torch.testing.assert_close(output.entropies, expected.entropies, rtol=0, atol=0)
    torch.testing.assert_close(output.hidden_states, expected.hidden_states, rtol=0, atol=0)
    for parameter in copied.parameters():  # it shares nothing with the first
        parameter.data.zero_()
    torch.testing.assert_close(model(ids).logits, expected.logits, **EXACT)


def test_a_saved_layer_is_a_layer(tiny_model):
    layer = tiny_model("SM+SNorm", "QK+FFN").transformer.h[0].attn.c_attn
    again = pickle.loads(pickle.dumps(layer))
    assert list(again.state_dict()) == list(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)
    assert len(again.parametrizations.weight) == 2
    torch.nn.utils.parametrize.remove_parametrizations(again, "weight")
    assert type(again) is type(layer).__bases__[0]
    assert torch.equal(again.weight, layer.weight)


WITHOUT_ENTROPY_LIB = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "entropy_lib" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(str(error).splitlines()[-1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__, model.config.folded)
model.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[3]).save_pretrained(sys.argv[2])
AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
"""


def test_a_saved_model_is_loaded_by_who_never_heard_of_entropy_lib(tiny_model, tmp_path):
    model, ids = fold_for_inference(tiny_model(EREG)), tokens()
    model.save_pretrained(tmp_path / "saved")
    committed = TINY
    command = [sys.executable, "-c", WITHOUT_ENTROPY_LIB, tmp_path / "saved", tmp_path / "again", committed]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    asked, got = told.stdout.splitlines()[-2:]
    assert "pass the argument `trust_remote_code=True`" in asked
    assert got == "entropy_lib.modeling True"
    saved, again = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("saved", "again"))
    assert set(again) - set(saved) == {"tokenizer.json", "tokenizer_config.json"}
    assert "modeling_entropy_gpt2.py" in saved
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")  # here nobody is asked to trust anything
    assert type(loaded) is EntropyGPT2LMHeadModel
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)


def test_where_entropy_lib_is_missing_the_saved_file_says_so(tiny_model, tmp_path, monkeypatch):
    tiny_model("SM").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = {name.partition(".")[0] for name in config["auto_map"].values()}
    assert [path.stem for path in tmp_path.glob("*.py")] == list(modules)
    monkeypatch.setitem(sys.modules, "entropy_lib.modeling", None)
    with pytest.raises(ImportError, match="classes are those of entropy_lib: install it"):
        exec((tmp_path / "modeling_entropy_gpt2.py").read_text(), {})


def test_greedy_generation_with_cache_without_cache_and_by_hand(model):
    prompt = tokens(2, 5)
    kwargs = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(prompt, use_cache=True, pad_token_id=0, **kwargs)
    plain = model.generate(prompt, use_cache=False, pad_token_id=0, **kwargs)
    assert cached.sequences.shape == (2, 14)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.logits, plain.logits, **SINGLE)
    logits = model(cached.sequences).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), logits, **SINGLE)
    assert torch.equal(cached.sequences[:, 5:], logits.argmax(-1))


def test_left_padding_changes_nothing(model):
    ids, pad = tokens(2, 9), 4
    padded = torch.cat([torch.randint(0, VOCAB, (2, pad)), ids], dim=1)
    mask = torch.cat([torch.zeros(2, pad, dtype=torch.long), torch.ones_like(ids)], dim=1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    for candidate in (model, eager_copy(model)):
        expected = candidate(ids, output_entropies=True)
        for kwargs in ({}, {"output_entropies": True}):
            output = candidate(padded, attention_mask=mask, position_ids=position_ids, **kwargs)
            torch.testing.assert_close(output.logits[:, pad:], expected.logits, **EXACT)
            for entropy, unpadded in zip(output.entropies or (), expected.entropies, strict=bool(kwargs)):
                torch.testing.assert_close(entropy[..., pad:], unpadded, **EXACT)
                assert (entropy[..., :pad] == 0).all()  # a padding query sees nothing
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(generated[:, pad:], model.generate(ids, **settings))


@pytest.mark.parametrize("variant", ["SM+LN+G", EREG])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", [1, 2, 6])
def test_entropies_under_caches_and_chunked_prefill(variant, implementation, prompt, tiny_model):
    model = tiny_model(variant)
    model.set_attn_implementation(implementation)
    ids = tokens(2, 12)
    full = model(ids, output_entropies=True)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=CONTEXT)):
        # a prompt, then a chunk of several tokens, then one by one
        for start, stop in ((0, prompt), (prompt, prompt + 3), *((i, i + 1) for i in range(prompt + 3, 12))):
            output = model(ids[:, start:stop], past_key_values=cache, use_cache=True, output_entropies=True)
            torch.testing.assert_close(output.logits, full.logits[:, start:stop], **EXACT)
            for entropy, whole in zip(output.entropies, full.entropies, strict=True):
                torch.testing.assert_close(entropy, whole[..., start:stop], **EXACT)


def test_gradient_checkpointing(model):
    ids = tokens(2, 10)
    copied = copy.deepcopy(model)
    results = []
    for candidate in (model, copied):
        candidate.train()
        if candidate is copied:
            candidate.gradient_checkpointing_enable()
        loss = training_loss(candidate, ids)
        loss.backward()
        results.append((loss.detach(), gradients(candidate)))
    torch.testing.assert_close(results[0], results[1], **EXACT)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), copied.buffers(), strict=True))


def test_torch_compile(tiny_model):
    model, ids = tiny_model(EREG, n_layer=1).train(), tokens(2, 10)
    copied = copy.deepcopy(model)
    expected = model(ids, labels=ids, output_entropies=True)
    (expected.loss + sum(e.sum() for e in expected.entropies)).backward()
    torch._dynamo.reset()
    output = torch.compile(copied, backend="aot_eager", fullgraph=True)(ids, labels=ids, output_entropies=True)
    (output.loss + sum(e.sum() for e in output.entropies)).backward()
    torch.testing.assert_close(output.loss, expected.loss, **SINGLE)
    torch.testing.assert_close(output.entropies, expected.entropies, **EXACT)
    torch.testing.assert_close(gradients(copied), gradients(model), **SINGLE)


def test_bfloat16_model_has_float32_entropies(tiny_model):
    model = tiny_model(EREG, dtype=torch.float32)
    ids = tokens()
    expected = model(ids, output_entropies=True)
    half = copy.deepcopy(model).bfloat16()
    output = half(ids, output_entropies=True)
    assert output.logits.dtype == torch.bfloat16
    for entropy, exact in zip(output.entropies, expected.entropies, strict=True):
        assert entropy.dtype == torch.float32
        torch.testing.assert_close(entropy, exact, rtol=0, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(entropy.dtype == torch.float32 for entropy in model(ids, output_entropies=True).entropies)


def test_return_tuple_embeds_hidden_states_and_logits_to_keep(tiny_model):
    model, ids = tiny_model(EREG), tokens()
    full = model(ids, output_entropies=True, output_hidden_states=True, labels=ids)
    assert len(full.hidden_states) == 3
    shifted = cross_entropy(full.logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(full.loss, shifted, **SINGLE)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    torch.testing.assert_close(model(inputs_embeds=model.transformer.wte(ids)).logits, full.logits, **EXACT)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full.logits[:, -2:], **EXACT)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, full.logits[:, [0, 3]], **EXACT)


# Parameters by name, initial values, errors


def test_accessors(tiny_model):
    model = tiny_model(EREG)
    blocks = model.transformer.h
    assert torch.equal(model.entropy_thresholds(), torch.stack([b.attn.reg_threshold_weights for b in blocks]))
    assert model.entropy_thresholds().shape == (2, 2)
    assert torch.equal(model.temperatures(), torch.stack([b.attn.log_temperature.exp() for b in blocks]))
    assert model.temperatures().shape == (2, 2, CONTEXT)
    alpha, beta = model.ffn_scales()
    assert torch.equal(alpha, torch.stack([b.alpha for b in blocks]))
    assert torch.equal(beta, torch.stack([b.beta for b in blocks]))
    assert alpha.requires_grad
    stock = tiny_model("SM+LN+G")
    assert stock.entropy_thresholds() is stock.temperatures() is stock.ffn_scales() is None


def test_initial_values():
    model = build_model(EREG, n_layer=1, temperature_init=0.3, threshold_init=0.7)
    assert torch.allclose(model.temperatures(), torch.full((1, 4, 128), 0.3))
    assert torch.equal(model.entropy_thresholds(), torch.full((1, 4), 0.7))
    assert [scale.tolist() for scale in model.ffn_scales()] == [[1.0], [1.0]]
    assert EntropyGPT2Config().temperature_init == 1e-2
    assert EntropyGPT2Config().attn_pdrop == EntropyGPT2Config().resid_pdrop == EntropyGPT2Config().embd_pdrop == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scaled", [True, False])
def test_matrices_start_as_in_gpt2(variant, scaled):
    """The std of every matrix is that of transformers' own GPT-2 (whose residual projections are scaled by 1/√(2L))
    or 0.02 where that is turned off; what spectral normalisation divides starts elsewhere."""
    size = {"n_layer": 3, "n_head": 4, "n_embd": 128, "n_positions": 64, "vocab_size": 500}
    ids = {"bos_token_id": None, "eos_token_id": None}
    stock = dict(GPT2LMHeadModel(GPT2Config(**size, **ids)).named_parameters())
    assert stock["transformer.h.2.attn.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    model = build_model(variant, scaled_residual_init=scaled, **size)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (Conv1D, nn.Embedding))}
    assert len(linear) == 2 + 3 * (3 if VARIANTS[variant].fused_ffn else 4)
    for name, module in linear.items():
        if VARIANTS[variant].weight_normalization == "spectral" and "mlp" in name:
            continue
        as_gpt2 = scaled and not (VARIANTS[variant].fused_ffn and "mlp" in name)
        std = stock[f"{name}.weight"].std().item() if as_gpt2 else 0.02
        assert module.weight.std().item() == pytest.approx(std, rel=0.05), name


def test_position_ids_choose_the_temperature(tiny_model):
    model, ids = tiny_model("SM(t)+ScFuFFN"), tokens(1, 6)
    model.transformer.wpe.weight.data.zero_()  # so that position shows through t alone
    shifted = torch.arange(6)[None] + 5
    expected = model(ids, position_ids=shifted, output_entropies=True).entropies[0]
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.log_temperature.copy_(block.attn.log_temperature.roll(-5, dims=1))
    torch.testing.assert_close(model(ids, output_entropies=True).entropies[0], expected, **EXACT)


@pytest.mark.parametrize("name", ["SM+LN+G", EREG])
def test_input_longer_than_the_context(name, tiny_model):
    model = tiny_model(name)
    assert model(tokens(1, CONTEXT)).logits.shape == (1, CONTEXT, VOCAB)
    with pytest.raises(ValueError, match="25 tokens exceeds the model's 24"):
        model(tokens(1, CONTEXT + 1))
    with pytest.raises(ValueError, match="25 tokens"):
        model(inputs_embeds=torch.zeros(1, CONTEXT + 1, 32, dtype=torch.float64))


def test_cache_grows_beyond_the_context(tiny_model):
    model = tiny_model("SM+LN+G")
    cache = model(tokens(1, CONTEXT), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="24 positions"):  # 24 in the cache and one more
        model(tokens(1, 1), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_pdrop": 0.1}, "attn_pdrop must be 0.*0.1"),
        ({"weight_normalization": "batch"}, "weight_normalization.*'batch'"),
        ({"weight_normalization": "weight"}, "norm_placement.*None"),
        ({"weight_normalization": "weight", "norm_placement": "V"}, "norm_placement.*'V'"),
        ({"weight_normalization": "spectral", "norm_placement": "FFN", "fused_ffn": True}, "fused"),
        ({"temperature_init": 0.0}, "temperature_init.*0.0"),
        ({"temperature_init": -1.0}, "temperature_init"),
        ({"temperature_init": math.nan}, "temperature_init"),
        ({"add_cross_attention": True}, "decoder-only"),
    ],
)
def test_config_rejects(fields, message):
    with pytest.raises(ValueError, match=message):
        EntropyGPT2Config(**fields)


def test_build_model_rejects():
    with pytest.raises(ValueError, match="unknown variant 'SM\\+X'") as error:
        build_model("SM+X")
    assert all(name in str(error.value) for name in VARIANTS)
    with pytest.raises(ValueError, match="unknown size 'large'") as error:
        build_model("SM", "large")
    assert all(size in str(error.value) for size in MODEL_SIZES)
    with pytest.raises(ValueError, match="attn_pdrop"):
        build_model("SM", attn_pdrop=0.1)
    with pytest.raises(ValueError, match="no weight or spectral"):
        build_model("SM", norm_placement="FFN")


def test_entropies_need_an_implementation_whose_mask_is_known(tiny_model):
    model = tiny_model("SM")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'sdpa' or 'eager'.*'flash_attention_2'"):
        model.transformer.h[0].attn(torch.zeros(1, 4, 32, dtype=torch.float64), output_entropies=True)
    with pytest.raises(ValueError, match="position_ids"):
        tiny_model(EREG).transformer.h[0].attn(torch.zeros(1, 4, 32, dtype=torch.float64))
