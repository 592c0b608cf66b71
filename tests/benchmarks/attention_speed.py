"""Speed, memory and error of attention with entropy on a GPU, beside what else could compute it.

    python -m tests.benchmarks.attention_speed --output data/benchmarks/attention_h200.json

Each implementation makes output and entropy; the timed step adds a penalty on the entropy and asks for the gradients
of query, key and value, with a gradient arriving at the output too. Those without entropy are the floor. Times are
medians of CUDA graph replays (`step_ms`: the GPU's time) and of calls from Python (`launched_step_ms`, which at T = 128
is mostly launching); memory is the peak above the inputs. Every row is written to the file as soon as it is known.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from entropy_lib import attention, entropy_attention
from entropy_lib.attention import entropy_of_attention

HEADS, DIM = 12, 64
SIZES = "512x128,64x1024,8x8192,1x65536"
MARGIN, THRESHOLD, COEFF = 0.2, 0.5, 1e-2


def penalty(entropy, query_len):
    """λ·mean of squared deviations outside the tolerance band (Algorithm 1)."""
    ceiling = math.log(query_len)
    deviation = entropy - THRESHOLD * ceiling
    return COEFF * torch.where(deviation.abs() > MARGIN * ceiling, deviation, 0.0).square().mean()


def plain(query, key, value):
    return entropy_attention(query, key, value, backend="eager")


def published(query, key, value):
    """The published approach: weights kept, heads in a Python loop, log(a + 1e-9). Gives the penalty itself."""
    query_len = query.shape[2]
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    hidden = torch.ones(query_len, query_len, dtype=torch.bool, device=query.device).triu(1)
    weights = logits.masked_fill(hidden, -math.inf).float().softmax(-1)
    entropy = -torch.nansum(weights * torch.log(weights + 1e-9), -1)
    loss = sum(penalty(entropy[:, head], query_len) for head in range(entropy.shape[1])) / entropy.shape[1]
    return weights.to(value.dtype) @ value, loss


def implementations(query_len):
    """{name: (function of query, key, value, has entropy)}; the compiled ones are made anew for each size."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    with contextlib.suppress(Exception):
        torch._dynamo.reset()
    blocks = []  # made on first use, so that a failure stays with FlexAttention

    def block_mask():
        if not blocks:
            make = torch.compile(create_block_mask) if query_len > 8192 else create_block_mask
            blocks.append(make(lambda b, h, i, j: i >= j, None, None, query_len, query_len, device="cuda"))
        return blocks[0]

    flex = torch.compile(flex_attention, dynamic=False)

    def flex_entropy(query, key, value):
        """V' = [V; K] gives Σ_j a_ij k_j beside the output: H_i = LSE_i - q_i·Σ_j a_ij k_j·scale."""
        both, lse = flex(query, key, torch.cat([value, key], -1), block_mask=block_mask(), return_lse=True)
        output, mean_key = both[..., :DIM], both[..., DIM:]
        return output, lse - (query.float() * mean_key.float()).sum(-1) / math.sqrt(DIM)

    return {
        "fused (triton)": (lambda q, k, v: entropy_attention(q, k, v, backend="triton"), True),
        "sdpa, no entropy": (lambda q, k, v: (F.scaled_dot_product_attention(q, k, v, is_causal=True), None), False),
        "flex, no entropy": (lambda q, k, v: (flex(q, k, v, block_mask=block_mask()), None), False),
        "flex on [V;K]": (flex_entropy, True),
        "eager, compiled": (torch.compile(plain, dynamic=False), True),
        "eager": (plain, True),
        "published loop": (published, True),
    }


def step(function, inputs, grad_output):
    output, entropy = function(*inputs)
    if entropy is None:
        return torch.autograd.grad(output, inputs, grad_output)
    loss = entropy if entropy.dim() == 0 else penalty(entropy, entropy.shape[-1])
    return torch.autograd.grad((output, loss), inputs, (grad_output, torch.ones_like(loss)))


def draw(batch, query_len, dtype=torch.bfloat16, seed=0):
    rng = torch.Generator("cuda").manual_seed(seed)
    shape = (batch, HEADS, query_len, DIM)
    *inputs, grad = (torch.randn(shape, device="cuda", generator=rng, dtype=torch.float32).to(dtype) for _ in range(4))
    return [x.requires_grad_() for x in inputs], grad


def median_ms(call, quick):
    from triton.testing import do_bench

    return do_bench(call, warmup=20 if quick else 50, rep=60 if quick else 250, return_mode="median")


