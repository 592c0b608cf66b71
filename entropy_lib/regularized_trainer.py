"""transformers' Trainer with entropy regularisation, for any model that `record_entropy` records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer

from entropy_lib.recording import EntropyRecorder, record_entropy
from entropy_lib.regularization import EntropyRegularization

THRESHOLDS_FILE = "entropy_thresholds.pt"


class EntropyRegularizedTrainer(Trainer):
    """`Trainer` that adds λ·penalty to the training loss and learns one threshold a head along:

        regularization = EntropyRegularization(loss_coeff=0.16, reduction="mean")
        trainer = EntropyRegularizedTrainer(model=model, args=args, train_dataset=data, regularization=regularization)
        trainer.train()

    With a Trainer of another library: `class MyTrainer(EntropyRegularizedTrainer, SFTTrainer): pass`.

    `thresholds` is θ, [layers, heads] float32 in the order in which the model records, None until its first training
    pass has shown how many there are. It is in the optimizer, without weight decay and outside gradient clipping;
    checkpoints and `save_model` keep it as entropy_thresholds.pt beside the model, whose own files and class stay
    as they are, and `resume_from_checkpoint` and `load_best_model_at_end` restore it.

    A step's penalty does not depend on how its sequences are split into micro-batches and processes (DDP): with
    reduction="mean" it is the mean over its real queries, with "sum" the sum. Micro-batches weigh what their
    attention_mask has of tokens, which for an encoder-decoder are the encoder's; with per="head" the head means are
    those of a micro-batch.

    The logs of training have `loss` without the penalty, as `eval_loss` is, with `entropy_penalty` (λ included) and
    `attention_entropy` (nats, mean over real queries, heads and layers) beside it. Evaluation records nothing.

    Args:
        regularization: what the penalty is.
        threshold_init: where θ starts, a number or a tensor that broadcasts to [layers, heads], such as a saved
            entropy_thresholds.pt.

    Raises ValueError for FSDP, DeepSpeed, tensor parallelism and DataParallel; before the first update for what
    `record_entropy` and `EntropyRegularization` refuse: reentrant checkpointing, layers with unequal heads.
    """

    def __init__(self, *args, regularization: EntropyRegularization, threshold_init: float | Tensor = 0.5, **kwargs):
        self.regularization = regularization
        self.threshold_init = threshold_init
        self.thresholds: nn.Parameter | None = None
        self._recorder: EntropyRecorder | None = None  # open during a training step
        self._queries_of_step: Tensor | None = None
        self._of_step = self._of_log = 0.0  # sums of (penalty, entropy)
        self._steps_of_log = 0
        super().__init__(*args, **kwargs)
        sharded = self.is_fsdp_enabled or self.is_fsdp_xla_enabled or self.is_deepspeed_enabled
        if sharded or self.args.n_gpu > 1 or (getattr(self.model, "tp_size", None) or 1) > 1:
            raise ValueError(
                "EntropyRegularizedTrainer works on one device or, under torchrun, with one process a device (DDP), "
                f"not with FSDP, DeepSpeed, tensor parallelism, or {self.args.n_gpu} GPUs in one process"
            )

    # -- thresholds ---------------------------------------------------------------------------------------------

    def call_model_init(self, *args, **kwargs):
        self.thresholds = None  # a new model, as in every trial of a search
        return super().call_model_init(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        group = self._undecayed_group()
        if self.thresholds is not None and all(p is not self.thresholds for p in group["params"]):
            group["params"].append(self.thresholds)
        return optimizer

    def _undecayed_group(self) -> dict:
        """A group that is there already: schedulers have one learning rate for each."""
        groups = [group for group in self.optimizer.param_groups if not group.get("weight_decay")]
        if not groups:
            raise ValueError(
                "the optimizer decays all of its parameter groups: give it one for the thresholds before its "
                'scheduler, optimizer.add_param_group({"params": [], "weight_decay": 0.0})'
            )
        return groups[-1]

    def _set_thresholds(self, values: Tensor) -> None:
        if self.thresholds is not None:
            self.thresholds.data.copy_(values)
        else:
            self.thresholds = nn.Parameter(values.to(self.args.device, torch.float32, copy=True))

    def _start_thresholds(self, layers: int, heads: int) -> None:
        start = torch.as_tensor(self.threshold_init, dtype=torch.float32).detach()
        if start.dim() > 2 or any(n not in (1, to) for n, to in zip(start.shape[::-1], (heads, layers), strict=False)):
            raise ValueError(
                f"threshold_init must be a number or broadcast to [{layers}, {heads}] (layers, heads), "
                f"got {list(start.shape)}"
            )
        self._set_thresholds(start.expand(layers, heads))
        self._undecayed_group()["params"].append(self.thresholds)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save and self.thresholds is not None:
            torch.save(self.thresholds.detach().cpu(), Path(output_dir or self.args.output_dir) / THRESHOLDS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args, **kwargs) -> None:
        self._load_thresholds(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_thresholds(self.state.best_model_checkpoint)

    def _load_thresholds(self, folder: str) -> None:
        path = Path(folder) / THRESHOLDS_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {THRESHOLDS_FILE}, so EntropyRegularizedTrainer did not write it: to go on from its "
                "weights with new thresholds, load the model from it and train without resume_from_checkpoint"
            )
        try:
            values = torch.load(path, map_location=self.args.device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read, resume from another checkpoint: {error}") from error
        self._set_thresholds(values)

    # -- a step -------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        self._of_log, self._steps_of_log = 0.0, 0
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        """Called once a step, for all of its micro-batches."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self.thresholds is not None:
            self.thresholds.grad = None  # the Trainer clears those of the model
        self._of_step = 0.0
        queries = [_real_queries(batch) for batch in batches]
        self._queries_of_step = None
        if queries and all(count is not None for count in queries):
            total = torch.stack(queries).sum().to(self.args.device)
            self._queries_of_step = self.accelerator.reduce(total, "sum").clamp(min=1)
        return batches, num_items_in_batch

    def training_step(self, model, inputs, *args, **kwargs):
        self._of_micro_batch = None
        try:
            with record_entropy(self.model) as self._recorder:  # open for backward: checkpointing runs attention again
                loss = super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._recorder = None
        if self._of_micro_batch is None:
            raise ValueError(
                f"{type(self).__name__}.compute_loss never came to EntropyRegularizedTrainer.compute_loss, so there is "
                "no penalty: call super().compute_loss, and name EntropyRegularizedTrainer first among the bases"
            )
        self._of_step = self._of_step + self._of_micro_batch
        if self.accelerator.sync_gradients:
            self.thresholds.grad = self.accelerator.reduce(self.thresholds.grad, "mean")
            self._of_log = self._of_log + self.accelerator.reduce(self._of_step, "mean")
            self._steps_of_log += 1
        return loss - self._of_micro_batch[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        queries = _real_queries(inputs)
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if self._recorder is None:  # evaluation
            return result
        penalty = self._add_penalty(queries)
        if not self._is_scaled(num_items_in_batch):
            penalty = penalty * self.current_gradient_accumulation_steps
        return (result[0] + penalty, *result[1:]) if return_outputs else result + penalty

    def _add_penalty(self, queries: Tensor | None) -> Tensor:
        """This micro-batch's part of the step's penalty, times the number of processes, over which DDP averages."""
        recorder = self._recorder
        if self.thresholds is None:
            heads = [layer.shape[1] for layer in recorder.entropies]
            if len(set(heads)) > 1:
                raise ValueError(f"one threshold a head wants as many heads in every recorded layer, got {heads}")
            self._start_thresholds(len(heads), heads[0])
        processes = self.accelerator.num_processes
        if queries is None or self._queries_of_step is None:
            weight = 1 / self.current_gradient_accumulation_steps
        else:
            weight = queries / self._queries_of_step * processes
        penalty = self.regularization(recorder.entropies, self.thresholds, recorder.query_masks)
        of_queries = self.regularization.reduction == "mean" or self.regularization.per == "head"
        penalty = penalty * (weight if of_queries else processes)
        logged = torch.stack([penalty.detach(), recorder.head_means().mean() * weight])
        self._of_micro_batch = logged if self._of_micro_batch is None else self._of_micro_batch + logged
        return penalty

    def _is_scaled(self, num_items_in_batch) -> bool:
        """Whether the Trainer takes a loss as it is, and does not divide it by the number of micro-batches."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return self.loss_is_scaled_for_ga
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._steps_of_log:
            logs["entropy_penalty"], logs["attention_entropy"] = (self._of_log / self._steps_of_log).tolist()
            self._of_log, self._steps_of_log = 0.0, 0
        super().log(logs, *args, **kwargs)


def _real_queries(inputs) -> Tensor | None:
    """Tokens of a micro-batch that are not padding, a scalar on its device; None for inputs that do not tell."""
    if not isinstance(inputs, Mapping):
        return None
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask != 0).sum()
    whole = next((value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1), None)
    return None if whole is None else torch.full((), math.prod(whole.shape[:2]), device=whole.device)
