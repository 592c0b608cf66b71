"""The entropy of every attention row of any transformers model, while it runs.

Importing this module registers the attention implementation "entropy" with transformers: the model's own arithmetic,
on `entropy_attention`. `record_entropy(model)` switches a model to it and collects what its layers report.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from entropy_lib.attention import _visible_keys, entropy_attention, entropy_of_attention

# Arguments of transformers' attention functions that change the logits, or which keys there are.
CHANGES_LOGITS = "softcap s_aux sinks position_bias alibi attention_bias head_mask cache indices block_indices".split()

_recording: list[EntropyRecorder] = []  # of the forward pass now running; empty while checkpointing recomputes


def entropy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> Tensor | None:
    """The mask for "entropy", as small as it can be, so that the fused kernel takes it.

    Where the queries are the last positions of the keys and the pattern is plainly causal (or a window that no key
    falls out of): None, or [B, kv_length] if a key is padded or queries follow a cache. Where it is plainly
    bidirectional: None or [B, 1, 1, kv_length]. Anything else: `sdpa_mask`'s [B, 1, q_length, kv_length].
    Boolean, True where a key takes part.
    """
    in_window = local_size is not None and kv_length < local_size
    causal = allow_is_causal_skip and (mask_function is causal_mask_function or in_window)
    everything = allow_is_bidirectional_skip and (mask_function is bidirectional_mask_function or in_window)
    keys_fit = kv_offset == 0 and (attention_mask is None or attention_mask.shape == (batch_size, kv_length))
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_length
    if keys_fit and (everything or (causal and aligned)):
        padding = attention_mask
        if padding is not None and not torch.compiler.is_compiling() and padding.all():
            padding = None
        if everything:
            return None if padding is None else padding.bool()[:, None, None, :]
        if padding is None and (q_length == 1 or q_length == kv_length):
            return None
        if padding is None:  # None would mean what it does to sdpa: the first q_length keys
            return torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device", "cpu"))
        return padding.bool()
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """One attention layer, reported to the recorder of the running pass.

    Args:
        module: the layer, for its `is_causal` and for messages.
        query, key, value: [B, H, T, D] and [B, H_kv, T_k, D].
        attention_mask: None, keys [B, T_k] (with causality on top if the layer is causal), or a whole mask
            broadcastable to [B, H, T, T_k]: boolean, or additive with nothing but 0 and very negative values.
        dropout: above 0, the output comes from `scaled_dot_product_attention` with this dropout, while the entropy
            is that of the weights before dropout.

    Returns: output [B, T, H, D], entropy [B, H, T] in nats.
    """
    mask, causal = attention_mask, getattr(module, "is_causal", True) if is_causal is None else is_causal
    query_len, key_len = query.shape[2], key.shape[2]
    if mask is None and causal and key_len > query_len > 1:  # as in sdpa: the rest of a static cache is still empty
        key, value, key_len = key[:, :, :query_len], value[:, :, :query_len], query_len
    if mask is not None and mask.dtype != torch.bool:
        mask = _visible_where_added(mask, module)
    if mask is not None and mask.dim() == 4:
        causal = False
        if mask.shape[1:] == (1, 1, key_len):
            mask = mask[:, 0, 0]
    if dropout > 0 or value.shape != key.shape:
        visible = _visible_keys(mask, causal, query_len, key_len, query.device)
        output = sdpa_attention_forward(
            module, query, key, value, visible, dropout=dropout, scaling=scaling, is_causal=False
        )[0]
        entropy = entropy_of_attention(query, key, scale=scaling, causal=causal, mask=mask)
    else:
        output, entropy = entropy_attention(query, key, value, scale=scaling, causal=causal, mask=mask)
        output = output.transpose(1, 2)
    for recorder in _recording:
        recorder._record(module, entropy, mask)
    return output, entropy


def entropy_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """`attend` with transformers' signature: output [B, T, H, D] and no weights.

    Raises ValueError for what has no entropy of this form: soft-capped logits, sinks, position biases, paged caches,
    chosen keys, and unknown floating-point tensors.
    """
    for name, argument in kwargs.items():
        unknown = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dim() > 0
        if argument is not None and (name in CHANGES_LOGITS or unknown):
            raise ValueError(
                f"{type(module).__name__} passes {name!r} to its attention, which may change the weights in a way "
                "that 'entropy' does not compute. Use attn_implementation='eager' with output_attentions=True and "
                "attention_entropy(weights)."
            )
    return attend(module, query, key, value, attention_mask, dropout, scaling, is_causal)[0], None


AttentionInterface.register("entropy", entropy_attention_forward)
AttentionMaskInterface.register("entropy", entropy_mask)


def _visible_where_added(mask: Tensor, module: nn.Module) -> Tensor:
    if not mask.is_floating_point() or not ((mask == 0) | (mask <= -1e4)).all():
        raise ValueError(
            f"{type(module).__name__} got an attention mask of {mask.dtype} with values other than 0 and very "
            "negative ones; 'entropy' needs a boolean mask, or an additive one that only hides keys"
        )
    return mask == 0


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

        Real are the queries that a 2-D `attention_mask` passed to the model marks, else those that see a key. (For
        encoder-decoder models the latter only.)
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
        _recording.append(self)

    def _end(self, model: nn.Module, args: tuple, output) -> None:
        self._depth -= 1
        if self._depth == 0:
            _recording.remove(self)
            if output is not None and not self.passes[-1]:
                raise ValueError(f"{type(model).__name__} ran no attention through transformers' AttentionInterface")

    def _record(self, module: nn.Module, entropy: Tensor, mask: Tensor | None) -> None:
        batch, _, query_len = entropy.shape
        if self._padding is not None and self._padding.shape[0] == batch and self._padding.shape[1] >= query_len:
            queries = self._padding[:, -query_len:].bool()
        else:
            queries = None if mask is None or mask.dim() != 4 else mask.any(-1).any(1).expand(batch, query_len)
        if self.mean:
            entropy, queries = _head_mean(entropy, queries), None
        elif self._with_gradients and module.training and not torch.is_grad_enabled():
            raise ValueError(
                "reentrant gradient checkpointing hides the gradients of the entropies: call "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}), or record_"
                "entropy(model, mean=True) for statistics only"
            )
        self.passes[-1].append(entropy)
        self._queries.append(queries)


def _head_mean(entropy: Tensor, queries: Tensor | None) -> Tensor:
    """[B, H, T], real queries [B, T] -> [H]."""
    entropy = entropy.detach()
    if queries is None:
        return entropy.mean(dim=(0, 2))
    real = queries.to(entropy.device)[:, None]
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
    mean over the training batch is taken; other steps cost nothing.

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
