"""The attention implementation "entropy" for any transformers model, registered when this module is imported.

It is the model's own attention: computed by `entropy_attention` in the layers that an open recorder wants
(`record_entropy`), which are told their entropy, and by sdpa in all others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from entropy_lib.attention import entropy_attention, entropy_of_attention, visible_mask

# Arguments of transformers' attention functions that change the logits, or which keys there are.
CHANGES_LOGITS = "softcap s_aux sinks position_bias alibi attention_bias head_mask cache indices block_indices".split()

# By layer, the open recorders of models that have it; entered and taken out by `record_entropy`.
recorders: dict[nn.Module, tuple] = {}


def no_mask(device: torch.device) -> Tensor:
    """A mask that says: plainly causal, nothing hidden.

    None would leave causality to the layer's `is_causal`, which is False in decoders that rely on their mask. From a
    model that knows it of its input, None says less to transformers' mask functions too: without a cache they look
    for packed sequences in the position ids, and under torch.compile, where they cannot look, build the whole mask.
    They pass on what has four dimensions, and no other mask is empty.
    """
    return torch.empty(0, 0, 0, 0, dtype=torch.bool, device=device)


def all_visible(device: torch.device) -> Tensor:
    """A mask that says: every query sees every key. (One that holds a single True, and no other is as small.)"""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


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
) -> Tensor:
    """The mask for "entropy", as small as it can be, so that the fused kernel takes it; it alone says what is causal.

    Where the queries are the last positions of the keys and the pattern is plainly causal (or a window that no key
    falls out of): `no_mask`, or [B, kv_length] if a key is padded or queries follow a cache. Where it is plainly
    bidirectional: `all_visible` or [B, 1, 1, kv_length]. Anything else: `sdpa_mask`'s [B, 1, q_length, kv_length].
    Boolean, True where a key takes part.
    """
    if getattr(kwargs.get("config"), "num_kv_shared_layers", 0):  # Gemma 4 cuts queries off the mask that its last
        allow_is_causal_skip = False  # layers get, which only a whole one can take
    in_window = local_size is not None and kv_length < local_size
    causal = allow_is_causal_skip and (mask_function is causal_mask_function or in_window)
    everything = allow_is_bidirectional_skip and (mask_function is bidirectional_mask_function or in_window)
    keys_fit = kv_offset == 0 and (attention_mask is None or attention_mask.shape == (batch_size, kv_length))
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_length
    if keys_fit and (everything or (causal and aligned)):
        padding, device = attention_mask, kwargs.get("device", "cpu")
        if padding is not None and not torch.compiler.is_compiling() and padding.all():
            padding = None
        if everything:
            return all_visible(device) if padding is None else padding.bool()[:, None, None, :]
        if padding is None and (q_length == 1 or q_length == kv_length):
            return no_mask(device)
        if padding is None:  # `no_mask` would mean what None does to sdpa: the first q_length keys
            return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
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


def visible_keys(module: nn.Module, attention_mask: Tensor | None, query: Tensor, key_len: int) -> Tensor | None:
    """What queries [B, H, T_q, D] see of the keys: boolean, broadcastable to [B, 1, T_q, T_k]; masks as in `attend`.

    None where that is plainly causal and the queries are the last of the keys.
    """
    mask, causal = _read(attention_mask, module, None, key_len)
    if mask is None and causal:
        return None
    if mask is not None and mask.dtype != torch.bool:  # compiled code cannot look at values: eager attention's own mask
        mask = mask == 0 if torch.compiler.is_compiling() else _visible_where_added(mask, module)
    visible = visible_mask(mask, causal, query.shape[2], key_len, query.device)
    if visible is None:
        visible = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    return visible[(None,) * (4 - visible.dim())]


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
    """One attention layer, reported to its recorders.

    Args:
        module: the layer, for messages and, where there is no mask, for its `is_causal`.
        query, key, value: [B, H, T, D] and [B, H_kv, T_k, D].
        attention_mask: what `entropy_mask` makes, keys [B, T_k] being causal; or a whole mask broadcastable to
            [B, H, T, T_k]: boolean, or additive with nothing but 0 and very negative values; or None, which is causal
            if the layer is, as in sdpa.
        dropout: above 0, the output comes from `scaled_dot_product_attention` with this dropout, while the entropy
            is that of the weights before dropout.

    Returns: output [B, T, H, D], entropy [B, H, T] in nats.
    """
    query_len, key_len = query.shape[2], key.shape[2]
    mask, causal = _read(attention_mask, module, is_causal, key_len)
    if attention_mask is None and causal and key_len > query_len > 1:  # as in sdpa: a static cache's rest is empty
        key, value, key_len = key[:, :, :query_len], value[:, :, :query_len], query_len
    if mask is not None and mask.dtype != torch.bool:
        mask = _visible_where_added(mask, module)
    if mask is not None and mask.dim() == 4 and mask.shape[1:] == (1, 1, key_len):
        mask = mask[:, 0, 0]
    wants_max = bool(recorders) and _wants_max_logits(module)
    rows = {"scale": scaling, "causal": causal, "mask": mask, "return_max_logits": wants_max}
    if dropout > 0 or value.shape != key.shape:
        visible = visible_mask(mask, causal, query_len, key_len, query.device)
        output = sdpa_attention_forward(
            module, query, key, value, visible, dropout=dropout, scaling=scaling, is_causal=False
        )[0]
        entropy = entropy_of_attention(query, key, **rows)
        entropy, peak = entropy if wants_max else (entropy, None)
    else:
        output, entropy, *peak = entropy_attention(query, key, value, **rows)
        peak = peak[0] if wants_max else None
        output = output.transpose(1, 2).contiguous()
    if recorders:
        _report(module, entropy, mask, causal, peak)
    return output, entropy


@torch.compiler.disable
def _report(module: nn.Module, entropy: Tensor, mask: Tensor | None, causal: bool, max_logits: Tensor | None) -> None:
    for recorder in recorders.get(module, ()):
        if recorder.wants(module):
            recorder.hear(module, entropy, mask, causal, max_logits)


@torch.compiler.disable
def _wants_max_logits(module: nn.Module) -> bool:
    return any(recorder.with_max_logits and recorder.wants(module) for recorder in recorders.get(module, ()))


@torch.compiler.disable
def _is_recorded(module: nn.Module) -> bool:
    return any(recorder.wants(module) for recorder in recorders.get(module, ()))


def entropy_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function "entropy": output [B, T, H, D] and no weights; `attend` where it is recorded.

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
    if attention_mask is None:  # no mask was made, so that eager attention sees every key, whatever the layer says
        is_causal = False
    if not (recorders and _is_recorded(module)):
        return attention_on_request_forward(
            module, query, key, value, attention_mask, is_causal, dropout=dropout, scaling=scaling, **kwargs
        )
    return attend(module, query, key, value, attention_mask, dropout, scaling, is_causal)[0], None


def attention_on_request_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    is_causal: bool | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """sdpa with the masks of "entropy": what `EntropyGPT2LMHeadModel` runs when nobody asks for entropies.

    With `output_entropies` it calls `attend` on the same masks, which stay small enough for the fused kernel under
    torch.compile too, where sdpa's own are always whole.
    """
    mask, causal = _read(attention_mask, module, is_causal, key.shape[2])
    if mask is not None and mask.dim() == 2:
        mask = visible_mask(mask, causal, query.shape[2], key.shape[2], query.device)
    return sdpa_attention_forward(module, query, key, value, mask, is_causal=causal, **kwargs)


AttentionInterface.register("entropy", entropy_attention_forward)
AttentionMaskInterface.register("entropy", entropy_mask)
AttentionInterface.register("entropy_on_request", attention_on_request_forward)
AttentionMaskInterface.register("entropy_on_request", entropy_mask)


def _read(mask: Tensor | None, module: nn.Module, is_causal: bool | None, key_len: int) -> tuple[Tensor | None, bool]:
    """(mask, causal): the mask, None where it hides nothing, and whether causality comes on top of it."""
    if mask is None:
        return None, getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask.numel() == 0:  # `no_mask`
        return None, True
    if mask.shape == (1, 1, 1, 1) and key_len > 1:  # `all_visible`
        return None, False
    return mask, mask.dim() == 2


def _visible_where_added(mask: Tensor, module: nn.Module) -> Tensor:
    if not mask.is_floating_point() or not ((mask == 0) | (mask <= -1e4)).all():
        raise ValueError(
            f"{type(module).__name__} got an attention mask of {mask.dtype} with values other than 0 and very "
            "negative ones; 'entropy' needs a boolean mask, or an additive one that only hides keys"
        )
    return mask == 0
