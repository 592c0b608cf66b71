"""The README's training scripts run as they stand, and its table is that of the records."""

import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from paper.tables import markdown

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SECTION = re.search(r"^## Use it in your training script$(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
SCRIPTS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_scripts(tmp_path, checkpointing):
    """In their order, as on one page: with the Trainer, in a loop, with the authors' interface."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=97, n_positions=24, attn_pdrop=0.0))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(97, (2, 16))
    batch = {"input_ids": ids, "labels": ids}
    dataset = [{"input_ids": row, "labels": row} for row in ids] * 4
    names = {"torch": torch, "model": model, "batch": batch, "loader": [batch, batch], "dataset": dataset}
    names["args"] = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    names["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with_trainer, own_loop, authors = SCRIPTS
    for script in (with_trainer, own_loop):
        before = [p.detach().clone() for p in model.parameters()]
        exec(script, names)
        thresholds = names["trainer"].thresholds if script is with_trainer else names["thresholds"]
        assert any((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
        assert thresholds.shape == (2, 2)
        assert (thresholds != 0.5).any()
    model.set_attn_implementation("eager")  # the published code needs the matrices
    model.zero_grad()
    exec(authors, names)
    assert names["thresholds"].grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("table", ["table2", "table3"])
def test_the_tables_are_those_of_the_records(table):
    assert markdown(table, Path(__file__).resolve().parents[1] / "data" / "runs").strip() in README
