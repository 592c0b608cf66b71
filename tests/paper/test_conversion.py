"""The conversions of SmolLM2, rehearsed on a tiny Llama: which runs there are, what is on record, the table."""

import math

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig

from entropy_lib.explore.tiny_model import load_tiny_model
from entropy_lib.private_inference.architecture import Architecture
from entropy_lib.private_inference.costs import inference_cost
from paper import conversion


@pytest.fixture(scope="module")
def model():
    _, tokenizer = load_tiny_model()
    sizes = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=len(tokenizer), max_position_embeddings=128)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def test_a_rehearsal_is_on_record_and_in_the_table(model, tmp_path, monkeypatch, capsys):
    recipe = {"precision": "float32", "entropy_every": 1}
    monkeypatch.setattr(conversion, "MEASURED", 2)
    monkeypatch.setattr(conversion, "TOKENS", 256)
    monkeypatch.setattr(conversion, "RECIPE", conversion.replace(conversion.RECIPE, **recipe))
    name = "SmolLM2+SM(58)+R"
    options = ["--corpus", "sample", "--length", "64", "--steps", "2", "--output", str(tmp_path), "--only", name]
    assert conversion.main(options, model) == 0
    assert f"{name}: finished, perplexity" in capsys.readouterr().out
    assert conversion.main(options, model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{name}: on record" in lines
    assert len(lines) == 3 + 2 * len(conversion.COUNTS)
    assert conversion.main(["--table", "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert name in table
    (record,) = conversion.load_runs(tmp_path)
    assert sum(record.model_config["entropy_heads"]) == 58
    row = conversion.table([record]).iloc[0]
    heads = tuple(record.model_config["entropy_heads"])
    small = Architecture(layers=30, heads=9, width=576, vocabulary=49152, activation="relu", ffn_width=1536,
                         norm="rmsnorm", gated=True, key_value_heads=3, dynamic_heads=heads)  # fmt: skip
    assert row["GB as given"] == inference_cost(small, 64, "spu-0.9.5").communication_gb
    original = conversion.replace(small, activation="silu", dynamic_heads=(9,) * 30)
    whole = inference_cost(original, 64, "spu-0.9.5").communication_gb
    assert row["optimized, of the original as given"] == row["GB optimized"] / whole
    assert row["recall"] == record.recall
    assert row["copy"] == record.patterns["copy"][7]  # 64 tokens are eight of them
    assert row["on new training text"] == pytest.approx(math.exp(record.history["loss"].mean()))
    assert conversion.spread(Dataset.from_dict({"n": range(10)}), 3)["n"][:] == [0, 3, 6]
    assert conversion.spread(Dataset.from_dict({"n": range(2)}), 3)["n"][:] == [0, 1]
    narrow = ["--list", "--max-tokens", "20000", *options[:2], *options[6:8]]
    assert conversion.main(narrow, model) == 0
    assert f"{name}: on record" in capsys.readouterr().out
    assert conversion.main(["--table", "--output", str(tmp_path / "none")]) == 2
    assert "has no records, unlike" in capsys.readouterr().err
    assert conversion.main(["--only", "SmolLM3", "--corpus", "sample", "--output", str(tmp_path)], model) == 2
    assert "unknown run SmolLM3; there are SmolLM2, SmolLM2+R" in capsys.readouterr().err


def test_without_the_download_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(conversion, "is_downloaded", lambda: False)
    assert conversion.main([]) == 2
    assert "notebook 03's section 'Get a model'" in capsys.readouterr().err
