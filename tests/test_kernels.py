"""The Triton backend against the eager one in float64, in Triton's interpreter on the CPU (no GPU needed).

The interpreter must be chosen before Triton's kernels are defined, so this file runs itself in a process that has
TRITON_INTERPRET=1; the tests below the first one are skipped elsewhere.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from entropy_lib import attention, entropy_attention
from entropy_lib.attention import entropy_of_attention

TRITON = (0, 0)
if importlib.util.find_spec("triton") is not None:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own with TRITON_INTERPRET=1")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(TRITON < (3, 7), reason="no Triton whose interpreter runs with numpy 2.4 (3.7 or newer)")
@pytest.mark.timeout(1200)  # that process has a limit of its own for every test, which names the one that hangs
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-rs", "-W", "ignore", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def case(
    batch=2, heads=2, kv_heads=None, query_len=19, key_len=None, dim=16, causal=True, mask=False, temperature=None,
    dtype=torch.float32, spread=1.5, seed=0,
):  # fmt: skip
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    key_len = key_len or query_len
    kv_shape = (batch, kv_heads or heads, key_len, dim)
    inputs = [(normal(batch, heads, query_len, dim) * spread).to(dtype), normal(*kv_shape).to(dtype)]
    inputs.append(normal(*kv_shape).to(dtype))
    if temperature:
        inputs.append(torch.rand(*{"H": (heads,), "HT": (heads, query_len)}[temperature], generator=rng) + 0.5)
    if mask:
        mask = torch.rand(batch, key_len, generator=rng) > 0.3
        mask[0] = False  # a sequence that is all padding
        mask[1:, -1] = True
    grads = normal(batch, heads, query_len, dim).to(dtype), normal(batch, heads, query_len)
    return inputs, {"causal": causal, "mask": mask if mask is not False else None}, grads


def _run(inputs, options, grads, arriving, backend):
    inputs = [x.detach().requires_grad_() for x in inputs]
    query, key, value, *temperature = inputs
    output, entropy = entropy_attention(query, key, value, *temperature, **options, backend=backend)
    loss = sum((x * g).sum() for name, x, g in zip("oe", (output, entropy), grads, strict=True) if name in arriving)
    return output, entropy, *torch.autograd.grad(loss, inputs, allow_unused=True)


def _both(example, arriving="oe"):
    inputs, options, grads = example
    fused = _run(inputs, options, grads, arriving, "triton")
    return fused, _run([x.double() for x in inputs], options, grads, arriving, "eager")


def error(fused, reference):
    if reference is None or fused is None:
        return 0.0 if fused is None and (reference is None or not reference.any()) else float("inf")
    return ((fused.double() - reference).norm() / reference.norm().clamp(min=1e-6)).item()


GROUPED = "grouped, cached keys, padding, temperature by row"
CASES = {
    "causal": {"batch": 1},
    "full": {"batch": 1, "causal": False, "query_len": 33},
    "interior blocks": {"batch": 1, "heads": 1, "query_len": 50},
    GROUPED: {
        "heads": 2, "kv_heads": 1, "query_len": 18, "key_len": 35, "dim": 24, "mask": True, "temperature": "HT"
    },
    "more queries than keys, odd head size, temperature by head": {
        "batch": 1, "kv_heads": 1, "query_len": 35, "key_len": 18, "dim": 17, "temperature": "H"
    },
    "padding, full": {"heads": 1, "query_len": 5, "key_len": 21, "causal": False, "mask": True},
    "one query": {"query_len": 1, "key_len": 21, "temperature": "HT"},
}  # fmt: skip
BACKWARD = {"one program a head": 128, "two kernels": 0}


PARTIAL = [(name, arriving) for name in ("causal", GROUPED) for arriving in "oe"]


@interpreted
@pytest.mark.parametrize(("name", "arriving"), [*((name, "oe") for name in CASES), *PARTIAL])
@pytest.mark.parametrize("backward", [*BACKWARD, "two kernels, through pointers"])
def test_equals_eager_in_float64(name, backward, arriving, monkeypatch):
    monkeypatch.setattr(attention.operators, "SHORT", BACKWARD.get(backward, 0))
    if "pointers" in backward:  # as on GPUs before Hopper
        monkeypatch.setattr(attention.operators, "_has_copy_engine", lambda device: False)
    fused, reference = _both(case(**CASES[name]), arriving)
    assert fused[0].dtype == torch.float32
    assert fused[1].dtype == torch.float32
    assert all(x is None or x.isfinite().all() for x in fused)
    errors = [error(*pair) for pair in zip(fused, reference, strict=True)]
    assert max(errors) < 2e-5, errors


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_largest_logits(name):
    (query, key, value, *temperature), options, _ = case(**CASES[name])
    found = entropy_attention(query, key, value, *temperature, **options, backend="triton", return_max_logits=True)
    inputs = [x.double() for x in (query, key, value, *temperature)]
    expected = entropy_attention(*inputs, **options, backend="eager", return_max_logits=True)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-5, atol=1e-5)
    alone = entropy_of_attention(query, key, *temperature, **options, backend="triton", return_max_logits=True)
    torch.testing.assert_close(alone, found[1:])


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward", BACKWARD)
def test_half_precision(dtype, backward, monkeypatch):
    monkeypatch.setattr(attention.operators, "SHORT", BACKWARD[backward])
    fused, reference = _both(case(query_len=33, batch=1, temperature="HT", dtype=dtype))
    assert [x.dtype for x in fused] == [dtype, torch.float32, dtype, dtype, dtype, torch.float32]
    errors = [error(*pair) for pair in zip(fused, reference, strict=True)]
    assert errors[1] < 1e-6
    assert max(errors) < (2e-2 if dtype == torch.bfloat16 else 3e-3), errors


@interpreted
@pytest.mark.parametrize("backward", BACKWARD)
def test_large_logits_and_one_hot_rows(backward, monkeypatch):
    """Logits in the thousands: the entropy of a one-hot row is 0 without cancellation, and so is its gradient."""
    monkeypatch.setattr(attention.operators, "SHORT", BACKWARD[backward])
    fused, reference = _both(case(batch=1, spread=3e3, query_len=33))
    assert reference[1].max() < 0.7
    assert (fused[1] - reference[1]).abs().max() < 2e-3
    assert all(x.isfinite().all() for x in fused)
    inputs, options, grads = case(batch=1, spread=3e3, query_len=33)
    inputs[1][:, :, 0] = inputs[0][:, :, 5]  # key 0 takes all of query 5's attention, and its own logits are ~1e8
    output, entropy, *gradients = _run(inputs, options, grads, "e", "triton")
    assert entropy[:, :, 5].abs().max() == 0
    assert torch.equal(output[:, :, 5], inputs[2][:, :, 0])
    assert all(x is None or x.isfinite().all() for x in gradients)


@interpreted
@pytest.mark.parametrize("backward", BACKWARD)
def test_rows_without_keys_are_zero(backward, monkeypatch):
    monkeypatch.setattr(attention.operators, "SHORT", BACKWARD[backward])
    example = case(heads=1, query_len=9, mask=True, temperature="H")
    fused = _run(*example, "oe", "triton")
    assert not any(x[0].any() for x in fused[:5])  # batch 0 is all padding
    assert fused[0][1].any()


@interpreted
def test_strided_views_and_layout():
    """Query, key, value as views of one projection [B, T, 3·H·D], as a model has them, and gradients with holes."""
    (query, key, value), options, _ = case(query_len=21)
    joint = torch.cat([x.transpose(1, 2).flatten(2) for x in (query, key, value)], -1).requires_grad_()
    split = [x.unflatten(-1, (2, 16)).transpose(1, 2) for x in joint.split(32, -1)]
    output, entropy = entropy_attention(*split, **options, backend="triton")
    assert output.transpose(1, 2).is_contiguous()  # heads merge without a copy
    (output.sum() + entropy.sum()).backward()
    plain = joint.detach().double().requires_grad_()
    split = [x.unflatten(-1, (2, 16)).transpose(1, 2) for x in plain.split(32, -1)]
    reference = entropy_attention(*split, **options, backend="eager")
    (reference[0].sum() + reference[1].sum()).backward()
    assert error(output, reference[0]) < 1e-6
    assert error(joint.grad, plain.grad) < 1e-5
    transposed = [x.mT.contiguous().mT for x in (query, key, value)]  # last stride is not 1
    assert torch.equal(entropy_attention(*transposed, **options, backend="triton")[0], output)


@interpreted
def test_which_operands_the_copy_engine_takes():
    streamed = attention.operators._streamed
    keys = torch.randn(2, 2, 12, 16)
    assert isinstance(streamed(keys), TensorDescriptor)
    assert streamed(None) is None
    odd = torch.randn(2, 2, 12, 17)
    for refused in (odd, odd[..., :16], odd.flatten()[1:769].view(2, 2, 12, 16), keys[:1].expand(2, -1, -1, -1)):
        assert isinstance(streamed(refused), tuple)


@interpreted
def test_entropy_alone():
    inputs, options, grads = case(kv_heads=1, key_len=30, mask=True, temperature="HT")
    query, key, _, temperature = inputs
    fused = entropy_of_attention(query, key, temperature, **options, backend="triton")
    assert torch.equal(fused, entropy_attention(*inputs, **options, backend="triton")[1])
    found = []
    for backend, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (query, key, temperature)]
        entropy = entropy_of_attention(*leaves, **options, backend=backend)
        found.append((entropy, *torch.autograd.grad((entropy * grads[1]).sum(), leaves)))
    assert max(error(*pair) for pair in zip(*found, strict=True)) < 1e-5


@interpreted
@pytest.mark.parametrize("full", [False, True], ids=["bare", "temperature and mask"])
def test_operator_contract(full):
    inputs, _, _ = case(batch=1, heads=2, kv_heads=1, query_len=4, key_len=6, temperature="HT")
    query, key, value, temperature = (x.requires_grad_() for x in inputs)
    extra = (temperature, torch.ones(1, 6, dtype=torch.bool)) if full else (None, None)
    torch.library.opcheck(torch.ops.entropy_lib.attention, (query, key, value, *extra, 0.25, True))
    torch.library.opcheck(torch.ops.entropy_lib.attention, (query, key, None, *extra, 0.25, True))


@interpreted
@pytest.mark.parametrize("arriving", ["oe", "o", "e"])
def test_compiles_without_graph_breaks(arriving):
    example = case(batch=1, temperature="H", query_len=7)
    run = torch.compile(
        lambda *xs: entropy_attention(*xs, backend="triton"), fullgraph=True, backend="aot_eager", dynamic=False
    )
    inputs, _, grads = example
    inputs = [x.requires_grad_() for x in inputs]
    results = run(*inputs)
    loss = sum((x * g).sum() for name, x, g in zip("oe", results, grads, strict=True) if name in arriving)
    compiled = torch.autograd.grad(loss, inputs, allow_unused=True)
    expected = _run(*example, arriving, "triton")
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])
    for found, wanted in zip(compiled, expected[2:], strict=True):
        assert error(found, wanted) < 1e-6 or not found.any()


@interpreted
def test_checkpointing():
    inputs, options, grads = case(batch=1, query_len=7)
    expected = _run(inputs, options, grads, "oe", "triton")
    leaves = [x.detach().requires_grad_() for x in inputs]
    output, entropy = checkpoint(
        lambda *xs: entropy_attention(*xs, **options, backend="triton"), *leaves, use_reentrant=False
    )
    found = torch.autograd.grad((output * grads[0]).sum() + (entropy * grads[1]).sum(), leaves)
    assert all(torch.equal(*pair) for pair in zip(found, expected[2:], strict=True))


class Projected(torch.nn.Module):
    """One attention layer with a learnable temperature, so that DistributedDataParallel has parameters to average."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projection = torch.nn.Linear(16, 3 * 32)
        self.temperature = torch.nn.Parameter(torch.tensor([0.7, 1.3]))

    def forward(self, hidden):
        heads = self.projection(hidden).unflatten(-1, (6, 16)).transpose(1, 2)
        return entropy_attention(*heads.split(2, dim=1), self.temperature, backend="triton")


