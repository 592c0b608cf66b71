"""The entropy of every attention row of any transformers model, while it runs."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from entropy_lib.entropy import head_means
from entropy_lib.interface import recorders
from entropy_lib.regularization import check_logger, send_metrics

# Arguments under which attention layers are given the states whose keys they read, if those are not their own.
KEYS_FROM_ELSEWHERE = ("key_value_states", "encoder_hidden_states", "cross_attention_states", "context")

_LOCK = threading.RLock()
_switched: dict[int, list] = {}  # id of a configuration: [it, its own implementation, how many recorders are open]
_RUNNING = threading.local()  # .passes: how many recorded passes run in this thread


@dataclass
class _Pass:
    """One forward pass of a recorded model."""

    begun_by: nn.Module
    with_gradients: bool
    entropies: list[Tensor] = field(default_factory=list)
    query_masks: list[Tensor | None] = field(default_factory=list)
    max_logits: list[Tensor] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    frames: list[tuple[nn.Module, dict]] = field(default_factory=list)  # models that run, innermost last
    calls: list[_Call] = field(default_factory=list)  # attention layers that run, innermost last


@dataclass
class _Call:
    """One call of an attention layer."""

    layer: nn.Module
    cross: bool
    reports: int = 0


class EntropyRecorder:
    """What `record_entropy` yields. It hears its own model's passes only, in whatever thread they run.

    Attributes:
        entropies: the last forward pass, one tensor for each attention call in the order of the calls: [B, H, T] in
            nats, float32 (float64 for float64 models), with gradients where they are enabled; 0 where a query sees
            no key. With mean=True: [H], without gradients, the mean over batch and real queries.
        query_masks: beside each of them, True at real queries, [B or 1, T], or None where all are real: what
            `EntropyRegularization` takes. Real is what is not padding, by the layer's own mask and by the 2-D
            `attention_mask` of the encoder or decoder that the layer is in.
        max_logits: with max_logits=True, the largest logit of every row among the keys it sees, after scaling and
            before the softmax: [B, H, T] float32 without gradients, -inf where it sees none; with mean=True, [H], the
            largest of the pass.
        layers: beside each of them, the name of its layer in the model.
        passes: such lists of entropies, one a forward pass, oldest first. With `generate`, the first is the prompt's
            and each further one a new token's, [B, H, 1] a layer (an encoder's own pass comes before them). A pass
            recorded with gradients is kept only until the next one, since it holds the activations of its pass;
            with mean=True, or under no_grad, all are kept.
    """

    def __init__(self, model: nn.Module, inner: PreTrainedModel, layers: Sequence | None, mean: bool, max_logits: bool):
        self.mean, self.with_max_logits = mean, max_logits
        self._model, self._inner = model, inner
        self._names = {module: name for name, module in inner.named_modules()}
        self._chosen = None if layers is None else _choose(inner, layers)
        self._passes: list[_Pass] = []
        self._thread, self._local = threading.get_ident(), threading.local()
        self._handles: list = []
        self._open = False
        self._unheard: str | None = None

    @property
    def passes(self) -> list[list[Tensor]]:
        return [recorded.entropies for recorded in self._passes]

    @property
    def entropies(self) -> list[Tensor]:
        return self._passes[-1].entropies if self._passes else []

    @property
    def query_masks(self) -> list[Tensor | None]:
        return self._passes[-1].query_masks if self._passes else []

    @property
    def max_logits(self) -> list[Tensor]:
        if not self.with_max_logits:
            raise ValueError("the largest logits were not recorded: record_entropy(model, max_logits=True)")
        return self._passes[-1].max_logits if self._passes else []

    @property
    def layers(self) -> list[str]:
        return self._passes[-1].layers if self._passes else []

    def head_means(self) -> Tensor | list[Tensor]:
        """[layers, H]: each head's mean entropy in the last pass over batch and real queries, without gradients.

        A list of [H], one a layer, where layers or parts of the model differ in their number of heads.
        """
        if not self.entropies:
            raise ValueError("nothing recorded yet: call the model inside `with record_entropy(model)`")
        means = self.entropies
        if not self.mean:
            means = [head_means(*layer) for layer in zip(self.entropies, self.query_masks, strict=True)]
        return torch.stack(means) if len({len(heads) for heads in means}) == 1 else list(means)

    # -- what attention layers ask and tell, see `interface` --------------------------------------------------------

    def wants(self, layer: nn.Module) -> bool:
        return self._chosen is None or layer in self._chosen

    def hear(
        self, layer: nn.Module, entropy: Tensor, mask: Tensor | None, causal: bool, max_logits: Tensor | None
    ) -> None:
        recorded: _Pass | None = getattr(self._local, "current", None)
        if recorded is None:
            # Not of a pass of this model: checkpointing that computes one again, or another model with this layer.
            if torch._C._current_graph_task_id() == -1 and threading.get_ident() == self._thread:
                self._unheard = type(layer).__name__
            return
        if not self.mean and recorded.with_gradients and layer.training and not torch.is_grad_enabled():
            raise ValueError(
                "reentrant gradient checkpointing hides the gradients of the entropies: turn it on with "
                "use_reentrant=False, or use record_entropy(model, mean=True) for statistics only"
            )
        call = recorded.calls[-1] if recorded.calls and recorded.calls[-1].layer is layer else None
        if call is not None:
            call.reports += 1
            if call.reports > 1 and self._chosen is None:
                raise ValueError(
                    f"{type(layer).__name__} runs attention more than once in one call, so that it has no single row "
                    "of weights a query; record the other layers with record_entropy(model, layers=[...])"
                )
        queries = _real_queries(entropy, mask, causal, call is not None and call.cross, recorded.frames)
        recorded.entropies.append(head_means(entropy, queries) if self.mean else entropy)
        recorded.query_masks.append(queries)
        recorded.layers.append(self._names.get(layer, type(layer).__name__))
        if self.with_max_logits:
            peak = max_logits.detach()
            if self.mean:
                peak = peak if queries is None else peak.masked_fill(~queries[:, None], -torch.inf)
                peak = peak.amax(dim=(0, 2))
            recorded.max_logits.append(peak)

    # -- opening and closing ----------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Switch the model to "entropy" and listen; undone by `_leave`, in whatever order recorders are left."""
        with _LOCK:
            self._configs = configs_of(self._inner)
            for config in self._configs:
                _switched.setdefault(id(config), [config, config._attn_implementation, 0])[2] += 1
            self._open = True
            self._inner.set_attn_implementation("entropy")
            for module in self._inner.modules():
                config = getattr(module, "config", None)
                if isinstance(config, PreTrainedConfig) and config._attn_implementation != "entropy":
                    raise ValueError(f"{type(module).__name__} kept its attention {config._attn_implementation!r}")
            for module in self._names:
                recorders[module] = (*recorders.get(module, ()), self)

    def _leave(self) -> None:
        with _LOCK:
            for module in self._names:
                left = tuple(recorder for recorder in recorders.get(module, ()) if recorder is not self)
                if left:
                    recorders[module] = left
                else:
                    recorders.pop(module, None)
            for config in self._configs:
                entry = _switched[id(config)]
                entry[2] -= 1
                if not entry[2]:
                    config._attn_implementation_internal = entry[1]
                    del _switched[id(config)]
            self._open = False

    def _hook(self) -> None:
        add = self._handles.append
        for module in dict.fromkeys((self._model, *self._names)):
            kind = type(module)
            if isinstance(module, PreTrainedModel) or module is self._model:
                add(module.register_forward_pre_hook(_outside_of_graphs(self._begin), with_kwargs=True, prepend=True))
                add(module.register_forward_hook(_outside_of_graphs(self._end), always_call=True))
            elif _uses_interface(kind):
                add(module.register_forward_pre_hook(_outside_of_graphs(self._begin_call), with_kwargs=True))
                add(module.register_forward_hook(_outside_of_graphs(self._end_call), always_call=True))
            elif self._chosen is None and _attends_by_itself(kind):
                add(module.register_forward_pre_hook(_outside_of_graphs(self._refuse)))

    def _unhook(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    # -- hooks ------------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        recorded = getattr(self._local, "current", None)
        if recorded is None:
            # A part that is called by itself counts as a pass (CLIP's get_text_features, the encoder in `generate`),
            # unless it may be another model that has it too: in another thread, or while that is being recorded.
            mine = module is self._model or module is self._inner
            if not mine and (threading.get_ident() != self._thread or getattr(_RUNNING, "passes", 0)):
                return
            recorded = self._local.current = _Pass(module, torch.is_grad_enabled())
            _RUNNING.passes = getattr(_RUNNING, "passes", 0) + 1
            if self._passes and any(entropy.requires_grad for entropy in self._passes[-1].entropies):
                self._passes.pop()
            self._passes.append(recorded)
        recorded.frames.append((module, _arguments(module, args, kwargs)))

    def _end(self, module: nn.Module, args: tuple, output) -> None:
        recorded = getattr(self._local, "current", None)
        if recorded is None:
            return
        while recorded.frames and recorded.frames.pop()[0] is not module:
            pass
        if recorded.frames:
            return
        self._local.current = None
        _RUNNING.passes -= 1
        if output is not None and not recorded.entropies:
            self._passes = [other for other in self._passes if other is not recorded]
            if (module is self._model or module is self._inner) and self._chosen is None:
                raise ValueError(f"{type(module).__name__} ran no attention through transformers' AttentionInterface")
        for tensor in (*_tensors(output), *recorded.entropies):
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(self._reopen_for_backward)

    def _begin_call(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        recorded = getattr(self._local, "current", None)
        if recorded is not None:
            arguments = _arguments(layer, args, kwargs)
            cross = any(isinstance(arguments.get(name), Tensor) for name in KEYS_FROM_ELSEWHERE)
            recorded.calls.append(_Call(layer, cross))

    def _end_call(self, layer: nn.Module, args: tuple, output) -> None:
        recorded = getattr(self._local, "current", None)
        if recorded is not None and recorded.calls:
            recorded.calls.pop()

    def _refuse(self, module: nn.Module, args: tuple) -> None:
        if getattr(self._local, "current", None) is not None:
            raise ValueError(
                f"{type(module).__name__} ({self._names.get(module, '')}) computes attention without transformers' "
                "AttentionInterface, so its entropy would be missing: record the layers that use it with "
                "record_entropy(model, layers=[...])"
            )

    def _reopen_for_backward(self, grad: Tensor) -> None:
        """Non-reentrant checkpointing computes layers again in the backward pass: as they were in the forward pass."""
        if not self._open:
            self._enter()
            torch.autograd.Variable._execution_engine.queue_callback(self._leave)


def _outside_of_graphs(hook):
    return torch.compiler.disable(hook)


def _arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    return {**dict(zip(_parameters(type(module))[1:], args, strict=False)), **kwargs}


@cache
def _parameters(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)


def _tensors(output) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    return [value for value in values if isinstance(value, Tensor)]


def _real_queries(
    entropy: Tensor, mask: Tensor | None, causal: bool, cross: bool, frames: list[tuple[nn.Module, dict]]
) -> Tensor | None:
    """[B or 1, T], True where a query is no padding, or None where all are real; `cross`: keys are others' tokens."""
    batch, _, query_len = entropy.shape
    queries = None
    if mask is not None and not cross:
        if mask.dim() == 4:
            queries = mask.any(-1).any(1).expand(-1, query_len)
        elif causal or mask.shape[1] == query_len:
            queries = mask[:, -query_len:]
    padding = _padding(frames, batch, query_len)
    if padding is not None:
        queries = padding.to(entropy.device) if queries is None else queries & padding.to(queries.device)
    return None if queries is None else queries.to(entropy.device)


def _padding(frames: list[tuple[nn.Module, dict]], batch: int, query_len: int) -> Tensor | None:
    """The 2-D `attention_mask` of the innermost model that runs, at the positions of the queries."""
    for model, arguments in reversed(frames):
        given = arguments.get("attention_mask")
        if "decoder_attention_mask" in (*arguments, *_parameters(type(model))):
            return None  # the mask is the encoder's, and this layer may be the decoder's
        if isinstance(given, Tensor) and given.dim() == 2:
            length = given.shape[1]
            fits = length == query_len or (length > query_len and arguments.get("past_key_values") is not None)
            return given[:, -query_len:].bool() if fits and len(given) in (1, batch) else None
        if given is None:
            return None
    return None


@cache
def _source(kind: type) -> str:
    """The code of a class and its parents below nn.Module, "" where it cannot be read."""
    parents = [parent for parent in kind.__mro__ if issubclass(parent, nn.Module) and parent is not nn.Module]
    try:
        return "\n".join(inspect.getsource(parent) for parent in parents)
    except (OSError, TypeError):
        return ""


@cache
def _uses_interface(kind: type) -> bool:
    return not issubclass(kind, PreTrainedModel) and "ALL_ATTENTION_FUNCTIONS" in _source(kind)


@cache
def _attends_by_itself(kind: type) -> bool:
    """Whether a module's code multiplies with a softmax: attention that `record_entropy` does not reach."""
    if issubclass(kind, nn.MultiheadAttention):
        return True
    source = _source(kind)
    named = re.search("attention|attn", kind.__name__, re.IGNORECASE) is not None
    product = re.search(r"matmul\(|bmm\(|einsum\(| @ ", source) is not None
    softmax = "scaled_dot_product_attention(" in source or ("softmax(" in source and product)
    return named and softmax and "ALL_ATTENTION_FUNCTIONS" not in source and not issubclass(kind, PreTrainedModel)


def _choose(model: nn.Module, layers: Sequence[int | str]) -> set[nn.Module]:
    """The attention layers that `record_entropy(layers=...)` names."""
    known = {name: module for name, module in model.named_modules() if _uses_interface(type(module))}
    names = list(known)
    by_number = {number: names[number] for number in range(-len(names), len(names))}
    chosen = {known.get(by_number.get(layer) if type(layer) is int else layer) for layer in layers}
    if not chosen or None in chosen:
        raise ValueError(
            f"layers must name attention layers of {type(model).__name__}, by number from 0 to {len(names) - 1} or as "
            f"in {names[:3]}; got {list(layers)}"
        )
    return chosen


@contextmanager
def record_entropy(
    model: nn.Module, layers: Sequence[int | str] | None = None, *, mean: bool = False, max_logits: bool = False
) -> Iterator[EntropyRecorder]:
    """Record the attention entropies of a transformers model, forward, training or `generate`:

        with record_entropy(model) as recorder:
            loss = model(**batch).loss
            penalty = regularization(recorder.entropies, thresholds, recorder.query_masks)

    The model runs on the attention implementation "entropy" inside, and on its own again afterwards. Call the model
    itself, or a part of it that is a transformers model (a `forward` method alone is not seen).

    Args:
        model: a `PreTrainedModel`, or a module that wraps one.
        layers: record these attention layers only, by number in the order of `model.modules()` (from 0, or back from
            -1) or by name; the others run as fast as without a recorder. None: all, and what has attention without
            transformers' interface is refused.
        mean: keep one number a head and pass instead of one a row, without gradients.
        max_logits: keep the largest logit of every row too.

    Raises ValueError for a model, or a part of one that runs, that does not use transformers' AttentionInterface, for
    a layer with more than one attention in a call, and if nothing was recorded although its layers ran.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"{type(model).__name__} is not a transformers PreTrainedModel and holds none")
    if isinstance(model, nn.DataParallel):
        raise ValueError("nn.DataParallel runs copies of the model, which are not recorded: use one GPU, or torchrun")
    recorder = EntropyRecorder(model, inner, layers, mean, max_logits)
    for module in inner.modules():
        if layers is None and isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise ValueError(
                f"{type(module).__name__} does not use transformers' AttentionInterface, so its attention cannot be "
                "replaced. Use output_attentions=True and attention_entropy(weights)."
            )
    try:
        recorder._enter()
        recorder._hook()
        yield recorder
    finally:
        recorder._unhook()
        recorder._leave()
    if recorder._unheard and not recorder.passes:
        raise ValueError(
            f"nothing was recorded, although {recorder._unheard} ran: call the model itself, not its forward method, "
            "or record the part that you call"
        )


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
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
        check_logger(logger)
        self.every, self.logger, self.history = every, logger, []
        self._recorder, self._stack = None, ExitStack()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._stack.close()  # an earlier training that was interrupted in the middle of a step
        self._recorder = None
        if args is not None and args.n_gpu > 1:
            raise ValueError(
                f"entropy_callback does not see the copies that nn.DataParallel runs on {args.n_gpu} GPUs: "
                "use torchrun, or one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if model is not None:
            with record_entropy(model):  # refuses here, not in the middle of a training, what it cannot record
                pass

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._recorder = self._stack.enter_context(record_entropy(model, mean=True))

    def on_step_end(self, args, state, control, **kwargs):
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        self._stack.close()
        entropy = _mean_over_passes(recorder)
        step = state.global_step - 1
        self.history.append({"step": step, "entropy": entropy})
        if state.is_world_process_zero:
            heads = ((layer, head, e) for layer, row in enumerate(entropy) for head, e in enumerate(row))
            send_metrics({f"attn.{layer}.head.{head}.entropy": e for layer, head, e in heads}, step, self.logger)


def _mean_over_passes(recorder: EntropyRecorder) -> list[list[float]]:
    """[layers][heads]: more than one pass with gradient accumulation, and not all need run the same layers."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    for recorded in recorder._passes:
        for place, (layer, heads) in enumerate(zip(recorded.layers, recorded.entropies, strict=True)):
            found.setdefault((layer, recorded.layers[:place].count(layer)), []).append(heads)
    return [torch.stack(heads).mean(0).tolist() for heads in found.values()]


def entropy_callback(every: int = 50, logger=None) -> TrainerCallback:
    """A callback that watches attention entropy in anyone's training: `Trainer(..., callbacks=[entropy_callback()])`.

    At steps 0, every, 2·every, ... (updates made so far) the model runs with "entropy" attention and each head's
    mean over the training batch is taken; other steps cost nothing. A training that breaks off inside a recorded step
    leaves the model on "entropy", with the same outputs, until the next training begins.

    Args:
        every: steps between records.
        logger: as in `EntropyRegularization.log_entropy_metrics`, with its keys; None to fill `history` only.

    Returns: a TrainerCallback whose `history` is a list of {"step": int, "entropy": [layers][heads] in nats}, of this
    process's batches. Rows differ in length where layers differ in their number of heads.
    """
    return _EntropyCallback(every, logger)
