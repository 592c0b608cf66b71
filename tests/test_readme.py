"""The README's code runs as it stands, its first output is right, the tables are those of the records, links and
commands lead somewhere, no notebook is left out; and it stays short."""

import ast
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from entropy_lib.explore.tiny_model import load_tiny_model
from entropy_lib.training import train
from paper.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
NOTEBOOKS = (ROOT / "notebooks" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [ROOT / "README.md", *ROOT.glob("notebooks/*.md"), *ROOT.glob("data/**/*.md")]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_it_is_short():
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 1300
    assert README.splitlines().index("```python") < 25


def test_the_first_code_prints_what_stands_below_it():
    code, printed = re.search(r"```python\n(.*?)```\n```\n(.*?)```", README, re.DOTALL).groups()
    *before, last = ast.parse(code).body
    names = {}
    exec(compile(ast.Module(before, []), "README", "exec"), names)
    assert str(eval(ast.unparse(last), names)) == printed.strip()


def test_the_library_in_a_few_lines(monkeypatch, tmp_path):
    monkeypatch.setenv("ENTROPY_LIB_CACHE", str(tmp_path))
    recipe = train.get_recipe
    monkeypatch.setattr(train, "get_recipe", lambda name: recipe(name, steps=2))
    (code,) = (block for block in BLOCKS if "train_variant" in block)
    exec(code, names := {})
    assert names["output"].entropies[0].shape == (2, 4, 128)
    assert names["penalty"].requires_grad
    assert names["record"].steps == 2


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
    (with_trainer,) = (block for block in BLOCKS if "EntropyRegularizedTrainer" in block)
    (own_loop,) = re.findall(r"## A loop of your own\n\n```python\n(.*?)```", NOTEBOOKS, re.DOTALL)
    for script in (with_trainer, own_loop):
        before = [p.detach().clone() for p in model.parameters()]
        exec(script, names)
        thresholds = names["trainer"].thresholds if script is with_trainer else names["thresholds"]
        assert any((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
        assert thresholds.shape == (2, 2)
        assert (thresholds != 0.5).any()
    model.set_attn_implementation("eager")  # the published code needs the matrices
    model.zero_grad()
    (authors,) = re.findall(r"```python\n(thresholds = .*?compute_loss.*?)```", NOTEBOOKS, re.DOTALL)
    exec(authors, names)
    assert names["thresholds"].grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())


def test_bring_your_own_model():
    model, tokenizer = load_tiny_model()
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=len(tokenizer), n_positions=128))
    names = {"model": model.eval(), "tokenizer": tokenizer, "texts": ["def f(x):\n    return x\n" * 60]}
    (code,) = (block for block in BLOCKS if "convert_for_private_inference" in block)
    exec(code, names)
    assert 0 < names["plan"].softmax_heads <= 8
    assert names["private"](torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("table", ["table2", "table3"])
def test_the_tables_are_those_of_the_records(table):
    assert markdown(table, ROOT / "data" / "runs").strip() in (ROOT / "data" / "runs" / "README.md").read_text()


def test_every_notebook_has_its_line():
    assert re.findall(r"^\| \[.*\]\((notebooks/.*\.ipynb)\)", README, re.MULTILINE) == sorted(
        str(notebook.relative_to(ROOT)) for notebook in ROOT.glob("notebooks/*.ipynb")
    )


@each_page
def test_links_lead_somewhere(page):
    for name in re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / name).exists(), name


@each_page
def test_commands_exist(page):
    text = re.sub(r"^\| `python [^|]*\|", "", page.read_text(), flags=re.MULTILINE)  # what a command was called before
    for name in re.findall(r"\bpython ([\w./]+)", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"-m ((?:entropy_lib|tests)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