@interpreted
def test_distributed_data_parallel():
    """Two ranks with half of the batch each, summed, are one process with all of it.

    The ranks take turns in this process, on torch's stand-in for a connection and with a hook that halves a bucket in
    place of the exchange: what is tested is that the wrapper's hooks and buckets meet the operator, not sockets.
    """

    def halve(_, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer() / 2)
        return future

    hidden, model = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)), Projected()
    output, entropy = model(hidden)
    (output.square().mean() + entropy.mean()).backward()
    reduced = []
    for rank in range(2):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        try:
            parallel = torch.nn.parallel.DistributedDataParallel(Projected())
            parallel.register_comm_hook(None, halve)
            output, entropy = parallel(hidden[rank : rank + 1])
            (output.square().mean() + entropy.mean()).backward()
            reduced.append([p.grad.clone() for p in parallel.parameters()])
        finally:
            torch.distributed.destroy_process_group()
    for parameter, *of_rank in zip(model.parameters(), *reduced, strict=True):
        torch.testing.assert_close(sum(of_rank), parameter.grad)


@interpreted
def test_second_derivative_is_refused():
    inputs, options, _ = case(batch=1, query_len=3)
    query = inputs[0].requires_grad_()
    output, entropy = entropy_attention(query, *inputs[1:], **options, backend="triton")
    (first,) = torch.autograd.grad(entropy.sum() + output.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.skipif(INTERPRETED or TRITON == (0, 0), reason="the interpreter has one configuration a kernel")
def test_what_is_tuned_together_can_use_the_same_blocks():
    """Whatever length comes first, and without tuning anew at every length of a decode loop."""
    operators, calls = attention.operators, []

    class Kernel:
        def __getitem__(self, programs):
            return lambda **arguments: calls.append(arguments)

    lengths = [*range(1, 140), 500, 1023, 1024, 1025, 3000, 4096, 4097, 9000]
    pairs = [(n, n) for n in lengths] + [(1, n) for n in lengths] + [(n, 2 * n) for n in lengths]
    for query_len, key_len in pairs:
        query, key = (torch.empty(1, 1, n, 16, dtype=torch.bfloat16) for n in (query_len, key_len))
        operators._launch(Kernel(), "BLOCK_M", query, key, 1.0, True, (), q=(query,))
    for kernel in (operators.FORWARD, operators.DQ, operators.DKV):
        candidates = {}
        for call in calls:
            blocks = [tuple(config.kwargs.items()) for config in operators._worth_trying(kernel.configs, call)]
            assert candidates.setdefault(call["KEY"], blocks) == blocks, (call["query_len"], call["key_len"])
    decoding = [call["KEY"] for call in calls if call["query_len"] == 1]
    assert len(set(decoding)) <= 6
    keys = {(call["query_len"], call["key_len"]): call["KEY"] for call in calls}
    assert len({keys[1, 1024], keys[1024, 1024], keys[16, 16], keys[128, 128]}) == 4


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 8}, "head size from 16 to 128, got 8"),
        ({"dim": 129}, "head size from 16 to 128, got 129"),
        ({"dtype": torch.float64}, "got torch.float64"),
    ],
)
def test_what_triton_does_not_take(change, message):
    inputs, options, _ = case(batch=1, query_len=3, **change)
    with pytest.raises(ValueError, match=message):
        entropy_attention(*inputs, **options, backend="triton")
    entropy_attention(*inputs, **options)


@interpreted
def test_masks_that_triton_does_not_take():
    inputs, _, _ = case(query_len=3)
    with pytest.raises(ValueError, match="mask of shape"):
        entropy_attention(*inputs, mask=torch.ones(2, 1, 3, 3, dtype=torch.bool), backend="triton")


def test_bad_arguments():
    inputs, options, _ = case(query_len=3)
    with pytest.raises(ValueError, match="'auto', 'triton' or 'eager', got 'cuda'"):
        entropy_attention(*inputs, **options, backend="cuda")
    with pytest.raises(ValueError, match=r"mask of keys must have shape \[2, 3\], got \[2, 4\]"):
        entropy_attention(*inputs, mask=torch.ones(2, 4, dtype=torch.bool))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(attention, "operators", None)
    inputs, options, _ = case(query_len=3)
    with pytest.raises(ValueError, match="not installed"):
        entropy_attention(*inputs, **options, backend="triton")
    assert entropy_attention(*inputs, **options)[1].shape == (2, 2, 3)
    assert entropy_of_attention(*inputs[:2]).shape == (2, 2, 3)
