"""`python notebooks/paper experiments table3`: the runs behind each table and figure, as data.

Records go to `data/runs/<experiment>/[<setting>/]<variant>-seed<k>.{json,parquet}`. What is on record is not run again,
so an interrupted list goes on when the same command is given again. An option that changes a run, whichever it is,
makes a rehearsal of the list, at tiny size for instance; its records go to build/experiments. --only and --seeds choose
among the runs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import pandas as pd

from entropy_lib.clone import CLONE
from entropy_lib.modeling import MODEL_SIZES
from entropy_lib.training.__main__ import add_parallel_options, add_recipe_options, recipe_changes
from entropy_lib.training.identity import scaled_before_the_field
from entropy_lib.training.parallel import Run, exit_status, recorded, run_all, visible_gpus
from entropy_lib.training.recipe import get_recipe
from entropy_lib.training.records import RunRecord, compare
from entropy_lib.variants import NORM_PLACEMENTS, PRIVATE_VARIANTS, VARIANTS
from paper.head_choice import COUNTS, RULES, heads_by_layer, variant_name

# A step is 65,536 tokens. Runs of minutes keep checkpoints only when interrupted: each takes 1.2 GB and seconds.
FULL = {"steps": 3052, "warmup_ratio": 0.10, "eval_every": 500, "checkpoint_every": 0}  # 200M tokens
LONG = FULL | {"steps": 9156, "checkpoint_every": 3000}  # 600M tokens
SHORT = {"steps": 1000, "warmup_ratio": 0.20, "eval_every": 250, "checkpoint_every": 0}  # 66M tokens

EREG = "EReg(SM(t)+ScFuFFN)"
HEADLINE = ("SM+LN+G", "SM+LN+R", "SM+ScFuFFN", EREG)  # the rows of Tables 3, 4, 7 and 8


@dataclass(frozen=True)
class Experiment:
    name: str
    description: str
    listed: tuple[Run, ...] | Callable[[], tuple[Run, ...]]  # or what lists them once other runs are on record

    @property
    def runs(self) -> tuple[Run, ...]:
        """Folders are relative to data/runs; a run may lie in another experiment's folder and be shared."""
        return self.listed() if callable(self.listed) else self.listed


# How the records below started. The experiments `initialization` say what GPT-2's start changes.
_START = {name: {"scaled_residual_init": scaled_before_the_field(asdict(v))} for name, v in VARIANTS.items()}
_START |= {name: {} for name in PRIVATE_VARIANTS}


def _runs(folder: str, variants: Iterable[str], changes: dict, seeds: Iterable[int] = (0,), **run) -> tuple[Run, ...]:
    return tuple(
        Run(v, Path(folder), s, changes=_START.get(v, {}) | changes, **run) for v, s in product(variants, seeds)
    )


def _sweep(name: str, variants: Iterable[str], changes: dict, settings: dict[str, dict], **run) -> tuple[Run, ...]:
    """Every variant under each of `settings` (name: further changes), a folder a setting."""
    return tuple(r for s, more in settings.items() for r in _runs(f"{name}/{s}", variants, changes | more, **run))


def _placements(name: str, variants: Iterable[str], changes: dict, places: Iterable[str]) -> tuple[Run, ...]:
    return tuple(r for place in places for r in _runs(f"{name}/{place}", variants, changes, norm_placement=place))


def _ablation() -> dict[str, dict]:
    settings = {}
    for t, coeff in product((0.01, 0.1, 1.0), (0.0, 0.01, 0.16)):
        fields = {"temperature_init": t, "loss_coeff": coeff}
        if not coeff:  # without a penalty its form does not matter
            settings[f"t{t}-lambda0"] = fields
            continue
        for ceiling, per in product(("context", "causal"), ("query", "head")):
            settings[f"t{t}-lambda{coeff}-{ceiling}-{per}"] = {**fields, "ceiling": ceiling, "per": per}
    return settings


