"""`python data/make/tiny_model.py`: train the model that the attention inspector reads with if it is given none."""

import argparse
from pathlib import Path

from entropy_lib.explore.tiny_model import TINY
from entropy_lib.training.corpus import load_corpus
from entropy_lib.training.recipe import get_recipe
from entropy_lib.training.train import train_variant


def make_tiny_model(folder: str | Path = TINY, steps: int = 600) -> None:
    """Train EReg(SM(t)+ScFuFFN) at size "tiny" on the sample corpus and save it in float16 with its tokenizer."""
    recipe = get_recipe("smoke", steps=steps)
    corpus = load_corpus("sample", recipe.context_length)
    record = train_variant("EReg(SM(t)+ScFuFFN)", corpus, recipe)
    print(f"{record.minutes:.1f} min on {record.device}, validation loss {record.eval_loss:.2f} nats a token")
    record.model.half().save_pretrained(folder)
    corpus[1].save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=TINY)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    make_tiny_model(options.folder, options.steps)
