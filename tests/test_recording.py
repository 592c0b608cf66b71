"""record_entropy against the weights that transformers' own eager attention returns, for one tiny model a family."""

import contextlib
import copy
import logging
import threading

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from entropy_lib import EntropyRegularization, attention_entropy, entropy_attention, entropy_callback, record_entropy
from entropy_lib.interface import (
    attend,
    attention_on_request_forward,
    entropy_attention_forward,
    entropy_mask,
    recorders,
)

SIZES = {"vocab_size": 61, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
WIDE = {**LAYERS, "intermediate_size": 48, "max_position_embeddings": 32}
GROUPED = {**WIDE, "num_key_value_heads": 2}
FAMILIES = {
    "GPT2": {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 32},
    "GPTNeoX": WIDE,
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Mistral": {**GROUPED, "sliding_window": 4},
    "OPT": {**LAYERS, "ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 32},
    "Bert": WIDE,
}
DECODERS = [family for family in FAMILIES if family != "Bert"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0}


def make(family, implementation="sdpa", **fields):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, GROUPED), **fields})
    torch.manual_seed(1)
    auto = AutoModel if family == "Bert" else AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=implementation).eval()


def eager(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def batch(padding):
    """[3, 9] ids; two rows are shorter."""
    ids = torch.randint(1, 61, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, length in ((1, 5), (2, 8)):
        if padding == "left":
            mask[row, :-length] = 0
        elif padding == "right":
            mask[row, length:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def output_of(result):
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_entropies_and_logits_are_those_of_the_model(family, padding):
    model, inputs = make(family), batch(padding)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = output_of(model(**inputs))
        weights = eager(model)(**inputs, output_attentions=True).attentions
        with record_entropy(model) as recorder:
            logits = output_of(model(**inputs))
    torch.testing.assert_close(logits[real], expected[real], **CLOSE)
    assert len(recorder.entropies) == len(weights) == 2
    for entropy, attention in zip(recorder.entropies, map(attention_entropy, weights), strict=True):
        assert entropy.dtype == torch.float32
        assert entropy.std() > 0.1
        rows = real[:, None].expand_as(entropy)
        torch.testing.assert_close(entropy[rows], attention[rows], **CLOSE)
    means = torch.stack([attention_entropy(a).transpose(1, 2)[real].mean(0) for a in weights])
    torch.testing.assert_close(recorder.head_means(), means, **CLOSE)
    with torch.no_grad(), record_entropy(model, mean=True) as recorder:
        model(**inputs)
    assert [entropy.shape for entropy in recorder.entropies] == [(4,), (4,)]
    torch.testing.assert_close(recorder.head_means(), means, **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_generate(family, cache):
    """Every pass of generate, against one eager pass over the whole text."""
    model, inputs = make(family), batch("left")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(**inputs, **options)
    with record_entropy(model) as recorder:
        text = model.generate(**inputs, **options)
    assert torch.equal(text, expected)
    assert len(recorder.passes) == 6
    assert [passed[0].shape[2] for passed in recorder.passes] == [9, 1, 1, 1, 1, 1]
    real = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.long)], dim=1)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    if family == "GPTNeoX" or family == "OPT":
        positions = None
    with torch.no_grad():
        weights = eager(model)(
            text[:, :14], attention_mask=real, position_ids=positions, output_attentions=True
        ).attentions
    for layer, attention in enumerate(map(attention_entropy, weights)):
        entropy = torch.cat([passed[layer] for passed in recorder.passes], dim=2)
        rows = real.bool()[:, None].expand_as(entropy)
        torch.testing.assert_close(entropy[rows], attention[rows], **CLOSE)
    prefill = real.bool()[:, :9]
    first = torch.stack([passed.transpose(1, 2)[prefill].mean(0) for passed in recorder.passes[0]])
    with record_entropy(model, mean=True) as recorder:
        model.generate(**inputs, **options)
    torch.testing.assert_close(torch.stack(recorder.passes[0]), first)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager_attention(family, checkpointing):
    model = make(family, **DROPOUT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    twin, inputs = eager(model), batch("none")
    regularization = EntropyRegularization(loss_coeff=1.0, reduction="mean", tolerance_margin_factor=0.01)
    thresholds = torch.rand(2, 4, dtype=torch.float32)

    weights = twin(**inputs, output_attentions=True).attentions
    (
        output_of(twin(**inputs)).square().mean() + regularization([*map(attention_entropy, weights)], thresholds)
    ).backward()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with record_entropy(model) as recorder:
        output = output_of(model(**inputs))
        (output.square().mean() + regularization(recorder.entropies, thresholds)).backward()
        assert len(recorder.entropies) == 2
        assert len(recorder.passes) == 1
    assert model.is_gradient_checkpointing == checkpointing
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_reentrant_checkpointing_is_refused_where_gradients_would_be_lost():
    model = make("Llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with record_entropy(model, mean=True) as recorder:
        model(**batch("none")).logits.sum().backward()
    assert len(recorder.passes) == 1
    with record_entropy(model), pytest.raises(ValueError, match="use_reentrant"):
        model(**batch("none"))


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_dropout_in_training_leaves_the_entropy_of_the_undropped_weights(family, padding):
    """The first layer's inputs are the same with and without attention dropout."""
    model, inputs = make(family, **DROPOUT), batch(padding)
    real = inputs["attention_mask"].bool()[:, None].expand(3, 4, 9)
    with record_entropy(model) as recorder:
        model(**inputs)
    clean = recorder.entropies[0].detach()
    dropped = make(family, **{**DROPOUT, "attn_pdrop": 0.5, "attention_dropout": 0.5}).train()
    torch.manual_seed(3)
    expected = dropped(**inputs).logits
    torch.manual_seed(3)
    with record_entropy(dropped) as recorder:
        logits = dropped(**inputs).logits
    torch.testing.assert_close(recorder.entropies[0][real], clean[real])
    torch.testing.assert_close(logits[real[:, 0]], expected[real[:, 0]])  # same random numbers as sdpa
    assert recorder.entropies[1].requires_grad


def test_implementations_are_restored():
    model = make("Llama", implementation="eager")
    with record_entropy(model):
        assert model.config._attn_implementation == "entropy"
        with record_entropy(model) as inner:
            model(**batch("none"))
        assert model.config._attn_implementation == "entropy"
    assert model.config._attn_implementation == "eager"
    assert len(inner.passes) == 1
    with pytest.raises(KeyError, match="stop"), record_entropy(model):
        raise KeyError("stop")
    assert model.config._attn_implementation == "eager"
    model(**batch("none"))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_failed_pass_leaves_no_recorder_behind():
    model = make("Llama")
    with record_entropy(model) as recorder:
        with pytest.raises(IndexError):
            model(torch.full((1, 3), 10_000))
        model(**batch("none"))
        assert len(recorder.entropies) == 2
    assert not recorders


def test_sub_configurations_get_their_own_implementation_back():
    text = {**WIDE, **SIZES, "eos_token_id": 60}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**text, "projection_dim": 16}, vision_config={**vision, "image_size": 8, "patch_size": 4}
    )
    model = transformers.CLIPModel(config).eval()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    config.vision_config = copy.deepcopy(config.vision_config)  # one that no module holds
    inputs = {**batch("right"), "pixel_values": torch.randn(3, 3, 8, 8)}
    with torch.no_grad(), record_entropy(model) as recorder:
        assert config.vision_config._attn_implementation == "entropy"
        model(**inputs)
    implementations = [c._attn_implementation for c in (config, config.text_config, config.vision_config)]
    assert implementations == ["sdpa", "eager", "sdpa"]
    assert sorted(entropy.shape[2] for entropy in recorder.entropies) == [5, 5, 9, 9]
    with torch.no_grad():
        out = eager(model)(**inputs, output_attentions=True)
    expected = {9: out.text_model_output.attentions, 5: out.vision_model_output.attentions}
    real = inputs["attention_mask"].bool()
    for length, weights in expected.items():
        seen = [entropy for entropy in recorder.entropies if entropy.shape[2] == length]
        rows = real[:, None].expand(3, 4, 9) if length == 9 else ...
        for entropy, attention in zip(seen, weights, strict=True):
            torch.testing.assert_close(entropy[rows], attention_entropy(attention)[rows], **CLOSE)
    for entropy, heads in zip(recorder.entropies, recorder.head_means(), strict=True):
        by_query = entropy.transpose(1, 2)
        queries = by_query[real] if entropy.shape[2] == 9 else by_query.flatten(0, 1)
        torch.testing.assert_close(heads, queries.mean(0))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("Gemma2", {"head_dim": 8, "attn_logit_softcapping": 5.0}, "Gemma2Attention passes 'softcap'"),
        ("GptOss", {"head_dim": 8, "num_local_experts": 2}, "GptOssAttention passes 's_aux'"),
        ("Bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 32}, "Bloom.* does not use"),
        ("Falcon", {"alibi": True, **LAYERS}, "Falcon.* does not use"),
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, "no attention"),
    ],
)
def test_what_has_no_such_entropy_is_refused(family, fields, message):
    fields = fields if family in ("Bloom", "Falcon", "Mamba") else {**GROUPED, **fields}
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message), record_entropy(model):
        model(**batch("none"))
    assert model.config._attn_implementation == before


