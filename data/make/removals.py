"""What each removal costs SmolLM2-135M at once, before any fine-tuning: `python data/make/removals.py`, four minutes.

Writes data/private_inference/removals.json: the loss on Python source after every removal alone, and how far the rows
that its norms read differ in scale.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from entropy_lib.annealed_layer_norm import AnnealedRMSNorm, anneal
from entropy_lib.explore.smollm2 import load_smollm2
from entropy_lib.private_inference.convert import convert_for_private_inference
from entropy_lib.private_inference.methods import METHODS
from entropy_lib.private_inference.plan import suggest_plan
from entropy_lib.training.corpus import load_corpus

OUTPUT = Path(__file__).resolve().parents[1] / "private_inference" / "removals.json"
LENGTH, MEASURED, HELD_OUT, BATCH = 128, 32, 48, 8
COUNTS = (260, 250, 180, 112)
RULES = ("dependent", "sharp", "random")


def by_segments(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the SiLU that method "optimized" computes, in the model's own precision."""
    name, numbers = METHODS["optimized"].functions["silu"]
    assert name == "segments"
    (q, h, k, m, c), changed = numbers["quartic"], copy.deepcopy(model)

    def silu(x: Tensor) -> Tensor:
        kept = x.relu()
        inner = (2 * kept - x).clamp(max=numbers["bound"])
        return kept - (q * ((inner + h).square() + k).square() + m * inner + c)

    for layer in changed.model.layers:
        del layer.mlp.act_fn  # a module, which a function cannot replace
        layer.mlp.act_fn = silu
    return changed


def removals() -> dict:
    model, tokenizer = load_smollm2()
    dataset, _ = load_corpus("sample", LENGTH, tokenizer=tokenizer)
    measured = torch.tensor(dataset["train"][:MEASURED]["input_ids"])
    held_out = torch.tensor(dataset["validation"][:HELD_OUT]["input_ids"])
    plan = replace(suggest_plan(model, measured, math.inf), relu=False, constant_norms=False)

    @torch.no_grad()
    def loss(model) -> dict:
        """Mean over blocks, and its standard error, nats a token; None where it is not finite."""
        parts = [(model(part).logits[:, :-1].transpose(1, 2), part[:, 1:]) for part in held_out.split(BATCH)]
        losses = torch.cat([cross_entropy(*part, reduction="none").mean(-1) for part in parts]).double()
        if not losses.isfinite().all():
            return {"loss": None, "error": None}
        return {"loss": losses.mean().item(), "error": (losses.std() / len(losses) ** 0.5).item()}

    found = {"as it is": loss(model)}
    found["ReLU for SiLU"] = loss(convert_for_private_inference(model, replace(plan, relu=True)))
    found["SiLU by segments"] = loss(by_segments(model))
    entropy, dependence = (torch.tensor(numbers).flatten() for numbers in plan.statistics[:2])
    chance = torch.rand(len(entropy), generator=torch.Generator().manual_seed(0))
    for rule, score in zip(RULES, (dependence, -entropy, chance), strict=True):
        order = score.argsort(descending=True)
        for count in COUNTS:
            keep = torch.zeros(len(order), dtype=torch.bool)
            keep[order[:count]] = True
            heads = tuple(map(tuple, keep.view(len(plan.keep), -1).tolist()))
            changed = convert_for_private_inference(model, replace(plan, keep=heads))
            found[f"{count} of {len(order)} softmaxes, the most {rule}"] = loss(changed)
            print(list(found.items())[-1], flush=True)
    annealed, scales = convert_for_private_inference(model, replace(plan, constant_norms=True)), []

    def listen(norm, inputs):
        rms = inputs[0].square().mean(-1).sqrt()
        scales.append((rms.max() / rms.median()).item())

    norms = [module for module in annealed.modules() if isinstance(module, AnnealedRMSNorm)]
    hooks = [norm.register_forward_pre_hook(listen) for norm in norms]
    with torch.no_grad():
        annealed.train()(measured[:BATCH])
    for hook in hooks:
        hook.remove()
    for blend in (0.001, 0.01, 0.1, 1.0):
        anneal(annealed, blend)
        found[f"norms constant to {blend:.1%}"] = loss(annealed.eval())
    command = "python data/make/removals.py"
    return {"command": command, "blocks": HELD_OUT, "length": LENGTH, "losses": found, "largest_of_median_rms": scales}


if __name__ == "__main__":
    record = removals()
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, found in record["losses"].items():
        print(f"{name}: " + ("not finite" if found["loss"] is None else f"perplexity {math.exp(found['loss']):.4g}"))
