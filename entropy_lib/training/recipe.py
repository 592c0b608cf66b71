"""Recipes: how long, how fast and with which regularisation a variant is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from entropy_lib.regularization import EntropyRegularization


@dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are the paper's for CodeParrot at T = 128 unless a line says otherwise.

    Attributes:
        steps: optimiser steps.
        sequences_per_step: over all micro-batches and processes.
        micro_batch: sequences in one forward pass of one process; any divisor of sequences_per_step gives the same
            results up to rounding. 512 of GPT-2 small take up to 31 GiB of GPU memory: choose 128 or 64 for less.
        warmup_ratio: share of the steps with a rising learning rate, before its linear decay to 0.
        warmup_from_zero: whether the rising rate starts at 0, as in transformers' schedule, whose first of W warm-up
            steps changes nothing; False starts it at 1/W.
        optimizer: "adamw", or "muon" for the blocks' matrices (see `MuonAdamW`).
        data_seed: of the order of the data; None takes the run's seed, which is the initialisation's.
        entropy_every, eval_every: steps between recorded entropies, and between evaluations (0: at the end only).
        checkpoint_every: steps between checkpoints (0: only when interrupted).
        eval_blocks: validation blocks used, from the start of the split; all of them if there are fewer. Recall and
            patterns are measured on as many sequences, 256 at most.
        loss_coeff, tolerance_margin_factor, reduction, per, ceiling: of `EntropyRegularization`, for variants with
            entropy regularisation. The paper's λ = 1e-5 on the sum over 128 sequences of 128 tokens is 0.164 on the
            mean, which does not depend on the batch.
        penalty_from, penalty_until: two token ids; the penalty counts queries from the first on and before the second,
            and no others, so that thresholds are those of one kind of token. 0, the end of text, in the first: all.
        temperature_init, threshold_init: t and θ at the start.
        initializer_range: std of the weights at the start. GPT-2's 0.02 is for d = 768: without LayerNorm, 24 layers
            of d = 3,328 start so at a loss of thousands of nats, and at 0.02·√(768/d) as those of d = 768.
        scaled_residual_init: see `EntropyGPT2Config`.
        anneal_start, anneal_end: shares of the steps between which annealed LayerNorms (LN(a)) become constant.
        norm_penalty_coeff: factor of their penalty, mean(log²(k·std)), in the loss of training.
        distillation: share of the teacher's KL(teacher ‖ model) in the loss of `fine_tune`, 0 for none; the rest is the
            cross-entropy.
        precision: "float32" (matrix products in TF32 on GPUs that have it) or "bfloat16" (autocast).
        max_skipped_in_a_row: non-finite steps in a row that end a run as collapsed.
    """

    steps: int = 32_000
    context_length: int = 128
    sequences_per_step: int = 512
    micro_batch: int = 512
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.05
    warmup_from_zero: bool = True
    optimizer: str = "adamw"
    data_seed: int | None = None
    weight_decay: float = 0.1
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    entropy_every: int = 50
    eval_every: int = 1000
    checkpoint_every: int = 1000
    eval_blocks: int = 4096
    loss_coeff: float = 1e-5 * 128 * 128
    tolerance_margin_factor: float = 0.20
    reduction: str = "mean"
    per: str = "query"
    ceiling: str = "context"
    penalty_from: int = 0
    penalty_until: int = 0
    temperature_init: float = 1e-2
    threshold_init: float = 0.5
    initializer_range: float = 0.02
    scaled_residual_init: bool = True
    anneal_start: float = 0.3
    anneal_end: float = 0.7
    norm_penalty_coeff: float = 0.1
    distillation: float = 0.0
    precision: str = "float32"
    compile: bool = False
    max_skipped_in_a_row: int = 20

    def __post_init__(self):
        for entry in fields(self):
            value, kind = getattr(self, entry.name), int if entry.default is None else type(entry.default)
            if value is None and entry.default is None:
                continue
            wanted = {int: Integral, float: Real}.get(kind, kind)
            if not isinstance(value, wanted) or (kind is not bool and isinstance(value, bool)):
                raise ValueError(f"{entry.name} must be of type {kind.__name__}, got {value!r}")
            if kind in (int, float) and not 0 <= value < math.inf:
                raise ValueError(f"{entry.name} must be finite and not negative, got {value!r}")
            object.__setattr__(self, entry.name, kind(value))  # a NumPy number is none for the record's JSON
        for name in ("steps", "context_length", "sequences_per_step", "micro_batch", "entropy_every", "eval_blocks",
                     "max_skipped_in_a_row"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature_init:
            raise ValueError("temperature_init must be above 0, got 0.0: the model divides by it")
        if not self.initializer_range:
            raise ValueError("initializer_range must be above 0, got 0.0: weights of 0 learn nothing")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if self.distillation > 1:
            raise ValueError(f"distillation must be in [0, 1], got {self.distillation}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', got {self.optimizer!r}")
        if not self.anneal_start < self.anneal_end <= 1:
            raise ValueError(
                f"anneal_start must be below anneal_end, and that at most 1, got {self.anneal_start} and "
                f"{self.anneal_end}: LayerNorm would not be constant in the end"
            )
        if self.penalty_from and (self.ceiling, self.per) != ("context", "query"):
            raise ValueError(f"penalty_from needs ceiling='context' and per='query', got {self.ceiling!r} and "
                             f"{self.per!r}")  # fmt: skip
        self.regularization()  # its own checks, before a model is built

    def regularization(self) -> EntropyRegularization:
        return EntropyRegularization(
            self.loss_coeff,
            self.tolerance_margin_factor,
            self.context_length,
            reduction=self.reduction,
            per=self.per,
            ceiling=self.ceiling,
        )

    def layer_norm_blend(self, step: int) -> float:
        """How much of an annealed LayerNorm is constant after `step` steps, from 0 to 1."""
        share = (step / self.steps - self.anneal_start) / (self.anneal_end - self.anneal_start)
        return min(1.0, max(0.0, share))

    def accumulation_steps(self, processes: int) -> int:
        """Micro-batches a step in each process."""
        steps, rest = divmod(self.sequences_per_step, self.micro_batch * processes)
        if rest or steps == 0:
            raise ValueError(
                f"sequences_per_step ({self.sequences_per_step}) must be a multiple of micro_batch "
                f"({self.micro_batch}) times the number of processes ({processes})"
            )
        return steps


RECIPES: dict[str, Recipe] = {
    # under a minute on a CPU; at this learning rate, right for d = 64, the loss falls below the unigram entropy
    "smoke": Recipe(
        steps=200, sequences_per_step=16, micro_batch=16, learning_rate=4e-3, warmup_ratio=0.3, entropy_every=10,
        eval_every=100, checkpoint_every=0, eval_blocks=128,
    ),
    # minutes on a GPU, about 33M tokens
    "small": Recipe(
        steps=1000, sequences_per_step=256, micro_batch=256, warmup_ratio=0.3, entropy_every=20, eval_every=200,
        eval_blocks=1024, precision="bfloat16",
    ),
    "paper": Recipe(precision="bfloat16", compile=True),
}  # fmt: skip


def get_recipe(recipe: str | Recipe, **changes) -> Recipe:
    """A preset ("smoke", "small", "paper") or a `Recipe`, with fields changed."""
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; choose from {', '.join(RECIPES)} or pass a Recipe")
        recipe = RECIPES[recipe]
    return replace(recipe, **changes)


def training_arguments(recipe: Recipe, output_dir: str | Path, seed: int, **overrides) -> TrainingArguments:
    """The Trainer's arguments for a recipe. `overrides` are any of `TrainingArguments`' own."""
    settings = {
        "output_dir": str(output_dir),
        "seed": seed,
        "data_seed": seed if recipe.data_seed is None else recipe.data_seed,
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.micro_batch,
        "per_device_eval_batch_size": recipe.micro_batch,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(recipe.warmup_ratio * recipe.steps),
        "weight_decay": recipe.weight_decay,
        "adam_epsilon": recipe.adam_epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": "adamw_torch_fused",  # skips non-finite steps on the device, see EntropyTrainer
        "tf32": True if is_torch_tf32_available() else None,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": recipe.precision == "bfloat16",
        "torch_compile": recipe.compile,
        "eval_strategy": "steps" if recipe.eval_every else "no",
        "eval_steps": recipe.eval_every or None,
        "save_strategy": "steps" if recipe.checkpoint_every else "no",
        "save_steps": recipe.checkpoint_every or 500,
        "save_total_limit": 1,
        "prediction_loss_only": True,
        "dataloader_drop_last": True,  # in training; evaluation drops nothing, see EntropyTrainer
        "dataloader_pin_memory": torch.cuda.is_available(),
        # the copy of the next batch to the GPU does not wait for the step that runs there
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},
        "remove_unused_columns": False,
        # thresholds get their gradient outside the model's forward pass, where this search would not see them
        "ddp_find_unused_parameters": False,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # the history keeps its own losses, non-finite ones included
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**settings, **overrides})
    # one GPU a process: with several in sight the Trainer would take nn.DataParallel, which has no entropies
    arguments._n_gpu = min(arguments.n_gpu, 1)
    arguments.gradient_accumulation_steps = recipe.accumulation_steps(arguments.world_size)
    return arguments
