"""`train_variant`: one call from a variant's name to a run record. Interruptible, resumable, one process or many."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from datasets import DatasetDict
from tqdm.std import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from entropy_lib.modeling import build_model
from entropy_lib.study.cache import cache_folder
from entropy_lib.study.corpus import corpus_hash, load_corpus
from entropy_lib.study.global_state import OwnDraws, one_training_at_a_time
from entropy_lib.study.recipes import RECIPES, Recipe, get_recipe, training_arguments
from entropy_lib.study.runs import RunRecord
from entropy_lib.study.speed import model_flops_per_token, steady_tokens_per_second
from entropy_lib.study.trainer import EntropyTrainer, TokenBlocks, collate_blocks
from entropy_lib.variants import Variant, get_variant

__all__ = ["RECIPES", "EntropyTrainer", "Recipe", "collate_blocks", "get_recipe", "train_variant"]

Corpus = tuple[DatasetDict, PreTrainedTokenizerBase]


@one_training_at_a_time()
def train_variant(
    variant: str | Variant,
    corpus: str | Path | Corpus = "sample",
    recipe: str | Recipe = "smoke",
    *,
    size: str = "tiny",
    seed: int = 0,
    output_dir: str | Path | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    model_config: dict | None = None,
    training_overrides: dict | None = None,
) -> RunRecord:
    """Train one variant and return its record; the trained model is `record.model`.

    Args:
        variant: a name in `VARIANTS` or a `Variant`.
        corpus: what `load_corpus` takes, or what it returned: (DatasetDict, tokenizer).
        recipe: "smoke", "small", "paper" or a `Recipe`.
        size: a preset of `build_model`; the vocabulary and the positions come from the corpus and the recipe.
        seed: of the initialisation and of the order of the data.
        output_dir: where the record goes, `<variant>-seed<k>.json` and `.parquet`; None writes none.
        run_dir: where checkpoints go; by default a folder in the user's cache that belongs to exactly this run.
        progress: a progress bar on a terminal, five lines elsewhere.
        callbacks: transformers' `TrainerCallback`s. One with a method `on_record(row)` is given every row of the
            history as it is recorded, e.g. to draw live curves.
        model_config: fields of `EntropyGPT2Config` to set, e.g. {"norm_placement": "QK+FFN"}.
        training_overrides: fields of transformers' `TrainingArguments` to set, e.g. {"use_cpu": True}.

    A run that was interrupted (Ctrl-C, or the notebook's stop button) leaves a checkpoint in `run_dir` and raises
    KeyboardInterrupt; the same call takes it up there and gives the same losses as without the interruption. A
    finished run removes its checkpoints. Global random states and settings are left as they were, and a training in
    another thread of the process is waited for. ValueError if `run_dir` holds another run's checkpoint.
    """
    variant, recipe = get_variant(variant), get_recipe(recipe)
    dataset, tokenizer = _load(corpus, recipe.context_length)
    if len(dataset["train"]) < recipe.sequences_per_step:
        raise ValueError(
            f"the corpus has {len(dataset['train'])} training blocks of {recipe.context_length} tokens, a step takes "
            f"sequences_per_step={recipe.sequences_per_step}"
        )
    data_hash = corpus_hash(dataset)
    config = {
        "vocab_size": len(tokenizer),
        "n_positions": recipe.context_length,
        "temperature_init": recipe.temperature_init,
        "threshold_init": recipe.threshold_init,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **(model_config or {}),
    }
    identity = {
        "variant": asdict(variant),
        "size": size,
        "seed": seed,
        "corpus_sha256": data_hash,
        "recipe": asdict(recipe),
        "model_config": config,
    }
    run_dir = _claim_run_dir(run_dir, identity)
    with OwnDraws(seed):
        model = build_model(variant, size, **config)
    arguments = training_arguments(recipe, run_dir, seed, **(training_overrides or {}))
    blocks = dataset["validation"]
    trainer = EntropyTrainer(
        model=model,
        args=arguments,
        train_dataset=TokenBlocks(dataset["train"]),
        eval_dataset=TokenBlocks(blocks.select(range(min(recipe.eval_blocks, len(blocks))))),
        regularization=recipe.regularization(),
        entropy_every=recipe.entropy_every,
        max_skipped_in_a_row=recipe.max_skipped_in_a_row,
        callbacks=[*callbacks, _Progress(variant.name, enabled=progress)],
    )
    started = time.monotonic()
    with _stop_on_interrupt(trainer) as interrupted:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(run_dir))
    if interrupted.is_set() and trainer.state.global_step < recipe.steps:
        raise KeyboardInterrupt(
            f"{variant.name}: stopped after step {trainer.state.global_step} of {recipe.steps}; "
            "run the same call again to go on from there"
        )
    seconds = trainer.history[-1]["seconds"] if trainer.history else time.monotonic() - started
    if trainer.eval_step != trainer.state.global_step:
        trainer.evaluate()
    eval_loss, entropy = trainer.eval_loss, trainer.eval_entropy
    if not torch.isfinite(entropy).all():
        entropy = torch.tensor(trainer.history[-1]["entropy"]) if trainer.history else torch.zeros_like(entropy)
    tokens = trainer.state.global_step * recipe.sequences_per_step * recipe.context_length
    history = trainer.history_frame()
    tokens_per_second = steady_tokens_per_second(history)
    if math.isnan(tokens_per_second):  # too short to tell
        tokens_per_second = tokens / seconds
    record = RunRecord(
        variant=variant.name,
        size=size,
        corpus=dataset["train"].info.dataset_name or "unnamed",
        seed=seed,
        tokens=tokens,
        eval_loss=eval_loss if math.isfinite(eval_loss) else None,
        eval_perplexity=math.exp(eval_loss) if eval_loss < 700 else None,
        status="collapsed" if trainer.collapsed or not math.isfinite(eval_loss) else "finished",
        minutes=seconds / 60,
        device=device_name(arguments.device),
        steps=trainer.state.global_step,
        skipped_steps=trainer.skipped,
        parameters=model.num_parameters(),
        tokens_per_second=tokens_per_second,
        tflops=tokens_per_second * model_flops_per_token(model) / arguments.world_size / 1e12,
        peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if arguments.device.type == "cuda" else 0.0,
        corpus_sha256=data_hash,
        context_length=recipe.context_length,
        vocab_size=config["vocab_size"],
        processes=arguments.world_size,
        entropy=entropy.tolist(),
        recipe=asdict(recipe),
        model_config=model_config or {},
        command=_command(variant.name, size, seed),
        versions=_versions(),
        history=history,
        model=model.eval(),
    )
    if arguments.should_save:
        if output_dir is not None:
            record.save(output_dir)
        shutil.rmtree(run_dir, ignore_errors=True)
    return record


def _load(corpus: str | Path | Corpus, context_length: int) -> Corpus:
    if isinstance(corpus, (str, Path)):
        return load_corpus(corpus, context_length)
    dataset, tokenizer = corpus
    length = len(dataset["train"][0]["input_ids"])
    if length != context_length:
        raise ValueError(f"the corpus has blocks of {length} tokens, the recipe's context_length is {context_length}")
    return dataset, tokenizer


def _claim_run_dir(run_dir: str | Path | None, identity: dict) -> Path:
    """The folder of exactly this run; it remembers which run it is."""
    text = json.dumps(identity, sort_keys=True)
    if run_dir is None:
        run_dir = cache_folder() / "runs" / hashlib.sha256(text.encode()).hexdigest()[:16]
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    claim = run_dir / "run.json"
    if claim.exists() and claim.read_text() != text:
        seen = json.loads(claim.read_text())
        differing = [key for key in identity if seen.get(key) != json.loads(text)[key]]
        raise ValueError(
            f"{run_dir} holds the checkpoint of another run (it differs in {', '.join(differing)}): "
            "choose another run_dir, or delete it"
        )
    claim.write_text(text)
    return run_dir


@contextmanager
def _stop_on_interrupt(trainer: EntropyTrainer):
    """Turn the first Ctrl-C into "finish the step, save a checkpoint, stop"; the second one interrupts at once."""
    stop = threading.Event()
    trainer.add_callback(_SaveAndStop(trainer, stop))
    # signals belong to the main thread, and a handler that is not Python's (None) could not be put back
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield stop
        return

    def handle(signum, frame):
        signal.signal(signal.SIGINT, previous)
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


class _SaveAndStop(TrainerCallback):
    def __init__(self, trainer: EntropyTrainer, stop: threading.Event):
        self.trainer, self.stop = trainer, stop

    def on_step_end(self, args, state, control, **kwargs):
        stop = self.stop.is_set()
        if args.world_size > 1:  # processes must stop at the same step; to agree takes a wait, so not at every step
            stop = state.global_step % 10 == 0 and self._any_process(stop, args.device)
        if stop:
            self.stop.set()
            control.should_save = control.should_training_stop = True
        return control

    def _any_process(self, stop: bool, device: torch.device) -> bool:
        return bool(self.trainer.accelerator.reduce(torch.tensor(float(stop), device=device), "sum") > 0)


class _Progress(TrainerCallback):
    """A bar on a terminal; elsewhere (notebooks, logs) a line at every fifth of the run."""

    def __init__(self, name: str, enabled: bool):
        self.name, self.enabled = name, enabled

    def on_train_begin(self, args, state, control, **kwargs):
        self.enabled = self.enabled and state.is_world_process_zero
        self.bar = None
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update()
        elif self.enabled and state.global_step * 5 // state.max_steps > (state.global_step - 1) * 5 // state.max_steps:
            print(f"{self.name}: step {state.global_step} of {state.max_steps}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def _command(variant: str, size: str, seed: int) -> str:
    """The command line, or in a notebook, whose command line says nothing, the call beside the recipe on record."""
    if any("ipykernel" in word for word in sys.orig_argv):
        return f"train_variant({variant!r}, ..., size={size!r}, seed={seed}), in a notebook"
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores" if device.type == "cpu" else device.type


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("entropy_lib", "torch", "transformers", "accelerate", "datasets", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a clone without installation
            found[package] = "source"
    return found
