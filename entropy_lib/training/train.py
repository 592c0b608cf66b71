"""From a variant's name, or a converted model, to a run record. Interruptible, resumable, one process or many."""

from __future__ import annotations

import copy
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, get_int_from_env
from datasets import DatasetDict
from tqdm.std import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from entropy_lib.input_dependence import input_dependence
from entropy_lib.logit_range import logit_range
from entropy_lib.modeling import build_model
from entropy_lib.training.abilities import PATTERNS, SEQUENCES, associative_recall, loss_by_position, patterns, recall
from entropy_lib.training.cache import cache_folder
from entropy_lib.training.corpus import load_corpus
from entropy_lib.training.global_state import OwnDraws, one_training_at_a_time
from entropy_lib.training.identity import corpus_identity, digest, plain, run_identity, weights_hash
from entropy_lib.training.recipe import RECIPES, Recipe, get_recipe, training_arguments
from entropy_lib.training.records import RunRecord
from entropy_lib.training.run_folder import MarkWhole, RunFolder, place_of_record, remove
from entropy_lib.training.speed import model_flops_per_token, steady_tokens_per_second
from entropy_lib.training.trainer import EntropyTrainer, TokenBlocks, collate_blocks
from entropy_lib.variants import Variant, get_variant

__all__ = ["RECIPES", "EntropyTrainer", "Recipe", "collate_blocks", "fine_tune", "get_recipe", "train_variant"]

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
    overwrite: bool = False,
    stop: threading.Event | None = None,
) -> RunRecord:
    """Train one variant and return its record; the trained model is `record.model`.

    Args:
        variant: a name in `VARIANTS` or a `Variant`.
        corpus: what `load_corpus` takes, or what it returned: (DatasetDict, tokenizer).
        recipe: "smoke", "small", "paper" or a `Recipe`.
        size: a preset of `build_model`; the vocabulary and the positions come from the corpus and the recipe.
        seed: of the initialisation, and of the order of the data unless the recipe has a `data_seed`.
        output_dir: where the record goes, `<variant>-seed<k>.json` and `.parquet`; None writes none.
        run_dir: where checkpoints go; by default a folder in the user's cache that belongs to exactly this run.
        progress: a progress bar on a terminal, five lines elsewhere.
        callbacks: transformers' `TrainerCallback`s. One with a method `on_record(row)` is given every row of the
            history as it is recorded, e.g. to draw live curves.
        model_config: fields of `EntropyGPT2Config` to set, e.g. {"norm_placement": "QK+FFN"}.
        training_overrides: fields of transformers' `TrainingArguments` to set, e.g. {"use_cpu": True}.
        overwrite: whether a record of another run with the same name in `output_dir` may be replaced.
        stop: set from another thread, interrupts the run as Ctrl-C does.

    A run that was interrupted (Ctrl-C, the notebook's stop button, `stop`) leaves a checkpoint in `run_dir` and raises
    KeyboardInterrupt; the same call takes it up there and gives the same losses as without the interruption. After a
    kill it goes on from the last whole checkpoint. A finished run removes its checkpoints, and nothing else.
    Global random states and settings are left as they were; a training in another thread of the process is waited for.

    Before the first step ValueError is raised for what could not be put on record at the end, for a `run_dir` that
    holds another run's checkpoint or that another process is at work in, and for an `output_dir` that cannot be
    written to or whose record of the same name is of another run.
    """
    variant, recipe = get_variant(variant), get_recipe(recipe)
    if recipe.distillation:
        raise ValueError(f"train_variant has no teacher for distillation={recipe.distillation}: see fine_tune")
    seed, corpus = _whole_seed(seed), _load(corpus, recipe.context_length)
    tokenizer = corpus[1]
    config = {
        "vocab_size": len(tokenizer),
        "n_positions": recipe.context_length,
        "temperature_init": recipe.temperature_init,
        "threshold_init": recipe.threshold_init,
        "initializer_range": recipe.initializer_range,
        "scaled_residual_init": recipe.scaled_residual_init,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **(model_config or {}),
    }
    return _run(
        lambda: build_model(variant, size, **config), corpus, recipe, variant=variant, size=size, seed=seed,
        vocab_size=config["vocab_size"], model_config=model_config, training_overrides=training_overrides,
        output_dir=output_dir, run_dir=run_dir, progress=progress, callbacks=callbacks, overwrite=overwrite, stop=stop,
    )  # fmt: skip