def test_other_modules_are_refused():
    with (
        pytest.raises(ValueError, match="Linear is not a transformers PreTrainedModel"),
        record_entropy(nn.Linear(2, 2)),
    ):
        pass
    query = torch.randn(1, 2, 3, 8)
    module = nn.Module()
    with pytest.raises(ValueError, match="'relative_bias'"):
        entropy_attention_forward(module, query, query, query, None, relative_bias=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="only hides keys"):
        attend(module, query, query, query, torch.tensor([[[[0.0, -1.0, 0.5]]]]))
    with record_entropy(make("Llama")) as recorder, pytest.raises(ValueError, match="nothing recorded"):
        recorder.head_means()
    with pytest.raises(ValueError, match="every must be"):
        entropy_callback(every=0)


def test_masks_of_ones_own():
    """A whole 4-D mask, boolean or additive, and packed sequences by position ids."""
    model, twin = make("Llama"), eager(make("Llama"))
    ids = batch("none")["input_ids"]
    hidden = torch.rand(3, 1, 9, 9) < 0.4
    visible = (~hidden | torch.eye(9, dtype=torch.bool)).tril()
    added = torch.zeros(3, 1, 9, 9, dtype=torch.float32).masked_fill(~visible, torch.finfo(torch.float32).min)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]]).expand(3, -1)
    for ours, theirs in (
        ({"attention_mask": visible}, {"attention_mask": added}),
        ({"attention_mask": added}, {"attention_mask": added}),
        ({"position_ids": packed}, {"position_ids": packed}),
    ):
        with torch.no_grad(), record_entropy(model) as recorder:
            model(ids, **ours, use_cache=False)
        with torch.no_grad():
            weights = twin(ids, **theirs, use_cache=False, output_attentions=True).attentions
        for entropy, attention in zip(recorder.entropies, weights, strict=True):
            torch.testing.assert_close(entropy, attention_entropy(attention), **CLOSE)


