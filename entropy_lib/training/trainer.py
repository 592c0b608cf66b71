"""transformers' Trainer with the entropy penalty, entropies on record, and collapse handled as a result."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as compute
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from entropy_lib.annealed_layer_norm import anneal
from entropy_lib.entropy import head_means, pad_heads
from entropy_lib.regularization import EntropyRegularization
from entropy_lib.training.global_state import RandomStateKept
from entropy_lib.training.muon import MuonAdamW
from entropy_lib.training.records import read_history, write_history, written_whole


class TokenBlocks(torch.utils.data.Dataset):
    """Token blocks in memory, [N, T] in the corpus's own integer type: a batch is one indexing.

    512 of 128 tokens take 1.2 ms of CPU so, and 15 ms row by row through `datasets`: a quarter of a fast GPU's step.
    """

    def __init__(self, dataset: Dataset):
        tables = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=65_536)
        chunks = [chunk for table in tables for chunk in table.column(0).chunks]
        lengths = sorted({int(n) for chunk in chunks for n in np.unique(compute.list_value_length(chunk))})
        if len(lengths) != 1:
            seen = f"from {lengths[0]} to {lengths[-1]} tokens" if lengths else "no rows"
            raise ValueError(f"a split of the corpus has {seen}, wanted at least one block, all of the same length")
        self.ids = np.concatenate([c.flatten().to_numpy(zero_copy_only=False) for c in chunks]).reshape(-1, *lengths)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index]}

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        return self.ids[indices]


def collate_blocks(blocks: Sequence[dict] | np.ndarray) -> dict[str, Tensor]:
    """Token blocks -> {"input_ids", "labels"}, int64 [B, T] each; the first token is nobody's target (-100)."""
    if not isinstance(blocks, np.ndarray):
        blocks = np.stack([np.asarray(block["input_ids"]) for block in blocks])
    input_ids = torch.from_numpy(blocks.astype(np.int64))
    labels = input_ids.clone()
    labels[:, 0] = -100
    return {"input_ids": input_ids, "labels": labels}


def between(ids: Tensor, first: int, last: int) -> Tensor:
    """True from every token `first` on and before the next `last`, [B, T]: the queries whose answers stand between."""
    places = torch.arange(ids.shape[1], device=ids.device)
    opened, closed = (torch.where(ids == token, places, -1).cummax(1).values for token in (first, last))
    return opened > closed


def kl_divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(wanted) ‖ softmax(logits)) in nats, [..., V] -> [...], in float32."""
    wanted = wanted.float().log_softmax(-1)
    return (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1)


def whole(value: Tensor | None) -> Tensor | None:
    """A parameter that FSDP has shared out, whole again. Its gradient becomes the mean over processes, as FSDP's do."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor(grad_placements=[Partial()] * value.device_mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / value.device_mesh.size())
    return full


