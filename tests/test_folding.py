"""Folding: the same function with only what inference computes, and the original untouched."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from entropy_lib import fold_for_inference

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_folded_model_is_the_same_function(model):
    ids = torch.randint(0, 97, (2, 12))
    folded = fold_for_inference(model)
    expected = model(ids, labels=ids, output_entropies=True)
    output = folded(ids, labels=ids, output_entropies=True)
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    torch.testing.assert_close(output.loss, expected.loss, **EXACT)
    torch.testing.assert_close(output.entropies, expected.entropies, **EXACT)
    single = copy.deepcopy(model).float()  # in float32, as it would be used
    torch.testing.assert_close(fold_for_inference(single)(ids).logits, single(ids).logits, rtol=1e-5, atol=1e-4)
    # left padding: positions start later, and the query scale with them
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    torch.testing.assert_close(folded(ids, **kwargs).logits, model(ids, **kwargs).logits, **EXACT)


def test_nothing_left_to_fold(model):
    folded = fold_for_inference(model)
    assert not any(parametrize.is_parametrized(module) for module in folded.modules())
    names = " ".join(folded.state_dict())
    assert not any(word in names for word in ("parametrizations", "alpha", "log_temperature", "threshold", "gain"))
    assert folded.config.folded
    assert folded.config.weight_normalization is folded.config.norm_placement is None
    assert folded.config.variant == model.config.variant
    assert folded.entropy_thresholds() is folded.temperatures() is folded.ffn_scales() is None
    assert folded.lm_head.weight is folded.transformer.wte.weight
    assert not folded.training


@pytest.mark.parametrize("training", [True, False])
def test_original_is_untouched_and_trains_on(model, training):
    ids = torch.randint(0, 97, (2, 8))
    before, logits = snapshot(model), model(ids).logits
    model.train(training)
    folded = fold_for_inference(model)
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert not model.config.folded
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():  # no shared storage either way
        for parameter in folded.parameters():
            parameter.zero_()
    torch.testing.assert_close(model.eval()(ids).logits, logits, rtol=0, atol=0)
    model.train()(ids, labels=ids).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_folded_model_saves_reloads_and_generates(model, tmp_path):
    ids = torch.randint(0, 97, (2, 6))
    folded = fold_for_inference(model)
    folded.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(folded)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    for candidate in (folded, loaded):
        for use_cache in (True, False):
            assert torch.equal(candidate.generate(ids, use_cache=use_cache, **settings), expected)


def test_folding_twice_changes_nothing(model):
    once = fold_for_inference(model)
    twice = fold_for_inference(once)
    first, second = once.state_dict(), twice.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_folding_of_a_loaded_model(model, tmp_path):
    ids = torch.randint(0, 97, (1, 6))
    model.save_pretrained(tmp_path)
    folded = fold_for_inference(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(folded(ids).logits, model(ids).logits, **EXACT)


def test_attention_implementation_and_dtype_are_kept(tiny_model):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("SM(t)+ScFuFFN", dtype=dtype)
        model.set_attn_implementation("eager")
        folded = fold_for_inference(model)
        assert folded.dtype == dtype
        assert folded.transformer.h[0].attn.query_scale.dtype == dtype
        assert folded.config._attn_implementation == "eager"


def test_nothing_global_and_nothing_of_the_model_is_touched(model, monkeypatch):
    """Neither random state nor, even for a moment, a module's mode, which another thread may rely on."""
    model.train().transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    own, train = set(map(id, model.modules())), torch.nn.Module.train

    def switch(module, mode=True):
        assert id(module) not in own
        return train(module, mode)

    monkeypatch.setattr(torch.nn.Module, "train", switch)
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    fold_for_inference(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert [module.training for module in model.modules()] == modes


def test_hooks_stay_with_the_model(tiny_model):
    model, calls = tiny_model("SM+SNorm"), []
    for name, module in model.named_modules():
        if "parametrizations" not in name:  # those run whenever their weight is read
            module.register_forward_hook(lambda module, *_: calls.append(module))
    folded = fold_for_inference(model)
    folded(torch.arange(4)[None])
    assert not calls


def test_each_tensor_keeps_its_dtype_and_the_settings_of_generation_are_copied(tiny_model):
    model = tiny_model("EReg(SM(t)+ScFuFFN)", dtype=torch.bfloat16)
    model.lm_head.float()  # tied: the embedding with it
    model.transformer.wpe.half()
    model.generation_config.max_new_tokens = 3
    folded = fold_for_inference(model)
    assert {p.dtype for p in folded.transformer.h.parameters()} == {torch.bfloat16}
    assert (folded.lm_head.weight.dtype, folded.transformer.wpe.weight.dtype) == (torch.float32, torch.float16)
    assert folded.generation_config.max_new_tokens == 3
    assert folded.generation_config is not model.generation_config


def test_embeddings_untied_by_hand_stay_apart(tiny_model):
    model, ids = tiny_model("SM"), torch.arange(8)[None]
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    torch.testing.assert_close(fold_for_inference(model)(ids).logits, model(ids).logits, **EXACT)


def test_a_normalisation_of_pytorch_s_own_is_folded_too(tiny_model):
    """Its spectral norm takes a power iteration whenever the weight of a training model is read."""
    model, ids = tiny_model("SM"), torch.arange(8)[None]
    torch.nn.utils.parametrizations.spectral_norm(model.transformer.h[0].mlp.c_fc)
    before = snapshot(model.train())
    folded = fold_for_inference(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(folded(ids).logits, model.eval()(ids).logits, **EXACT)


def test_other_models_are_refused(tiny_model):
    with pytest.raises(ValueError, match="got GPT2LMHeadModel"):
        fold_for_inference(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=5)))
    model = tiny_model("SM")
    model.transformer.h[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"other than those of its configuration(.|\n)*adapter"):
        fold_for_inference(model)
