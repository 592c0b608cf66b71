"""`python notebooks/paper conversion`: SmolLM2-135M converted, one removal at a time and all, and fine-tuned on Python.

Every run has the same tokens and the original as its teacher; "SmolLM2" itself is the original fine-tuned so too, what
the others are held against. Runs on record are skipped. It needs notebook 03's download, and a GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from entropy_lib import Recipe, convert_for_private_inference, inference_cost, load_corpus, suggest_plan
from entropy_lib.clone import CLONE
from entropy_lib.explore.smollm2 import is_downloaded, load_smollm2
from entropy_lib.private_inference.architecture import Architecture
from entropy_lib.private_inference.plan import HeadPlan
from entropy_lib.training.records import RunRecord, load_runs
from entropy_lib.training.train import fine_tune

MODEL, RUNS, LENGTH, MEASURED = "SmolLM2", (CLONE or Path()) / "data" / "runs" / "conversion", 128, 32
COUNTS = (250, 180, 112, 58)  # of 270 softmaxes
# 33M tokens; no rate was searched for.
RECIPE = Recipe(
    steps=2000, sequences_per_step=128, micro_batch=128, learning_rate=3e-4, warmup_from_zero=False, distillation=0.5,
    anneal_start=0.05, anneal_end=0.6, entropy_every=100, eval_every=500, checkpoint_every=0, eval_blocks=1024,
    precision="bfloat16",
)  # fmt: skip


def plans(plan: HeadPlan) -> dict[str, HeadPlan]:
    """By name, from one plan with its statistics: nothing, one removal at a time, ReLU with ever fewer heads, all."""
    heads = torch.tensor(plan.statistics.dependence)
    order = heads.flatten().argsort(descending=True, stable=True)

    def changed(count: int | None = None, relu: bool = False, constant_norms: bool = False) -> HeadPlan:
        keep = torch.ones(len(order), dtype=torch.bool)
        if count is not None:
            keep[order[count:]] = False
        return replace(plan, keep=tuple(map(tuple, keep.view(heads.shape).tolist())), relu=relu,
                       constant_norms=constant_norms)  # fmt: skip

    found = {MODEL: changed(), f"{MODEL}+R": changed(relu=True), f"{MODEL}+LN(a)": changed(constant_norms=True)}
    found |= {f"{MODEL}+SM({count})": changed(count) for count in COUNTS}
    found |= {f"{MODEL}+SM({count})+R": changed(count, relu=True) for count in COUNTS}
    return found | {f"{MODEL}+SM({count})+LN(a)+R": changed(count, True, True) for count in COUNTS}


def table(records: list[RunRecord]) -> pd.DataFrame:
    """Perplexity against bytes, as given and optimized, of the recorded runs; both against the original's."""
    rows = {}
    for record in records:
        config, original = record.model_config, Architecture(
            layers=30, heads=9, width=576, vocabulary=49152, activation="silu", ffn_width=1536, norm="rmsnorm",
            gated=True, key_value_heads=3,
        )  # fmt: skip
        architecture = replace(
            original, layer_norm=not config["annealed_layer_norm"], activation=config["activation"],
            dynamic_heads=tuple(config["entropy_heads"]),
        )  # fmt: skip
        given, whole = (inference_cost(a, LENGTH, "spu-0.9.5").communication_gb for a in (architecture, original))
        careful = inference_cost(architecture, LENGTH, "optimized").communication_gb
        rows[record.name] = {
            "softmaxes": sum(config["entropy_heads"]), "perplexity": record.eval_perplexity or math.nan,
            "GB as given": given, "of the original": given / whole, "GB optimized": careful,
        }  # fmt: skip
    return pd.DataFrame(rows).T.sort_values("GB as given", ascending=False)


def main(arguments: list[str] | None = None, model=None) -> int:
    """`model`: (model, tokenizer) in place of SmolLM2, for rehearsals."""
    parser = argparse.ArgumentParser(prog="python notebooks/paper conversion", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these runs; see --list")
    parser.add_argument("--list", action="store_true", help="print the runs and which are on record, train none")
    parser.add_argument("--table", action="store_true", help="print perplexity against bytes of what is on record")
    parser.add_argument("--corpus", default="pypi-medium", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="of 16,384 tokens; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=RECIPE.learning_rate, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of the records")
    options = parser.parse_args(arguments)
    on_record = {record.name: record for record in load_runs(options.output)} if options.output.is_dir() else {}
    if options.table:
        print(table(list(on_record.values())).to_string(float_format="{:.3g}".format))
        return 0
    if model is None and not is_downloaded():
        print("error: download SmolLM2 first, as notebook 03's section 'Get a model' says", file=sys.stderr)
        return 2
    model, tokenizer = model or load_smollm2()
    recipe = replace(RECIPE, steps=options.steps, learning_rate=options.learning_rate)
    tokens = max(options.steps * recipe.sequences_per_step * LENGTH, 1_000_000)
    data = load_corpus(options.corpus, LENGTH, tokenizer=tokenizer, max_tokens=tokens)
    measured = torch.tensor(data[0]["train"][:MEASURED]["input_ids"])
    runs = plans(suggest_plan(model, measured, math.inf))
    if unknown := [name for name in options.only or [] if name not in runs]:
        print(f"error: unknown run {', '.join(unknown)}; there are {', '.join(runs)}", file=sys.stderr)
        return 2
    for name, plan in runs.items():
        done = f"{name}-seed{options.seed}" in on_record
        if options.list or done or name not in (options.only or runs):
            print(f"{name}: {'on record' if done else 'not on record'}")
            continue
        record = fine_tune(
            convert_for_private_inference(model, plan), data, recipe, name=name, teacher=model, seed=options.seed,
            output_dir=options.output,
        )  # fmt: skip
        print(f"{name}: {record.status}, perplexity {record.eval_perplexity or math.nan:.2f}", flush=True)
    return 0
