"""The folder that a run has to itself while it trains, the checkpoints in it, and the place of its record."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from entropy_lib.training.identity import differences, digest, record_identity
from entropy_lib.training.records import read_summary, record_path, written_whole

# What the Trainer and our callbacks write into a checkpoint, the marker of a whole one last.
MARKER = "whole.json"
CHECKPOINT_FILES = (
    MARKER, "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "modeling_entropy_*.py",
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "history.parquet",
    ".history.parquet.*.tmp", f".{MARKER}.*.tmp", "trainer_state.json",
)  # fmt: skip


@contextmanager
def held_folder(path: Path, lock: str, busy: str, option: str) -> Iterator[bool]:
    """A folder, made if need be, and a lock in it, which the system lets go when the process ends, however it ends.

    Gives whether the folder was made; if so, and it is empty at the end, it goes. ValueError with the sentence `busy`
    if another process holds the lock, and if the folder cannot be written to.
    """
    made, held = not path.exists(), FileLock(path / lock)
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=0)
        except Timeout:
            raise ValueError(busy) from None
        except OSError as error:
            raise ValueError(f"{option} {path} cannot be written to ({error}): choose another folder") from error
        try:
            yield made
        finally:
            (path / lock).unlink(missing_ok=True)  # before it is let go: who opened it meanwhile sees that it is gone
            held.release()
    finally:
        if made:
            remove_if_empty(path)


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def place_of_record(folder: Path, name: str, identity: dict, overwrite: bool) -> Iterator[None]:
    """Hold a record's place while its run trains. ValueError for what would be lost there, or could not be written."""
    path = record_path(folder, name)
    busy = f"another process trains {name} with its record in {folder}: wait for it, or give another output_dir"
    with held_folder(folder, f".{name}.parquet.lock", busy, "output_dir"):
        for file in (path, path.with_suffix(".parquet")):
            if file.exists() and not file.is_file():
                raise ValueError(f"{file} is no file, and in the place of one: choose another output_dir")
        if path.exists() and not overwrite:
            differing = differences(identity, record_identity(read_summary(path)))
            if differing:
                raise ValueError(f"{path} is of another run ({differing}): choose another output_dir, or move it away")
        yield


