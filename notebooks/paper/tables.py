"""`python notebooks/paper tables table3`: the paper's tables beside the recorded runs, as Markdown.

Corpora and budgets differ from the paper's, so perplexities themselves do not compare. Gaps to the baseline of the
same table, PPL/PPL(SM+LN+G) - 1, do.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from entropy_lib.entropy import diagnose, entropy_bands, head_entropies
from entropy_lib.private_inference.costs import paper_tables
from entropy_lib.training.parallel import Run, recorded
from entropy_lib.training.recipe import Recipe, get_recipe
from entropy_lib.training.records import RunRecord, compare
from entropy_lib.variants import NORM_PLACEMENTS, VARIANTS
from paper.experiments import EXPERIMENTS, Experiment

BASELINE = "SM+LN+G"
TABLES = {  # experiment: key in `paper_tables`
    "table2": "table2_nonlinearities_codeparrot_T128",
    "table3": "table3_codeparrot_T128",
    "table4": "table4_languini_T512",
    "table5": "table5_norm_placement_T128",
    "table6": "table6_ffn_stabilisers_T128",
    "table7": "table7_codeparrot_T256",
    "table8": "table8_codeparrot_L18_T128",
}
STATES = ("collapsed", "healthy", "overloaded")  # of heads, by `diagnose`
# Runs of other experiments that are further settings of a sweep: 200M tokens, and the learning rate 1e-3.
_MORE_SETTINGS = {
    "budget": ("table3",),
    "learning_rates": ("table3", "table2", "table6"),
    "table5_learning_rates": ("table5",),
    "table8_learning_rates": ("table8",),
    "temperature_start": ("table3",),
}
_OF_COMPARE = {"collapsed": "collapsed_runs", "tokens": "tokens", "perplexity": "ppl", "spread": "spread", "gap": "gap",
               "minutes": "minutes"}  # fmt: skip
_NOT_A_SETTING = {
    "micro_batch", "entropy_every", "eval_every", "checkpoint_every", "eval_blocks", "scaled_residual_init",
}  # fmt: skip


def paper_ppl(experiment: str, tokens: str = "1.2B") -> dict[str, float]:
    """{row: evaluation perplexity} as the paper prints it, NaN where its training ended in NaN (SM in Table 2).

    Tables 5 and 6 print no baseline: theirs is Table 2's, of the same corpus and length. `tokens` chooses the column
    of Table 4, "1.2B", "2.4B" or "4.8B".
    """
    if experiment not in TABLES:
        raise ValueError(f"{experiment!r} is no table with printed perplexities; those are {', '.join(TABLES)}")
    paper = paper_tables()
    table = paper[TABLES[experiment]]
    baseline = {BASELINE: paper[TABLES["table2"]][BASELINE]}
    if experiment == "table5":
        names = {"weight_norm": "SM+WNorm", "spectral_norm": "SM+SNorm"}
        placed = {f"{names[norm]}, {place}": ppl for norm, places in table.items() for place, ppl in places.items()}
        return baseline | placed
    if experiment == "table6":
        names = {"weight_norm": "SM+WNorm", "spectral_norm": "SM+SNorm", "scaled_ffn": "SM+ScFFN"}
        return baseline | {names[key]: ppl for key, ppl in table.items()}
    rows = {row: values["ppl"] if isinstance(values, dict) else values for row, values in table.items()}
    rows = {row: ppl[tokens] if isinstance(ppl, dict) else ppl for row, ppl in rows.items()}
    return {row: math.nan if ppl is None else ppl for row, ppl in rows.items()}


def table_runs(experiment: str) -> dict[str, list[Run]]:
    """{row: its runs}, the paper's rows and those that the experiment adds, in the order of `VARIANTS`.

    A printed row that the experiment does not train itself takes another experiment's runs with the same settings:
    SM+LN+R of Table 3 is Table 2's, the baseline of Table 5 is the one of `baselines_66M`.
    """
    own = _experiment(experiment).runs
    rows: dict[str, list[Run]] = {}
    for run in own:
        rows.setdefault(_row(run), []).append(run)
    everywhere = {run.record: run for other in EXPERIMENTS.values() for run in other.runs}.values()  # shared ones once
    for row in paper_ppl(experiment):
        if row not in rows:
            rows[row] = [run for run in everywhere if _row(run) == row and _settings(run) == _settings(own[0])]
    return dict(sorted(rows.items(), key=lambda item: _order(item[0])))


def reproduction(experiment: str, runs: str | Path = "data/runs") -> pd.DataFrame:
    """One row a row of the paper's table that is on record, the printed figures beside those of the runs.

    Columns: printed (whether the paper has the row), paper_ppl (NaN if its training ended in NaN), paper_gap; runs,
    collapsed_runs; tokens, ppl and spread (sample standard deviation over seeds), gap, minutes, each a mean over runs
    as in `compare`; heads collapsed, healthy and overloaded (`diagnose`, mean over runs), heads.

    ValueError for an experiment that is no table or has no run on record, a record of another run than the
    experiment's, mixed corpora, and a `runs` that is no folder.
    """
    printed = paper_ppl(experiment)
    rows, records = {}, []
    for row, found in _rows_on_record(experiment, runs).items():
        records += [_renamed(record, row) for record in found]  # Table 5's placements share a variant
        rows[row] = {
            "printed": row in printed,
            "paper_ppl": printed.get(row, math.nan),
            "paper_gap": printed.get(row, math.nan) / printed[BASELINE] - 1,
            "runs": len(found),
            **dict.fromkeys(_OF_COMPARE.values(), math.nan),
            **_heads(found),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.update(compare(records, BASELINE).rename(columns=_OF_COMPARE)[list(_OF_COMPARE.values())])
    return table


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """What `reproduction` returns as words, with three significant digits."""
    rows = {}
    for row, values in table.iterrows():
        ours = "collapsed"
        if math.isfinite(values["ppl"]):
            ours = _three_digits(values["ppl"]) + (f" ± {values['spread']:.2g}" if values["spread"] >= 0 else "")
            if values["collapsed_runs"]:
                ours += f", {values['collapsed_runs']:.0f} of {values['runs']} collapsed"
        paper = _three_digits(values["paper_ppl"]) if math.isfinite(values["paper_ppl"]) else "collapsed"
        rows[row] = {
            "paper": paper if values["printed"] else "–",
            "paper's gap": _percent(values["paper_gap"]),
            "here": ours,
            "gap here": _percent(values["gap"]),
            "heads collapsed / healthy / overloaded": _counts(values),
            "runs": values["runs"],
        }
    return pd.DataFrame(rows).T


def gaps(table: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """{row: (the paper's gap, ours)} of what `reproduction` returns: NaN if there is none, infinity for a collapse."""
    paper = table["paper_gap"].where(~(table["printed"] & table["paper_ppl"].isna()), math.inf)
    ours = table["gap"].where(table["collapsed_runs"] < table["runs"], math.inf)
    return {row: (paper[row], ours[row]) for row in table.index}


def examples(experiment: str, runs: str | Path = "data/runs") -> tuple[dict[str, RunRecord], str]:
    """({row: record}, caption): one run a row of a table, for figures that need heads and histories.

    The caption names the folder, the tokens and the corpus. ValueError as for `reproduction`.
    """
    found = {row: records[0] for row, records in _rows_on_record(experiment, runs).items()}
    longest = max(found.values(), key=lambda record: record.tokens)  # a collapsed run has fewer
    return found, f"data/runs/{experiment}, {longest.tokens / 1e6:.0f}M tokens of {longest.corpus}"


def sweep(experiment: str, runs: str | Path = "data/runs") -> pd.DataFrame:
    """One row a run of a sweep on record, its settings as columns: whatever the recipes of its runs differ in.

    Further columns: variant (with its placement, if any), seed, status, tokens, perplexity, gap (to the SM+LN+G runs on
    record of the same steps, batch, length, warm-up and order), entropy (mean over heads, nats), heads collapsed,
    healthy and overloaded (`diagnose`), heads, top_band (share of heads in the last band of Figure 2a, as in Figure 7),
    minutes. A collapsed run has no perplexity and keeps its last entropies.
    """
    own = _experiment(experiment).runs
    variants = {run.variant for run in own}
    more = [run for name in _MORE_SETTINGS.get(experiment, ()) for run in EXPERIMENTS[name].runs]
    planned = {run.record: run for run in (*own, *more) if run.variant in variants}.values()
    settings = [name for name in asdict(Recipe()) if name not in _NOT_A_SETTING and _differ(planned, name)]
    baselines, rows = _baselines(runs), []
    for run in planned:
        recipe = asdict(_recipe(run))
        row = {"variant": _row(run), "seed": run.seed} | {name: recipe[name] for name in settings}
        rows += [row | _outcome(record, baselines.get(_budget(run), [])) for record in on_record([run], runs)]
    columns = ["variant", "seed", *settings, "status", "tokens", "perplexity", "gap", "entropy", *STATES, "heads",
               "top_band", "minutes"]  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=columns).sort_values(["variant", *settings, "seed"], ignore_index=True)


def outcomes(runs: pd.DataFrame, rows: str | list[str], columns: str, decimals: int = 1) -> pd.DataFrame:
    """Runs of a `sweep` as a grid of words: the first seed's perplexity, or how it ended; "" where there is none."""
    runs = runs.sort_values("seed").drop_duplicates([rows, columns] if isinstance(rows, str) else [*rows, columns])
    perplexity = runs["perplexity"]
    result = perplexity.map(f"{{:.{decimals}f}}".format).where(perplexity.notna(), runs["status"])
    grid = runs.assign(result=result).pivot(index=rows, columns=columns, values="result").fillna("")
    return grid.loc[sorted(grid.index, key=_order)] if rows == "variant" else grid


def markdown(experiment: str, runs: str | Path = "data/runs") -> str:
    """A table with its heading and the command that makes its runs, as Markdown; tokens and minutes are a run's."""
    figures = reproduction(experiment, runs)
    table = readable(figures)
    table["tokens"] = [f"{n / 1e6:.3g}M" if n > 0 else "" for n in figures["tokens"]]
    table["minutes"] = [f"{n:.1f}" if n > 0 else "" for n in figures["minutes"]]
    lines = [
        ["", *table.columns],
        ["---", *["---:"] * len(table.columns)],
        *([row, *map(str, v)] for row, *v in table.itertuples()),
    ]
    rows = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    heading = f"Table {experiment.removeprefix('table')}: {EXPERIMENTS[experiment].description}"
    return f"**{heading}**\n\n{rows}\n\n`python notebooks/paper experiments {experiment}`\n"


def _rows_on_record(experiment: str, runs: str | Path) -> dict[str, list[RunRecord]]:
    found = {row: on_record(planned, runs) for row, planned in table_runs(experiment).items()}
    if not any(found.values()):
        command = f"python notebooks/paper experiments {experiment}"
        raise ValueError(f"no run of {experiment} is on record in {runs}; to make them: {command}")
    return {row: records for row, records in found.items() if records}


def _experiment(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}; choose from {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def _row(run: Run) -> str:
    return f"{run.variant}, {run.norm_placement}" if run.norm_placement else run.variant


def _order(row: str) -> tuple[int, int]:
    variant, _, place = row.partition(", ")
    return list(VARIANTS).index(variant), NORM_PLACEMENTS.index(place) if place else -1


def _recipe(run: Run) -> Recipe:
    return get_recipe(run.recipe, **run.changes)


def _settings(run: Run) -> tuple:
    return run.size, run.corpus, run.max_tokens, _recipe(run)


def _budget(run: Run) -> tuple:
    """What a run must share with a baseline for their perplexities to compare."""
    recipe = _recipe(run)
    length = recipe.steps, recipe.sequences_per_step, recipe.context_length
    schedule = recipe.warmup_ratio, recipe.warmup_from_zero, recipe.data_seed
    return run.size, run.corpus, run.max_tokens, *length, *schedule


def _baselines(runs: str | Path) -> dict[tuple, list[RunRecord]]:
    """The SM+LN+G runs on record by budget: those that started as the tables' others did, not scaled as GPT-2's does.

    Where there are none, those that did start as GPT-2 does; `initialization` holds them against each other.
    """
    found: dict[tuple, dict[bool, list[RunRecord]]] = {}
    for run in {run.record: run for experiment in EXPERIMENTS.values() for run in experiment.runs}.values():
        if run.variant == BASELINE and (records := on_record([run], runs)):
            found.setdefault(_budget(run), {}).setdefault(_recipe(run).scaled_residual_init, []).extend(records)
    return {budget: by_start.get(False) or by_start[True] for budget, by_start in found.items()}


def _differ(runs: Iterable[Run], field: str) -> bool:
    return len({getattr(_recipe(run), field) for run in runs}) > 1


def on_record(planned: Iterable[Run], runs: str | Path) -> list[RunRecord]:
    """The records of these runs below the folder `runs`; ValueError if one of them is of another run."""
    if not Path(runs).is_dir():
        raise ValueError(f"no folder of run records at {runs}")
    return recorded([run for p in planned if (run := replace(p, folder=Path(runs) / p.folder)).finished()])


def _heads(records: list[RunRecord]) -> dict[str, float]:
    """Heads in each state, mean over runs, and their number."""
    states = [diagnose(record.entropy, record.context_length) for record in records]
    return {state: float(np.mean([heads[state].sum() for heads in states])) for state in STATES} | {
        "heads": float(np.size(records[0].entropy))
    }


def _renamed(record: RunRecord, name: str) -> RunRecord:
    named = copy.copy(record)
    named.variant = name
    return named


def _outcome(record: RunRecord, baseline: list[RunRecord]) -> dict:
    # under another name, so that a baseline too is compared with the mean over all seeds
    result = compare([_renamed(record, "this run"), *baseline], BASELINE).loc["this run"]
    return {
        "status": record.status,
        "tokens": record.tokens,
        "perplexity": result["perplexity"],
        "gap": result["gap"],
        "entropy": head_entropies(record.entropy).nanmean().item(),
        **_heads([record]),
        "top_band": entropy_bands(record.entropy)[3].item(),
        "minutes": record.minutes,
    }


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _percent(gap: float) -> str:
    return "–" if not math.isfinite(gap) or gap == 0 else f"{gap:+.1%}".replace("-", "−")


def _counts(values: pd.Series) -> str:
    return " / ".join(f"{values[state]:.0f}" for state in STATES)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python notebooks/paper tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; all of them if none")
    parser.add_argument("--runs", type=Path, default=Path("data/runs"), help="folder of run records")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(markdown(table, options.runs) for table in options.tables or TABLES), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
