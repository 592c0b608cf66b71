"""Run records: what a training run was, how it went, and where it ended, in one JSON and one Parquet file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from entropy_lib.entropy import entropy_bands

STATUSES = ("finished", "collapsed")


@dataclass
class RunRecord:
    """One training run: a JSON summary and a Parquet history.

    `status` is "finished" or "collapsed" (non-finite steps in a row ended it, or the validation loss is not finite;
    the last finite entropies are kept). `eval_loss` is the mean cross-entropy on validation blocks in nats a token,
    None if it is not finite; `entropy` the mean over validation of every head's entropy, [L][H] in nats. `history`
    has one row a recorded step: step, tokens, loss, penalty, eval_loss (NaN between evaluations), entropy [L, H] of the
    training batch, thresholds θ [L, H], temperatures t [L, H] (mean over positions), alpha and beta [L], learning_rate,
    grad_norm, skipped (non-finite steps so far), seconds. `minutes` include compilation and evaluation,
    `tokens_per_second` (over all processes) does not, see `steady_tokens_per_second`; `tflops` is what a process
    (a GPU) achieved of it by `training_flops_per_token`, in 10¹² a second, None in records older than the field,
    whose tokens_per_second are tokens over minutes. `peak_memory_gib` is GPU memory, 0 on a CPU.

    `recall`, `associative_recall` by the number of pairs, `patterns` by kind and number of examples before,
    `loss_by_position` [T-1], `logit_range` [L][softmax heads][lowest, highest] and `input_dependence`
    [L][softmax heads] are of the final weights, see `abilities`; None in older records and of collapsed runs.

    `max_tokens` is what the corpus was cut to, `variant_config` the fields of the `Variant`; both, and
    `training_overrides`, are empty in records older than the fields. `history_sha256` is of the Parquet file.

    The history of a record that was loaded is read at its first use.
    """

    variant: str
    size: str
    corpus: str
    seed: int
    tokens: int
    eval_loss: float | None
    eval_perplexity: float | None
    status: str
    minutes: float
    device: str
    steps: int
    skipped_steps: int
    parameters: int
    tokens_per_second: float
    peak_memory_gib: float
    corpus_sha256: str
    context_length: int
    vocab_size: int
    processes: int
    entropy: list[list[float]] = field(repr=False)
    recipe: dict = field(repr=False)
    model_config: dict = field(repr=False)
    command: str = field(repr=False)
    versions: dict[str, str] = field(repr=False)
    history: pd.DataFrame = field(repr=False)
    tflops: float | None = None
    max_tokens: int | None = None
    variant_config: dict = field(default_factory=dict, repr=False)
    training_overrides: dict = field(default_factory=dict, repr=False)
    recall: float | None = None
    associative_recall: dict[str, float] | None = None
    patterns: dict[str, list[float]] | None = field(default=None, repr=False)
    loss_by_position: list[float] | None = field(default=None, repr=False)
    logit_range: list[list[list[float]]] | None = field(default=None, repr=False)
    input_dependence: list[list[float]] | None = field(default=None, repr=False)
    history_sha256: str | None = field(default=None, repr=False)
    model: object = field(default=None, repr=False, compare=False)  # the trained model, not written to disk
    path: Path | None = field(default=None, repr=False, compare=False)  # the JSON file it was read from

    def __post_init__(self):
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {self.status!r}")

    def __getattr__(self, name: str):
        """Only called for what is not set, which is the history of a loaded record."""
        if name != "history" or "_history_path" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.history = read_history(self._history_path)
        return self.history

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether its perplexity is a result: a collapsed run's last weights may give one too, of any size."""
        return self.status == "finished" and self.eval_perplexity is not None

    def entropy_history(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps [N], entropies [N, L, H]) of the recorded training steps."""
        return self.history["step"].to_numpy(), np.array(self.history["entropy"].tolist())

    def summary(self) -> dict:
        """Everything but the history, as plain JSON types."""
        skip = {"history", "model", "path"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}

    def save(self, folder: str | Path) -> Path:
        """Write `<folder>/<variant>-seed<k>.json` and `.parquet`, both or neither; returns the JSON's path.

        A record of the same name is replaced.
        """
        folder = Path(folder)
        path = record_path(folder, self.name)
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path.with_suffix(".parquet"), path) as (history, summary):
            write_history(self.history, history)
            self.history_sha256 = _sha256(history)
            summary.write_text(json.dumps(self.summary(), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a record from the path of its JSON file. ValueError if it is torn, or its history another run's."""
        path = Path(path)
        if path.suffix != ".json" or not path.exists():
            raise ValueError(f"expected the .json file of a run record, got {path}")
        summary, history = read_summary(path), path.with_suffix(".parquet")
        if unknown := set(summary) - ({f.name for f in fields(cls)} - {"history", "model", "path"}):
            raise ValueError(f"{path} has fields of a later version of entropy_lib: {', '.join(sorted(unknown))}")
        if not history.exists():
            raise ValueError(f"{path} has no history beside it, {history.name}: {_WAY_OUT}")
        if (wanted := summary.get("history_sha256")) and _sha256(history) != wanted:
            raise ValueError(f"{history} is torn, or the history of another run than {path.name}: {_WAY_OUT}")
        record = cls(**summary, history=None, path=path)
        record._history_path = history
        del record.history  # see __getattr__
        return record


