"""Triton kernels for attention with the entropy of every row, forward and backward; `operators.py` launches them.

Forward: one pass over the keys, FlashAttention-2 style (Dao 2023), with one more running sum for the entropy. Per row,
with z the logits in bits (q·k·scale/t·log2 e), m their maximum so far and x_j = z_j - m <= 0:

    l = Σ 2^x_j     w = Σ 2^x_j·x_j     when m grows by d:  w <- 2^-d·(w - d·l),  l <- 2^-d·l
    LSE = m + log2 l                    H = ln 2·(log2 l - w/l)   nats; exactly 0 for a one-hot row at any |z|

Backward, with e_i the gradient arriving at H_i, dP = dO·Vᵀ and a recomputed from LSE:

    dz_ij = a_ij·(dP_ij - c_i - e_i·log a_ij)     c_i = D_i + e_i·H_i     D_i = Σ_k dO_ik·O_ik
    dQ = dz·K·scale/t     dK = dzᵀ·Q·scale/t     dV = aᵀ·dO     dt_i = -(1/t_i)·q_i·dq_i

c_i is also Σ_j a_ij·(dP_ij - e_i·log a_ij), which the short kernel uses: it sees whole rows and needs neither O nor H.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e28)  # where m starts: finite, so that no inf - inf arises in a row without visible keys
HIDDEN = tl.constexpr(-1e34)  # logit of an invisible key while m is sought, below FLOOR
NOTHING = tl.constexpr(-1e6)  # its x afterwards: 2^x = 0 and 2^x·x = 0
DOT = tl.constexpr("tf32x3")  # float32 products in three tf32 steps, near float32 accuracy; no effect on 16-bit inputs


# A matrix argument is a tuple (tensor, batch stride, head stride, row stride), or None; `t` and `mask` have one stride
# less. What is None is compiled away. q, k, v are read in place, whatever the strides; only the last one must be 1.
# Those that a kernel streams through may be tensor descriptors of blocks [1, 1, BLOCK, BLOCK_D] instead: from Hopper on
# the copy engine (TMA) then loads them, zeros beyond the end, and leaves the registers to the arithmetic.
@triton.jit
def _pointers(x, batch, head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    base = x[0] + tl.cast(batch, tl.int64) * x[1] + tl.cast(head, tl.int64) * x[2] + tl.cast(start, tl.int64) * x[3]
    return base + tl.arange(0, BLOCK)[:, None] * x[3] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _inside(start, limit, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    return (start + tl.arange(0, BLOCK) < limit)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]


@triton.jit
def _load(
    x, batch, head, start, limit, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr
):
    """Rows start..start+BLOCK of x[batch, head]: [limit, D], zeros beyond it (rows beyond only where EDGE)."""
    if isinstance(x, tl.tensor_descriptor):
        tile = tl.reshape(x.load([batch, head, start, 0]), [BLOCK, BLOCK_D])
    elif EDGE or BLOCK_D != D:
        inside = _inside(start, limit, D, BLOCK, BLOCK_D)
        tile = tl.load(_pointers(x, batch, head, start, BLOCK, BLOCK_D), mask=inside, other=0.0)
    else:
        tile = tl.load(_pointers(x, batch, head, start, BLOCK, BLOCK_D))
    return tile


@triton.jit
def _store(x, batch, head, start, limit, tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = _pointers(x, batch, head, start, BLOCK, BLOCK_D)
    tl.store(pointers, tile.to(x[0].dtype.element_ty), mask=_inside(start, limit, D, BLOCK, BLOCK_D))


@triton.jit
def _rows_of(x, place, rows, query_len, EVEN: tl.constexpr):
    """One number a row, 0 past the end (where EVEN, no block reaches past it)."""
    return tl.load(x + place) if EVEN else tl.load(x + place, mask=rows < query_len, other=0.0)


@triton.jit
def _inverse_temperature(t, head, rows, query_len):
    inverse = tl.full(rows.shape, 1.0, tl.float32)
    if t is not None:
        inverse /= tl.load(t[0] + head * t[1] + rows * t[2], mask=rows < query_len, other=1.0)
    return inverse


@triton.jit
def _keys_of(mask, batch, columns):
    return mask[0] + tl.cast(batch, tl.int64) * mask[1] + columns * mask[2]


@triton.jit
def _visible(rows, columns, query_len, key_len, mask, batch, CAUSAL: tl.constexpr):
    seen = columns < key_len
    if mask is not None:
        seen = seen & (tl.load(_keys_of(mask, batch, columns), mask=seen, other=0) != 0)
    visible = seen[None, :] & (rows >= 0)[:, None]
    if CAUSAL:  # the queries are the last positions of the keys
        visible = visible & (columns[None, :] <= rows[:, None] + (key_len - query_len))
    return visible


@triton.jit
def _key_range(first, query_len, key_len, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(inner, high) for a block of rows: it sees all keys below inner, a multiple of BLOCK_N, and none from high on."""
    inner, high = key_len, key_len
    if CAUSAL:
        inner = tl.minimum(tl.maximum(first + 1 + key_len - query_len, 0), key_len)
        high = tl.minimum(tl.maximum(first + BLOCK_M + key_len - query_len, 0), key_len)
    return inner // BLOCK_N * BLOCK_N, high


