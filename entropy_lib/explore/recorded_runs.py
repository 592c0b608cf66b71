"""Explorer of recorded runs: two variants side by side at any training step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from entropy_lib.study.runs import RunRecord, load_runs

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"


def recorded(records: RunRecord | Sequence[RunRecord] | None) -> list[RunRecord]:
    """Records as a list; None for those in data/runs."""
    records = load_runs(RUNS) if records is None else [records] if isinstance(records, RunRecord) else list(records)
    if not records:
        raise ValueError(f"no run records to explore{' in ' + str(RUNS) if records is None else ''}")
    return records


def label(record: RunRecord) -> str:
    """A run's name in a list: variant, seed, size, corpus."""
    return f"{record.variant}, seed {record.seed} ({record.size}, {record.corpus})"
