"""Plans: which heads are kept is the ranking's, how many is the budget's."""

from dataclasses import replace

import pytest
import torch
from test_families import tiny

from entropy_lib import record_entropy
from entropy_lib.explore.tiny_model import load_tiny_model
from entropy_lib.input_dependence import input_dependence
from entropy_lib.private_inference.architecture import Architecture
from entropy_lib.private_inference.costs import inference_cost, savings
from entropy_lib.private_inference.plan import suggest_plan

T = 12
BLOCKS = torch.randint(100, (9, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma"])
def test_the_most_input_dependent_heads_are_kept_and_as_many_as_the_budget_pays_for(name):
    model = tiny(name).train()
    everything = suggest_plan(model, BLOCKS, 1.0, context_length=T)
    assert everything.softmax_heads == 8
    assert everything.cost.communication_gb < everything.original.communication_gb
    assert everything.original == inference_cost(model, T, "optimized")
    dependence = torch.tensor(input_dependence(model.eval(), BLOCKS)).flatten()
    order = dependence.argsort(descending=True)
    model.train()
    for count in (1, 3, 8):
        heads = torch.zeros(8, dtype=torch.bool)
        heads[order[:count]] = True
        exact = suggest_plan(model, BLOCKS, 1.0, context_length=T) if count == 8 else None
        budget = exact.cost.communication_gb if exact else _price(model, heads)
        found = suggest_plan(model, BLOCKS, budget * (1 + 1e-9), context_length=T)
        assert torch.equal(torch.tensor(found.keep).flatten(), heads)
        if count > 1:
            assert suggest_plan(model, BLOCKS, budget * (1 - 1e-6), context_length=T).softmax_heads == count - 1
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "eager"


def _price(model, heads):
    by_layer = tuple(heads.view(2, 4).sum(-1).tolist())
    return inference_cost(
        replace(Architecture.of(model.config), activation="relu", dynamic_heads=by_layer), T, "optimized"
    ).communication_gb


def test_what_is_measured_is_the_heads_own():
    model = tiny("llama")
    plan = suggest_plan(model, BLOCKS, 1.0, context_length=T)
    with torch.no_grad(), record_entropy(model) as recorder:
        model(BLOCKS)
    torch.testing.assert_close(torch.tensor(plan.statistics.entropy), recorder.head_means(), rtol=1e-5, atol=1e-5)
    assert list(plan.to_frame()["softmax heads"]) == [4, 4]
    assert plan.to_frame()["the others'"].isna().all()


def test_norms_and_activation_may_stay():
    model = tiny("llama")
    kept = suggest_plan(model, BLOCKS, 1.0, context_length=T, relu=False, prices="spu-0.9.5")
    assert kept.cost.bytes == kept.original.bytes
    table = savings(model, T)
    norms = suggest_plan(model, BLOCKS, 1.0, context_length=T, constant_norms=True, relu=False, prices="spu-0.9.5")
    assert norms.cost.communication_gb == pytest.approx(table.loc["norms become constants", "GB"])


def test_texts_are_joined_and_cut_into_blocks():
    model, tokenizer = load_tiny_model()
    texts = ["def f(x):\n    return x\n" * 20, "import os\n" * 30]
    plan = suggest_plan(model, texts, 1.0, tokenizer=tokenizer, context_length=64)
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    assert plan == suggest_plan(model, ids[: len(ids) // 64 * 64].view(-1, 64), 1.0, context_length=64)
    for wrong, words in (
        ({"texts": texts}, "need the model's tokenizer"),
        ({"texts": ["x"], "tokenizer": tokenizer}, "less than a block of 64"),
        ({"texts": torch.zeros(3, 64)}, r"token ids \[N, T\], got torch.float32"),
        ({"texts": ids[None, :64], "budget": 1e-6}, "pays for no softmax head: one takes"),
    ):
        with pytest.raises(ValueError, match=words):
            suggest_plan(model, **{"budget": 1.0, "context_length": 64, **wrong})
