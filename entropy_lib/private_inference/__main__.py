"""`python -m entropy_lib.private_inference`: one private forward pass of a small model between two parties."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from entropy_lib.modeling import build_model
from entropy_lib.private_inference.methods import METHODS
from entropy_lib.private_inference.parties import PROTOCOLS
from entropy_lib.private_inference.two_party import run_two_party
from entropy_lib.variants import VARIANTS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m entropy_lib.private_inference", description=__doc__)
    parser.add_argument("--variant", default="EReg(SM(t)+ScFuFFN)", help=f"one of {', '.join(VARIANTS)}")
    parser.add_argument("--protocol", default="CHEETAH", choices=PROTOCOLS)
    parser.add_argument("--method", default="as given", choices=METHODS, help="how operations are computed")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--output", type=Path, help="write the result's cost as JSON")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        if options.output and not (options.output.parent.is_dir() and not options.output.is_dir()):
            raise ValueError(f"--output must be a file in a folder that exists, got {options.output}")
        model = build_model(
            options.variant, "tiny", n_layer=options.layers, vocab_size=256, temperature_init=0.5
        ).eval()
        ids = torch.randint(256, (options.tokens,))
        result = run_two_party(model, ids, options.protocol, method=options.method, timeout=options.timeout)
    except KeyboardInterrupt:
        print("stopped; both parties have ended", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result.to_frame().round(2).to_string())
    print(f"{options.variant}, {options.layers} layers, {options.tokens} tokens, {options.protocol}, {options.method}")
    print(
        f"{result.bytes / 1e6:.1f} MB, {result.seconds:.1f} s, logits within {result.max_error:.1e} of the model's own"
    )
    if options.output:
        record = {name: getattr(options, name) for name in ("variant", "protocol", "method", "layers", "tokens")}
        record["command"] = "python -m entropy_lib.private_inference"
        record |= {"max_error": result.max_error, "steps": result.steps}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