def test_chunked_prefill():
    model, inputs = make("Llama"), batch("left")
    ids = inputs["input_ids"]
    for mask in (torch.ones_like(ids), inputs["attention_mask"]):
        with torch.no_grad(), record_entropy(model) as recorder:
            cache = model(ids[:, :4], attention_mask=mask[:, :4]).past_key_values
            position_ids = torch.arange(4, 9)[None]
            model(ids[:, 4:], attention_mask=mask, past_key_values=cache, position_ids=position_ids)
        with torch.no_grad():
            whole = eager(model)(
                ids, attention_mask=mask, position_ids=torch.arange(9)[None], output_attentions=True
            ).attentions
        for entropy, attention in zip(recorder.entropies, whole, strict=True):
            rows = mask[:, None, 4:].bool().expand_as(entropy)
            torch.testing.assert_close(entropy[rows], attention_entropy(attention)[:, :, 4:][rows], **CLOSE)


def test_the_mask_is_compact_only_where_that_is_exact():
    ones = torch.ones(2, 6, dtype=torch.bool)
    padded = ones.clone()
    padded[1, :2] = False
    common = {"batch_size": 2, "q_length": 6, "kv_length": 6, "attention_mask": ones}
    causal, everything_visible = (0, 0, 0, 0), (1, 1, 1, 1)
    assert entropy_mask(**common).shape == causal
    assert entropy_mask(**{**common, "attention_mask": None}).shape == causal
    assert torch.equal(entropy_mask(**{**common, "attention_mask": padded}), padded)
    assert torch.equal(entropy_mask(**{**common, "q_length": 2, "q_offset": 4}), ones)
    assert entropy_mask(**{**common, "q_length": 1, "q_offset": 5}).shape == causal
    everything = {**common, "mask_function": bidirectional_mask_function, "allow_is_causal_skip": False}
    assert entropy_mask(**everything, allow_is_bidirectional_skip=True).shape == everything_visible
    keys = entropy_mask(**{**everything, "attention_mask": padded}, allow_is_bidirectional_skip=True)
    assert torch.equal(keys, padded[:, None, None])
    window = {**common, "mask_function": sliding_window_causal_mask_function(4), "local_size": 4}
    wide = {**common, "mask_function": sliding_window_causal_mask_function(9), "local_size": 9}
    assert entropy_mask(**wide).shape == causal
    for whole in (
        everything,
        window,
        {**common, "allow_is_causal_skip": False},
        {**common, "q_length": 3},
        {**common, "q_length": 3, "q_offset": torch.tensor(3)},
        {**common, "kv_length": 8},
        {**common, "q_length": 3, "q_offset": 3, "kv_offset": 2},
        {**common, "mask_function": lambda *index: causal_mask_function(*index)},
    ):
        mask = entropy_mask(**whole)
        assert mask.shape == (2, 1, whole["q_length"], whole["kv_length"])
        assert torch.equal(mask, sdpa_mask(**{**whole, "allow_is_causal_skip": False}))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("is_causal", [True, False, None])
