"""`python -m entropy_lib.private_inference`: private forward passes of a model between two parties.

Of a new model of a variant on random ids, or of a saved one on a text; with --generate, one pass a token.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_lib.annealed_layer_norm import anneal
from entropy_lib.modeling import MODEL_SIZES, build_model
from entropy_lib.private_inference.methods import METHODS
from entropy_lib.private_inference.parties import PROTOCOLS
from entropy_lib.private_inference.two_party import generate_two_party, run_two_party
from entropy_lib.variants import PRIVATE_VARIANTS, VARIANTS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m entropy_lib.private_inference", description=__doc__)
    names = ", ".join([*VARIANTS, *PRIVATE_VARIANTS])
    parser.add_argument("--variant", default="EReg(SM(t)+ScFuFFN)", metavar="NAME", help=f"one of {names}")
    parser.add_argument("--size", default="tiny", choices=MODEL_SIZES, help="width and heads of the variant's model")
    parser.add_argument("--layers", type=int, default=2, help="its layers")
    parser.add_argument("--tokens", type=int, default=16, help="how many random ids it reads")
    parser.add_argument("--model", type=Path, help="a saved model and its tokenizer, instead of --variant")
    parser.add_argument("--text", default="import os\n", help="what the saved model reads")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="continue by N tokens, greedily")
    parser.add_argument("--protocol", default="CHEETAH", choices=PROTOCOLS)
    parser.add_argument("--method", default="as given", choices=METHODS, help="how operations are computed")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a pass may take")
    parser.add_argument("--output", type=Path, help="write the result's cost as JSON")
    options = parser.parse_args(arguments)
    command = ["python", "-m", "entropy_lib.private_inference", *(sys.argv[1:] if arguments is None else arguments)]
    record = {"command": shlex.join(command)}
    try:
        if options.output and not (options.output.parent.is_dir() and not options.output.is_dir()):
            raise ValueError(f"--output must be a file in a folder that exists, got {options.output}")
        if options.model:
            model = AutoModelForCausalLM.from_pretrained(options.model)
            tokenizer = AutoTokenizer.from_pretrained(options.model)
            ids = torch.tensor(tokenizer(options.text)["input_ids"])
            record |= {"model": str(options.model), "text": options.text}
        else:
            torch.manual_seed(0)
            model = build_model(options.variant, options.size, n_layer=options.layers, vocab_size=256, n_positions=128,
                                temperature_init=0.5)  # fmt: skip
            ids = torch.randint(256, (options.tokens,))
            model.train()(ids[None])
            anneal(model, 1.0)  # as at the end of training
            record |= {name: getattr(options, name) for name in ("variant", "size", "layers", "tokens")}
        model = model.eval()
        record |= {"protocol": options.protocol, "method": options.method}
        parties = {"method": options.method, "timeout": options.timeout}
        if options.generate:
            told, plain = _generate(model, ids, options, parties)
            record |= {"generated": told, "plain": plain, "equal": told == plain}
            if options.model:
                record["generated_text"] = tokenizer.decode(told)
                print(repr(record["generated_text"]))
            print(f"{len(told)} tokens, {'as' if record['equal'] else 'NOT as'} the model alone continues")
        else:
            result = run_two_party(model, ids, options.protocol, **parties)
            record |= {"max_error": result.max_error, "bytes": result.bytes, "steps": result.steps}
            print(result.to_frame().round(2).to_string())
            print(
                f"{options.model or options.variant}, {model.config.n_layer} layers, {len(ids)} tokens, "
                f"{options.protocol}, {options.method}\n{result.bytes / 1e6:.1f} MB, {result.seconds:.1f} s, "
                f"logits within {result.max_error:.1e} of the model's own"
            )
    except KeyboardInterrupt:
        print("stopped; both parties have ended", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output:
        options.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


def _generate(model, ids, options, parties) -> tuple[list[int], list[int]]:
    """What the parties generate, and what the model alone does."""
    private = ids
    for number in range(1, options.generate + 1):
        print(f"token {number} of {options.generate}", file=sys.stderr, flush=True)
        private = generate_two_party(model, private, 1, options.protocol, **parties)
    plain = model.generate(ids[None], max_new_tokens=options.generate, min_new_tokens=options.generate, do_sample=False)
    return private[0, len(ids) :].tolist(), plain[0, len(ids) :].tolist()


if __name__ == "__main__":
    sys.exit(main())
