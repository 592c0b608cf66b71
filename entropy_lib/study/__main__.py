"""`python -m entropy_lib.study`: train variants without a notebook; under `torchrun` on several processes."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields

from entropy_lib.modeling import MODEL_SIZES
from entropy_lib.study.recipes import RECIPES, Recipe, get_recipe
from entropy_lib.study.runs import compare
from entropy_lib.study.training import train_variant
from entropy_lib.variants import NORM_PLACEMENTS, VARIANTS


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m entropy_lib.study", description=__doc__)
    parser.add_argument("--variant", "--variants", dest="variants", nargs="+", required=True, metavar="NAME",
                        help=f"one or more of: {', '.join(VARIANTS)}")  # fmt: skip
    parser.add_argument("--size", default="tiny", choices=list(MODEL_SIZES))
    parser.add_argument(
        "--corpus", default="sample", help="sample, pypi-small, pypi-medium, english, codeparrot or a path"
    )
    parser.add_argument("--recipe", default="smoke", choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--norm-placement", choices=NORM_PLACEMENTS, help="for SM+WNorm and SM+SNorm (Table 5)")
    parser.add_argument("--output", default="build/runs", help="folder of the run records (default: %(default)s)")
    changes = parser.add_argument_group("change the recipe")
    for entry in fields(Recipe):
        kind = type(entry.default)
        option = "--" + entry.name.replace("_", "-")
        if kind is bool:
            changes.add_argument(option, action=argparse.BooleanOptionalAction, default=None)
        else:
            changes.add_argument(option, type=kind, default=None, metavar=kind.__name__.upper())
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    changes = {f.name: getattr(options, f.name) for f in fields(Recipe) if getattr(options, f.name) is not None}
    model_config = {"norm_placement": options.norm_placement} if options.norm_placement else None
    main_process = int(os.environ.get("RANK", "0")) == 0
    records = []
    try:
        recipe = get_recipe(options.recipe, **changes)
        for variant in options.variants:
            record = train_variant(
                variant, options.corpus, recipe, size=options.size, seed=options.seed,
                output_dir=options.output, model_config=model_config,
            )  # fmt: skip
            records.append(record)
            if main_process:
                perplexity = "none" if record.eval_perplexity is None else f"{record.eval_perplexity:.2f}"
                print(
                    f"{record.name}: {record.status}, perplexity {perplexity}, {record.tokens:,} tokens in "
                    f"{record.minutes:.1f} min ({record.tokens_per_second:,.0f} tokens/s on {record.device})",
                    flush=True,
                )
    except KeyboardInterrupt as stopped:
        print(stopped or "interrupted", file=sys.stderr)
        return 130
    except (ValueError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if main_process:
        print(compare(records).to_string(float_format="{:.3g}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
