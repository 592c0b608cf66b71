"""`python notebooks/paper conversion`: SmolLM2-135M converted, one removal at a time, and fine-tuned on Python.

Every run has the same tokens and the original as its teacher; "SmolLM2" itself is the original fine-tuned so too, what
the others are held against. Runs on record are skipped. It needs notebook 03's download, and a GPU.

Blocks are drawn from the whole corpus, and held out from all of its validation split. data/runs/conversion_narrow is
`--max-tokens 8192000 --steps 500`: the first that many tokens, which are four packages, and validation's first blocks,
a fifth one. data/runs/conversion_english is `--corpus english --steps 400`.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset

from entropy_lib import Recipe, convert_for_private_inference, inference_cost, load_corpus, suggest_plan
from entropy_lib.clone import CLONE
from entropy_lib.explore.smollm2 import is_downloaded, load_smollm2
from entropy_lib.private_inference.architecture import Architecture
from entropy_lib.private_inference.plan import HeadPlan
from entropy_lib.training.records import RunRecord, load_runs
from entropy_lib.training.train import fine_tune

MODEL, RUNS, MEASURED = "SmolLM2", (CLONE or Path()) / "data" / "runs" / "conversion", 32
TOKENS = 16_384  # of a step
COUNTS = (180, 112, 58, 30)  # of 270 softmaxes
RATES = {MODEL: 3e-4}  # others 1e-3; neither was searched for
RECIPE = Recipe(
    steps=1000, learning_rate=1e-3, warmup_from_zero=False, distillation=0.5,
    anneal_start=0.05, anneal_end=0.6, entropy_every=100, eval_every=0, checkpoint_every=0,
    precision="bfloat16",
)  # fmt: skip


def plans(plan: HeadPlan) -> dict[str, HeadPlan]:
    """By name, from one plan with its statistics: nothing, one removal at a time, ReLU with ever fewer heads.

    Constant norms are on their own: rare rows, many times larger than the others, overflow once they are constant.
    """
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
    return found | {f"{MODEL}+SM({count})+R": changed(count, relu=True) for count in COUNTS}


def spread(blocks: Dataset, count: int) -> Dataset:
    """`count` blocks from all over, or all if there are fewer."""
    return blocks.select(range(0, len(blocks), max(1, len(blocks) // count))[:count])


def table(records: list[RunRecord]) -> pd.DataFrame:
    """Perplexity against bytes of the recorded runs, and both against the original's.

    Twice: held out, and on the text that the last two recorded steps were about to learn from, the same for all, which
    no run had seen unless its tokens are more than the corpus has, as in English.
    """
    original = Architecture(
        layers=30, heads=9, width=576, vocabulary=49152, activation="silu", ffn_width=1536, norm="rmsnorm", gated=True,
        key_value_heads=3,
    )  # fmt: skip
    rows = {}
    for record in records:
        config, strength = record.model_config, record.recipe["norm_penalty_coeff"]
        architecture = replace(
            original, layer_norm=not config["annealed_layer_norm"], activation=config["activation"],
            dynamic_heads=tuple(config["entropy_heads"]),
        )  # fmt: skip
        given, careful = (
            inference_cost(architecture, record.context_length, p).communication_gb for p in ("spu-0.9.5", "optimized")
        )
        whole = inference_cost(original, record.context_length, "spu-0.9.5").communication_gb
        done, usual = record.status == "finished", strength == RECIPE.norm_penalty_coeff
        rows[record.name + ("" if usual else f", norm penalty {strength:g}")] = {
            "softmaxes": sum(config["entropy_heads"]), "perplexity": record.eval_perplexity or math.nan,
            "on new training text": math.exp(record.history["loss"].iloc[-2:].mean()) if done else math.nan,
            "recall": math.nan if record.recall is None else record.recall,
            "copy": (record.patterns or {}).get("copy", [math.nan])[-1],  # with the most examples that fit
            "skipped steps": record.skipped_steps, "GB as given": given, "GB optimized": careful,
            "optimized, of the original as given": careful / whole,
        }  # fmt: skip
    return pd.DataFrame(rows).T.sort_values("GB as given", ascending=False)


def main(arguments: list[str] | None = None, model=None) -> int:
    """`model`: (model, tokenizer) in place of SmolLM2, for rehearsals."""
    parser = argparse.ArgumentParser(prog="python notebooks/paper conversion", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these runs; see --list")
    parser.add_argument("--list", action="store_true", help="print the runs and which are on record, train none")
    parser.add_argument("--table", action="store_true", help="print perplexity against bytes of what is on record")
    parser.add_argument("--corpus", default="pypi-medium", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens of a block; default: %(default)s")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help=f"of {TOKENS:,} tokens; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3, of the original 3e-4")
    parser.add_argument("--norm-penalty", type=float, default=RECIPE.norm_penalty_coeff, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, help="train on the corpus's first this many; default: on all of it")
    parser.add_argument("--compile", action="store_true", help="torch.compile of model and teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of the records")
    options = parser.parse_args(arguments)
    if options.table:
        if not (records := load_runs(options.output) if options.output.is_dir() else []):
            print(f"error: {options.output} has no records, unlike data/runs/conversion", file=sys.stderr)
            return 2
        print(table(records).to_string(float_format="{:.3g}".format))
        return 0
    if model is None and not is_downloaded():
        print("error: download SmolLM2 first, as notebook 03's section 'Get a model' says", file=sys.stderr)
        return 2
    model, tokenizer = model or load_smollm2()
    sequences = max(1, TOKENS // options.length)
    recipe = replace(
        RECIPE, steps=options.steps, context_length=options.length, sequences_per_step=sequences, micro_batch=sequences,
        eval_blocks=8 * sequences, norm_penalty_coeff=options.norm_penalty, compile=options.compile,
    )  # fmt: skip
    data = load_corpus(options.corpus, options.length, tokenizer=tokenizer, max_tokens=options.max_tokens)
    measured = data[0]["train"].select(range(MEASURED))
    if options.max_tokens is None:  # as they come, blocks are of a few packages
        data[0]["validation"] = spread(data[0]["validation"], recipe.eval_blocks)
        measured = spread(data[0]["train"], MEASURED)
    measured = torch.tensor(measured[:]["input_ids"])
    runs = plans(suggest_plan(model, measured, math.inf))
    if unknown := [name for name in options.only or [] if name not in runs]:
        print(f"error: unknown run {', '.join(unknown)}; there are {', '.join(runs)}", file=sys.stderr)
        return 2
    for name, plan in runs.items():
        done = (options.output / f"{name}-seed{options.seed}.json").exists()
        if options.list or done or name not in (options.only or runs):
            print(f"{name}: {'on record' if done else 'not on record'}")
            continue
        rate = options.learning_rate or RATES.get(name, RECIPE.learning_rate)
        record = fine_tune(
            convert_for_private_inference(model, plan), data, replace(recipe, learning_rate=rate), name=name,
            teacher=model, seed=options.seed, output_dir=options.output,
        )  # fmt: skip
        print(f"{name}: {record.status}, perplexity {record.eval_perplexity or math.nan:.2f}", flush=True)
    return 0