def replayed_ms(call, quick):
    """Median of replays of a CUDA graph of the call: what the GPU needs, without what Python needs to launch it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay, quick)


def measure(function, has_entropy, batch, query_len, quick):
    inputs, grad = draw(batch, query_len)
    step(function, inputs, grad)  # compile and tune
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(function, inputs, grad)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    launched = median_ms(lambda: step(function, inputs, grad), quick)
    both = replayed_ms(lambda: step(function, inputs, grad), quick)
    forward_ms = replayed_ms(lambda: function(*inputs), quick)
    flops = 4 * batch * HEADS * query_len**2 * DIM / 2  # half of the square is causal; backward counts 2.5 times that
    return {
        "step_ms": both, "launched_step_ms": launched, "forward_ms": forward_ms,
        "peak_extra_gib": peak / 2**30, "entropy": has_entropy,
        "step_tflops": 3.5 * flops / both / 1e9, "forward_tflops": flops / forward_ms / 1e9,
    }  # fmt: skip


def entropy_alone(batch, query_len, quick):
    (query, key, _), _ = draw(batch, query_len)
    with torch.no_grad():
        entropy_of_attention(query, key)  # compile and tune
        return {"forward_ms": replayed_ms(lambda: entropy_of_attention(query, key), quick)}


def guarded(call, *arguments, **keywords):
    """The call's dictionary, or why there is none."""
    try:
        return call(*arguments, **keywords)
    except torch.OutOfMemoryError:
        return {"failed": "does not fit"}
    except Exception as error:
        text = str(error)
        return {"failed": "does not fit" if "out of memory" in text else f"{type(error).__name__}: {text[:300]}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def relative(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def errors_at_size(batch, query_len):
    """The tuned kernel against float64: the last rows of the last sequence, and one head's gradients where they fit."""
    (query, key, value), grad = inputs, _ = draw(batch, query_len, seed=1)
    output, entropy = entropy_attention(*inputs, backend="triton")
    grad_entropy = torch.randn_like(entropy)
    grads = torch.autograd.grad((output, entropy), inputs, (grad, grad_entropy))
    last, head = slice(-min(query_len, 64), None), slice(HEADS - 1, None)
    rows = [x.detach()[-1:].double() for x in (query[:, :, last], key, value)]
    wanted = entropy_attention(*rows, backend="eager")
    result = {
        "output": relative(output[-1:, :, last], wanted[0]),
        "entropy": relative(entropy[-1:, :, last], wanted[1]),
        "entropy_max_abs_nats": (entropy[-1:, :, last] - wanted[1]).abs().max().item(),
    }
    if query_len <= 8192:
        one = [x.detach()[-1:, head].double().requires_grad_() for x in inputs]
        reference = entropy_attention(*one, backend="eager")
        wanted = torch.autograd.grad(reference, one, (grad[-1:, head].double(), grad_entropy[-1:, head].double()))
        for name, found, want in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
            result[name] = relative(found[-1:, head], want)
    return result


@contextlib.contextmanager
def untuned(choice=-2):
    """One configuration a kernel: no time goes into tuning."""
    tuners = [getattr(attention.operators, name) for name in ("FORWARD", "DQ", "DKV", "SHORT_BACKWARD")]
    kept = [tuner.configs for tuner in tuners]
    for tuner in tuners:
        tuner.configs = [tuner.configs[choice if tuner is not tuners[-1] else 0]]
    try:
        yield
    finally:
        for tuner, configs in zip(tuners, kept, strict=True):
            tuner.configs = configs


CHECKS = {
    "bf16, T=128": {"query_len": 128},
    "bf16, T=1000": {"query_len": 1000},
    "bf16, T=1000, entropy gradient only": {"query_len": 1000, "arriving": "e"},
    "bf16, T=100 to 128, grouped, padded": {"query_len": 100, "key_len": 128, "kv_heads": 4, "mask": True},
    "bf16, T=300 to 500, grouped, padded": {"query_len": 300, "key_len": 500, "kv_heads": 4, "mask": True},
    "bf16, full, D=80": {"query_len": 333, "dim": 80, "causal": False},
    "fp16, T=1000": {"query_len": 1000, "dtype": torch.float16},
    "fp32, T=300": {"query_len": 300, "dtype": torch.float32},
}


def check(
    query_len, key_len=None, kv_heads=HEADS, dim=DIM, dtype=torch.bfloat16, causal=True, mask=False, arriving="oe"
):
    """Relative errors against float64 with a learnable temperature, beside those of SDPA in the same precision."""
    key_len, batch = key_len or query_len, 4
    rng = torch.Generator("cuda").manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=rng)

    query = normal(batch, HEADS, query_len, dim).to(dtype)
    key, value = (normal(batch, kv_heads, key_len, dim).to(dtype) for _ in range(2))
    temperature = normal(HEADS, query_len).mul(0.3).exp()
    grad, grad_entropy = normal(*query.shape).to(dtype), normal(*query.shape[:3])
    seen = None
    if mask:
        seen = torch.rand(batch, key_len, device="cuda", generator=rng) > 0.3
        seen[0] = False

    def run(dtype, backend):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (query, key, value, temperature)]
        results = entropy_attention(*leaves, causal=causal, mask=seen, backend=backend)
        kept = ["oe".index(name) for name in arriving]
        arrived = [(grad, grad_entropy)[i].to(results[i].dtype) for i in kept]
        grads = torch.autograd.grad([results[i] for i in kept], leaves, arrived, allow_unused=True)
        return dict(zip(("output", "entropy", "dq", "dk", "dv", "dt"), (*results, *grads), strict=True))

    wanted = run(torch.float64, "eager")
    poison = [torch.full_like(query, math.nan) for _ in range(12)]
    del poison  # what the kernels do not write stays NaN
    fused = run(None, "triton")
    result = {name: relative(x, wanted[name]) for name, x in fused.items() if x is not None}  # NaN is shown as such
    if not mask and kv_heads == HEADS and arriving == "oe" and causal and query_len == key_len:
        leaves = [x.detach().requires_grad_() for x in (query / temperature[..., None].to(dtype), key, value)]
        output = F.scaled_dot_product_attention(*leaves, is_causal=True)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        exact_output = entropy_attention(*exact, backend="eager")[0]
        found = [output, *torch.autograd.grad(output, leaves, grad)]
        want = [exact_output, *torch.autograd.grad(exact_output, exact, grad.double())]
        result["sdpa"] = {n: relative(*p) for n, *p in zip(("output", "dq", "dk", "dv"), found, want, strict=True)}
    return result


