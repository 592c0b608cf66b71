"""`python notebooks/paper arithmetic`: does low entropy on an answer's digits help to calculate (the paper's question)?

Half of the blocks are Python source, half additions and multiplications, every byte a token: `37+85`, a sign, the
answer's digits from the last to the first, an end. Conditions differ in model and penalty alone. Runs on record are
skipped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, DatasetInfo

from entropy_lib import Recipe, load_corpus
from entropy_lib.clone import CLONE
from entropy_lib.training.train import train_variant

RESULTS = (CLONE or Path()) / "data" / "arithmetic"
EREG, SIGN, END = "EReg(SM(t)+ScFuFFN)", "\x01", "\x02"
DIGITS = {"+": (1, 2, 3, 4, 5, 6), "*": (1, 2, 3)}
LENGTH, BLOCKS, ASKED = 128, 200_000, 512  # tokens of a block, blocks at most, problems of a kind that are asked
# By name: the variant, and what its recipe changes; "answers" stands for the two tokens around an answer.
CONDITIONS = {
    "GPT-2": ("SM+LN+G", {}),
    "no penalty": ("SM+ScFuFFN", {}),
    "temperature": ("SM(t)+ScFuFFN", {}),
    "penalty": (EREG, {}),
    "penalty on answers": (EREG, {"answers": True}),
    "low entropy on answers": (EREG, {"answers": True, "threshold_init": 0.1}),
}
RECIPE = Recipe(
    steps=4000, sequences_per_step=128, micro_batch=128, learning_rate=1e-3, warmup_ratio=0.1, entropy_every=500,
    eval_every=0, checkpoint_every=0, eval_blocks=1024, precision="bfloat16", compile=True,
)  # fmt: skip
RATES = {"tiny": 4e-3, "small": 2e-3}  # narrow models want more, as in the recipe "smoke"


def problems(generator: np.random.Generator, operations, digits) -> list[tuple[str, str]]:
    """`a+b` or `a*b` of numbers with so many digits each, and the answer's digits, the last one first."""
    low = np.where(np.array(digits) > 1, 10 ** (np.array(digits) - 1), 0)
    pairs = generator.integers(low[:, None], 10 ** np.array(digits)[:, None], (len(low), 2)).tolist()
    found = []
    for (first, second), operation in zip(pairs, operations, strict=True):
        answer = first + second if operation == "+" else first * second
        found.append((f"{first}{operation}{second}{SIGN}", str(answer)[::-1] + END))
    return found


