"""A trained model that comes with the library; data/make/tiny_model.py made it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from entropy_lib.modeling import EntropyGPT2LMHeadModel

TINY = Path(__file__).with_name("ereg-tiny")


def load_tiny_model(folder: str | Path = TINY) -> tuple[EntropyGPT2LMHeadModel, PreTrainedTokenizerBase]:
    """The model in float32 and evaluation mode, and its tokenizer. ValueError if there is none."""
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"no model at {folder}; make one with: python data/make/tiny_model.py")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it is read in milliseconds
    try:
        model = EntropyGPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval(), AutoTokenizer.from_pretrained(folder)