@pytest.mark.parametrize("function", [causal_mask_function, bidirectional_mask_function])
def test_what_is_causal_is_said_by_the_mask_and_not_by_the_layer(function, is_causal, padding):
    layer, keys = nn.Module(), batch(padding)["attention_mask"].bool()
    if is_causal is not None:
        layer.is_causal = is_causal
    query = torch.randn(3, 2, 9, 8)
    skip = "allow_is_causal_skip" if function is causal_mask_function else "allow_is_bidirectional_skip"
    common = {"batch_size": 3, "q_length": 9, "kv_length": 9, "mask_function": function, "attention_mask": keys}
    mask = entropy_mask(**{**common, "allow_is_causal_skip": False, skip: True})
    whole = sdpa_mask(**common, allow_is_causal_skip=False)
    assert mask.numel() < whole.numel()
    expected = entropy_attention(query, query, query, causal=False, mask=whole)
    for found in (
        attend(layer, query, query, query, mask),
        attend(layer, query, query, query, mask, is_causal=is_causal),
        attend(layer, query, query, query, mask, dropout=1e-9),
    ):
        torch.testing.assert_close(found[1], expected[1])
    rows = keys[:, :, None, None].expand(3, 9, 2, 8)
    on_request = attention_on_request_forward(layer, query, query, query, mask)[0]
    for output in (found[0], on_request, attend(layer, query, query, query, mask)[0]):
        torch.testing.assert_close(output[rows], expected[0].transpose(1, 2)[rows], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_fused_kernel_gets_masks_that_it_takes(monkeypatch, family, padding):
    """None or [B, T], but for a window shorter than the text."""
    seen = []

    def spy(*args, mask=None, causal=True, **kwargs):
        seen.append((None if mask is None else mask.dim(), causal))
        return entropy_attention(*args, mask=mask, causal=causal, **kwargs)

    monkeypatch.setattr("entropy_lib.interface.entropy_attention", spy)
    model = make(family)
    with torch.no_grad(), record_entropy(model):
        model(**batch(padding))
    expected = (None if padding == "none" else 2, family != "Bert")
    assert seen == 2 * [(4, False) if family == "Mistral" else expected]


def test_one_pass_with_gradients_is_kept_and_all_without():
    model = make("Llama")
    with record_entropy(model) as recorder:
        for _ in range(3):
            model(**batch("none"))
        assert len(recorder.passes) == 1
        with torch.no_grad():
            for _ in range(3):
                model(**batch("none"))
        assert len(recorder.passes) == 3
    with record_entropy(model, mean=True) as recorder:
        for _ in range(3):
            model(**batch("none"))
        assert len(recorder.passes) == 3
        assert not recorder.entropies[0].requires_grad


@pytest.mark.parametrize("variant", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_project_s_own_model(tiny_model, variant, padding):
    model, inputs = tiny_model(variant), batch(padding)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        out = model(**inputs, output_entropies=True)
        with record_entropy(model) as recorder:
            logits = model(**inputs).logits
            recorded = recorder.entropies
            asked = model(**inputs, output_entropies=True).entropies
    torch.testing.assert_close(logits[real], out.logits[real])
    for ours, once, plain in zip(recorded, asked, out.entropies, strict=True):
        rows = real[:, None].expand_as(plain)
        torch.testing.assert_close(ours[rows], plain[rows])
        torch.testing.assert_close(once[rows], plain[rows])
    assert len(recorder.passes) == 2


def test_generate_of_the_project_s_own_model_says_where_entropies_are(tiny_model):
    model, ids = tiny_model("SM+LN+G"), batch("none")["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ValueError, match=r"recorder\.passes"):
        model.generate(ids, output_entropies=True, **options)
    with record_entropy(model) as recorder:
        text = model.generate(ids, output_entropies=False, **options)
    assert [passed[0].shape[2] for passed in recorder.passes] == [9, 1, 1]
    with torch.no_grad():
        whole = model(text[:, :-1], output_entropies=True).entropies
    for layer, entropy in enumerate(whole):
        torch.testing.assert_close(torch.cat([passed[layer] for passed in recorder.passes], dim=2), entropy, **CLOSE)


class Writer:
    def __init__(self):
        self.seen = []

    def add_scalar(self, key, value, step):
        self.seen.append((key, value, step))


class Log:
    def __init__(self):
        self.seen = []

    def log(self, metrics, step):
        self.seen += [(key, value, step) for key, value in metrics.items()]


@pytest.mark.parametrize("logger", [Writer(), Log()])
def test_callback_in_a_training_run(tmp_path, logger):
    model = make("Llama")
    start = copy.deepcopy(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 61, (4, 9))]  # one step sees them all
    callback = entropy_callback(every=2, logger=logger)
    modes = []

    class Watch(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            modes.append((state.global_step, model.config._attn_implementation))

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback, Watch()])
    trainer.train()
    assert modes == [(0, "entropy"), (1, "sdpa"), (2, "entropy")]
    assert model.config._attn_implementation == "sdpa"
    assert [record["step"] for record in callback.history] == [0, 2]
    with torch.no_grad(), record_entropy(start, mean=True) as recorder:
        start(torch.stack([row["input_ids"] for row in rows]))
    first, second = (torch.tensor(record["entropy"]) for record in callback.history)
    torch.testing.assert_close(first, recorder.head_means())
    assert (second - first).abs().max() > 1e-3
    assert len(logger.seen) == 2 * 2 * 4
    assert logger.seen[5] == ("attn.1.head.1.entropy", callback.history[0]["entropy"][1][1], 0)
    assert logger.seen[-1] == ("attn.1.head.3.entropy", callback.history[1]["entropy"][1][3], 2)


def test_callback_after_an_interrupted_step():
    model, callback = make("Llama"), entropy_callback()
    state = transformers.TrainerState(global_step=0)
    callback.on_step_begin(None, state, None, model=model)
    assert model.config._attn_implementation == "entropy"
    callback.on_train_begin(None, state, None)
    assert model.config._attn_implementation == "sdpa"
    callback.on_step_end(None, state, None)
    assert callback.history == []


def test_compiled_models_are_recorded():
    model, inputs = make("Llama"), batch("none")
    with torch.no_grad(), record_entropy(model) as recorder:
        model(**inputs)
    expected = recorder.entropies
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), record_entropy(compiled) as recorder:
        for _ in range(2):
            compiled(**inputs)
    for passed in recorder.passes:
        torch.testing.assert_close(passed, expected)
    assert len(recorder.passes) == 2


