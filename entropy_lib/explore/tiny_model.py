"""A trained model small enough to commit: `python -m entropy_lib.explore.tiny_model` writes data/models/ereg-tiny."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from entropy_lib.modeling import EntropyGPT2LMHeadModel

MODELS = Path(__file__).resolve().parents[2] / "data" / "models"
TINY = "ereg-tiny"


def load_tiny_model(folder: str | Path = MODELS / TINY) -> tuple[EntropyGPT2LMHeadModel, PreTrainedTokenizerBase]:
    """The committed model in float32 and evaluation mode, and its tokenizer. ValueError if there is none."""
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"no model at {folder}; make it with: python -m entropy_lib.explore.tiny_model")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it is read in milliseconds
    try:
        model = EntropyGPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def make_tiny_model(folder: str | Path = MODELS / TINY, steps: int = 600) -> None:
    """Train EReg(SM(t)+ScFuFFN) at size "tiny" on the sample corpus and save it in float16 with its tokenizer."""
    from entropy_lib.study.corpus import load_corpus
    from entropy_lib.study.recipes import get_recipe
    from entropy_lib.study.training import train_variant

    recipe = get_recipe("smoke", steps=steps)
    corpus = load_corpus("sample", recipe.context_length)
    record = train_variant("EReg(SM(t)+ScFuFFN)", corpus, recipe)
    print(f"{record.minutes:.1f} min on {record.device}, validation loss {record.eval_loss:.2f} nats a token")
    record.model.half().save_pretrained(folder)
    corpus[1].save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=MODELS / TINY)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    make_tiny_model(options.folder, options.steps)
