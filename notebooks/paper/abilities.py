"""`python notebooks/paper abilities`: what is left, beside perplexity, of a GPT-2 small whose nonlinearities are gone.

Every model starts as GPT-2 does, is trained on the same tokens and then asked: recall, associative recall, patterns
from examples, and bits a byte of the right answers of five benchmarks (86 MB at first). Runs on record are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pandas as pd

from entropy_lib import load_corpus
from entropy_lib.clone import CLONE
from entropy_lib.training.abilities import answer_bits
from entropy_lib.training.benchmarks import BENCHMARKS, gold_answers
from entropy_lib.training.recipe import get_recipe
from entropy_lib.training.train import train_variant
from paper.experiments import EREG, FULL, LONG, SHORT
from paper.frontier import AT_BEST, block_megabytes

RESULTS = (CLONE or Path()) / "data" / "abilities"
MODELS = (
    "SM+LN+G", "SM+LN+R", "SM+ScFuFFN", EREG, "SM(3)+LN(a)+R+V", "SM(1)+LN(a)+R+V", "R2(0,0,1)+LN(a)+R(2d)+V",
)  # fmt: skip
BUDGETS = {"66M": SHORT, "200M": FULL, "600M": LONG}
PAIRS = 8  # of associative recall, in the table


def table(results: list[dict]) -> pd.DataFrame:
    """Means over seeds by corpus, tokens and model, the model that sends most first.

    MB are those of twelve blocks of GPT-2 small computed with care; `copy` is with the most examples that fit.
    """
    rows = []
    for result in results:
        summary = result["summary"]
        row = {name: result[name] for name in ("corpus", "tokens", "model")}
        row |= {"MB": block_megabytes(result["model"], AT_BEST), "perplexity": summary["eval_perplexity"]}
        pairs, patterns = summary["associative_recall"] or {}, summary["patterns"] or {}
        row |= {"recall": summary["recall"], f"{PAIRS} pairs": pairs.get(str(PAIRS))}
        rows.append(row | {"copy": patterns.get("copy", [None])[-1]} | result["bits"])
    found = pd.DataFrame(rows).astype({"perplexity": float, "recall": float, f"{PAIRS} pairs": float, "copy": float})
    keys = ["corpus", "tokens", "model"]
    means = found.groupby(keys, sort=False).mean()
    means["runs"] = found.groupby(keys, sort=False).size()
    return means.sort_values(["corpus", "tokens", "MB"], ascending=[True, True, False])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python notebooks/paper abilities", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, metavar="MODEL", default=list(MODELS))
    parser.add_argument("--tokens", choices=BUDGETS, default="200M", help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--corpus", default="pypi-medium", help="default: %(default)s")
    parser.add_argument("--size", default="gpt2", help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="instead of the budget's")
    parser.add_argument("--table", action="store_true", help="print what is on record, train nothing")
    parser.add_argument("--output", type=Path, help="default: data/abilities, build/abilities for a rehearsal")
    options = parser.parse_args(arguments)
    rehearsal = options.size != parser.get_default("size") or options.steps
    options.output = options.output or (Path("build/abilities") if rehearsal else RESULTS)
    if options.table:
        results = [json.loads(path.read_text()) for path in sorted(options.output.glob("*.json"))]
        print(table(results).to_string(float_format="{:.3g}".format, na_rep="–"))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    changes = BUDGETS[options.tokens] | {"scaled_residual_init": True}
    recipe = get_recipe("paper", **changes | ({"steps": options.steps} if options.steps else {}))
    data = None
    for seed in options.seeds:
        for model in options.only:
            path = options.output / f"{model}, {options.corpus}, {options.tokens}, seed {seed}.json"
            if path.exists():
                print(f"{path.stem}: on record")
                continue
            if data is None:
                # without a network this fails, so before the hours of training
                questions = {name: gold_answers(name) for name in BENCHMARKS}
                data = load_corpus(options.corpus, recipe.context_length)
            record = train_variant(model, data, recipe, size=options.size, seed=seed)
            result = {"model": model, "corpus": options.corpus, "tokens": options.tokens, "seed": seed, "bits": {}}
            if record.finished:
                for name, answers in questions.items():
                    bits = answer_bits(record.model, data[1], answers)
                    result["bits"][name] = math.fsum(bits) / len(bits)
            result["summary"] = record.summary()
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{path.stem}: {record.status}, {result['bits']}", flush=True)
    return 0
