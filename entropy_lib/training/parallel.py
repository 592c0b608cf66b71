"""Several training runs side by side, each a process of its own: one a GPU, as many as asked for on a CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO

import torch

from entropy_lib.training.corpus import CORPORA, load_corpus
from entropy_lib.training.identity import corpus_identity, differences, known_corpus, record_identity, run_identity
from entropy_lib.training.recipe import get_recipe
from entropy_lib.training.records import RunRecord, read_summary
from entropy_lib.variants import get_variant


@dataclass(frozen=True)
class Run:
    """One training run, as `python -m entropy_lib.training` takes it.

    `changes` are fields of the recipe `recipe` that are set, `folder` is where the record goes.
    """

    variant: str
    folder: Path
    seed: int = 0
    recipe: str = "paper"
    changes: dict = field(default_factory=dict)
    size: str = "gpt2"
    corpus: str = "pypi-medium"
    max_tokens: int | None = None
    norm_placement: str | None = None

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"

    @property
    def record(self) -> Path:
        return Path(self.folder) / f"{self.name}.json"

    def command(self) -> list[str]:
        """The command line of this run alone, without the interpreter."""
        options = {"variant": self.variant, "seed": self.seed, "size": self.size, "corpus": self.corpus}
        options |= {"recipe": self.recipe, **self.changes, "max_tokens": self.max_tokens}
        options |= {"norm_placement": self.norm_placement, "output": self.folder}
        words = ["-m", "entropy_lib.training"]
        for name, value in options.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            elif value is not None:
                words += [f"--{option}", str(value)]
        return words

    def identity(self) -> dict:
        """What determines its result, as far as can be said without training: a path's corpus by its content."""
        if self.corpus in CORPORA:
            corpus = known_corpus(self.corpus, self.max_tokens)
        else:
            dataset, tokenizer = load_corpus(self.corpus, _length(self), max_tokens=self.max_tokens)
            known = corpus_identity(dataset, len(tokenizer))
            corpus = {name: known[name] for name in ("sha256", "vocab_size")}
        return run_identity(
            get_variant(self.variant),
            size=self.size,
            seed=self.seed,
            corpus=corpus,
            recipe=get_recipe(self.recipe, **self.changes),
            model_config={"norm_placement": self.norm_placement},
        )

    def finished(self) -> bool:
        """Whether its record is there. ValueError if what is there is torn, or the record of another run."""
        if not self.record.exists():
            return False
        if differing := differences(self.identity(), record_identity(read_summary(self.record))):
            raise ValueError(f"{self.record} is of another run ({differing}): choose another folder, or move it away")
        return True


