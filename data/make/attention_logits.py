"""`python data/make/attention_logits.py`: train a tiny model; its logits are the temperature explorer's."""

import argparse
from pathlib import Path

import numpy as np
import torch

from entropy_lib.explore.attention_logits import SAMPLE, AttentionLogits, logits_of
from entropy_lib.training.corpus import load_corpus
from entropy_lib.training.train import train_variant

TEXT = '''def area(radius):
    """Return the area of a circle."""
    if radius < 0:
        raise ValueError("radius must not be negative")
    return math.pi * radius ** 2


def volume(radius, height):
    """Return the volume of a cylinder."""
    return area(radius) * height
'''


def write_logits(sample: AttentionLogits, path: str | Path) -> None:
    """A compressed npz of causal logits: the lower triangles in float16 (good to 3 digits), the tokens, the origin."""
    size = len(sample.tokens)
    rows, columns = torch.tril_indices(size, size)
    lower = sample.logits[:, :, rows, columns].half().numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, lower=lower, tokens=np.array(sample.tokens), origin=np.array(sample.origin))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="SM+LN+G")
    parser.add_argument("--output", type=Path, default=SAMPLE)
    arguments = parser.parse_args()
    corpus = load_corpus("sample", context_length=128)
    record = train_variant(arguments.variant, corpus, recipe="smoke")
    sample = logits_of(record.model, corpus[1], TEXT)
    origin = f"{record.variant}, size {record.size}, {record.steps} steps on the corpus sample"
    write_logits(AttentionLogits(sample.logits, sample.tokens, origin), arguments.output)
    print(f"{arguments.output}: {list(sample.logits.shape)}, validation loss {record.eval_loss:.3f}")


if __name__ == "__main__":
    main()