def ceilings(quick):
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    product, copy = median_ms(lambda: a @ b, quick), median_ms(lambda: y.copy_(x), quick)
    return {"matmul_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_per_s": 4 * x.numel() / copy / 1e9}


def chosen_blocks():
    found = {}
    for name in ("FORWARD", "DQ", "DKV", "SHORT_BACKWARD"):
        cache = getattr(attention.operators, name).cache
        found[name] = {" ".join(map(str, key[:4])): str(config) for key, config in cache.items()}
    return found


def table(report):
    print(
        f"\n{'B x T':>10}  {'implementation':22} {'step ms':>9} {'launched':>9} {'fwd ms':>8} {'GiB':>7} {'TFLOP/s':>8}"
    )
    for row in report["speed"]:
        size = f"{row['batch']}x{row['length']}"
        if "failed" in row:
            print(f"{size:>10}  {row['name']:22} {row['failed'][:60]}")
        elif "step_ms" in row:
            numbers = f"{row['step_ms']:9.3f} {row['launched_step_ms']:9.3f} {row['forward_ms']:8.3f}"
            numbers += f" {row['peak_extra_gib']:7.2f}"
            print(f"{size:>10}  {row['name']:22} {numbers} {row['step_tflops']:8.1f}")
        else:
            print(f"{size:>10}  {row['name']:22} {'':19} {row['forward_ms']:8.3f}")
    for name, errors in {**report["errors_at_size"], **report["checks"]}.items():
        shown = {k: f"{v:.1e}" if isinstance(v, float) else v for k, v in errors.items() if k != "sdpa"}
        print(f"{name:38}", *(f"{k}={v}" for k, v in shown.items()))
        if "sdpa" in errors:
            print(f"{'  SDPA':38}", *(f"{k}={v:.1e}" for k, v in errors["sdpa"].items()))
    print("ceilings", report["ceilings"], f"{report['seconds']:.0f} s")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--sizes", default=SIZES, help=f"batch x length, comma-separated (default {SIZES})")
    parser.add_argument("--only", default="", help="comma-separated parts of implementation names, e.g. fused,sdpa")
    parser.add_argument("--checks", choices=("all", "some", "none"), default="some", help="error table (default some)")
    parser.add_argument("--budget", type=float, default=400, help="start nothing new after so many seconds")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    import triton

    start = time.monotonic()
    report = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "heads": HEADS, "head_dim": DIM, "dtype": "bfloat16", "causal": True, "ceilings": guarded(
            ceilings, options.quick), "speed": [], "errors_at_size": {}, "checks": {}, "seconds": 0.0,
    }  # fmt: skip

    def attempt(call, *arguments, **keywords):
        late = time.monotonic() - start > options.budget
        return {"failed": "not tried: out of time"} if late else guarded(call, *arguments, **keywords)

    def save():
        report["seconds"] = time.monotonic() - start
        report["blocks"] = chosen_blocks()
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n")

    for name in {"all": list(CHECKS), "some": list(CHECKS)[:3], "none": []}[options.checks]:
        with untuned():
            report["checks"][name] = attempt(check, **CHECKS[name])
        print(name, report["checks"][name], flush=True)
    for size in options.sizes.split(","):
        batch, length = map(int, size.split("x"))
        for name, (function, has_entropy) in implementations(length).items():
            if not any(part in name for part in options.only.split(",")):
                continue
            row = attempt(measure, function, has_entropy, batch, length, options.quick)
            report["speed"].append({"batch": batch, "length": length, "name": name, **row})
            save()
            print(report["speed"][-1], flush=True)
            if name != "fused (triton)":
                continue
            report["errors_at_size"][f"tuned, {size}"] = attempt(errors_at_size, batch, length)
            row = attempt(entropy_alone, batch, length, options.quick)
            report["speed"].append({"batch": batch, "length": length, "name": "fused, entropy only", **row})
    save()
    table(report)


if __name__ == "__main__":
    main()