# Whose entropies, in which thread


def two_models():
    first = make("Llama")
    torch.manual_seed(2)
    return first, AutoModelForCausalLM.from_config(first.config, attn_implementation="sdpa").eval()


def alone(model, inputs):
    with torch.no_grad(), record_entropy(model) as recorder:
        model(**inputs)
    return recorder.entropies


@pytest.mark.parametrize("share", ["nothing", "layers", "backbone"])
@pytest.mark.parametrize("both", [False, True])
def test_a_recorder_hears_its_own_model_only_in_any_thread(share, both):
    ours, other = two_models()
    other.model.norm.weight.data *= 2
    if share == "layers":
        other.model.layers = ours.model.layers
        other.model.embed_tokens.weight.data = other.model.embed_tokens.weight.data.flip(0)
    elif share == "backbone":
        other.model = ours.model
    inputs, others = batch("none"), batch("left")
    expected = alone(ours, inputs), alone(other, others)
    passes, stop = [], threading.Event()

    def run_the_other():
        with record_entropy(other) if both else contextlib.nullcontext() as recorder, torch.no_grad():
            while not stop.is_set():
                other(**others)
                if both:
                    passes.append(list(recorder.entropies))

    with torch.no_grad(), record_entropy(ours) as recorder:
        thread = threading.Thread(target=run_the_other)
        thread.start()
        try:
            for _ in range(30):
                ours(**inputs)
        finally:
            stop.set()
            thread.join()
        if both:
            with record_entropy(other) as inner:
                other(**others)
                ours(**inputs)
            assert len(inner.passes) == 1
            torch.testing.assert_close(inner.entropies, expected[1])
    assert len(recorder.passes) == 30 + both
    for passed in recorder.passes:
        torch.testing.assert_close(passed, expected[0])
    assert bool(passes) == both
    for passed in passes:
        torch.testing.assert_close(passed, expected[1])
    assert not recorders
    assert ours.config._attn_implementation == other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_recorders_are_left_in_any_order(order):
    model, inputs = make("Llama"), batch("none")
    stacks = [contextlib.ExitStack() for _ in order]
    opened = [stack.enter_context(record_entropy(model)) for stack in stacks]
    stacks[order[0]].close()
    with torch.no_grad():
        model(**inputs)
    assert [len(opened[place].passes) for place in order] == [0, 1]
    assert model.config._attn_implementation == "entropy"
    stacks[order[1]].close()
    assert model.config._attn_implementation == "sdpa"
    assert not recorders
    assert not model._forward_hooks


