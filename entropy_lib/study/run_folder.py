"""Which run a record or a checkpoint is of, and the folder that a run has to itself while it trains."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from entropy_lib.study.corpus import CODEPARROT_TOKENS
from entropy_lib.study.recipes import Recipe
from entropy_lib.study.runs import written_whole
from entropy_lib.variants import VARIANTS, Variant

# What the Trainer and our callbacks write into a checkpoint, the marker of a whole one last.
MARKER = "whole.json"
CHECKPOINT_FILES = (
    MARKER, "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "history.parquet",
    ".history.parquet.*.tmp", f".{MARKER}.*.tmp", "trainer_state.json",
)  # fmt: skip


# -- identity


def run_identity(
    variant: Variant,
    *,
    size: str,
    seed: int,
    corpus: dict,
    recipe: Recipe | dict,
    model_config: dict | None = None,
    training_overrides: dict | None = None,
) -> dict:
    """Everything that determines a run's result, as plain JSON types.

    `corpus` is what is known of it: "sha256" and "vocab_size", or "name" and "max_tokens" of a known one. A field that
    a recipe on record lacks was added since, and has its default. ValueError for what JSON does not hold.
    """
    model_config = dict(model_config or {})
    if placement := model_config.pop("norm_placement", None):
        variant = variant.placed(placement)
    if isinstance(recipe, Recipe):
        recipe = asdict(recipe)
    return {
        "variant": _plain("variant", asdict(variant)),
        "size": size,
        "seed": seed,
        "corpus": corpus,
        "recipe": _plain("recipe", asdict(Recipe()) | recipe),
        "model_config": _plain("model_config", model_config),
        "training_overrides": _plain("training_overrides", training_overrides or {}),
    }


def record_identity(summary: dict) -> dict:
    """The identity of a run on record, from what its JSON file holds."""
    variant = summary.get("variant_config") or asdict(VARIANTS.get(summary["variant"], Variant(summary["variant"])))
    if "max_tokens" in summary:
        max_tokens = summary["max_tokens"]
    else:  # recorded before the field was: the command tells
        given = re.findall(r"--max-t[a-z-]*[= ](\d+)", summary["command"])
        max_tokens = int(given[-1]) if given else None
    return run_identity(
        Variant(**variant),
        size=summary["size"],
        seed=summary["seed"],
        corpus={
            **known_corpus(summary["corpus"], max_tokens),
            "sha256": summary["corpus_sha256"],
            "vocab_size": summary["vocab_size"],
        },
        recipe=summary["recipe"],
        model_config=summary["model_config"],
        training_overrides=summary.get("training_overrides"),
    )


def known_corpus(name: str, max_tokens: int | None) -> dict:
    """The identity of one of `CORPORA`: the same name gives the same tokens anywhere."""
    return {"name": name, "max_tokens": max_tokens or (CODEPARROT_TOKENS if name == "codeparrot" else None)}


def differences(wanted: dict, found: dict) -> str:
    """Where an identity differs from the one that is wanted, in words; "" if nowhere. Of the corpus, what is wanted."""
    found = {**found, "corpus": {key: found["corpus"].get(key) for key in wanted["corpus"]}}
    names, details = [], []
    for name, value in wanted.items():
        if found.get(name) == value:
            continue
        names.append(name)
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            for key in sorted({*value, *found[name]}):
                if value.get(key) != found[name].get(key):
                    details.append(f"{key} {found[name].get(key)!r}, wanted {value.get(key)!r}")
        else:
            details.append(f"{name} {found.get(name)!r}, wanted {value!r}")
    return f"{', '.join(names)} differ: {'; '.join(details)}" if names else ""


def digest(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _plain(name: str, values: dict) -> dict:
    plain = {}
    for key, value in values.items():
        try:
            plain[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name} goes on record, as JSON, which cannot hold {key}={value!r}: {error}") from error
    return plain


# -- the folder


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