@one_training_at_a_time()
def fine_tune(
    model: PreTrainedModel,
    corpus: str | Path | Corpus,
    recipe: str | Recipe,
    *,
    name: str,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    training_overrides: dict | None = None,
    overwrite: bool = False,
    stop: threading.Event | None = None,
) -> RunRecord:
    """Train a copy of a converted model further and return its record; the trained copy is `record.model`.

    Args:
        model: what `convert_for_private_inference` returned, or another `EntropyGPT2LMHeadModel`. It stays as it is.
        corpus: as for `train_variant`, in the model's own tokens: `load_corpus(..., tokenizer=...)`.
        recipe: as for `train_variant`. `distillation` weighs the teacher, `loss_coeff` the entropy penalty if the
            model has thresholds, `anneal_start` to `anneal_end` is when its norms become constants.
        name: of the record, in place of a variant's.
        teacher: the model to learn from, the original in general; needed if `recipe.distillation` is above 0. A copy of
            it is used: it stays as it is.

    The rest, interruption and resumption are as for `train_variant`; the same call means the same weights. The loss on
    record is the cross-entropy. A run whose loss rises by more than a nat over its start says so while it runs. Raises
    ValueError for a model of another kind, and for a corpus of tokens that the model does not know.
    """
    recipe, config = get_recipe(recipe), model.config
    if not hasattr(config, "entropy_heads"):
        raise ValueError(
            f"fine_tune trains what convert_for_private_inference returns, got {type(model).__name__}: "
            "convert it first, or use EntropyRegularizedTrainer"
        )
    if (teacher is None) != (recipe.distillation == 0):
        raise ValueError(f"a teacher and recipe.distillation above 0 go together, got {recipe.distillation}")
    seed, corpus = _whole_seed(seed), _load(corpus, recipe.context_length)
    if len(corpus[1]) > config.vocab_size:
        raise ValueError(f"the corpus has {len(corpus[1])} tokens, the model knows {config.vocab_size}")
    known = {
        "model_type": config.model_type, "entropy_heads": config.entropy_heads(),
        "annealed_layer_norm": config.annealed_layer_norm, "activation": getattr(config, "hidden_act", None)
        or config.activation_function, "weights_sha256": weights_hash(model),
        "teacher_sha256": teacher and weights_hash(teacher),
    }  # fmt: skip
    size = f"{model.num_parameters() / 1e6:.3g}M"
    return _run(
        lambda: copy.deepcopy(model), corpus, recipe, variant=Variant(name), size=size, seed=seed,
        vocab_size=config.vocab_size, model_config=known, training_overrides=training_overrides,
        output_dir=output_dir, run_dir=run_dir, progress=progress, callbacks=[*callbacks, _Rising()],
        overwrite=overwrite, stop=stop, teacher=copy.deepcopy(teacher),
    )  # fmt: skip