@pytest.mark.parametrize("use", ["loss", "penalty"])
@pytest.mark.parametrize("mean", [False, True])
def test_backward_outside_the_with_computes_checkpointed_layers_as_they_were(mean, use):
    grads = []
    for inside in (True, False):
        model, inputs = make("Llama").train(), batch("none")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with record_entropy(model, mean=mean) as recorder:
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            if use == "penalty" and not mean:
                loss = sum(entropy.square().mean() for entropy in recorder.entropies)
            if inside:
                loss.backward()
        if not inside:
            with torch.no_grad():
                model(**inputs)
            loss.backward()
            assert len(recorder.passes) == 1
        assert model.config._attn_implementation == "sdpa"
        assert not recorders
        grads.append([parameter.grad for parameter in model.parameters()])
        torch.manual_seed(0)
    assert sum(grad is not None for grad in grads[0]) > 5
    torch.testing.assert_close(grads[1], grads[0])


# Real queries


def bart(**fields):
    config = transformers.BartConfig(
        **{**SIZES, "eos_token_id": 60, "pad_token_id": 0, "decoder_start_token_id": 1}, d_model=32, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=32, init_std=0.3, **{"decoder_attention_heads": 4, **fields},
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.BartForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("decoder_padding", ["none", "right", "left"])
@pytest.mark.parametrize("heads", [4, 2])
def test_queries_of_a_decoder_are_its_own_tokens(decoder_padding, heads):
    """Encoder and decoder of one length and different padding, in self- and cross-attention."""
    model, inputs, target = bart(decoder_attention_heads=heads), batch("right"), batch(decoder_padding)
    masks = {"attention_mask": inputs["attention_mask"].flip(0), "decoder_attention_mask": target["attention_mask"]}
    if decoder_padding == "none":
        del masks["decoder_attention_mask"]
    arguments = {"input_ids": inputs["input_ids"].flip(0), "decoder_input_ids": target["input_ids"], **masks}
    with torch.no_grad(), record_entropy(model) as recorder:
        model(**arguments)
    with torch.no_grad():
        out = eager(model)(**arguments, output_attentions=True)
    real = {"encoder": masks["attention_mask"].bool(), "decoder": target["attention_mask"].bool()}
    weights = {"encoder": out.encoder_attentions, "self_attn": out.decoder_attentions, "cross": out.cross_attentions}
    expected = []
    for name, entropy in zip(recorder.layers, recorder.entropies, strict=True):
        part = "encoder" if ".encoder." in name else "self_attn" if name.endswith("self_attn") else "cross"
        queries = real["encoder" if part == "encoder" else "decoder"]
        wanted = attention_entropy(weights[part][int(name.split(".layers.")[1][0])]).transpose(1, 2)[queries]
        torch.testing.assert_close(entropy.transpose(1, 2)[queries], wanted, **CLOSE)
        expected.append(wanted.mean(0))
    means = recorder.head_means()
    assert isinstance(means, torch.Tensor) == (heads == 4)
    torch.testing.assert_close(list(means), expected, **CLOSE)
    with torch.no_grad(), record_entropy(model, mean=True) as recorder:
        model(**arguments)
    torch.testing.assert_close(list(recorder.head_means()), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_recorded_query_masks_make_a_batch_pay_what_its_sequences_pay(family, padding):
    model, inputs = make(family), batch(padding)
    regularization = EntropyRegularization(1.0, 0.05, reduction="sum")
    thresholds = torch.rand(2, 4)
    with record_entropy(model) as recorder:
        model(**inputs)
    penalty = regularization(recorder.entropies, thresholds, recorder.query_masks)
    alone = torch.zeros(())
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        positions = {} if family in ("GPTNeoX", "OPT") else {"position_ids": torch.arange(9)[mask][None]}
        with record_entropy(model) as recorder:
            model(ids[mask][None], **positions)
        alone = alone + regularization(recorder.entropies, thresholds)
    assert penalty > 0
    torch.testing.assert_close(penalty, alone, **CLOSE)


def test_unequal_heads_in_a_training_run(tmp_path):
    model = bart(decoder_attention_heads=2)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 60, (4, 9))]
    callback = entropy_callback(every=1)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    assert [len(heads) for heads in callback.history[0]["entropy"]] == [4, 4, 2, 2, 2, 2]


