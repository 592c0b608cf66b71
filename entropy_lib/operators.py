"""The torch operators `entropy_lib::attention` and its backward: which kernel runs, with which blocks, on what.

Custom operators with fake implementations, so that torch.compile, checkpointing and DDP take them as they are.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from entropy_lib import kernels

INTERPRET = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, in numpy
SHORT = 128  # up to so many queries and keys, one program computes dQ, dK and dV of a whole head
# Lengths between two of these are tuned together: they can use the same blocks, and a growing length is tuned anew
# only a few times.
LENGTHS = (32, 64, 128, 1024, 4096)


def _config(block_m: int, block_n: int, warps: int, stages: int) -> triton.Config:
    """BLOCK_M queries by BLOCK_N keys, warps, stages of the software pipeline."""

    def fit_descriptors(arguments: dict) -> None:
        for name, block in (("q", block_m), ("do", block_m), ("k", block_n), ("v", block_n)):
            if isinstance(arguments.get(name), TensorDescriptor):
                arguments[name].block_shape = [1, 1, block, arguments["BLOCK_D"]]

    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return triton.Config(blocks, num_warps=warps, num_stages=stages, pre_hook=fit_descriptors)


def _worth_trying(configs: list[triton.Config], arguments: dict, **keywords) -> list[triton.Config]:
    """No block longer than the sequence, small ones for float32; the last is small enough for any GPU."""
    arguments = {**arguments, **keywords}
    largest = triton.next_power_of_2(max(arguments["query_len"], arguments["key_len"]))
    query = arguments["q"].base if isinstance(arguments["q"], TensorDescriptor) else arguments["q"][0]
    if query.dtype == torch.float32:
        largest = min(largest, 64)
    return [c for c in configs if max(c.kwargs.values(), default=0) <= largest] or configs[-1:]


def _autotuned(kernel, *configs: triton.Config):
    """Choose among a few configurations by measuring, once for each kind of call: `KEY`, head size, what is present."""
    return triton.autotune(
        [_config(16, 16, 4, 1)] if INTERPRET and configs[0].kwargs else list(configs[: 1 if INTERPRET else None]),
        key=["KEY", "BLOCK_D", "CAUSAL", "GROUP"],
        prune_configs_by={"early_config_prune": _worth_trying},
        # The GPU idles, at a low clock, while a configuration compiles: without a long warm-up the one that compiles
        # fastest looks best.
        do_bench=lambda call, quantiles: triton.testing.do_bench(call, warmup=100, rep=40, quantiles=quantiles),
    )(kernel)


FORWARD = _autotuned(
    kernels.forward_kernel, _config(64, 128, 4, 3), _config(128, 64, 4, 3), _config(128, 128, 8, 2),
    _config(64, 64, 4, 2), _config(64, 64, 4, 3), _config(32, 32, 4, 2),
)  # fmt: skip
DQ = _autotuned(
    kernels.dq_kernel, _config(64, 128, 4, 3), _config(128, 64, 4, 3), _config(128, 64, 8, 3), _config(64, 64, 4, 3),
    _config(32, 32, 4, 2),
)  # fmt: skip
EVEN = triton.heuristics({"EVEN": lambda arguments: arguments["query_len"] % arguments["BLOCK_M"] == 0})
DKV = _autotuned(
    EVEN(kernels.dkv_kernel), _config(128, 64, 4, 2), _config(128, 128, 8, 3), _config(64, 128, 8, 2),
    _config(64, 64, 4, 3), _config(64, 64, 4, 2), _config(32, 32, 4, 2),
)  # fmt: skip
# 4 warps, 8, and 8 held to 128 registers all took the same time on an H200: nothing to tune.
SHORT_BACKWARD = _autotuned(kernels.short_kernel, triton.Config({}, num_warps=8, num_stages=1))


def _launch(kernel, split, query: Tensor, key: Tensor, scale: float, causal: bool, present: tuple, **arguments):
    """Run `kernel` with a program for every block of queries (split "BLOCK_M"), of keys ("BLOCK_N"), or for all (None).

    `present` are the optional arguments that decide what is compiled, and so what has to be tuned anew.
    """
    (batch, heads, query_len, head_dim), (_, kv_heads, key_len, _) = query.shape, key.shape

    def programs(meta: dict) -> tuple[int]:
        if split == "BLOCK_M":
            return (batch * heads * triton.cdiv(query_len, meta["BLOCK_M"]),)
        return (batch * kv_heads * (triton.cdiv(key_len, meta["BLOCK_N"]) if split else 1),)

    lengths = [sum(length > bound for bound in LENGTHS) for length in (query_len, key_len)]
    streamed = any(isinstance(x, TensorDescriptor) for x in arguments.values())
    kind = (query.dtype.itemsize, *lengths, int(streamed), *(int(x is not None) for x in present))
    with torch.cuda.device_of(query):
        kernel[programs](
            **arguments, scale=scale, heads=heads, query_len=query_len, key_len=key_len,
            KEY=int("".join(map(str, kind))), GROUP=heads // kv_heads, D=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim), CAUSAL=causal,
        )  # fmt: skip


def _matrix(x: Tensor) -> tuple:
    """[B, H, T, D] as the kernels take it: the tensor and all strides but the last, which is 1."""
    return x, *x.stride()[:-1]


def _operand(x: Tensor | None) -> tuple | None:
    """`_matrix` of something that is only read."""
    if x is None:
        return None
    if INTERPRET and x.dtype == torch.bfloat16:
        x = x.float()  # numpy multiplies no bfloat16
    return _matrix(x if x.stride(-1) == 1 else x.contiguous())


def _has_copy_engine(device: torch.device) -> bool:
    return INTERPRET or torch.cuda.get_device_properties(device).major >= 9


def _streamed(x: Tensor | None) -> TensorDescriptor | tuple | None:
    """`_operand` of what a kernel runs through block by block: a descriptor where the copy engine can take it."""
    operand = _operand(x)
    if operand is None or not _has_copy_engine(x.device):
        return operand
    x, *strides = operand
    if x.data_ptr() % 16 or any(stride <= 0 or stride * x.element_size() % 16 for stride in strides):
        return operand
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, 1, 1])  # `fit_descriptors` sets the block


def _rows(x: Tensor | None) -> tuple | None:
    """t [H, T_q] or mask [B, T_k] as the kernels take it."""
    return None if x is None else (x.view(torch.uint8) if x.dtype == torch.bool else x, *x.stride())


def _empty_like(x: Tensor) -> Tensor:
    """Keeps the order of dimensions: heads next to channels in, heads next to channels out, ready to be merged."""
    empty = torch.empty_like(x)
    return empty if empty.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward_results(query: Tensor, value: Tensor | None, max_logits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = query.new_empty(0) if value is None else _empty_like(query)
    rows = query.shape[:3]
    return output, *(query.new_empty(shape, dtype=torch.float32) for shape in (rows, rows, rows if max_logits else 0))


@torch.library.custom_op(
    "entropy_lib::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor? value, Tensor? temperature, Tensor? mask, float scale, bool causal, "
    "bool max_logits=False) -> (Tensor output, Tensor entropy, Tensor lse, Tensor peak)",
)
def attention(query, key, value, temperature, mask, scale, causal, max_logits=False):
    """Output (empty without `value`), entropy in nats, log-sum-exp of the logits in bits, for the backward pass, and
    the largest logit of every row (empty without `max_logits`; without gradient), -inf where no key is visible.

    temperature: [H, T_q] float32 or None; mask: [B, T_k] boolean or None. Shapes are checked by the caller.
    """
    output, entropy, lse, peak = _forward_results(query, value, max_logits)
    arguments = {
        "q": _operand(query), "k": _streamed(key), "v": _streamed(value), "t": _rows(temperature), "mask": _rows(mask),
        "out": None if value is None else _matrix(output), "entropy": entropy, "lse": lse,
        "peak": peak if max_logits else None,
    }  # fmt: skip
    _launch(FORWARD, "BLOCK_M", query, key, scale, causal, (value, temperature, mask), **arguments)
    return output, entropy, lse, peak


@attention.register_fake
def _(query, key, value, temperature, mask, scale, causal, max_logits=False):
    return _forward_results(query, value, max_logits)


def _gradients(query, key, value, temperature, grad_output) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward pass fills: dQ, dK, dV (empty if no gradient arrives at the output), rows of dt (or empty)."""
    grad_value = query.new_empty(0) if grad_output is None else _empty_like(value)
    rows = query.shape[:3] if temperature is not None else (0,)
    return _empty_like(query), _empty_like(key), grad_value, query.new_empty(rows, dtype=torch.float32)


