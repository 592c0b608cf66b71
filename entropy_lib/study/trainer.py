"""transformers' Trainer with the entropy penalty, entropies on record, and collapse handled as a result."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback

from entropy_lib.regularization import EntropyRegularization
from entropy_lib.study.runs import read_history, write_history


def collate_blocks(blocks: Sequence[dict]) -> dict[str, Tensor]:
    """Token blocks -> {"input_ids", "labels"}, int64 [B, T] each; the first token is nobody's target (-100)."""
    input_ids = torch.from_numpy(np.stack([np.asarray(block["input_ids"], dtype=np.int64) for block in blocks]))
    labels = input_ids.clone()
    labels[:, 0] = -100
    return {"input_ids": input_ids, "labels": labels}


class EntropyTrainer(Trainer):
    """transformers' Trainer for `EntropyGPT2LMHeadModel`: cross-entropy + λ·penalty, entropies on record.

    The penalty is applied if the model has thresholds (an EReg variant). With reduction="mean" it is the mean over
    all micro-batches and processes of a step, with "sum" the sum, so that splitting a batch changes nothing (with
    per="head" the head means are those of a micro-batch). A step whose gradient is not finite is skipped and
    counted; `max_skipped_in_a_row` of them end training with `collapsed` set.

    `history` is the list of recorded rows (see `RunRecord`); it is saved with every checkpoint and restored on
    resume. `eval_loss`, `eval_step` and `eval_entropy` (mean of every head, [L, H]) are of the last evaluation.
    """

    def __init__(
        self,
        *args,
        regularization: EntropyRegularization | None = None,
        entropy_every: int = 50,
        max_skipped_in_a_row: int = 20,
        **kwargs,
    ):
        kwargs.setdefault("data_collator", collate_blocks)
        super().__init__(*args, **kwargs)
        self.regularization = regularization if self.model.config.entropy_regularization else None
        self.entropy_every = entropy_every
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.collapsed = False
        self.grad_norm = math.nan
        self.skipped = self.skipped_in_a_row = 0
        self.history: list[dict] = []
        self.eval_entropy: Tensor | None = None
        self.eval_loss = math.nan
        self.eval_step = -1
        self._reset_step()
        self.remove_callback(PrinterCallback)  # the history and the progress line say it better
        self.add_callback(_RecordAndSkip(self))

    # -- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        entropies_wanted = not model.training or self.regularization is not None or self._recording()
        loss, outputs = super().compute_loss(
            model,
            {**inputs, "output_entropies": entropies_wanted},
            return_outputs=True,
            num_items_in_batch=num_items_in_batch,
        )
        if not model.training:
            self._add_eval_entropy(outputs.entropies)
            return (loss, outputs) if return_outputs else loss
        # The Trainer's loss is this micro-batch's share of the step's mean, times the number of processes.
        self._cross_entropy = self._cross_entropy + loss.detach() / self.accelerator.num_processes
        if self._recording():
            self._entropies.append(torch.stack([e.detach().mean(dim=(0, 2)) for e in outputs.entropies]))
        if self.regularization is not None:
            penalty = self.regularization(outputs.entropies, self.model.entropy_thresholds())
            # Micro-batches add up, processes are averaged: a mean wants the first undone, a sum the second.
            if self.regularization.reduction == "mean" or self.regularization.per == "head":
                penalty = penalty / self.current_gradient_accumulation_steps
                self._penalty = self._penalty + penalty.detach() / self.accelerator.num_processes
            else:
                self._penalty = self._penalty + penalty.detach()
                penalty = penalty * self.accelerator.num_processes
            loss = loss + penalty
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay for matrices only: not for biases, gains, α, β, thresholds or temperatures."""
        return [n for n, p in model.named_parameters() if p.dim() >= 2 and not n.endswith("log_temperature")]

    def _get_grad_norm(self, model, grad_norm=None):
        """The Trainer hands the norm before clipping through here, just before `on_pre_optimizer_step`."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.grad_norm = float(norm)
        return norm

    # -- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self._eval_entropy_sum, self._eval_sequences = None, 0
        metrics = super().evaluate(*args, **kwargs)
        sequences = self.accelerator.reduce(torch.tensor(self._eval_sequences, device=self.args.device), "sum")
        self.eval_entropy = (self.accelerator.reduce(self._eval_entropy_sum, "sum") / sequences).cpu()
        self.eval_loss, self.eval_step = metrics["eval_loss"], self.state.global_step
        if self.history and self.history[-1]["step"] == self.eval_step:
            self.history[-1]["eval_loss"] = self.eval_loss
        return metrics

    def _add_eval_entropy(self, entropies: Sequence[Tensor]) -> None:
        total = torch.stack([entropy.detach().mean(dim=2).sum(dim=0) for entropy in entropies])
        self._eval_entropy_sum = total if self._eval_entropy_sum is None else self._eval_entropy_sum + total
        self._eval_sequences += entropies[0].shape[0]

    # -- record -------------------------------------------------------------------------------------------------

    def _recording(self) -> bool:
        """Whether the step in progress is to be recorded: the first, every n-th, the last, one after a skipped one."""
        step = self.state.global_step + 1
        due = step % self.entropy_every == 0 or step in (1, self.state.max_steps)
        evaluated = self.args.eval_steps and step % self.args.eval_steps == 0
        return bool(due or evaluated or self.skipped_in_a_row)

    def _reset_step(self) -> None:
        self._cross_entropy = torch.zeros((), device=self.args.device)
        self._penalty = torch.zeros((), device=self.args.device)
        self._entropies: list[Tensor] = []

    def record_step(self, learning_rate: float) -> None:
        """Append the row of the step just taken, if it was to be recorded and its entropies are finite."""
        if self._entropies:
            entropy = self.accelerator.reduce(torch.stack(self._entropies).mean(0), "mean")
            losses = self.accelerator.reduce(torch.stack([self._cross_entropy, self._penalty]), "sum").tolist()
            if torch.isfinite(entropy).all():
                self.history.append(self._row(losses, entropy, learning_rate))
        self._reset_step()

    @torch.no_grad()
    def _row(self, losses: list[float], entropy: Tensor, learning_rate: float) -> dict:
        model, scales = self.model, self.model.ffn_scales()
        thresholds, temperatures = model.entropy_thresholds(), model.temperatures()
        step = self.state.global_step
        sequences = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return {
            "step": step,
            "tokens": step * sequences * self.model.config.n_positions,
            "loss": losses[0],
            "penalty": losses[1],
            "eval_loss": math.nan,
            "entropy": entropy.tolist(),
            "thresholds": None if thresholds is None else thresholds.tolist(),
            "temperatures": None if temperatures is None else temperatures.mean(-1).tolist(),
            "alpha": None if scales is None else scales[0].tolist(),
            "beta": None if scales is None else scales[1].tolist(),
            "learning_rate": learning_rate,
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
            "seconds": time.monotonic() - self._started,
        }

    def history_frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.history)


class _RecordAndSkip(TrainerCallback):
    """Skips steps with a non-finite gradient, ends a collapsed run, and keeps the history with the checkpoints."""

    def __init__(self, trainer: EntropyTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer._started = time.monotonic()
        if state.global_step and not trainer.history:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "history.parquet"
            if path.exists():
                trainer.history = read_history(path).to_dict("records")
                trainer.skipped = trainer.history[-1]["skipped"]
                trainer._started -= trainer.history[-1]["seconds"]

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if math.isfinite(self.trainer.grad_norm):
            self.trainer.skipped_in_a_row = 0
            return
        # Without gradients the optimiser's step leaves weights and moments alone.
        optimizer.zero_grad(set_to_none=True)
        self.trainer.skipped += 1
        self.trainer.skipped_in_a_row += 1

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.trainer.record_step(lr_scheduler.get_last_lr()[0])
        if self.trainer.skipped_in_a_row >= self.trainer.max_skipped_in_a_row:
            self.trainer.collapsed = True
            control.should_training_stop = True
        return control

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.trainer.history:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_history(self.trainer.history_frame(), folder / "history.parquet")
