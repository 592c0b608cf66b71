"""The entropy of every attention row of any transformers model, while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from entropy_lib.interface import listeners


class EntropyRecorder:
    """What `record_entropy` yields.

    Attributes:
        entropies: the last forward pass, one tensor for each attention call in the order of the calls: [B, H, T] in
            nats, float32 (float64 for float64 models), with gradients where they are enabled; 0 where a query sees
            no key. With mean=True: [H], without gradients, the mean over batch and real queries.
        passes: such lists, one a forward pass, oldest first. A pass recorded with gradients is kept only until the
            next one, since it holds the activations of its pass; with mean=True, or under no_grad, all are kept.
    """

    def __init__(self, mean: bool = False):
        self.mean = mean
        self.passes: list[list[Tensor]] = []
        self._queries: list[Tensor | None] = []  # of the last pass by layer: the real ones, [B, T]
        self._depth = 0

    @property
    def entropies(self) -> list[Tensor]:
        return self.passes[-1] if self.passes else []

    def head_means(self) -> Tensor:
        """[layers, H]: each head's mean entropy in the last pass over batch and real queries, without gradients.

        Real is what is not padding, by the layer's mask and by a 2-D `attention_mask` given to the model.
        """
        if not self.entropies:
            raise ValueError("nothing recorded yet: call the model inside `with record_entropy(model)`")
        if self.mean:
            return torch.stack(self.entropies)
        return torch.stack([_head_mean(*layer) for layer in zip(self.entropies, self._queries, strict=True)])

    def _start(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._depth += 1
        if self._depth > 1:  # a wrapper, such as PEFT's, and the model inside it
            return
        positional = dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
        mask = (positional | kwargs).get("attention_mask")
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 and not encoder_decoder else None
        self._with_gradients = torch.is_grad_enabled()
        if self.passes and any(entropy.requires_grad for entropy in self.passes[-1]):
            self.passes.pop()
        self.passes.append([])
        self._queries = []
        listeners.append(self._listen)

    def _end(self, model: nn.Module, args: tuple, output) -> None:
        self._depth -= 1
        if self._depth == 0:
            listeners.remove(self._listen)
            if output is not None and not self.passes[-1]:
                raise ValueError(f"{type(model).__name__} ran no attention through transformers' AttentionInterface")

    def _listen(self, layer: nn.Module, entropy: Tensor, mask: Tensor | None, causal: bool) -> None:
        if not self.mean and self._with_gradients and layer.training and not torch.is_grad_enabled():
            raise ValueError(
                "reentrant gradient checkpointing hides the gradients of the entropies: turn it on with "
                "use_reentrant=False, or use record_entropy(model, mean=True) for statistics only"
            )
        queries = self._real_queries(entropy.shape[2], mask, causal)
        self.passes[-1].append(_head_mean(entropy, queries) if self.mean else entropy)
        self._queries.append(queries)

    def _real_queries(self, query_len: int, mask: Tensor | None, causal: bool) -> Tensor | None:
        """[B or 1, T], or None where all are real."""
        if mask is None or (mask.dim() == 2 and not causal and mask.shape[1] != query_len):  # None: cross-attention
            return None
        if mask.dim() == 2:
            return mask[:, -query_len:]
        queries = mask.any(-1).any(1).expand(-1, query_len)
        padding = self._padding
        if padding is not None and len(padding) == len(queries) and padding.shape[1] >= query_len:
            queries = queries & padding[:, -query_len:].to(queries)
        return queries


def _head_mean(entropy: Tensor, queries: Tensor | None) -> Tensor:
    """[B, H, T], real queries [B, T] -> [H]."""
    entropy = entropy.detach()
    if queries is None:
        return entropy.mean(dim=(0, 2))
    real = queries.to(entropy.device).expand(entropy.shape[0], -1)[:, None]
    return entropy.masked_fill(~real, 0).sum(dim=(0, 2)) / real.sum().clamp(min=1)


@contextmanager
def record_entropy(model: nn.Module, mean: bool = False) -> Iterator[EntropyRecorder]:
    """Record the attention entropies of a transformers model, forward, training or `generate`:

        with record_entropy(model) as recorder:
            loss = model(**batch).loss
            penalty = regularization(recorder.entropies, thresholds)

    The model runs on the attention implementation "entropy" inside, and on its own again afterwards. Call the model
    itself (its `forward` method alone is not seen). With gradient checkpointing stay inside for `backward`.

    Args:
        model: a `PreTrainedModel`, or a module that wraps one.
        mean: keep one number a head and pass instead of one a row, without gradients.

    Raises ValueError for a model, or a part of one, that does not use transformers' AttentionInterface.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"{type(model).__name__} is not a transformers PreTrainedModel and holds none")
    for module in inner.modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise ValueError(
                f"{type(module).__name__} does not use transformers' AttentionInterface, so its attention cannot be "
                "replaced. Use output_attentions=True and attention_entropy(weights)."
            )
    before = [(config, config._attn_implementation) for config in _configs(inner)]
    recorder, handles = EntropyRecorder(mean), []
    try:
        inner.set_attn_implementation("entropy")
        for module in inner.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and config._attn_implementation != "entropy":
                raise ValueError(f"{type(module).__name__} kept its attention {config._attn_implementation!r}")
        for module in dict.fromkeys((model, inner)):
            handles.append(module.register_forward_pre_hook(recorder._start, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(recorder._end, always_call=True))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every configuration in the model and their sub-configurations, each object once."""
    found = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


class _EntropyCallback(TrainerCallback):
    def __init__(self, every: int, logger):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.logger, self.history = every, logger, []
        self._recorder, self._stack = None, ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self._stack.close()  # an earlier training that was interrupted in the middle of a step
        self._recorder = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._recorder = self._stack.enter_context(record_entropy(model, mean=True))

    def on_step_end(self, args, state, control, **kwargs):
        if self._recorder is None:
            return
        passes, self._recorder = self._recorder.passes, None  # more than one with gradient accumulation
        self._stack.close()
        entropy = torch.stack([torch.stack(heads) for heads in passes]).mean(0).tolist()  # [L, H]
        step = state.global_step - 1
        self.history.append({"step": step, "entropy": entropy})
        if state.is_world_process_zero and self.logger is not None:
            heads = ((layer, head, e) for layer, row in enumerate(entropy) for head, e in enumerate(row))
            _send({f"attn.{layer}.head.{head}.entropy": e for layer, head, e in heads}, step, self.logger)


def entropy_callback(every: int = 50, logger=None) -> TrainerCallback:
    """A callback that watches attention entropy in anyone's training: `Trainer(..., callbacks=[entropy_callback()])`.

    At steps 0, every, 2·every, ... (updates made so far) the model runs with "entropy" attention and each head's
    mean over the training batch is taken; other steps cost nothing. A training that breaks off inside a recorded step
    leaves the model on "entropy", with the same outputs, until the next training begins.

    Args:
        every: steps between records.
        logger: as in `EntropyRegularization.log_entropy_metrics`, with its keys; None to fill `history` only.

    Returns: a TrainerCallback whose `history` is a list of {"step": int, "entropy": [layers][heads] in nats}, of this
    process's batches.
    """
    return _EntropyCallback(every, logger)


def _send(metrics: dict[str, float], step: int, logger) -> None:
    if hasattr(logger, "log"):
        logger.log(metrics, step=step)
    else:
        for key, entropy in metrics.items():
            logger.add_scalar(key, entropy, step)