def _run(
    make: Callable[[], PreTrainedModel], corpus: Corpus, recipe: Recipe, *, variant: Variant, size: str, seed: int,
    vocab_size: int, model_config: dict | None, training_overrides: dict | None, output_dir: str | Path | None,
    run_dir: str | Path | None, progress: bool, callbacks: Sequence[TrainerCallback], overwrite: bool,
    stop: threading.Event | None, teacher: PreTrainedModel | None = None,
) -> RunRecord:  # fmt: skip
    """What `train_variant` and `fine_tune` share: identity, the run's folder, training, the record."""
    dataset = corpus[0]
    if len(dataset["train"]) < recipe.sequences_per_step:
        raise ValueError(
            f"the corpus has {len(dataset['train'])} training blocks of {recipe.context_length} tokens, a step takes "
            f"sequences_per_step={recipe.sequences_per_step}: wanted more text, or a recipe with fewer "
            "sequences_per_step (and a micro_batch that divides it) or a shorter context_length"
        )
    text = corpus_identity(dataset, vocab_size)
    identity = run_identity(
        variant,
        size=size,
        seed=seed,
        corpus=text,
        recipe=recipe,
        model_config=model_config,
        training_overrides=training_overrides,
    )
    if "output_dir" in (training_overrides or {}):
        raise ValueError("training_overrides cannot set output_dir: give run_dir, where checkpoints go")
    own = run_dir is None
    run_dir = cache_folder() / "runs" / digest(identity)[:16] if own else Path(run_dir)
    folder = RunFolder(run_dir, identity, own)
    known = {
        "variant": variant.name,
        "size": size,
        "corpus": text["name"],
        "seed": seed,
        "corpus_sha256": text["sha256"],
        "context_length": recipe.context_length,
        "vocab_size": vocab_size,
        "recipe": asdict(recipe),
        "model_config": model_config or {},
        "max_tokens": text["max_tokens"],
        "variant_config": plain("variant", asdict(variant)),
        "training_overrides": training_overrides or {},
        "command": _command(variant.name, size, seed),
        "versions": _versions(),
    }
    with ExitStack() as held:

        def claim() -> Path | None:
            if output_dir is not None:
                held.enter_context(place_of_record(Path(output_dir), f"{variant.name}-seed{seed}", identity, overwrite))
            return held.enter_context(folder).last_checkpoint()

        # Setting up the arguments takes accelerate's state away from a training in another thread, so not before the
        # claim; but who is the main process is known only then.
        processes = get_int_from_env(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1)
        checkpoint = claim() if processes == 1 else None
        # every checkpoint is kept until the one after it is whole, see MarkWhole
        settings = {"save_total_limit": None, **(training_overrides or {})}
        arguments = training_arguments(recipe, run_dir, seed, **settings)
        if processes > 1:
            checkpoint = _on_main_process(arguments, claim)
        bar = _Progress(variant.name, enabled=progress)
        watching, stop = [*callbacks, bar], stop or threading.Event()
        record = _train(make, recipe, dataset, arguments, folder, checkpoint, watching, known, stop, teacher)
        if arguments.should_save:
            if output_dir is not None:
                record.save(output_dir)
            for whole in folder.checkpoints():
                remove(whole)
    return record


def _train(
    make: Callable[[], PreTrainedModel],
    recipe: Recipe,
    dataset: DatasetDict,
    arguments: TrainingArguments,
    folder: RunFolder,
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
    known: dict,
    stop: threading.Event,
    teacher: PreTrainedModel | None,
) -> RunRecord:
    """The training itself; `known` are the fields of the record that are known before."""
    # What is shared out over GPUs is large: a CPU takes a minute to draw a billion weights.
    with OwnDraws(known["seed"]), arguments.device if arguments.fsdp else nullcontext():
        model = make()
    blocks = dataset["validation"]
    trainer = EntropyTrainer(
        model=model,
        args=arguments,
        train_dataset=TokenBlocks(dataset["train"]),
        eval_dataset=TokenBlocks(blocks.select(range(min(recipe.eval_blocks, len(blocks))))),
        regularization=recipe.regularization(),
        penalty_span=(recipe.penalty_from, recipe.penalty_until) if recipe.penalty_from else None,
        entropy_every=recipe.entropy_every,
        max_skipped_in_a_row=recipe.max_skipped_in_a_row,
        warmup_from_zero=recipe.warmup_from_zero,
        muon=recipe.optimizer == "muon",
        layer_norm_blend=recipe.layer_norm_blend,
        norm_penalty_coeff=recipe.norm_penalty_coeff,
        teacher=teacher,
        distillation=recipe.distillation,
        callbacks=list(callbacks),
    )
    trainer.add_callback(MarkWhole(folder, trainer.accelerator))
    started = time.monotonic()
    with _stop_on_interrupt(trainer, stop):
        if not stop.is_set():  # as it may be after another training was waited for
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if stop.is_set() and trainer.state.global_step < recipe.steps:
        raise KeyboardInterrupt(
            f"{known['variant']}: stopped after step {trainer.state.global_step} of {recipe.steps}; "
            "run the same call again to go on from there"
        )
    seconds = trainer.history[-1]["seconds"] if trainer.history else time.monotonic() - started
    if trainer.eval_step != trainer.state.global_step:
        trainer.evaluate()
    eval_loss, entropy = trainer.eval_loss, trainer.eval_entropy
    if not torch.isfinite(entropy[trainer.has_entropy]).all():
        entropy = torch.where(trainer.has_entropy, 0.0, math.nan)
        if trainer.history:
            entropy = torch.tensor(trainer.history[-1]["entropy"])
    tokens = trainer.state.global_step * recipe.sequences_per_step * recipe.context_length
    history = trainer.history_frame()
    tokens_per_second = steady_tokens_per_second(history)
    if math.isnan(tokens_per_second):  # too short to tell
        tokens_per_second = tokens / seconds
    status = "collapsed" if trainer.collapsed or not math.isfinite(eval_loss) else "finished"
    return RunRecord(
        **known,
        **(_abilities(model, trainer, recipe) if status == "finished" else {}),
        tokens=tokens,
        eval_loss=eval_loss if math.isfinite(eval_loss) else None,
        eval_perplexity=math.exp(eval_loss) if eval_loss < 700 else None,
        status=status,
        minutes=seconds / 60,
        device=device_name(arguments.device),
        steps=trainer.state.global_step,
        skipped_steps=trainer.skipped,
        parameters=model.num_parameters(),
        tokens_per_second=tokens_per_second,
        tflops=tokens_per_second * model_flops_per_token(model, recipe.context_length) / arguments.world_size / 1e12,
        peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if arguments.device.type == "cuda" else 0.0,
        processes=arguments.world_size,
        entropy=[[None if math.isnan(head) else head for head in layer] for layer in entropy.tolist()],
        history=history,
        model=model.eval(),
    )


