"""The README's training scripts run as they stand, and its table is that of the records."""

import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_lib.study.reproduction import markdown

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SECTION = re.search(r"^## Use it in your training script$(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
SCRIPTS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.mark.parametrize("script", SCRIPTS, ids=["authors' interface", "any model"])
def test_training_script(script):
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=97, n_positions=24, attn_pdrop=0.0))
    ids = torch.randint(97, (2, 16))
    batch = {"input_ids": ids, "labels": ids}
    model.set_attn_implementation("eager")  # the published code needs the matrices
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names = {"torch": torch, "model": model, "batch": batch, "loader": [batch, batch], "optimizer": optimizer}
    before = [p.detach().clone() for p in model.parameters()]
    exec(script, names)
    thresholds = names["thresholds"]
    if "loader" in script:
        assert any((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
        assert (thresholds != 0.5).any()
    else:
        assert thresholds.grad.abs().sum() > 0
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("table", ["table2", "table3"])
def test_the_tables_are_those_of_the_records(table):
    assert markdown(table, Path(__file__).resolve().parents[1] / "data" / "runs").strip() in README