def _rates(*rates: float) -> dict[str, dict]:
    return {f"{rate}": {"learning_rate": rate} for rate in rates}


_FROM_ONE = {"data_seed": 0, "warmup_from_zero": False}
_SCALED = {"scaled_residual_init": True}
_MUON = {"optimizer": "muon"}
_LOWER_RATES = _rates(6e-4, 3e-4)
_BASELINE = _runs("table3", ["SM+LN+G"], FULL, seeds=(0, 1, 2))
_GOALS = ("SM(2)+LN(a)+R+V", "SM(3)+LN(a)+R+V", "SM(1)+LN(a)+R+V", "R2(0,0,1)+LN(a)+R(2d)+V")
_T256 = {"context_length": 256, "sequences_per_step": 256, "micro_batch": 256}
# 24 layers of d = 1,024, started with the variance of d = 768; torch.compile would take longer than the run.
_350M = {"steps": 150, "eval_every": 0, "eval_blocks": 1024, "compile": False, "initializer_range": 0.0173}
# English has 4.4M training tokens, so few steps: 20M tokens are four and a half passes. λ is 5 times CodeParrot's, as
# in the paper, on a mean as there, since the batch that the paper sums over is not printed.
_T512 = {"context_length": 512, "sequences_per_step": 128, "micro_batch": 128, "steps": 300, "eval_every": 100}
_LANGUINI = {"temperature_init": 0.1, "loss_coeff": 5 * 0.16384, "eval_blocks": 1024}


def _margin(factor: float) -> tuple[Run, ...]:
    return _runs(f"figures7_8/gamma{factor:.2f}", [EREG], SHORT | {"tolerance_margin_factor": factor})


def _against_gpt2(setting: str, changes: dict, **run) -> tuple[Run, ...]:
    baseline = _runs(f"private/{setting}", ["SM+LN+G"], changes | _SCALED, **run)
    return (*baseline, *_runs(f"private/{setting}", ["SM(3)+LN(a)+R+V"], changes, **run))


_RANKED = _runs("head_choice/ranked", ["SM+LN+G"], SHORT | {"scaled_residual_init": True})


def _head_choice() -> tuple[Run, ...]:
    """What the record of `head_choice_ranked` names; no runs while there is none. Rules may name the same numbers."""
    ranked = CLONE / "data" / "runs" / _RANKED[0].record if CLONE else None
    if ranked is None or not ranked.is_file():
        return ()
    record = RunRecord.load(ranked)
    names = {variant_name(heads_by_layer(record, rule, count)) for count in COUNTS for rule in RULES}
    return _runs("head_choice/chosen", sorted(names), SHORT, seeds=(0, 1))


# Starts, batches and warm-up (306 steps) are those of the first rows of Tables 2 and 3 (305 steps).
_EVERY_STEP = FULL | {"steps": 340, "warmup_ratio": 0.90, "entropy_every": 1, "eval_every": 0}
_BUDGETED = ("SM+LN+G", "SM+ScFuFFN", EREG)
_33M = (
    *_runs("budget/33M", _BUDGETED, FULL | {"steps": 500}),
    *_runs("warmup_33M/0.3", _BUDGETED, FULL | {"steps": 500, "warmup_ratio": 0.30}),
)
_66M = (*_runs("baselines_66M", ["SM+LN+G", "SM+ScFuFFN"], SHORT), *_margin(0.20))