def visible_gpus() -> list[str]:
    """CUDA_VISIBLE_DEVICES of one process a GPU; none on a machine without."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [gpu for gpu in chosen.split(",") if gpu and torch.cuda.is_available()]


def run_all(runs: Sequence[Run], workers: int = 0, *, again: bool = False) -> list[Run]:
    """Run what has no record yet, `workers` processes at a time, and return the runs that failed.

    Args:
        runs: in this order; those whose record is there are left out.
        workers: processes at a time, spread over the visible GPUs; 0 for one a GPU.
        again: also what has a record; that of another run too is replaced, with a line that says so.

    Each process writes to `<folder>/<variant>-seed<k>.log`, beside earlier logs; a failing one stops no other. Ctrl-C
    (and SIGTERM) is passed on, so that every process saves a checkpoint, waited for, and raised again as
    KeyboardInterrupt; the same call then goes on from there. A second one ends the processes at once.

    Raises ValueError without GPU and `workers`, if a record is of another run, and for a folder that cannot be made;
    what `load_corpus` raises.
    """
    waiting = deque(run for run in runs if not _stays(run, again))
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are on record already", flush=True)
    gpus = visible_gpus()
    workers = workers or len(gpus)
    if workers < 1:
        raise ValueError("no GPU is visible: say how many processes run at a time, e.g. --parallel 2")
    for folder in dict.fromkeys(Path(run.folder) for run in waiting):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot be made ({error}): choose another folder for the records") from error
    for corpus, length, limit in dict.fromkeys((run.corpus, _length(run), run.max_tokens) for run in waiting):
        load_corpus(corpus, length, max_tokens=limit)  # build the cache once, not in every process
    places = [gpus[i % len(gpus)] if gpus else None for i in range(workers)]
    # Left alone, every process starts a thread a core, and their waiting threads take the cores from each other: four
    # runs on 64 cores and four H200s went at 0.5M tokens/s each, with four threads a process at 0.84M.
    cores = max(1, (os.cpu_count() or 1) // workers)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(min(4, cores) if gpus else cores)}
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _work(waiting, places, threads, again)
    finally:
        signal.signal(signal.SIGTERM, terminate)


def recorded(runs: Sequence[Run]) -> list[RunRecord]:
    """The records that are there, in the order of `runs`."""
    return [RunRecord.load(run.record) for run in runs if run.record.exists()]


def exit_status(failed: Sequence[Run]) -> int:
    """0, or 1 and a last line that names the runs that failed."""
    if failed:
        print(f"error: failed: {', '.join(str(run.record.with_suffix('.log')) for run in failed)}", file=sys.stderr)
    return 1 if failed else 0


def _length(run: Run) -> int:
    return get_recipe(run.recipe, **run.changes).context_length


@dataclass
class _Job:
    run: Run
    gpu: str | None
    process: subprocess.Popen
    log: IO
    started: float


def _stays(run: Run, again: bool) -> bool:
    """Whether a run's record is there and stays."""
    try:
        return run.finished() and not again
    except ValueError as error:
        if not again:
            raise
        print(f"to be replaced: {error}", flush=True)
        return False


def _work(waiting: deque[Run], places: list[str | None], environment: dict[str, str], again: bool) -> list[Run]:
    total, done, failed, jobs = len(waiting), 0, [], []
    try:
        while waiting or jobs:
            while waiting and places:
                jobs.append(_start(waiting.popleft(), places.pop(0), environment, again))
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                places.append(job.gpu)
                done += 1
                if job.process.returncode:
                    failed.append(job.run)
                print(f"[{done}/{total}] {_outcome(job)}", flush=True)
            time.sleep(0.1)
    finally:  # with jobs left only if interrupted
        for _ in range(2):
            try:
                _interrupt(jobs)
                break
            except KeyboardInterrupt:
                continue
    return failed


def _start(run: Run, gpu: str | None, environment: dict[str, str], again: bool) -> _Job:
    folder = Path(run.folder)
    path = folder / f"{run.name}.log"
    if path.exists():  # of an earlier attempt, or of a process that still writes to it
        path.rename(next(kept for k in count(1) if not (kept := folder / f"{run.name}.{k}.log").exists()))
    log = open(path, "x+", errors="replace")  # noqa: SIM115 - closed when the process has ended
    process = subprocess.Popen(
        [sys.executable, *run.command(), *(["--again"] if again else [])],
        env={**os.environ, **environment, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # the terminal's Ctrl-C comes once, from here; a second would lose the checkpoint
    )
    where = "" if gpu is None else f" on GPU {gpu}"
    print(f"{run.folder}: {run.name} starts{where}", flush=True)
    return _Job(run, gpu, process, log, time.monotonic())


def _outcome(job: _Job) -> str:
    job.log.seek(0)
    text = job.log.read()
    job.log.close()
    lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
    if job.process.returncode:
        return f"{job.run.folder}: {job.run.name} FAILED after {_minutes(job)}, {lines[-1]} (see {job.log.name})"
    told = [line for line in lines if line.startswith(f"{job.run.name}: ") and "perplexity" in line]
    return f"{job.run.folder}: {(told or lines)[-1]}; {_minutes(job)} in all"


def _minutes(job: _Job) -> str:
    return f"{(time.monotonic() - job.started) / 60:.1f} min"


def _interrupt(jobs: list[_Job]) -> None:
    for job in jobs:
        if job.process.poll() is None:
            print(f"{job.run.folder}: {job.run.name} is asked to save a checkpoint and stop", flush=True)
            job.process.send_signal(signal.SIGINT)
    for job in jobs:
        job.process.wait()
        job.log.close()