def _block(length: int) -> int:
    return max(16, triton.next_power_of_2(length))


def _is_short(query: Tensor, key: Tensor) -> bool:
    """Whether `short_kernel` takes it: its tiles must fit the shared memory (and the registers) of the GPU at once."""
    rows, columns, channels = (_block(n) for n in (query.shape[2], key.shape[2], query.shape[3]))
    if max(query.shape[2], key.shape[2]) > SHORT or INTERPRET:
        return max(query.shape[2], key.shape[2]) <= SHORT
    grouped = query.shape[1] != key.shape[1]  # then both a and dz stay there, not one after the other
    elements = 2 * (rows + columns) * channels + (2 if grouped else 1) * rows * columns
    gpu = torch.cuda.get_device_properties(query.device)
    fits = 2 * elements <= gpu.shared_memory_per_block_optin and (channels <= 64 or gpu.major >= 9)
    return fits and query.dtype.itemsize == 2


@torch.library.custom_op(
    "entropy_lib::attention_backward",
    mutates_args=(),
    schema="(Tensor? grad_output, Tensor? grad_entropy, Tensor query, Tensor key, Tensor? value, Tensor? temperature, "
    "Tensor? mask, Tensor output, Tensor entropy, Tensor lse, float scale, bool causal)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_temperature_rows)",
)
def attention_backward(
    grad_output, grad_entropy, query, key, value, temperature, mask, output, entropy, lse, scale, causal
):
    """Gradients; the temperature's as [B, H, T_q], to be summed over the batch."""
    grads = dq, dk, dv, dt = _gradients(query, key, value, temperature, grad_output)
    value = None if grad_output is None else value
    common = {
        "t": _rows(temperature), "mask": _rows(mask), "lse": lse,
        "de": None if grad_entropy is None else grad_entropy.contiguous(),
    }  # fmt: skip
    to_keys = {**common, "dk": _matrix(dk), "dv": None if grad_output is None else _matrix(dv)}
    to_rows = {**common, "dq": _matrix(dq), "dt": dt}
    call = (query, key, scale, causal, (temperature, mask, grad_output, grad_entropy))
    if _is_short(query, key):
        operands = {"q": _operand(query), "k": _operand(key), "v": _operand(value), "do": _operand(grad_output)}
        blocks = {"BLOCK_M": _block(query.shape[2]), "BLOCK_N": _block(key.shape[2])}
        _launch(SHORT_BACKWARD, None, *call, **operands, **{**to_rows, **to_keys}, **blocks)
    else:
        shift = torch.empty_like(lse)
        output = None if grad_output is None else _operand(output)
        operands = {"q": _operand(query), "k": _streamed(key), "v": _streamed(value), "do": _operand(grad_output)}
        _launch(DQ, "BLOCK_M", *call, **operands, **to_rows, out=output, entropy=entropy, shift=shift)
        operands = {"q": _streamed(query), "k": _operand(key), "v": _operand(value), "do": _streamed(grad_output)}
        _launch(DKV, "BLOCK_N", *call, **operands, **to_keys, shift=shift)
    return grads


@attention_backward.register_fake
def _(grad_output, grad_entropy, query, key, value, temperature, *_):
    return _gradients(query, key, value, temperature, grad_output)


def _save(ctx, inputs, output):
    query, key, value, temperature, mask, ctx.scale, ctx.causal, _ = inputs
    ctx.save_for_backward(query, key, value, temperature, mask, *output[:3])
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)  # a gradient that does not arrive is None, and its part of the kernels is left out


def _differentiate(ctx, grad_output, grad_entropy, *_):
    query, key, value, temperature, mask, *results = ctx.saved_tensors
    if value is None:
        grad_output = None  # of the empty stand-in
    dq, dk, dv, dt = attention_backward(
        grad_output, grad_entropy, query, key, value, temperature, mask, *results, ctx.scale, ctx.causal
    )
    dt = None if temperature is None else dt.sum(0)
    return dq, dk, None if grad_output is None else dv, dt, None, None, None, None


def _no_second_derivative(ctx, *_):
    raise NotImplementedError(
        "entropy_attention's Triton backend has no second derivative; call it with backend='eager' for one"
    )


attention.register_autograd(_differentiate, setup_context=_save)
attention_backward.register_autograd(_no_second_derivative)