@triton.jit
def forward_kernel(
    q, k, v, t, mask, out, entropy, lse, peak, scale, heads, query_len, key_len, KEY: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(query_len, BLOCK_M)
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # the longest causal rows first
    flat = tl.program_id(0) // blocks
    batch, head = flat // heads, flat % heads
    rows = first + tl.arange(0, BLOCK_M)
    row_scale = _inverse_temperature(t, head, rows, query_len) * (scale * LOG2E)
    q_tile = _load(q, batch, head, first, query_len, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    inner, high = _key_range(first, query_len, key_len, CAUSAL, BLOCK_M, BLOCK_N)
    if mask is not None:
        inner = inner * 0
    for EDGE in tl.static_range(2):  # blocks seen by all rows, then those that need masking
        if EDGE or mask is None:
            for start in range(inner if EDGE else 0, high if EDGE else inner, BLOCK_N):
                k_tile = _load(k, batch, head // GROUP, start, key_len, D, BLOCK_N, BLOCK_D, EDGE)
                z = tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT)
                if EDGE:
                    columns = start + tl.arange(0, BLOCK_N)
                    visible = _visible(rows, columns, query_len, key_len, mask, batch, CAUSAL)
                    z = z * row_scale[:, None]
                    higher = tl.maximum(top, tl.max(tl.where(visible, z, HIDDEN), 1))
                    x = tl.where(visible, z - higher[:, None], NOTHING)
                else:
                    higher = tl.maximum(top, tl.max(z, 1) * row_scale)
                    x = z * row_scale[:, None] - higher[:, None]
                p = tl.exp2(x)
                shrink = tl.exp2(top - higher)
                weighted = shrink * (weighted + total * (top - higher)) + tl.sum(p * x, 1)
                total = shrink * total + tl.sum(p, 1)
                if v is not None:
                    v_tile = _load(v, batch, head // GROUP, start, key_len, D, BLOCK_N, BLOCK_D, EDGE)
                    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=DOT)
                top = higher

    safe = tl.where(total > 0, total, 1.0)  # a row without a visible key has output, entropy and LSE 0
    place = tl.cast(flat, tl.int64) * query_len + rows
    tl.store(entropy + place, tl.maximum(LN2 * (tl.log2(safe) - weighted / safe), 0.0), mask=rows < query_len)
    tl.store(lse + place, tl.where(total > 0, top + tl.log2(safe), 0.0), mask=rows < query_len)
    if peak is not None:
        tl.store(peak + place, tl.where(total > 0, LN2 * top, float("-inf")), mask=rows < query_len)
    if v is not None:
        _store(out, batch, head, first, query_len, acc / safe[:, None], D, BLOCK_M, BLOCK_D)


@triton.jit
def dq_kernel(
    q, k, v, t, mask, out, entropy, lse, do, de, dq, dt, shift, scale, heads, query_len, key_len, KEY: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, and what else comes by rows: c_i into `shift`, for `dkv_kernel`, and the temperature's gradient."""
    blocks = tl.cdiv(query_len, BLOCK_M)
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    flat = tl.program_id(0) // blocks
    batch, head = flat // heads, flat % heads
    rows = first + tl.arange(0, BLOCK_M)
    place, inside = tl.cast(flat, tl.int64) * query_len + rows, rows < query_len
    inverse = _inverse_temperature(t, head, rows, query_len)
    row_scale = inverse * (scale * LOG2E)
    q_tile = _load(q, batch, head, first, query_len, D, BLOCK_M, BLOCK_D, True)
    lse_rows = tl.load(lse + place, mask=inside, other=0.0)
    c = tl.zeros([BLOCK_M], tl.float32)
    if de is not None:
        e = tl.load(de + place, mask=inside, other=0.0)
        c += e * tl.load(entropy + place, mask=inside, other=0.0)
        e *= LN2  # x, which it multiplies below, is log a in bits
    if do is not None:
        do_tile = _load(do, batch, head, first, query_len, D, BLOCK_M, BLOCK_D, True)
        out_tile = _load(out, batch, head, first, query_len, D, BLOCK_M, BLOCK_D, True)
        c += tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(shift + place, c, mask=inside)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    inner, high = _key_range(first, query_len, key_len, CAUSAL, BLOCK_M, BLOCK_N)
    if mask is not None:
        inner = inner * 0
    for EDGE in tl.static_range(2):
        if EDGE or mask is None:
            for start in range(inner if EDGE else 0, high if EDGE else inner, BLOCK_N):
                k_tile = _load(k, batch, head // GROUP, start, key_len, D, BLOCK_N, BLOCK_D, EDGE)
                if do is not None:
                    v_tile = _load(v, batch, head // GROUP, start, key_len, D, BLOCK_N, BLOCK_D, EDGE)
                x = tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT)
                da = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if do is not None:
                    da = tl.dot(do_tile, tl.trans(v_tile), input_precision=DOT)
                x = x * row_scale[:, None] - lse_rows[:, None]
                if EDGE:
                    columns = start + tl.arange(0, BLOCK_N)
                    x = tl.where(_visible(rows, columns, query_len, key_len, mask, batch, CAUSAL), x, NOTHING)
                da = da - c[:, None]
                if de is not None:
                    da = da - e[:, None] * x
                dz = tl.exp2(x) * da
                acc = tl.dot(dz.to(k_tile.dtype), k_tile, acc, input_precision=DOT)
    acc *= (inverse * scale)[:, None]
    _store(dq, batch, head, first, query_len, acc, D, BLOCK_M, BLOCK_D)
    if t is not None:
        tl.store(dt + place, -inverse * tl.sum(q_tile.to(tl.float32) * acc, 1), mask=inside)


@triton.jit
def dkv_kernel(
    q, k, v, t, mask, lse, do, de, dk, dv, shift, scale, heads, query_len, key_len, KEY: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys, over the queries of all heads of its group; tiles are [queries, keys].

    Keys never mix here, so that masked ones and those past the end need no care until the store; queries past the end
    have q = dO = e = c = 0 and add nothing. Both products that need no exponential come first, back to back, and
    queries are the rows, so that a thread holds few of LSE, c and e: on an H200 at T = 8192 that is 14% faster than
    tiles [keys, queries], although a and dz must then be transposed through shared memory.
    """
    blocks = tl.cdiv(key_len, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    kv_heads = heads // GROUP
    batch, kv_head = tl.program_id(0) // blocks // kv_heads, tl.program_id(0) // blocks % kv_heads
    keys = first + tl.arange(0, BLOCK_N)
    k_tile = _load(k, batch, kv_head, first, key_len, D, BLOCK_N, BLOCK_D, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if do is not None:
        v_tile = _load(v, batch, kv_head, first, key_len, D, BLOCK_N, BLOCK_D, True)
        dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    low, inner = 0, 0  # queries below low see none of these keys, those from inner on see all of them
    if CAUSAL:
        diagonal = first - (key_len - query_len)
        low = tl.maximum(diagonal, 0) // BLOCK_M * BLOCK_M
        inner = tl.cdiv(tl.maximum(diagonal + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
        inner = tl.maximum(tl.minimum(inner, query_len), low)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for EDGE in tl.static_range(1 if CAUSAL else 0, -1, -1):
            for start in range(low if EDGE else inner, inner if EDGE else query_len, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                place = (tl.cast(batch, tl.int64) * heads + head) * query_len + rows
                inverse = _inverse_temperature(t, head, rows, query_len)
                q_tile = _load(q, batch, head, start, query_len, D, BLOCK_M, BLOCK_D, True)
                if do is not None:
                    do_tile = _load(do, batch, head, start, query_len, D, BLOCK_M, BLOCK_D, True)
                # loaded ahead of the products, which hide the latency
                lse_rows = _rows_of(lse, place, rows, query_len, EVEN)
                c = _rows_of(shift, place, rows, query_len, EVEN)
                if de is not None:
                    e = _rows_of(de, place, rows, query_len, EVEN) * LN2
                x = tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT)
                da = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if do is not None:
                    da = tl.dot(do_tile, tl.trans(v_tile), input_precision=DOT)
                x = x * (inverse * (scale * LOG2E))[:, None] - lse_rows[:, None]
                if EDGE:
                    x = tl.where(keys[None, :] <= rows[:, None] + (key_len - query_len), x, NOTHING)
                p = tl.exp2(x)
                if do is not None:
                    dv_acc = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, dv_acc, input_precision=DOT)
                da = da - c[:, None]
                if de is not None:
                    da = da - e[:, None] * x
                dz = p * da * inverse[:, None]
                dk_acc = tl.dot(tl.trans(dz.to(q_tile.dtype)), q_tile, dk_acc, input_precision=DOT)
    seen = keys >= 0
    if mask is not None:
        seen = tl.load(_keys_of(mask, batch, keys), mask=keys < key_len, other=0) != 0
    _store(dk, batch, kv_head, first, key_len, tl.where(seen[:, None], dk_acc * scale, 0.0), D, BLOCK_N, BLOCK_D)
    if do is not None:
        _store(dv, batch, kv_head, first, key_len, tl.where(seen[:, None], dv_acc, 0.0), D, BLOCK_N, BLOCK_D)


@triton.jit
def short_kernel(
    q, k, v, t, mask, lse, do, de, dq, dk, dv, dt, scale, heads, query_len, key_len, KEY: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of a key-value head whose queries and keys fit one tile: a is recomputed once."""
    kv_heads = heads // GROUP
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = rows < query_len
    visible = _visible(rows, columns, query_len, key_len, mask, batch, CAUSAL)
    k_tile = _load(k, batch, kv_head, 0, key_len, D, BLOCK_N, BLOCK_D, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if do is not None:
        v_tile = _load(v, batch, kv_head, 0, key_len, D, BLOCK_N, BLOCK_D, True)
        dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        place = (tl.cast(batch, tl.int64) * heads + head) * query_len + rows
        inverse = _inverse_temperature(t, head, rows, query_len)
        q_tile = _load(q, batch, head, 0, query_len, D, BLOCK_M, BLOCK_D, True)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT) * (inverse * (scale * LOG2E))[:, None]
        x = tl.where(visible, x - tl.load(lse + place, mask=inside, other=0.0)[:, None], NOTHING)
        p = tl.exp2(x)
        da = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if de is not None:
            da -= (tl.load(de + place, mask=inside, other=0.0) * LN2)[:, None] * x
        if do is not None:
            do_tile = _load(do, batch, head, 0, query_len, D, BLOCK_M, BLOCK_D, True)
            da += tl.dot(do_tile, tl.trans(v_tile), input_precision=DOT)
            dv_acc = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, dv_acc, input_precision=DOT)
        dz = p * (da - tl.sum(p * da, 1)[:, None]) * inverse[:, None]
        dz = dz.to(q_tile.dtype)
        dk_acc = tl.dot(tl.trans(dz), q_tile, dk_acc, input_precision=DOT)
        dq_tile = tl.dot(dz, k_tile, input_precision=DOT) * scale
        _store(dq, batch, head, 0, query_len, dq_tile, D, BLOCK_M, BLOCK_D)
        if t is not None:
            tl.store(dt + place, -inverse * tl.sum(q_tile.to(tl.float32) * dq_tile, 1), mask=inside)
    _store(dk, batch, kv_head, 0, key_len, dk_acc * scale, D, BLOCK_N, BLOCK_D)
    if do is not None:
        _store(dv, batch, kv_head, 0, key_len, dv_acc, D, BLOCK_N, BLOCK_D)
