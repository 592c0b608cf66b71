"""record_entropy against the weights that transformers' own eager attention returns, for one tiny model a family."""

import copy

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
from entropy_lib.interface import attend, entropy_attention_forward, entropy_mask, recorders

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
    assert entropy_mask(**common) is None
    assert entropy_mask(**{**common, "attention_mask": None}) is None
    assert torch.equal(entropy_mask(**{**common, "attention_mask": padded}), padded)
    assert torch.equal(entropy_mask(**{**common, "q_length": 2, "q_offset": 4}), ones)
    assert entropy_mask(**{**common, "q_length": 1, "q_offset": 5}) is None
    everything = {**common, "mask_function": bidirectional_mask_function, "allow_is_causal_skip": False}
    assert entropy_mask(**everything, allow_is_bidirectional_skip=True) is None
    keys = entropy_mask(**{**everything, "attention_mask": padded}, allow_is_bidirectional_skip=True)
    assert torch.equal(keys, padded[:, None, None])
    window = {**common, "mask_function": sliding_window_causal_mask_function(4), "local_size": 4}
    assert entropy_mask(**{**common, "mask_function": sliding_window_causal_mask_function(9), "local_size": 9}) is None
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