def _abilities(model: PreTrainedModel, trainer: EntropyTrainer, recipe: Recipe) -> dict:
    """Fields of the record about the final weights, in the precision of training, on the blocks of the evaluation."""
    blocks = torch.from_numpy(trainer.eval_dataset.ids.astype("int64"))
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        length = recipe.context_length
        pairs = [2**power for power in range(length.bit_length()) if 4 * 2**power <= length]
        pairs = [count for count in pairs if count <= model.config.vocab_size]
        few = {"sequences": min(SEQUENCES, recipe.eval_blocks)}
        return {
            "recall": recall(model, length, **few) if length > 3 else None,
            "associative_recall": {str(count): associative_recall(model, count, **few) for count in pairs},
            "patterns": {kind: patterns(model, kind, length, **few) for kind in PATTERNS} if length > 7 else {},
            "loss_by_position": loss_by_position(model, blocks),
            "logit_range": logit_range(model, blocks[:256]),
            "input_dependence": input_dependence(model, blocks[:256]),
        }


def _whole_seed(seed: int) -> int:
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    return int(seed)  # a NumPy integer is none for JSON


def _load(corpus: str | Path | Corpus, context_length: int) -> Corpus:
    if isinstance(corpus, (str, os.PathLike)):
        return load_corpus(corpus, context_length)
    try:
        dataset, tokenizer = corpus
        lengths = [len(dataset["train"]), len(dataset["validation"]), len(tokenizer)]
        _ = tokenizer.bos_token_id, tokenizer.eos_token_id
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"a corpus is a name, a path, or (DatasetDict with train and validation, transformers tokenizer) as "
            f"load_corpus returns it, got {type(corpus).__name__} ({type(error).__name__}: {error})"
        ) from error
    for name, count in zip(("training split", "validation split", "tokenizer"), lengths, strict=True):
        if not count:
            raise ValueError(f"the {name} of the corpus has no rows, wanted at least one block (or token)")
    length = len(dataset["train"][0]["input_ids"])
    if length != context_length:
        raise ValueError(f"the corpus has blocks of {length} tokens, the recipe's context_length is {context_length}")
    return dataset, tokenizer


def _on_main_process(arguments: TrainingArguments, function: Callable[[], Path | None]) -> Path | None:
    """What `function` returns, or the ValueError that it raises, in every process; only the main one calls it."""
    outcome = [None, None]
    if arguments.process_index == 0:
        try:
            outcome[0] = function()
        except ValueError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


@contextmanager
def _stop_on_interrupt(trainer: EntropyTrainer, stop: threading.Event):
    """Turn `stop` and the first Ctrl-C into "finish the step, save a checkpoint, stop"; a second interrupts at once."""
    trainer.add_callback(_SaveAndStop(trainer, stop))
    # signals belong to the main thread, and a handler that is not Python's (None) could not be put back
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return

    def handle(signum, frame):
        signal.signal(signal.SIGINT, previous)
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
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


class _Rising(TrainerCallback):
    """Says while a fine-tuning runs, once, that it makes the model worse."""

    def __init__(self):
        self.start = None

    def on_record(self, row: dict) -> None:
        if self.start is None:
            self.start = row["loss"]
        elif row["loss"] > self.start + 1:
            words = f"the loss has risen from {self.start:.3g} to {row['loss']:.3g} nats a token at step {row['step']}"
            warnings.warn(f"{words}: stop it, and try a lower learning rate or fewer changes", stacklevel=2)
            self.start = math.inf


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
