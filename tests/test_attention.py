"""Attention with entropy against PyTorch's own attention and the entropy of an explicit softmax."""

import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from entropy_lib import attention, attention_entropy, entropy_attention, entropy_of_attention, max_entropy


def random_qkv(batch=2, heads=4, kv_heads=None, queries=5, keys=None, dim=8, dtype=torch.float64):
    keys, kv_heads = keys or queries, kv_heads or heads
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)
    return [(1.5 * torch.randn(shape, dtype=torch.float64)).to(dtype) for shape in shapes]


def visible_keys(batch, heads, queries, keys, causal, mask):
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if causal:
        visible &= torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    if mask is not None:
        visible &= mask[:, None, None, :] if mask.dim() == 2 else mask
    return visible


def reference(query, key, value, temperature=None, scale=None, causal=True, mask=None):
    """PyTorch's attention with 1/t moved into the queries; entropy from an explicit softmax, one head at a time."""
    batch, heads, queries, dim = query.shape
    repeat = heads // key.shape[1]
    key, value = (torch.stack([x[:, h // repeat] for h in range(heads)], dim=1) for x in (key, value))
    if temperature is not None:
        t = temperature[:, None].expand(heads, queries) if temperature.dim() == 1 else temperature
        query = query / t[None, :, :, None]
    visible = visible_keys(batch, heads, queries, key.shape[2], causal, mask)
    output = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    logits = torch.einsum("bhid,bhjd->bhij", query, key) * (dim**-0.5 if scale is None else scale)
    attention = logits.masked_fill(~visible, -math.inf).softmax(-1)
    empty = ~visible.any(-1)
    return output.masked_fill(empty[..., None], 0.0), attention_entropy(attention).masked_fill(empty, 0.0)


def assert_matches(qkv, tolerance=1e-10, **kwargs):
    output, entropy = entropy_attention(*qkv, **kwargs)
    expected_output, expected_entropy = reference(*qkv, **kwargs)
    torch.testing.assert_close(output, expected_output, rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=tolerance)


@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    queries=st.integers(1, 6),
    keys=st.integers(1, 8),
    dim=st.integers(1, 8),
    causal=st.booleans(),
    mask_kind=st.sampled_from([None, "padding", "full", "head", "query"]),
    temperature_kind=st.sampled_from([None, "H", "HT"]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 9),
)
def test_matches_pytorch(batch, kv_heads, groups, queries, keys, dim, causal, mask_kind, temperature_kind, scale, seed):
    # more queries than keys is included: under a causal mask the first queries then see nothing
    torch.manual_seed(seed)
    heads = kv_heads * groups
    shapes = {
        "padding": (batch, keys),
        "full": (batch, heads, queries, keys),
        "head": (1, heads, 1, keys),
        "query": (1, 1, queries, keys),
    }
    mask = None if mask_kind is None else torch.rand(shapes[mask_kind]) < 0.7
    t_shape = {None: None, "H": (heads,), "HT": (heads, queries)}[temperature_kind]
    temperature = None if t_shape is None else 0.2 + 2 * torch.rand(t_shape, dtype=torch.float64)
    qkv = random_qkv(batch, heads, kv_heads, queries, keys, dim)
    assert_matches(qkv, temperature=temperature, scale=scale, causal=causal, mask=mask)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_stock_causal_attention(backend):
    query, key, value = random_qkv(queries=7)
    output, entropy = entropy_attention(query, key, value, backend=backend)
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value, is_causal=True))
    assert entropy.shape == (2, 4, 7)
    assert (entropy[..., 0].abs() < 1e-12).all()  # one key
    assert (entropy <= max_entropy(7, causal=True, dtype=torch.float64) + 1e-12).all()


def test_one_temperature_per_row():
    # t[h, i] belongs to query i of head h: changing it moves the entropy of that row only
    query, key, value = random_qkv(queries=6)
    temperature = torch.ones(4, 6, dtype=torch.float64)
    _, before = entropy_attention(query, key, value, temperature)
    temperature[2, 4] = 3.0
    _, after = entropy_attention(query, key, value, temperature)
    changed = torch.zeros_like(before, dtype=torch.bool)
    changed[:, 2, 4] = True
    assert torch.equal((before - after).abs() > 1e-9, changed)
    assert (after[:, 2, 4] > before[:, 2, 4]).all()  # t > 1 diffuses


def test_temperature_limits():
    query, key, value = random_qkv(queries=6)
    ceiling = max_entropy(6, causal=True, dtype=torch.float64)
    for t, expected in ((1e9, ceiling), (1e-6, torch.zeros_like(ceiling))):
        _, entropy = entropy_attention(query, key, value, torch.full((4,), t, dtype=torch.float64))
        torch.testing.assert_close(entropy, expected.expand_as(entropy), rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_of_output_and_entropy(causal):
    qkv = [x.requires_grad_() for x in random_qkv(1, 4, 2, 3, 4, dim=2)]
    temperature = (0.5 + torch.rand(4, 3, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(1, 4, 3, 4) < 0.8
    mask[0, 1, 2] = False  # a fully masked row
    mask[0, 0, 0, 1:] = False  # one key
    for kwargs in ({}, {"mask": mask}):
        assert torch.autograd.gradcheck(
            lambda q, k, v, t, kwargs=kwargs: entropy_attention(q, k, v, t, causal=causal, **kwargs),
            (*qkv, temperature),
        )
    per_head = temperature.detach()[:, 0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: entropy_attention(*qkv, t, causal=causal), per_head)


def test_fully_masked_row():
    qkv = [x.requires_grad_() for x in random_qkv(2, 2, queries=4)]
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0] = False
    mask[1, :2] = False  # left padding: under the causal mask queries 0 and 1 see nothing
    output, entropy = entropy_attention(*qkv, mask=mask)
    for result in (output, entropy):
        assert (result[0] == 0).all()
        assert (result[1, :, :2] == 0).all()
        assert torch.isfinite(result).all()
    (output.square().sum() + entropy.sum()).backward()
    for x in qkv:
        assert torch.isfinite(x.grad).all()
        assert (x.grad[0] == 0).all()
        assert (x.grad[1] != 0).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_is_computed_in_float32(dtype, tolerance):
    qkv = random_qkv(queries=64, dim=16, dtype=dtype)
    output, entropy = entropy_attention(*qkv)
    assert output.dtype == dtype
    assert entropy.dtype == torch.float32
    expected_output, expected_entropy = reference(*(x.double() for x in qkv))
    torch.testing.assert_close(output.double(), expected_output, rtol=tolerance, atol=tolerance)  # rounded once
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        _, autocast_entropy = entropy_attention(*qkv)
    assert torch.equal(autocast_entropy, entropy)


def test_huge_logits_are_one_hot():
    qkv = [x.requires_grad_() for x in random_qkv(queries=5, dtype=torch.float32)]
    output, entropy = entropy_attention(*qkv, scale=1e6)
    (output.sum() + entropy.sum()).backward()
    torch.testing.assert_close(entropy, torch.zeros_like(entropy))
    assert all(torch.isfinite(x.grad).all() for x in qkv)


@pytest.fixture
def two_queries_at_once(monkeypatch):
    """Chunks as in long sequences: two queries by four heads by six keys in float64."""
    monkeypatch.setattr(attention, "WHOLE_QUERIES", 2)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 2 * 4 * 6 * 8)


@pytest.mark.parametrize("queries", [3, 6, 8])  # 8 queries of 6 keys: the first two see nothing if causal
@pytest.mark.parametrize("mask_shape", [None, (1, 6), (1, 4, 1, 6), (1, 1, -1, 6), (1, 1, -1, 1), (4, -1, 6)])
@pytest.mark.parametrize("causal", [True, False])
def test_chunks_of_queries_change_nothing(two_queries_at_once, monkeypatch, queries, mask_shape, causal):
    qkv = [x.requires_grad_() for x in random_qkv(1, 4, 2, queries, 6, dim=3)]
    temperature = (0.5 + torch.rand(4, queries, dtype=torch.float64)).requires_grad_()
    mask = None if mask_shape is None else torch.rand([queries if n == -1 else n for n in mask_shape]) < 0.7
    found = []
    for whole in (2, 512):
        monkeypatch.setattr(attention, "WHOLE_QUERIES", whole)
        output, entropy = entropy_attention(*qkv, temperature, causal=causal, mask=mask)
        alone = entropy_of_attention(*qkv[:2], temperature, causal=causal, mask=mask)
        with torch.no_grad():
            bare = entropy_attention(*qkv, temperature, causal=causal, mask=mask)
        loss = output.square().sum() + entropy.sin().sum() + alone.cos().sum()
        first = torch.autograd.grad(loss, (*qkv, temperature), create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (*qkv, temperature))
        found.append((output, entropy, alone, *bare, *first, *second))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_chunks_compile_and_know_autocast(two_queries_at_once):
    qkv = [x.requires_grad_() for x in random_qkv(1, 4, 2, 5, 6, dim=2, dtype=torch.float32)]
    expected = entropy_attention(*qkv)
    compiled = torch.compile(entropy_attention, backend="aot_eager", fullgraph=True)(*qkv)
    with torch.autocast("cpu", torch.bfloat16):
        cast = entropy_attention(*qkv)
    gradients = [
        torch.autograd.grad(output.sum() + entropy.sum(), qkv) for output, entropy in (expected, compiled, cast)
    ]
    for other, gradient in zip((compiled, cast), gradients[1:], strict=True):
        torch.testing.assert_close((other, gradient), (expected, gradients[0]))


class Memory(TorchDispatchMode):
    """The bytes of all tensors that operations made inside: alive now, and at most."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.seen[tensor.untyped_storage()] = True
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage] = True
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, size):
        self.alive -= size


@pytest.mark.parametrize(
    ("values", "mask", "gradients"), [(True, None, True), (True, "window", True), (False, None, False)]
)
def test_memory_stays_below_one_matrix_of_weights(monkeypatch, values, mask, gradients):
    monkeypatch.setattr(attention, "WHOLE_QUERIES", 16)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 2**14)
    inputs = [x.requires_grad_(gradients) for x in random_qkv(1, 2, 1, 256, dim=4, dtype=torch.float32)]
    position = torch.arange(256)
    window = (position[:, None] - position).abs()[None, None] < 5 if mask else None
    with Memory() as memory:
        if values:
            results = entropy_attention(*inputs, mask=window, causal=not mask)
        else:
            results = [entropy_of_attention(*inputs[:2], mask=window, causal=not mask)]
        if gradients:
            sum(x.square().sum() for x in results).backward()
    assert memory.peak < 4 * 2 * 256 * 256


Q = torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": Q[0]}, "expected query"),
        ({"key": Q[:, :, :2]}, "expected query"),
        ({"key": Q[..., :4], "value": Q[..., :4]}, "head size"),
        ({"key": Q[:1], "value": Q[:1]}, "batch"),
        ({"key": Q[:, :3], "value": Q[:, :3]}, "multiple"),
        ({"temperature": torch.ones(3)}, r"\[4\] or \[4, 3\], got \[3\]"),
        ({"temperature": torch.ones(4, 2)}, r"got \[4, 2\]"),
        ({"temperature": torch.tensor(1.0)}, "temperature"),
        ({"mask": torch.ones(2, 3)}, "boolean"),
        ({"mask": torch.zeros(2, 1, 3, 3)}, "boolean"),
        ({"backend": "flash"}, "'flash'"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        entropy_attention(**{"query": Q, "key": Q, "value": Q, **arguments})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_largest_logits_by_brute_force(monkeypatch, causal, masked, temperature, whole):
    if not whole:
        monkeypatch.setattr("entropy_lib.attention.WHOLE_QUERIES", 1)
        monkeypatch.setattr("entropy_lib.attention.CHUNK_BYTES", 700)
    queries, keys = 5, 7
    query = torch.randn(2, 4, queries, 3, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 2, 2, keys, 3, dtype=torch.float64)
    t = torch.rand(4, queries, dtype=torch.float64) + 0.5 if temperature else None
    mask = torch.rand(2, keys) > 0.4 if masked else None
    if masked:
        mask[0] = False
    found = entropy_attention(query, key, value, t, scale=0.7, causal=causal, mask=mask, return_max_logits=True)
    alone = entropy_of_attention(query, key, t, scale=0.7, causal=causal, mask=mask, return_max_logits=True)
    for b, h, i in itertools.product(range(2), range(4), range(queries)):
        seen = [j for j in range(keys) if (not causal or j <= i + keys - queries) and (mask is None or mask[b, j])]
        row = 0.7 * query[b, h, i] / (t[h, i] if temperature else 1)
        logits = [(row @ key[b, h // 2, j]).item() for j in seen]
        assert found[2][b, h, i].item() == pytest.approx(max(logits, default=-math.inf))
    assert not found[2].requires_grad
    torch.testing.assert_close(alone, found[1:])
    plain = entropy_attention(query, key, value, t, scale=0.7, causal=causal, mask=mask)
    torch.testing.assert_close(found[:2], plain, rtol=0, atol=0)
