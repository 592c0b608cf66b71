"""`python notebooks/paper frontier`: perplexity against bytes between two parties, of every model on record.

Two baselines, since a saving depends on what it is held against: GPT-2's blocks as the engine gives them, and at their
best, every operation by the cheapest method that computes the same function for any logits. All other models are priced
at their best. Perplexities are held against SM+LN+G at its best, with GPT-2's scaled start. A model that was trained
with another learning rate than the paper's has a row of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from entropy_lib.modeling import MODEL_SIZES, EntropyGPT2Config
from entropy_lib.private_inference.architecture import Architecture
from entropy_lib.private_inference.costs import InferenceCost, inference_cost
from entropy_lib.training.recipe import Recipe, get_recipe
from entropy_lib.training.records import RunRecord
from entropy_lib.variants import PRIVATE_VARIANTS, VARIANTS, get_variant
from paper.experiments import EXPERIMENTS, FULL, LONG, SHORT
from paper.tables import BASELINE, on_record

AS_GIVEN, AT_BEST = "spu-0.9.5-cheetah", "optimized-spu-0.9.5-cheetah"
BUDGETS = {"66M": SHORT, "200M": FULL, "600M": LONG}
T = 128
# largest gap to the baseline, and shares of its bytes as given and at its best; whether exponentials are allowed
GOALS = {"A": (0.0, 0.09, 0.31, True), "B": (0.03, 0.08, 0.27, True), "C": (0.06, 0.05, 0.18, False)}
# They change no weights; and the learning rate, which rows tell apart.
_NOT_COMPARED = ("micro_batch", "entropy_every", "eval_every", "checkpoint_every", "learning_rate")


def frontier(tokens: str = "200M", runs: str | Path = "data/runs") -> pd.DataFrame:
    """One row a model that started as GPT-2 does, GPT-2 small at T = 128.

    Columns: perplexity (mean over seeds; NaN if every run collapsed), spread (sample standard deviation), seeds that
    finished, runs that collapsed; gap to SM+LN+G and its standard error; recall (NaN where no run has it); softmax
    heads in all; MB of the twelve blocks at their best, as shares of GPT-2's as given and at its best; MB of the rest
    (embedding, last LayerNorm, vocabulary) for all tokens, and for one that is generated. ValueError for a budget that
    is none of BUDGETS, and without a record of the baseline.
    """
    if tokens not in BUDGETS:
        raise ValueError(f"unknown budget {tokens!r}; choose from {', '.join(BUDGETS)}")
    wanted = _weighing(get_recipe("paper", **BUDGETS[tokens]))
    planned = {run.record: run for experiment in EXPERIMENTS.values() for run in experiment.runs}.values()
    planned = [run for run in planned if _weighing(get_recipe(run.recipe, **run.changes)) == wanted]
    planned = [run for run in planned if (run.size, run.corpus, run.norm_placement) == ("gpt2", "pypi-medium", None)]
    records: dict[tuple[str, float], list[RunRecord]] = {}
    for record in on_record(planned, runs):
        records.setdefault((record.variant, record.recipe["learning_rate"]), []).append(record)
    rate = get_recipe("paper").learning_rate
    base = _perplexities(records.get((BASELINE, rate), ()))
    if not base:
        raise ValueError(f"no record of {BASELINE} with {tokens} tokens and a scaled start: gaps have no baseline")
    given, best = block_megabytes(BASELINE, AS_GIVEN), block_megabytes(BASELINE, AT_BEST)
    order = [*VARIANTS, *PRIVATE_VARIANTS]

    def place(item) -> tuple:  # models that no list names, those of `head_choice`, come last
        name, learning_rate = item[0]
        return order.index(name) if name in order else len(order), name, -learning_rate

    rows = {}
    for (name, learning_rate), found in sorted(records.items(), key=place):
        ppl = _perplexities(found) or [math.nan]
        recalls = [record.recall for record in found if record.finished and record.recall is not None]
        megabytes = block_megabytes(name, AT_BEST)
        rows[name if learning_rate == rate else f"{name} at {learning_rate:g}"] = {
            "perplexity": np.mean(ppl),
            "spread": _std(ppl),
            "runs": len(_perplexities(found)),
            "collapsed": sum(not record.finished for record in found),
            "gap": np.mean(ppl) / np.mean(base) - 1,
            "standard error": math.hypot(_std(ppl) / len(ppl) ** 0.5, _std(base) / len(base) ** 0.5) / np.mean(base),
            "recall": np.mean(recalls) if recalls else math.nan,
            "softmax heads": sum(config_of(name).entropy_heads()),
            "MB": megabytes,
            "of GPT-2 as given": megabytes / given,
            "of GPT-2 at its best": megabytes / best,
            "MB beside": _rest(name, 0),
            "MB beside, one token": _rest(name, 1),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def goals(table: pd.DataFrame) -> pd.DataFrame:
    """One row a goal: the model within its bytes that is nearest to the baseline, and by how much it is missed.

    A model that collapsed in one of its runs reaches no goal.
    """
    rows = {}
    for goal, (gap, given, best, exponentials) in GOALS.items():
        fits = table[(table["of GPT-2 as given"] <= given) & (table["of GPT-2 at its best"] <= best)]
        if not exponentials:
            fits = fits[fits["softmax heads"] == 0]
        stable = fits[fits["collapsed"] == 0]
        row = {"at most": f"{gap:+.0%}, {given:.2f} / {best:.2f}" + ("" if exponentials else ", no exponential")}
        if len(stable):
            nearest = stable.loc[stable["gap"].idxmin()]
            row |= {"model": nearest.name, **nearest[["gap", "standard error", "runs", "recall"]]}
            row |= nearest[["of GPT-2 as given", "of GPT-2 at its best"]].to_dict()
            missed, error = nearest["gap"] - gap, nearest["standard error"]
            row["outcome"] = "reached" if missed <= 0 else f"missed by {missed:.1%}"
            if missed > 0 and not missed > error:
                row["outcome"] += ", one seed" if math.isnan(error) else ", less than the standard error"
        else:
            unstable = f": collapsed in one run or more: {', '.join(fits.index)}" if len(fits) else ""
            row["outcome"] = f"no model on record is within its bytes{' and stable' if unstable else ''}{unstable}"
        rows[goal] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def block_megabytes(variant: str, prices: str) -> float:
    """MB of the twelve blocks of GPT-2 small at T = 128, both ways."""
    return blocks_cost(variant, prices).communication_gb * 1e3


def blocks_cost(variant: str, prices: str) -> InferenceCost:
    """What the twelve blocks of GPT-2 small cost at T = 128, without embedding, last LayerNorm and vocabulary."""
    return inference_cost(replace(Architecture.of(config_of(variant)), vocabulary=0), T, prices)


def _rest(variant: str, logits_to_keep: int) -> float:
    cost = inference_cost(config_of(variant), T, AT_BEST, logits_to_keep=logits_to_keep)
    return cost.communication_gb * 1e3 - block_megabytes(variant, AT_BEST)


def config_of(variant: str) -> EntropyGPT2Config:
    sizes = {**MODEL_SIZES["gpt2"], "n_positions": T, "vocab_size": 16384}
    return EntropyGPT2Config(**{**sizes, **get_variant(variant).config_fields()})


def _weighing(recipe: Recipe) -> dict:
    return {name: value for name, value in asdict(recipe).items() if name not in _NOT_COMPARED}


def _perplexities(found: Sequence[RunRecord]) -> list[float]:
    """Of every seed that finished; one that was run again counts once, by its first record."""
    return list({record.seed: record.eval_perplexity for record in reversed(found) if record.finished}.values())


def _std(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python notebooks/paper frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", choices=BUDGETS, default="200M")
    parser.add_argument("--runs", type=Path, default="data/runs")
    options = parser.parse_args(arguments)
    try:
        table = frontier(options.tokens, options.runs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(table.to_string(float_format="{:.4g}".format))
        print(f"\nGoals, against {BASELINE}: gap, bytes of the blocks against GPT-2 as given / at its best\n")
        print(goals(table).to_string(float_format="{:.3g}".format, na_rep=""))
    return 0