class EntropyTrainer(RandomStateKept):
    """transformers' Trainer for `EntropyGPT2LMHeadModel` and `modeling_llama`: cross-entropy + λ·penalty, entropies on
    record, and with a `teacher` a share `distillation` of KL(teacher ‖ model) for the cross-entropy.

    The penalty is applied if the model has thresholds (an EReg variant), to real queries only where a batch has an
    `attention_mask`, and with `penalty_span` to those `between` two tokens. With reduction="mean" it is the mean over
    all micro-batches and processes of a step, with "sum" the sum, so that splitting a batch changes nothing (with
    per="head" the head means are those of a micro-batch). A step whose gradient is not finite is skipped and
    counted; `max_skipped_in_a_row` of them end training with `collapsed` set (on a GPU one step later).

    Nothing waits for the GPU in a step that is not recorded, so that it never runs dry while Python prepares the
    next one. With torch.compile there is one graph: models without regularisation are compiled without entropies,
    and where those are wanted (recorded steps, evaluation) the uncompiled model gives them.

    An evaluation is of every sequence of its dataset, once: the loss is the mean over targets and the entropies are
    means over sequences, whatever the micro-batch and the number of processes.

    `history` is the list of recorded rows (see `RunRecord`); it is saved with every checkpoint and restored on
    resume; callbacks with a method `on_record(row)` are given each new one. `eval_loss`, `eval_step` and
    `eval_entropy` (mean of every head, [L, H]) are of the last evaluation.
    """

    def __init__(
        self,
        *args,
        regularization: EntropyRegularization | None = None,
        penalty_span: tuple[int, int] | None = None,
        entropy_every: int = 50,
        max_skipped_in_a_row: int = 20,
        warmup_from_zero: bool = True,
        muon: bool = False,
        layer_norm_blend: Callable[[int], float] | None = None,
        norm_penalty_coeff: float = 0.0,
        teacher: PreTrainedModel | None = None,
        distillation: float = 0.0,
        **kwargs,
    ):
        kwargs.setdefault("data_collator", collate_blocks)
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            self._scalars_as_vectors()
        positions = self.context_length = self.model.config.n_positions
        if isinstance(self.train_dataset, TokenBlocks):
            self.context_length = self.train_dataset.ids.shape[1]
        for blocks in (self.train_dataset, self.eval_dataset):
            if isinstance(blocks, TokenBlocks) and blocks.ids.shape[1] > positions:
                raise ValueError(f"blocks of {blocks.ids.shape[1]} tokens exceed the model's {positions} positions")
        self.regularization = regularization if self.model.config.entropy_regularization else None
        self.penalty_span = penalty_span
        self.entropy_every = entropy_every
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.warmup_from_zero = warmup_from_zero
        self.muon = muon
        anneals = self.model.config.annealed_layer_norm
        self.layer_norm_blend = layer_norm_blend if anneals else None
        self.norm_penalty_coeff = norm_penalty_coeff if anneals else 0.0
        numbers = torch.arange(self.model.config.n_head)  # True for softmax heads, whose entropies are numbers
        self.has_entropy = torch.stack([numbers < heads for heads in self.model.config.entropy_heads()])  # [L, H]
        self.teacher, self.distillation = teacher and teacher.to(self.args.device).eval(), distillation
        self._divergence = kl_divergence
        if teacher is not None and self.args.torch_compile:  # the model itself is the Trainer's to compile
            how = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
            self.teacher = torch.compile(self.teacher, **how)
            self._divergence = torch.compile(kl_divergence, **how)
        self.collapsed = False
        self.grad_norm = math.nan  # of the last step that was read, see `_read_grad_norms`
        self._grad_norms: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.skipped = self.skipped_in_a_row = 0
        self.history: list[dict] = []
        self._eval_sums: list[Tensor] = []
        self.eval_entropy: Tensor | None = None
        self.eval_loss = math.nan
        self.eval_step = -1
        self._reset_step()
        self.remove_callback(PrinterCallback)  # the history and the progress line say it better
        self.add_callback(_RecordAndSkip(self))

    def _scalars_as_vectors(self) -> None:
        """α and β, which FSDP does not share out as they are."""
        for module in self.model.modules():
            for name, value in [*module.named_parameters(recurse=False)]:
                if not value.dim():
                    setattr(module, name, nn.Parameter(value.detach().reshape(1), value.requires_grad))

    # -- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        loss, outputs = super().compute_loss(
            model,
            {**inputs, "output_entropies": self.regularization is not None},
            return_outputs=True,
            num_items_in_batch=num_items_in_batch,
        )
        padding = inputs.get("attention_mask")
        real = None if padding is None else padding.bool()
        # The Trainer's loss is this micro-batch's share of the step's mean, times the number of processes.
        self._cross_entropy = self._cross_entropy + loss.detach() / self.accelerator.num_processes
        if self.teacher is not None:
            distance = self._distance_to_teacher(outputs.logits, inputs) / self.current_gradient_accumulation_steps
            loss = (1 - self.distillation) * loss + self.distillation * distance
        if self._recording():
            entropies = outputs.entropies or self._entropies_without_graph(inputs["input_ids"], padding)
            heads = self.model.config.n_head
            self._entropies.append(torch.stack([pad_heads(head_means(e, real), heads) for e in entropies]))
        if self.regularization is not None:
            counted = real
            if self.penalty_span is not None:
                counted = between(inputs["input_ids"], *self.penalty_span)
                counted = counted if real is None else counted & real
            penalty = self.regularization(outputs.entropies, whole(self.model.entropy_thresholds()), counted)
            # Micro-batches add up, processes are averaged: a mean wants the first undone, a sum the second.
            if self.regularization.reduction == "mean" or self.regularization.per == "head":
                penalty = penalty / self.current_gradient_accumulation_steps
                self._penalty = self._penalty + penalty.detach() / self.accelerator.num_processes
            else:
                self._penalty = self._penalty + penalty.detach()
                penalty = penalty * self.accelerator.num_processes
            loss = loss + penalty
        if self.norm_penalty_coeff:
            loss = loss + self.norm_penalty_coeff * outputs.norm_penalty / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _distance_to_teacher(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """KL(teacher ‖ model) in nats, the mean over the micro-batch's targets."""
        with torch.no_grad():
            given = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
            wanted = self.teacher(**given).logits
        return self._divergence(wanted[:, :-1], logits[:, :-1])[inputs["labels"][:, 1:] != -100].mean()

    @torch.no_grad()
    def _entropies_without_graph(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
        """[B, H, T] a layer, from the model that torch.compile did not see, after the training forward pass.

        In eval mode, so that spectral norms do not take a second power iteration; dropout is 0 in both modes.
        """
        self.model.eval()
        try:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, output_entropies=True, logits_to_keep=1
            ).entropies
        finally:
            self.model.train()

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay for matrices only: not for biases, gains, α, β, thresholds, temperatures or filters."""
        named = model.named_parameters()
        return [n for n, p in named if p.dim() >= 2 and not n.endswith(("log_temperature", "static.filter"))]

    def create_optimizer(self, model=None):
        if self.muon and self.optimizer is None:
            _, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # AdamW's
            decayed = set(self.get_decay_parameter_names(self.model))
            self.optimizer = MuonAdamW(self.model, decayed, weight_decay=self.args.weight_decay, **settings)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The Trainer's linear schedule, or the same one step ahead while it rises (see `Recipe.warmup_from_zero`)."""
        if self.warmup_from_zero:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def share(step: int) -> float:
            return min((step + 1) / max(1, warmup), (num_training_steps - step) / max(1, num_training_steps - warmup))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset=None):
        """The Trainer's random order, cut to whole steps: whatever the micro-batch, no epoch ends in a smaller one."""
        sampler = super()._get_train_sampler(train_dataset)
        whole = len(sampler) // self._sequences_per_step() * self._sequences_per_step()
        if whole and isinstance(sampler, RandomSampler):
            sampler = RandomSampler(sampler.data_source, num_samples=whole)
        return sampler

    def _sequences_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def floating_point_ops(self, inputs) -> int:
        """0: the Trainer's own count walks through all modules at every micro-batch, and nobody reads it."""
        return 0

    # -- non-finite steps ---------------------------------------------------------------------------------------

    def _get_grad_norm(self, model, grad_norm=None):
        """The Trainer hands the norm before clipping through here, just before `on_pre_optimizer_step`."""
        norm = whole(super()._get_grad_norm(model, grad_norm))
        self._skip_if_not_finite(norm)
        if norm.device.type != "cuda":
            self._grad_norms.append((norm, None))
            self._read_grad_norms()
        else:
            # float(norm) would wait for the GPU and leave it idle until Python has launched the next step. So copy it
            # without waiting, and read the copy of the step before, while this one is in the GPU's queue.
            copy = torch.empty((), dtype=norm.dtype, pin_memory=True).copy_(norm, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._grad_norms.append((copy, event))
            self._read_grad_norms(leave=1)
        return norm

    def _skip_if_not_finite(self, norm: Tensor) -> None:
        """Have the optimiser leave weights and moments alone, for the step to come, if `norm` is not finite."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # the one that accelerate wraps
        if optimizer.defaults.get("fused"):
            # what GradScaler does: the fused kernel itself reads this flag, on the device, and then changes nothing
            optimizer.found_inf = (~torch.isfinite(norm)).float()
        elif not torch.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)

    def _read_grad_norms(self, leave: int = 0) -> None:
        """Count the steps whose norm is not read yet, except the last `leave`."""
        while len(self._grad_norms) > leave:
            norm, event = self._grad_norms.popleft()
            if event is not None:
                event.synchronize()
            self.grad_norm = norm.item()
            skipped = not math.isfinite(self.grad_norm)
            self.skipped += skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            self.collapsed = self.collapsed or self.skipped_in_a_row >= self.max_skipped_in_a_row

    # -- evaluation ---------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        with self._keeping_the_last_batch():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        with self._keeping_the_last_batch():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _keeping_the_last_batch(self):
        """`dataloader_drop_last` is about training: what is evaluated must not depend on the micro-batch."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        self.eval_loss, self.eval_entropy = self._evaluated
        self.eval_step = self.state.global_step
        if self.history and self.history[-1]["step"] == self.eval_step:
            self.history[-1]["eval_loss"] = self.eval_loss
        return metrics

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The Trainer's, with the loss of all targets: its own is of batches, and counts what fills up the last one."""
        config = self.model.config
        self._eval_sums = [torch.zeros(3 + config.n_layer * config.n_head, device=self.args.device)]
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = torch.stack(self._eval_sums).cpu().double().sum(dim=0)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        (loss, targets, queries), entropies = sums[:3], sums[3:]
        self._evaluated = (loss / targets).item(), (entropies / queries).float().view(config.n_layer, -1)
        if f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = self._evaluated[0]
        return output

    def _evaluation_loss(self, model, inputs: dict[str, Tensor], return_outputs: bool):
        """The mean loss of a batch of `evaluation_loop`, whose sums are kept: loss, targets, queries, entropies."""
        real = self._real_sequences(len(inputs["labels"]))
        labels = inputs["labels"].clone()
        labels[real:] = -100
        loss, outputs = super().compute_loss(  # `model` is the Trainer's own, which is not compiled
            model, {**inputs, "labels": labels, "output_entropies": True}, return_outputs=True
        )
        targets = (labels[:, 1:] != -100).sum()
        total = torch.where(targets > 0, loss * targets, 0.0)  # a mean over no targets is NaN
        queries = inputs.get("attention_mask", torch.ones_like(labels)).bool().clone()
        queries[real:] = False
        entropies = [
            pad_heads(entropy.masked_fill(~queries[:, None], 0).sum(dim=(0, 2)), self.model.config.n_head)
            for entropy in outputs.entropies
        ]
        self._eval_sums.append(torch.cat([torch.stack([total, targets, queries.sum()]), *entropies]))
        return (loss, outputs) if return_outputs else loss

    def _real_sequences(self, batch: int) -> int:
        """How many sequences of a batch come from the dataset, from its start: under several processes accelerate
        fills the last batches up with sequences from the beginning."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder < 1:
            return batch
        return min(batch, max(0, state.remainder - self.accelerator.process_index * batch))

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
            if torch.isfinite(entropy[self.has_entropy]).all():
                self.history.append(self._row(losses, entropy, learning_rate))
                for callback in self.callback_handler.callbacks:
                    if hasattr(callback, "on_record"):
                        callback.on_record(self.history[-1])
        self._reset_step()

    @torch.no_grad()
    def _row(self, losses: list[float], entropy: Tensor, learning_rate: float) -> dict:
        self._read_grad_norms()
        model, scales = self.model, self.model.ffn_scales()
        thresholds, temperatures = whole(model.entropy_thresholds()), whole(model.temperatures())
        heads = model.config.n_head
        step = self.state.global_step
        return {
            "step": step,
            "tokens": step * self._sequences_per_step() * self.context_length,
            "loss": losses[0],
            "penalty": losses[1],
            "eval_loss": math.nan,
            "entropy": entropy.tolist(),
            "thresholds": None if thresholds is None else pad_heads(thresholds.T, heads).T.tolist(),
            "temperatures": None if temperatures is None else pad_heads(temperatures.mean(-1).T, heads).T.tolist(),
            "alpha": None if scales is None else whole(scales[0]).flatten().tolist(),
            "beta": None if scales is None else whole(scales[1]).flatten().tolist(),
            "learning_rate": learning_rate,
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
            "seconds": time.monotonic() - self._started,
        }

    def history_frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.history)


class _RecordAndSkip(TrainerCallback):
    """Records steps, ends a collapsed run, and keeps the history with the checkpoints."""

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

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        if self.trainer.layer_norm_blend is not None:
            summed = self.trainer.accelerator.reduce if args.world_size > 1 else None  # reduce's default is the sum
            anneal(self.trainer.model, self.trainer.layer_norm_blend(state.global_step), summed)
        self.trainer.record_step(lr_scheduler.get_last_lr()[0])
        if self.trainer.collapsed:
            control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._read_grad_norms()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.trainer.history:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            with written_whole(folder / "history.parquet") as (temporary,):
                write_history(self.trainer.history_frame(), temporary)
