"""Folding: the same function with only what inference computes, and the original untouched."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

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