EXPERIMENTS: dict[str, Experiment] = {
    name: Experiment(name, description, runs)
    for name, description, runs in (
        (
            "warmup",
            "the warm-up at which the baseline is at its best, and its rival's, 200M tokens (10% is Table 3's)",
            (
                *_BASELINE[:1],
                *_runs("table3", ["SM+ScFuFFN"], FULL),
                *_sweep("warmup", ["SM+LN+G"], FULL, {f"{w}": {"warmup_ratio": w} for w in (0.05, 0.2)}),
                *_sweep("warmup", ["SM+ScFuFFN"], FULL, {"0.2": {"warmup_ratio": 0.2}}),
            ),
        ),
        (
            "table3",
            "the final model and its parts, 200M tokens, three seeds of the main ones",
            (
                *_BASELINE,
                *_runs("table3", ["SM+ScFuFFN", EREG], FULL, seeds=(0, 1, 2)),
                *_runs("table3", ["SM(t)+ScFuFFN"], FULL),
            ),
        ),
        (
            "table2",
            "nonlinearities taken out one after the other, 200M tokens",
            (*_BASELINE[:1], *_runs("table2", ["SM+LN+R", "SM+LN", "SM+G", "SM+R", "SM"], FULL)),
        ),
        (
            "table6",
            "what keeps the softmax-only FFN trainable, 200M tokens",
            (*_BASELINE[:1], *_runs("table6", ["SM+WNorm", "SM+SNorm", "SM+ScFFN"], FULL)),
        ),
        (
            "collapse",
            "every step of the warm-up of five of these runs: how entropies fall, where models break",
            _runs("collapse", ["SM", "SM(t)+ScFuFFN", "SM+ScFuFFN", EREG, "SM+LN+G"], _EVERY_STEP),
        ),
        (
            "learning_rates",
            "lower learning rates for what collapses at 1e-3, and for the final model and its rival, 200M tokens",
            _sweep(
                "learning_rates", ["SM", "SM+WNorm", "SM+ScFFN", "SM(t)+ScFuFFN", "SM+ScFuFFN", EREG], FULL,
                _LOWER_RATES,
            ),
        ),
        (
            "ablation",
            "temperature against regularisation: t at the start, λ, ceiling and unit of the penalty, 66M tokens",
            _sweep("ablation", [EREG], SHORT, _ablation()),
        ),
        (
            "temperature_start",
            "a temperature that starts at 0.1 (Table 3: 0.01), with and without the penalty, 200M tokens, three seeds",
            _runs(
                "temperature_start", ["SM(t)+ScFuFFN", EREG], FULL | {"temperature_init": 0.1}, seeds=(0, 1, 2)
            ),
        ),
        (
            "baselines_66M",
            "what the runs of 66M tokens are held against",
            _runs("baselines_66M", ["SM+LN+G", "SM+ScFuFFN"], SHORT),
        ),
        (
            "figures7_8",
            "the tolerance margin γ, 66M tokens",
            tuple(run for margin in range(7) for run in _margin(margin / 20)),
        ),
        (
            "budget",
            "the gap against tokens, each budget with its own schedule (200M is Table 3's)",
            (
                *_33M,
                *_66M,
                *_sweep("budget", _BUDGETED, FULL, {"131M": {"steps": 2000}, "600M": LONG}),
            ),
        ),
        (
            "initialization",
            "GPT-2's scaled residual projections, of the variants trained without: 66M tokens, six and three seeds",
            (
                *_runs("initialization/66M", ["SM+LN+G"], SHORT | _SCALED, seeds=range(6)),
                *_runs("initialization/66M", ["SM+LN+R", "SM+ScFuFFN"], SHORT | _SCALED, seeds=range(3)),
            ),
        ),
        (
            "initialization_200M",
            "the same at 200M tokens, three seeds of the main ones and one of Table 2's and Table 6's others",
            (
                *_runs("initialization/200M", ["SM+LN+G", "SM+ScFuFFN"], FULL | _SCALED, seeds=range(3)),
                *_runs(
                    "initialization/200M",
                    ["SM+LN+R", "SM+LN", "SM+G", "SM+R", "SM", "SM+WNorm", "SM+SNorm", "SM+ScFFN"],
                    FULL | _SCALED,
                ),
            ),
        ),
        (
            "private",
            "beyond the paper, 66M tokens, one seed each (the baselines are those of `initialization`)",
            _runs("private/66M", PRIVATE_VARIANTS, SHORT),
        ),
        (
            "private_200M",
            "beyond the paper: 36, 24 and 12 softmax heads in all, and no exponential; 200M tokens, three seeds",
            (
                *_runs("private/200M", _GOALS, FULL, seeds=(0, 1, 2)),
                *_runs("private/200M", ["SM(3)+LN+G+V"], FULL, seeds=(0, 1, 2)),  # GPT-2 with the same gifts
                *_runs("private/200M", ["SM+LN+G"], FULL | _SCALED, seeds=(3,)),  # its first three lack the recall
            ),
        ),
        (
            "private_600M",
            "beyond the paper: does the lead of 36 softmax heads survive 600M tokens? One seed",
            _against_gpt2("600M", LONG),
        ),
        (
            "private_elsewhere",
            "beyond the paper: does the lead hold at T = 256, on English at T = 512, at 18 layers, with Muon for both?",
            (
                *_against_gpt2("T256", SHORT | _T256),
                *_against_gpt2("english", SHORT | _T512 | {"eval_blocks": 1024}, seeds=(0, 1), corpus="english"),
                *_against_gpt2("muon_66M", SHORT | _MUON),
                *_against_gpt2("18_layers", SHORT, size="gpt2-18l"),
                *_against_gpt2("muon_200M", FULL | _MUON),
            ),
        ),
        (
            "private_penalty",
            "beyond the paper: does the penalty help the 36 heads that stay? 66M tokens, three seeds",
            _runs("private/66M", ["SM(3)+LN(a)+R+V", "EReg(SM(3)+LN(a)+R+V)"], SHORT, seeds=(0, 1, 2)),
        ),
        ("head_choice_ranked", "SM+LN+G whose heads are ranked by entropy and input dependence, 66M tokens", _RANKED),
        (
            "head_choice",
            "4, 12 and 36 softmax heads where those rankings put them, or at random; 66M tokens, two seeds",
            _head_choice,
        ),
        (
            "noise",
            "how far single runs of 66M tokens spread: by initialisation, by order, with a warm-up that starts at 1/W",
            (
                *_runs("noise/order0", ["SM+LN+G", EREG], SHORT | {"data_seed": 0}, seeds=range(6)),
                *_sweep("noise", ["SM+LN+G", EREG], SHORT, {f"order{k}": {"data_seed": k} for k in range(1, 6)}),
                *_runs("noise/warmup_from_one_step", ["SM+LN+G", EREG], SHORT | _FROM_ONE),
                *_runs("noise/warmup_from_one_step", [EREG], SHORT | _FROM_ONE, seeds=(1, 2)),
            ),
        ),
        (
            "learning_rates_350M",
            "rates for the billion, searched for at 24 layers of d = 1,024, 10M tokens",
            (
                *_sweep("learning_rates_350M", [EREG, "SM+ScFuFFN"], SHORT | _350M | _SCALED,
                        _rates(6e-4, 3e-4, 1.5e-4), size="350M"),
                *_sweep("learning_rates_350M", ["SM(3)+LN(a)+R+V"], SHORT | _350M,
                        _rates(1e-3, 6e-4, 3e-4), size="350M"),
            ),
        ),
        ("warmup_33M", "are the runs of 33M tokens at their best? 50 steps of warm-up against 150", _33M),
        ("table7", "T = 256, 66M tokens", _runs("table7", HEADLINE, SHORT | _T256)),
        ("table8", "18 layers, 66M tokens", _runs("table8", HEADLINE, SHORT, size="gpt2-18l")),
        (
            "table8_learning_rates",
            "18 layers: lower learning rates for what collapses at 1e-3, 66M tokens",
            _sweep("table8_learning_rates", ["SM+ScFuFFN", EREG], SHORT, _LOWER_RATES, size="gpt2-18l"),
        ),
        (
            "table4",
            "T = 512 on English prose, 20M tokens",
            _runs("table4", HEADLINE, SHORT | _T512 | _LANGUINI, corpus="english"),
        ),
        (
            "table5",
            "placements of weight and spectral normalisation, 66M tokens",
            _placements("table5", ["SM+WNorm", "SM+SNorm"], SHORT, NORM_PLACEMENTS),
        ),
        (
            "table5_learning_rates",
            "Table 5 at lower learning rates, for the placements that collapse at 1e-3, 66M tokens",
            tuple(
                run
                for rate, change in _LOWER_RATES.items()
                for variant, places in {"SM+WNorm": NORM_PLACEMENTS, "SM+SNorm": ["QK"]}.items()
                for run in _placements(f"table5_learning_rates/{rate}", [variant], SHORT | change, places)
            ),
        ),
    )
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python notebooks/paper experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of these variants only")
    parser.add_argument("--seeds", type=int, nargs="+", help="of these seeds only")
    parser.add_argument(
        "--output", type=Path, help="default: data/runs, or build/experiments if an option changes runs"
    )
    add_parallel_options(parser)
    changes = parser.add_argument_group("change every run")
    changes.add_argument("--recipe")
    changes.add_argument("--size", choices=list(MODEL_SIZES))
    changes.add_argument("--corpus")
    changes.add_argument("--max-tokens", type=int)
    add_recipe_options(parser)
    return parser


def expand(options: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs that the command line asks for, by experiment and setting; a run that two share is in both.

    ValueError for names, seeds and changes that there are none of.
    """
    planned = [run for name in options.experiments for run in EXPERIMENTS.get(name, Experiment("", "", ())).runs]
    for kind, known, names in (
        ("experiment", list(EXPERIMENTS), options.experiments),
        ("variant of these experiments", list(dict.fromkeys(run.variant for run in planned)), options.only),
        ("seed of these experiments", sorted({run.seed for run in planned}), options.seeds),
    ):
        if unknown := [name for name in names or () if name not in known]:
            raise ValueError(f"unknown {kind} {', '.join(map(str, unknown))}; choose from {', '.join(map(str, known))}")
    overrides = {name: getattr(options, name) for name in ("recipe", "size", "corpus", "max_tokens")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    runs: dict[str, list[tuple[Run, Run]]] = {}
    for name in options.experiments:
        for run in EXPERIMENTS[name].runs:
            if run.variant in (options.only or (run.variant,)) and run.seed in (options.seeds or (run.seed,)):
                changed = replace(run, changes=run.changes | recipe_changes(options), **overrides)
                runs.setdefault("/".join((name, *run.folder.parts[1:])), []).append((run, changed))
    if not runs:
        raise ValueError("no run of these experiments is of these variants and seeds")
    rehearsal = any(_settings(run) != _settings(changed) for pairs in runs.values() for run, changed in pairs)
    root = options.output or Path("build/experiments" if rehearsal else "data/runs")
    return {key: [replace(new, folder=root / new.folder) for _, new in pairs] for key, pairs in runs.items()}


def _settings(run: Run) -> Run:
    """A run with its recipe written out: what another must equal to be the same."""
    return replace(run, recipe="", changes=asdict(get_recipe(run.recipe, **run.changes)))


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.list or not options.experiments:
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name:21} {len(experiment.runs):3} runs  {experiment.description}")
        return 0
    try:
        settings = expand(options)
        runs = list({run.record: run for group in settings.values() for run in group}.values())  # shared ones once
        if options.dry_run:
            print("\n".join(shlex.join(["python", *run.command()]) for run in runs))
            return 0
        if options.again:  # repeats a run on record, and takes no other's place
            _ = [run.finished() for run in runs]
        failed = run_all(runs, options.parallel or len(visible_gpus()) or 1, again=options.again)
        tables = {setting: compare(records) for setting, group in settings.items() if (records := recorded(group))}
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if tables:
        print(pd.concat(tables).to_string(float_format="{:.3g}".format))
    return exit_status(failed)
