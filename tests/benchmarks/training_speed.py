"""What entropy regularisation costs a training step: GPT-2 small, bfloat16, torch.compile, on one GPU.

    python -m tests.benchmarks.training_speed --output data/benchmarks/training_h200.json

The same model (SM(t)+ScFuFFN with thresholds) takes the same optimiser steps once on cross-entropy alone, with
scaled_dot_product_attention, and once with the entropy penalty, through `entropy_attention`. The baseline SM+LN+G
comes last. These are bare loops: what `python -m entropy_lib.training` reaches is held against them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from entropy_lib import EntropyRegularization, build_model

TOKENS = 65_536  # a step
EREG = "EReg(SM(t)+ScFuFFN)"


def tokens_per_second(variant: str, length: int, regularized: bool) -> dict:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = build_model(variant, "gpt2", n_positions=length, vocab_size=16_384).cuda()
    regularization = EntropyRegularization(0.16, 0.2, reduction="mean")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 16_384, (TOKENS // length, length), device="cuda")

    @torch.compile
    def loss_of(ids):
        output = model(input_ids=ids, labels=ids, output_entropies=regularized)
        if not regularized:
            return output.loss
        return output.loss + regularization(output.entropies, model.entropy_thresholds())

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    loss = step().item()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = do_bench(step, warmup=2000, rep=4000, return_mode="median")
    return {
        "variant": variant, "length": length, "regularized": regularized, "step_ms": milliseconds, "first_loss": loss,
        "tokens_per_second": TOKENS / milliseconds * 1e3, "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": [],
    }
    for length in (128, 1024):
        for regularized in (False, True):
            report["rows"].append(tokens_per_second(EREG, length, regularized))
            print(report["rows"][-1], flush=True)
        plain, penalised = (row["tokens_per_second"] for row in report["rows"][-2:])
        report[f"ratio_T{length}"] = penalised / plain
        print(f"T={length}: {penalised / plain:.3f} of the tokens per second without regularisation", flush=True)
    report["rows"].append(tokens_per_second("SM+LN+G", 128, False))
    print(report["rows"][-1], flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
