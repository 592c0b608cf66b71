"""A training run in a thread of its own: followed while it goes, stopped, resumed. No widgets here."""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable

from transformers import TrainerCallback
from transformers.utils import logging

from entropy_lib.training.recipe import Recipe
from entropy_lib.training.train import Corpus, train_variant

SECONDS_BETWEEN_LOOKS = 0.1  # oftener than a reader can follow, and telling takes the training a millisecond


class LiveRun:
    """`train_variant` off the main thread.

    Attributes:
        state: "ready", "running", "stopped" (may be resumed), "finished", "collapsed" or "failed".
        step: optimiser steps made.
        rows: the recorded rows so far, as in `RunRecord.history`.
        record: the `RunRecord` of a run that came to its end.
        error: what a failed run raised.
    """

    def __init__(
        self, name: str, variant: str, corpus: Callable[[], Corpus], recipe: Recipe, *, size: str = "tiny",
        seed: int = 0, on_change: Callable[[LiveRun], None] = lambda run: None,
    ):  # fmt: skip
        """`corpus` is called in the thread, since loading may take seconds; `on_change` is called there too."""
        self.name, self.variant, self.recipe, self.size, self.seed = name, variant, recipe, size, seed
        self.state, self.step, self.rows, self.record, self.error = "ready", 0, [], None, None
        self._corpus, self._on_change = corpus, on_change
        self._folder = tempfile.mkdtemp(prefix="entropy-playground-")
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._stop, self._thread, self._looked = threading.Event(), None, -math.inf

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin, or go on from where the run was stopped: the same losses as without the stop."""
        if self.state not in ("ready", "stopped") or self.alive:
            raise ValueError(f"run {self.name!r} is {self.state} and cannot be started")
        self._stop.clear()
        self.state = "running"
        self._thread = threading.Thread(target=self._train, name=f"train {self.name}", daemon=True)
        atexit.register(self.close)  # a thread that runs into the interpreter's end can take it down
        self._thread.start()

    def stop(self) -> None:
        """Ask the run to finish its step, save a checkpoint and stop."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> str:
        """The state once the thread has ended, or after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self.state

    def close(self) -> None:
        """Stop, wait for the thread, delete the checkpoint."""
        self._on_change = lambda run: None
        self.stop()
        if self._thread is not threading.current_thread():
            self.wait(30)
        self._remove()

    def _train(self) -> None:
        follow = _Follow(self)
        try:
            self.record = train_variant(
                self.variant, self._corpus(), self.recipe, size=self.size, seed=self.seed, run_dir=self._folder,
                progress=False, callbacks=[follow], stop=self._stop,
            )  # fmt: skip
            self.state = self.record.status
        except KeyboardInterrupt:
            self.state = "stopped"
        except Exception as error:  # in a thread nobody else would see it
            self.state, self.error = "failed", error
        finally:
            follow.show_bars()
            if not self._remove.alive:  # closed while another training was waited for
                shutil.rmtree(self._folder, ignore_errors=True)
        self._on_change(self)
        atexit.unregister(self.close)

    def _look(self) -> None:
        if time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
            self._on_change(self)
            self._looked = time.monotonic()


class _Follow(TrainerCallback):
    def __init__(self, run: LiveRun):
        self.run, self._bars = run, False

    def on_step_end(self, args, state, control, **kwargs):
        self.run.step = state.global_step
        if self.run._stop.is_set() and logging.is_progress_bar_enabled():
            self._bars = True
            logging.disable_progress_bar()  # the one of saving would land in whatever cell the reader runs just then
        self.run._look()

    def on_record(self, row: dict) -> None:
        self.run.rows.append(row)

    def on_save(self, args, state, control, **kwargs):
        self.show_bars()

    def show_bars(self) -> None:
        if self._bars:
            logging.enable_progress_bar()
        self._bars = False