# What would be missing, or there twice


def vision(**fields):
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 8, "patch_size": 4, **fields}  # fmt: skip


def test_parts_without_the_interface_are_refused_unless_the_layers_are_chosen():
    text = {**WIDE, **SIZES, "eos_token_id": 60}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision())
    model = transformers.SiglipModel(config).eval()  # its vision tower ends in torch's own MultiheadAttention
    inputs = {"input_ids": batch("none")["input_ids"], "pixel_values": torch.randn(3, 3, 8, 8)}
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"MultiheadAttention.*layers=\[") as error, record_entropy(model):
            model(**inputs)
        assert "vision_model.head" in str(error.value)
        with record_entropy(model, layers=range(4)) as recorder:
            model(**inputs)
        with record_entropy(model) as text_only:
            model.get_text_features(inputs["input_ids"])
    assert len(recorder.entropies) == 4
    assert len(text_only.entropies) == 2


def test_a_layer_with_two_attentions_is_refused():
    model = make("DiffLlama")
    with pytest.raises(ValueError, match=r"DiffLlama.*more than once"), torch.no_grad(), record_entropy(model):
        model(**batch("none"))


def test_a_part_that_is_called_by_itself_is_a_pass():
    text = {**WIDE, **SIZES, "eos_token_id": 60}
    config = transformers.CLIPConfig(text_config={**text, "projection_dim": 16}, vision_config=vision())
    model, inputs = transformers.CLIPModel(config).eval(), batch("right")
    with torch.no_grad(), record_entropy(model) as recorder:
        model.get_text_features(**inputs)
        model.get_image_features(torch.randn(3, 3, 8, 8))
    assert [[entropy.shape[2] for entropy in passed] for passed in recorder.passes] == [[9, 9], [5, 5]]
    torch.testing.assert_close(alone(model.text_model, inputs), recorder.passes[0])
    model = bart()
    with record_entropy(model) as recorder:
        model.generate(**batch("right"), max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=1)
    assert [len(passed) for passed in recorder.passes] == [2, 4, 4, 4]


