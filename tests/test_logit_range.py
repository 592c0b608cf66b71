"""The range of attention logits, against the definition written out."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from entropy_lib import build_model
from entropy_lib.logit_range import logit_range

SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 12, "vocab_size": 50}


def model_of(variant):
    torch.manual_seed(0)
    if variant == "stock":
        return GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=None, eos_token_id=None)).eval()
    if variant == "Llama":  # two heads on each key
        sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48, vocab_size=50, initializer_range=0.3)).eval()
    return build_model(variant, "tiny", **SIZES).eval()


@pytest.mark.parametrize("variant", ["SM+LN+R", "SM(t)+ScFuFFN", "SM(0,0,1)+LN(a)+R+V", "stock", "Llama"])
def test_the_range_of_logits(variant):
    model, blocks = model_of(variant), torch.randint(50, (5, 12))
    implementation = model.config._attn_implementation
    found = logit_range(model, blocks, batch=2)
    assert model.config._attn_implementation == implementation
    wanted = [4, 4, 4] if variant in ("stock", "Llama") else model.config.entropy_heads()
    assert [len(heads) for heads in found] == wanted
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(blocks, output_attentions=True).attentions  # of the layers that have a softmax
    for layer, heads in enumerate(heads for heads in found if heads):
        for head, (low, high) in enumerate(heads):
            lows, highs = [0.0], [0.0]
            for row in range(12):
                logits = weights[layer][:, head, row, : row + 1].log()  # up to a constant of the row
                away = logits - logits.mean(-1, keepdim=True)
                lows.append(away.min().item())
                highs.append(away.max().item())
            assert (low, high) == pytest.approx((min(lows), max(highs)), rel=1e-4, abs=1e-5)


def test_attention_without_softmax_has_no_range():
    assert logit_range(model_of("R2(0,0,1)+LN(a)+R+V"), torch.randint(50, (2, 12))) == [[], [], []]