class RunFolder:
    """The folder of exactly one run, and of one process at a time: `run.json` says whose, a lock that it is at work.

    As a context manager it claims the folder, and leaves it as it was found unless there are checkpoints in it.
    `own` is for a folder that is named by the identity, in which whatever lies is this run's.

    Raises ValueError if another process is at work there, if the folder holds another run's checkpoints or others'
    files in the place of its own, and if it cannot be written to.
    """

    def __init__(self, path: Path, identity: dict, own: bool = False):
        self.path, self.identity, self.own = path, identity, own
        self.claim = path / "run.json"
        self.made = False
        self._held = ExitStack()

    def __enter__(self) -> RunFolder:
        with ExitStack() as held:
            made = held.enter_context(held_folder(self.path, "run.lock", self._busy(), "run_dir"))
            self.made = self._claim(made)
            self._held = held.pop_all()
        return self

    def __exit__(self, *raised) -> None:
        if not self.checkpoints():
            self.claim.unlink(missing_ok=True)
        self._held.close()
        if self.made:
            remove_if_empty(self.path)

    def checkpoints(self) -> list[Path]:
        """Folders that hold something of a checkpoint, by step."""
        found = [entry for entry in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", entry.name)]
        return sorted((entry for entry in found if any(_files(entry))), key=_step)

    def last_checkpoint(self) -> Path | None:
        """The last whole checkpoint. Later ones that were cut off while they were written are removed, with a line."""
        torn = []
        for checkpoint in reversed(self.checkpoints()):
            if not (fault := _fault(checkpoint)):
                break
            torn.append(f"{checkpoint} ({fault})")
            remove(checkpoint)
        else:
            checkpoint = None
        if torn:
            goes_on = f"goes on from {checkpoint.name}" if checkpoint else "starts from the beginning"
            print(f"not whole: {', '.join(torn)}; training {goes_on}", file=sys.stderr, flush=True)
        return checkpoint

    def _busy(self) -> str:
        try:
            owner = json.loads(self.claim.read_text())["process"]
        except (OSError, ValueError, KeyError, TypeError):
            owner = "another process"
        return f"{self.path} is in use: {owner} trains this run there; wait for it, or give another run_dir"

    def _claim(self, made: bool) -> bool:
        """Write `run.json`; returns whether training made the folder, now or when it was interrupted."""
        way_out = "choose another run_dir, or delete it"
        found = self._read_claim(way_out)
        if found and (differing := differences(self.identity, found["identity"])):
            raise ValueError(f"{self.path} holds the checkpoint of another run ({differing}): {way_out}")
        for checkpoint in self.checkpoints():
            of = (_read_marker(checkpoint) or {}).get("run")
            if of != digest(self.identity) and (of or not (found or self.own)):
                raise ValueError(f"{checkpoint} is of another run, or nothing says of which: {way_out}")
        made = made or self.own or bool(found and found.get("made_folder"))
        claim = {"identity": self.identity, "made_folder": made}
        claim["process"] = f"process {os.getpid()} on {socket.gethostname()}"
        with written_whole(self.claim) as (temporary,):
            temporary.write_text(json.dumps(claim, sort_keys=True) + "\n")
        return made

    def _read_claim(self, way_out: str) -> dict | None:
        """None if there is none, or a torn one, which says nothing."""
        if not self.claim.exists():
            return None
        text = self.claim.read_text(errors="replace").strip("\0 \n")
        try:
            claim = json.loads(text)
        except ValueError:
            if text and not text.startswith("{"):
                raise ValueError(f"{self.claim} is no claim of a training run: {way_out}") from None
            print(f"{self.claim} is torn, and written anew", file=sys.stderr, flush=True)
            return None
        if not isinstance(claim, dict) or not isinstance(claim.get("identity"), dict):
            raise ValueError(f"{self.claim} is of another run, of an earlier entropy_lib, or no claim: {way_out}")
        return claim


class MarkWhole(TrainerCallback):
    """Marks a checkpoint as whole once everything is written, and only then removes those before it."""

    def __init__(self, folder: RunFolder, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator

    def on_save(self, args, state, control, **kwargs):
        self.accelerator.wait_for_everyone()  # every process writes its random state
        if not args.should_save:
            return
        checkpoint = self.folder.path / f"checkpoint-{state.global_step}"
        marker = {"run": digest(self.folder.identity), "files": _sizes(checkpoint)}
        with written_whole(checkpoint / MARKER) as (temporary,):
            temporary.write_text(json.dumps(marker) + "\n")
        if args.save_total_limit is None:
            for other in self.folder.checkpoints():
                if other != checkpoint and str(other) != state.best_model_checkpoint:
                    remove(other)


def remove(checkpoint: Path) -> None:
    """Delete what training wrote into a checkpoint, and its folder if that is all there was."""
    for file in _files(checkpoint):  # the marker first: what is left of it, if this is cut off, is not whole
        file.unlink(missing_ok=True)
    remove_if_empty(checkpoint)


def _files(checkpoint: Path) -> Iterator[Path]:
    return (file for pattern in CHECKPOINT_FILES for file in sorted(checkpoint.glob(pattern)) if file.is_file())


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in _files(checkpoint) if file.name != MARKER}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _read_marker(checkpoint: Path) -> dict | None:
    with suppress(OSError, ValueError):
        marker = json.loads((checkpoint / MARKER).read_text())
        if isinstance(marker, dict) and isinstance(marker.get("files"), dict):
            return marker
    return None


def _fault(checkpoint: Path) -> str:
    """Why a checkpoint is not whole, "" if it is: by its marker, else (an earlier version's) by opening its files."""
    if marker := _read_marker(checkpoint):
        sizes = _sizes(checkpoint)
        wrong = [name for name, size in marker["files"].items() if sizes.get(name) != size]
        return f"{', '.join(wrong)} missing or cut off" if wrong else ""
    for name, check in _CHECKS.items():
        try:
            check(checkpoint / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            return f"{name} cannot be read: {error}"
    return ""


def _check_state(path: Path) -> None:
    if json.loads(path.read_text())["global_step"] != _step(path.parent):
        raise ValueError("of another step")


def _check_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt"):
        pass


def _check_torch(path: Path) -> None:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("cut off")


_CHECKS = {
    "trainer_state.json": _check_state,
    "model.safetensors": _check_safetensors,
    "optimizer.pt": _check_torch,
    "scheduler.pt": _check_torch,
    "history.parquet": pq.read_metadata,
}
