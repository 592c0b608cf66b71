"""`python -m entropy_lib.training`: train variants without a notebook.

One after the other, with --parallel side by side (one process a GPU), or one over several GPUs under `torchrun`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from entropy_lib.modeling import MODEL_SIZES
from entropy_lib.training.corpus import CORPORA, load_corpus
from entropy_lib.training.parallel import Run, exit_status, recorded, run_all
from entropy_lib.training.recipe import RECIPES, Recipe, get_recipe
from entropy_lib.training.records import RunRecord, compare
from entropy_lib.training.train import train_variant
from entropy_lib.variants import NORM_PLACEMENTS, PRIVATE_VARIANTS, VARIANTS, get_variant


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Every field of `Recipe` as an option, None if not given."""
    changes = parser.add_argument_group("change the recipe")
    for entry in fields(Recipe):
        kind = int if entry.default is None else type(entry.default)
        option = "--" + entry.name.replace("_", "-")
        if kind is bool:
            changes.add_argument(option, action=argparse.BooleanOptionalAction, default=None)
        else:
            changes.add_argument(option, type=kind, default=None, metavar=kind.__name__.upper())


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parallel", nargs="?", type=int, const=0, metavar="N",
                        help="N processes at a time (default: one a GPU); skips what is on record")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="with --parallel: also runs that are on record")


def recipe_changes(options: argparse.Namespace) -> dict:
    return {f.name: getattr(options, f.name) for f in fields(Recipe) if getattr(options, f.name) is not None}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m entropy_lib.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", "--variants", dest="variants", nargs="+", required=True, metavar="NAME",
                        help=f"one or more of: {', '.join(VARIANTS | PRIVATE_VARIANTS)}")  # fmt: skip
    parser.add_argument("--size", default="tiny", choices=list(MODEL_SIZES))
    parser.add_argument("--corpus", default="sample", help=f"{', '.join(CORPORA)} or a path")
    parser.add_argument("--max-tokens", type=int, help="train on the first this many tokens of the corpus")
    parser.add_argument("--recipe", default="smoke", choices=list(RECIPES))
    parser.add_argument("--seed", "--seeds", dest="seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--norm-placement", choices=NORM_PLACEMENTS, help="for SM+WNorm and SM+SNorm (Table 5)")
    parser.add_argument("--fsdp", action="store_true",
                        help="under torchrun: share weights, gradients and moments out over the processes")  # fmt: skip
    parser.add_argument("--checkpoint-activations", action="store_true", help="compute them again instead of keeping")
    parser.add_argument("--output", default="build/runs", help="folder of the run records (default: %(default)s)")
    add_parallel_options(parser)
    add_recipe_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    changes = recipe_changes(options)
    main_process = int(os.environ.get("RANK", "0")) == 0
    try:
        for variant in options.variants:
            get_variant(variant)
        recipe = get_recipe(options.recipe, **changes)
        overrides = {"fsdp": True} if options.fsdp else {}
        overrides |= {"gradient_checkpointing": True} if options.checkpoint_activations else {}
        if options.parallel is not None and overrides:
            raise ValueError("--parallel is a process a run: --fsdp and --checkpoint-activations go without it")
        if options.parallel is not None:
            runs = [
                Run(variant, Path(options.output), seed, options.recipe, changes, options.size, options.corpus,
                    options.max_tokens, options.norm_placement)
                for variant in options.variants
                for seed in options.seeds
            ]  # fmt: skip
            failed = run_all(runs, options.parallel, again=options.again)
            if records := recorded(runs):
                print_table(records)
            return exit_status(failed)
        corpus = load_corpus(options.corpus, recipe.context_length, max_tokens=options.max_tokens)
        records = []
        for variant in options.variants:
            for seed in options.seeds:
                record = train_variant(
                    variant, corpus, recipe, size=options.size, seed=seed, output_dir=options.output,
                    model_config={"norm_placement": options.norm_placement} if options.norm_placement else None,
                    training_overrides=overrides or None, overwrite=options.again,
                )  # fmt: skip
                records.append(record)
                if main_process:
                    print(outcome(record), flush=True)
        if main_process:
            print_table(records)
    except KeyboardInterrupt as stopped:
        print(stopped or "interrupted", file=sys.stderr)
        return 130
    except (ValueError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def outcome(record: RunRecord) -> str:
    perplexity = f"{record.eval_perplexity:.2f}" if record.finished else "none"
    speed = f"{record.tokens_per_second:,.0f} tokens/s, {record.tflops:.3g} TFLOP/s on {record.device}"
    return (
        f"{record.name}: {record.status}, perplexity {perplexity}, {record.tokens:,} tokens in "
        f"{record.minutes:.1f} min ({speed})"
    )


def print_table(records: Sequence[RunRecord]) -> None:
    print(compare(records).to_string(float_format="{:.3g}".format))


if __name__ == "__main__":
    sys.exit(main())