def test_what_is_recorded_nowhere_is_said():
    model = make("Llama").model
    with pytest.raises(ValueError, match="nothing was recorded, although LlamaAttention ran"), record_entropy(model):
        model.forward(batch("none")["input_ids"])
    with pytest.raises(ValueError, match="DataParallel"), record_entropy(nn.DataParallel(make("Llama"))):
        pass
    callback = entropy_callback()
    state = transformers.TrainerState(global_step=0)
    with pytest.raises(ValueError, match="DataParallel"):
        callback.on_train_begin(type("Arguments", (), {"n_gpu": 2}), state, None, model=make("Llama"))
    config = transformers.BloomConfig(**SIZES, n_layer=2, n_head=4, hidden_size=32)
    with pytest.raises(ValueError, match="does not use"):
        callback.on_train_begin(None, state, None, model=AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("logger", [logging.getLogger(), object(), print])
def test_a_logger_that_takes_no_metrics_is_refused_before_training(logger):
    with pytest.raises(ValueError, match=f"got {type(logger).__name__}"):
        entropy_callback(logger=logger)
    with pytest.raises(ValueError, match=f"got {type(logger).__name__}"):
        EntropyRegularization.log_entropy_metrics([torch.eye(3)[None, None]], 0, logger)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_largest_logits(monkeypatch, family, padding):
    model, inputs = make(family), batch(padding)
    twin, seen = eager(model), []

    def spy(query, key, *args, scale=None, **kwargs):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        seen.append(query @ keys.transpose(-1, -2) * scale)
        return entropy_attention(query, key, *args, scale=scale, **kwargs)

    monkeypatch.setattr("entropy_lib.interface.entropy_attention", spy)
    with torch.no_grad(), record_entropy(model, max_logits=True) as recorder:
        model(**inputs)
    with torch.no_grad(), record_entropy(model, mean=True, max_logits=True) as means:
        model(**inputs)
    with torch.no_grad():
        weights = twin(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    for layer, attention in enumerate(weights):
        expected = seen[layer].masked_fill(attention == 0, -torch.inf).amax(-1)  # keys with weight 0 are not seen
        rows = real[:, None].expand_as(expected)
        torch.testing.assert_close(recorder.max_logits[layer][rows], expected[rows], **CLOSE)
        heads = expected.masked_fill(~rows, -torch.inf).amax(dim=(0, 2))
        torch.testing.assert_close(means.max_logits[layer], heads, **CLOSE)
    with record_entropy(model) as recorder, pytest.raises(ValueError, match="max_logits=True"):
        _ = recorder.max_logits


# Only some layers


@pytest.mark.parametrize("layers", [[1], [-1], ["model.layers.1.self_attn"]])
def test_only_chosen_layers_are_recorded(monkeypatch, layers):
    model, inputs = make("Llama"), batch("left")
    real, whole = inputs["attention_mask"].bool(), alone(model, inputs)
    computed = []

    def spy(module, *args, **kwargs):
        computed.append(module.layer_idx)
        return attend(module, *args, **kwargs)

    monkeypatch.setattr("entropy_lib.interface.attend", spy)
    with torch.no_grad(), record_entropy(model, layers=layers) as recorder:
        logits = model(**inputs).logits
    assert computed == [1]
    assert recorder.layers == ["model.layers.1.self_attn"]
    torch.testing.assert_close(recorder.entropies, whole[1:])
    with torch.no_grad():
        torch.testing.assert_close(logits[real], model(**inputs).logits[real], **CLOSE)


@pytest.mark.parametrize("layers", [[], [2], [-3], ["nowhere"], [True], [1.0]])
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises(ValueError, match="by number from 0 to 1 or as in"), record_entropy(make("Llama"), layers):
        pass