_WAY_OUT = "restore it, or delete the record's two files and run it again"


def record_path(folder: Path, name: str) -> Path:
    """The JSON file of a record, whose name must be one of a file."""
    if Path(name).name != name:
        raise ValueError(f"a record is a file, and {name!r} is no name of one: give the variant another name")
    return folder / f"{name}.json"


def read_summary(path: Path) -> dict:
    """What the JSON file of a record holds. ValueError if that is not a whole record."""
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is torn or no run record ({error}): {_WAY_OUT}") from error
    required = {f.name for f in fields(RunRecord) if f.default is MISSING and f.default_factory is MISSING}
    if not isinstance(summary, dict) or (missing := required - {"history"} - set(summary)):
        lacks = f"it lacks {', '.join(sorted(missing))}" if isinstance(summary, dict) else "it holds no object"
        raise ValueError(f"{path} is not a run record: {lacks}")
    return summary


@contextmanager
def written_whole(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths to write to; they take the places of `paths`, all or none, once everything is written."""
    mark = secrets.token_hex(4)
    temporary, kept = ([path.with_name(f".{path.name}.{mark}.{end}") for path in paths] for end in ("tmp", "old"))
    replaced = []
    try:
        yield temporary
        for path, old in zip(paths[:-1], kept, strict=False):  # to go back to, should a later one fail
            if path.exists():
                shutil.copy2(path, old)
        for new, path, old in zip(temporary, paths, kept, strict=True):
            os.replace(new, path)
            replaced.append((path, old))
    except BaseException:
        for path, old in replaced:
            if old.exists():
                os.replace(old, path)
            else:
                path.unlink(missing_ok=True)
        raise
    finally:
        for path in (*temporary, *kept):
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_history(history: pd.DataFrame, path: Path) -> None:
    """Parquet; entropies and parameters in float32, which is more than a run reproduces and half the size."""
    columns = {}
    for name, values in history.items():
        nested = next((value for value in values if isinstance(value, list)), None)
        kind = None
        while nested is not None:
            kind = pa.list_(kind or pa.float32())
            nested = nested[0] if isinstance(nested[0], list) else None
        columns[name] = pa.array(values.tolist(), type=kind)
    pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=False)  # numbers seldom repeat


def read_history(path: Path) -> pd.DataFrame:
    """What `write_history` wrote. ValueError that names the file if it is torn."""
    try:
        return pd.DataFrame(pq.read_table(path).to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is torn or no history of a run ({error}): {_WAY_OUT}") from error


def load_runs(folder: str | Path) -> list[RunRecord]:
    """Every record below `folder`, sorted by path."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder of run records at {folder}")
    return [RunRecord.load(path) for path in sorted(folder.rglob("*-seed*.json"))]


def compare(records: Iterable[RunRecord], baseline: str = "SM+LN+G") -> pd.DataFrame:
    """One row a variant: runs, tokens, perplexity mean ± spread over seeds, gap to the baseline, bands, minutes.

    The gap is relative, PPL/PPL_baseline - 1, and NaN without a baseline run. The spread is the sample standard
    deviation over seeds, NaN for one seed. Bands are Figure 2a's, averaged over runs; a collapsed run is counted in
    `collapsed` and has no perplexity, whatever its last finite weights still give. Raises ValueError for records of
    different corpora (by name and by content), sizes or context lengths.
    """
    records = list(records)
    if not records:
        raise ValueError("no run records to compare")
    settings = {(record.corpus, record.corpus_sha256[:8], record.size, record.context_length) for record in records}
    if len(settings) > 1:
        raise ValueError(f"perplexities compare within one corpus, size and context length only, got {settings}")
    rows = [
        {
            "variant": record.variant,
            "tokens": record.tokens,
            "perplexity": record.eval_perplexity if record.finished else math.nan,
            "collapsed": record.status == "collapsed",
            "minutes": record.minutes,
            **{f"band {i + 1}": share for i, share in enumerate(entropy_bands(record.entropy).tolist())},
        }
        for record in records
    ]
    groups = pd.DataFrame(rows).groupby("variant", sort=False)
    table = groups.mean(numeric_only=True)
    table["collapsed"] = groups["collapsed"].sum()
    table.insert(0, "runs", groups.size())
    table.insert(3, "spread", groups["perplexity"].std())
    reference = table["perplexity"].get(baseline, math.nan)
    table.insert(4, "gap", table["perplexity"] / reference - 1)
    return table