def any_problems(generator: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Both operations and all numbers of digits as often."""
    operations, draws = generator.choice(list(DIGITS), count).tolist(), generator.random(count).tolist()
    sizes = [DIGITS[operation] for operation in operations]
    digits = [size[int(draw * len(size))] for size, draw in zip(sizes, draws, strict=True)]
    return problems(generator, operations, digits)


class Bytes:
    """Text to token ids, every character its own token."""

    def __init__(self, tokenizer):
        self.ids = {character: tokenizer(character)["input_ids"] for character in f"0123456789+*{SIGN}{END}"}
        assert all(len(ids) == 1 for ids in self.ids.values())

    def __call__(self, text: str) -> list[int]:
        return [self.ids[character][0] for character in text]


def mixed(corpus: str, count: int, seed: int):
    """`count` training blocks, every other one of `corpus`, the rest problems end to end; and the tokenizer.

    Validation has a twentieth as many, made the same way.
    """
    code, tokenizer = load_corpus(corpus, LENGTH)
    encode, splits = Bytes(tokenizer), {}
    for number, (split, blocks) in enumerate((("train", count), ("validation", max(8, count // 20)))):
        generator = np.random.default_rng([seed, number])
        chosen = np.sort(generator.integers(len(code[split]), size=blocks // 2))
        source = np.array(code[split].with_format("numpy")[chosen]["input_ids"])
        ids, wanted = [], (blocks - len(source)) * LENGTH
        while len(ids) < wanted:
            ids += encode("".join(map("".join, any_problems(generator, 10_000))))
        together = np.concatenate([source, np.array(ids[:wanted]).reshape(-1, LENGTH)])[generator.permutation(blocks)]
        column = pa.FixedSizeListArray.from_arrays(together.astype("uint16").ravel(), LENGTH)
        info = DatasetInfo(dataset_name=f"arithmetic+{corpus}")
        fingerprint = f"arithmetic-{corpus}-{seed}-{split}-{count}"  # a hash of the table failed in Python 3.12
        splits[split] = Dataset(pa.table({"input_ids": column}), info=info, fingerprint=fingerprint)
    return DatasetDict(splits), tokenizer


@torch.no_grad()
def accuracy(model, tokenizer, seed: int = 1) -> dict[str, list[float]]:
    """Share of problems whose whole answer comes out, each token the most likely, by operation and number of digits.

    Two other problems stand before each, as in training.
    """
    generator, encode, shares = np.random.default_rng(seed), Bytes(tokenizer), {}
    for operation, sizes in DIGITS.items():
        shares[operation] = []
        for digits in sizes:
            asked = problems(generator, [operation] * ASKED, [digits] * ASKED)
            before = ["".join(map("".join, any_problems(generator, 2))) + question for question, _ in asked]
            texts = [start + answer for start, (_, answer) in zip(before, asked, strict=True)]
            ids = torch.full((ASKED, max(map(len, texts))), 0)
            for row, text in zip(ids, texts, strict=True):
                row[: len(text)] = torch.tensor(encode(text))
            same = model(ids.to(model.device)).logits[:, :-1].argmax(-1).cpu() == ids[:, 1:]
            ends = [(len(start) - 1, len(text) - 1) for start, text in zip(before, texts, strict=True)]
            right = [bool(row[first:last].all()) for row, (first, last) in zip(same, ends, strict=True)]
            shares[operation].append(sum(right) / ASKED)
    return shares


def table(results: list[dict]) -> pd.DataFrame:
    """Mean and range over seeds of the exact answers, by size, condition, operation and digits."""
    rows = [
        {"size": r["size"], "condition": r["condition"], "problem": f"{digits} {operation}", "share": share}
        for r in results for operation, shares in r["accuracy"].items()
        for digits, share in zip(DIGITS[operation], shares, strict=True)
    ]  # fmt: skip
    found = pd.DataFrame(rows).groupby(["size", "condition", "problem"], sort=False)["share"]
    text = found.agg(lambda s: f"{s.mean():.0%}" + (f" ({s.min():.0%} to {s.max():.0%})" if len(s) > 1 else ""))
    return text.unstack("problem", sort=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python notebooks/paper arithmetic", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, metavar="CONDITION", default=list(CONDITIONS))
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--corpus", default="sample", help="the other half; default: %(default)s")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="of 16,384 tokens; default: %(default)s")
    parser.add_argument("--table", action="store_true", help="print what is on record, train nothing")
    parser.add_argument("--output", type=Path, help="default: data/arithmetic, build/arithmetic for other --steps")
    options = parser.parse_args(arguments)
    options.output = options.output or (RESULTS if options.steps == RECIPE.steps else Path("build/arithmetic"))
    if options.table:
        print(table([json.loads(path.read_text()) for path in sorted(options.output.glob("*.json"))]).to_string())
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        data = None
        for size in options.sizes:
            for condition in options.only:
                path = options.output / f"{condition}, {size}, seed {seed}.json"
                if path.exists():
                    print(f"{path.stem}: on record")
                    continue
                data = data or mixed(options.corpus, min(BLOCKS, options.steps * RECIPE.sequences_per_step), seed)
                variant, changes = CONDITIONS[condition]
                changes = dict(changes)
                if changes.pop("answers", False):
                    changes["penalty_from"], changes["penalty_until"] = Bytes(data[1])(SIGN + END)
                changes["learning_rate"] = RATES.get(size, RECIPE.learning_rate)
                recipe = replace(RECIPE, steps=options.steps, **changes)
                record = train_variant(variant, data, recipe, size=size, seed=seed)
                found = accuracy(record.model, data[1]) if record.status == "finished" else {}
                result = {"condition": condition, "size": size, "seed": seed, "accuracy": found}
                result["summary"] = record.summary()
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                print(f"{path.stem}: {record.status}, {found}", flush=True)
    return 0
