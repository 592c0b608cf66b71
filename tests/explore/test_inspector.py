"""The inspector shows the library's entropies and eager attention's rows, of the recorded model or of any other."""

import copy
import json
import math
import re

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from entropy_lib import attention_entropy, record_entropy
from entropy_lib.explore import smollm2, tiny_model
from entropy_lib.explore.attention_logits import logits_of
from entropy_lib.explore.reading import COARSE, EXACT, next_tokens, packed, read_attention, unpacked

pytest.importorskip("anywidget")
inspector = pytest.importorskip("entropy_lib.explore.inspector", exc_type=ImportError)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.load_tiny_model()[1]


@pytest.fixture
def explorer():
    return inspector.attention_inspector(text="def f(x):\n    return x < 1\n")


def llama(**options):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=2048, initializer_range=0.5, **options))


def bert():
    return BertModel(BertConfig(**SIZES, vocab_size=2048, initializer_range=0.5))


@pytest.mark.parametrize("kind", ["recorded", "llama", "bert"])
def test_entropies_and_rows_agree_and_the_model_is_left_as_it_was(kind, tokenizer):
    model = {
        "recorded": lambda: tiny_model.load_tiny_model()[0],
        "llama": llama,
        "bert": bert,
    }[kind]().train()
    before = model.config._attn_implementation
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding)).eval()
    reading = read_attention(model, tokenizer, "for key in keys: print(key)")
    assert model.training
    assert not frozen.training
    assert model.config._attn_implementation == before
    torch.testing.assert_close(attention_entropy(reading.attention), reading.entropy, atol=1e-5, rtol=1e-4)
    assert reading.attention.shape == (*reading.entropy.shape, len(reading.tokens))
    assert "".join(reading.tokens) == "for key in keys: print(key)"


def test_what_is_shown_is_the_reading_of_the_chosen_head_and_token(explorer):
    text = "import math\nprint(math.pi)\n"
    explorer.layer, explorer.head = 0, 0
    for name, value in {"text": text, "layer": 2, "head": 3, "position": 4}.items():
        before = explorer.words()
        setattr(explorer, name, value)
        assert explorer.words() != before, name
    model, tokenizer = tiny_model.load_tiny_model()
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad(), record_entropy(model) as recorder:
        model(ids)
    entropy = torch.cat(recorder.entropies)  # [L, H, T]: one sequence
    found = attention_entropy(explorer.attention)
    torch.testing.assert_close(found.float(), entropy, atol=1e-5, rtol=1e-4)
    assert explorer.attention[2, 3, 4].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(explorer.rows(), explorer.attention[2, 3])
    nats = entropy[2, 3, 4].item()
    assert f"{nats:.3g} nats, {math.exp(nats):.3g} keys" in explorer.words()
    assert "of 5" in explorer.words()
    assert explorer.shown["tokens"][-1] == "\n"
    assert len(explorer.still().data) == 1


@pytest.mark.parametrize("levels", [EXACT, COARSE])
@pytest.mark.parametrize("kind", [llama, bert])
def test_a_packed_reading_is_the_reading(kind, levels, tokenizer):
    reading = read_attention(kind(), tokenizer, "for key in keys: print(key, keys[key], file=sys.stderr)")
    sent = json.loads(json.dumps(packed(reading, levels)))
    attention = unpacked(sent)
    tolerance = 2e-5 if levels == EXACT else 0.006
    torch.testing.assert_close(attention, reading.attention.double(), atol=tolerance, rtol=0)
    seen = torch.ones(attention.shape[-2:]).tril() if kind is llama else torch.ones(attention.shape[-2:])
    assert torch.equal(attention > 0, seen.bool().expand_as(attention))
    assert sent["causal"] == (kind is llama)
    errors = (attention_entropy(attention) - reading.entropy).abs()
    assert errors.quantile(0.9) < (1e-4 if levels == EXACT else 0.01)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


def test_the_mean_over_heads_starts_at_the_sharpest_that_does_not_park(explorer):
    means = attention_entropy(explorer.attention).mean(-1)
    assert not explorer.parks.any()
    assert means[explorer.layer, explorer.head] == means.min()
    assert explorer.position == len(explorer.shown["tokens"]) - 1
    seen = inspector.microscope()
    means = attention_entropy(seen.attention).mean(-1)
    assert 50 < seen.parks.sum() < 200
    assert not seen.parks[seen.layer, seen.head]
    assert means[seen.layer, seen.head] == means[~seen.parks].min()
    assert means.min() < means[~seen.parks].min()


def test_a_head_parks_with_over_half_of_its_weight_on_the_first_token():
    rows = torch.tensor([[[1.0, 0, 0], [0.6, 0.4, 0], [0.5, 0.2, 0.3]], [[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]]])
    torch.testing.assert_close(inspector.on_the_first(rows), torch.tensor([0.55, 0.5]))
    assert (inspector.on_the_first(rows) > inspector.PARKED).tolist() == [True, False]
    assert inspector.on_the_first(torch.ones(2, 1, 1)).tolist() == [0, 0]
    # the same weight on the first token, the rest alike: (0.5, 0.25, 0.25)
    torch.testing.assert_close(inspector.habit(rows)[0, 2], torch.tensor(1.5 * math.log(2)))
    assert (inspector.habit(rows)[0] >= attention_entropy(rows[0])).all()
    assert inspector.habit(torch.ones(1, 1)).item() == 0


def test_a_temperature_divides_the_logits_of_the_chosen_head(explorer):
    logits = logits_of(*tiny_model.load_tiny_model(), explorer.text).logits.double()
    explorer.layer, explorer.head = 1, 2
    for t in (0.25, 0.5, 2.0, 4.0):
        explorer.temperature = t
        torch.testing.assert_close(explorer.rows(), (logits[1, 2] / t).softmax(-1), atol=1e-4, rtol=0)
        entropy = attention_entropy((logits[1, 2] / t).softmax(-1)).mean().item()
        told = re.search(r"head 2: ([\d.]+) nats", explorer.words())[1]
        assert float(told) == pytest.approx(entropy, rel=6e-3)
        assert f"at t = 1: {attention_entropy(explorer.attention[1, 2]).mean():.3g} nats" in explorer.words()


@pytest.mark.parametrize("kind", ["recorded", "llama"])
def test_what_comes_next_is_a_true_pass_with_that_head_s_logits_divided(kind, tokenizer):
    """Against a copy whose weights give that head's queries divided by t: logits are linear in them."""
    model = tiny_model.load_tiny_model()[0] if kind == "recorded" else llama(num_key_value_heads=1)
    text, layer, head, t = "for key in keys: print(key)", 1, 1, 3.0
    before = model.config._attn_implementation
    reading = read_attention(model, tokenizer, text)
    found = next_tokens(model, reading, layer, head, t)
    assert model.config._attn_implementation == before
    other = copy.deepcopy(model)
    with torch.no_grad():
        if kind == "recorded":
            projection = other.transformer.h[layer].attn.c_attn
            size = model.config.n_embd // model.config.n_head
            columns = slice(head * size, (head + 1) * size)
            projection.weight[:, columns] /= t
            projection.bias[columns] /= t
        else:
            projection = other.model.layers[layer].self_attn.q_proj
            projection.weight[head * 16 : (head + 1) * 16] /= t
        expected, plain = (m(reading.ids).logits[0].softmax(-1) for m in (other, model))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-4
    torch.testing.assert_close(next_tokens(model, reading), plain, atol=1e-6, rtol=1e-4)


def test_predictions_follow_the_head_the_temperature_and_the_text(explorer, tokenizer):
    model = tiny_model.load_tiny_model()[0]

    def top(text, **options):
        probabilities = next_tokens(model, read_attention(model, tokenizer, text), **options)
        values, ids = probabilities.topk(5)
        words = [[tokenizer.decode([token]) for token in row] for row in ids.tolist()]
        assert len({tuple(row) for row in words}) > 3
        return words, values

    def told(name):
        lists = explorer.predictions[name]
        return [[token for token, _ in row] for row in lists], torch.tensor([[p for _, p in row] for row in lists])

    assert explorer.predictions["after"] == []
    for name, value in {"temperature": 4.0, "layer": 0, "head": 3, "text": "x = [1, 2]\nfor y in x:"}.items():
        setattr(explorer, name, value)
        words, values = told("before")
        expected = top(explorer.text)
        assert words == expected[0]
        torch.testing.assert_close(values, expected[1])
        words, values = told("after")
        torch.testing.assert_close(values, top(explorer.text, layer=explorer.layer, head=explorer.head, t=4.0)[1])
    explorer.temperature = 1.0
    assert explorer.predictions["after"] == []
    encoder = inspector.attention_inspector(bert(), "a b c", tokenizer=tokenizer)
    assert encoder.predictions == {"why": "BertModel predicts no next token"}


def test_a_model_of_your_own_stands_beside_the_recorded_one(tokenizer):
    explorer = inspector.attention_inspector(llama(), "a b c", tokenizer=tokenizer, max_tokens=5)
    assert explorer.model == "yours (LlamaForCausalLM)"
    assert explorer.attention.shape[:2] == (3, 2)
    explorer.layer = 2
    assert explorer.words().splitlines()[-1].startswith("Layer 2")
    explorer.model = "ereg-tiny (recorded)"
    assert explorer.attention.shape[:2] == (4, 4)
    explorer.layer = 3
    explorer.model = "yours (LlamaForCausalLM)"
    assert explorer.layer == 2
    explorer.text = "one two three four five six seven"
    assert len(explorer.shown["tokens"]) == 5
    total = len(tokenizer(explorer.text).input_ids)
    assert explorer.words().startswith(f"The first 5 of {total} tokens.\n")
    with pytest.raises(ValueError, match="tokenizer"):
        inspector.attention_inspector(llama())
    with pytest.raises(inspector.TraitError, match="ereg-tiny"):
        explorer.model = "another"


def test_a_large_model_reads_when_the_box_is_left(explorer, monkeypatch):
    assert not explorer.slow
    monkeypatch.setattr(inspector, "AT_EVERY_KEY", 10)
    assert inspector.attention_inspector().slow


def test_an_empty_text_is_refused_in_place(explorer):
    before, text = explorer.shown, explorer.text
    explorer.text = ""
    assert "no tokens" in explorer.trouble
    explorer.head = 1
    assert explorer.shown is before
    explorer.text = text
    assert explorer.trouble == ""
    empty = inspector.attention_inspector(text="")
    empty.position = 3
    assert "type a word" in empty.words()
    with pytest.raises(ValueError, match="type a text"):
        empty.rows()
    explorer.text = "<b>"
    assert "".join(explorer.shown["tokens"]) == "<b>"


def test_the_query_stays_at_the_end_while_one_types_and_else_where_it_is(explorer):
    for text in ("a", "a = b", "a = b + c"):
        explorer.text = text
        assert explorer.position == len(explorer.shown["tokens"]) - 1
    explorer.position = 1
    explorer.text = "a = b + c + d"
    assert explorer.position == 1
    explorer.position = 1000
    assert explorer.position == len(explorer.shown["tokens"]) - 1


def test_the_page_has_the_prepared_texts_and_a_large_model_s_as_far_as_there_is_room(explorer, tokenizer, monkeypatch):
    state = explorer.state()
    assert [name for name, _ in state["texts"]] == [*inspector.TEXTS, "your text"]
    assert state["readings"].keys() == {f"{explorer.model}\n{text}" for _, text in state["texts"]}
    assert sum(len(reading["data"]) for reading in state["readings"].values()) < inspector.ROOM
    assert {reading["levels"] for reading in state["readings"].values()} == {COARSE}
    assert "kernel" in state["read_only"]
    assert explorer.read_only == ""
    assert "predictions" not in state
    monkeypatch.setattr(inspector, "ROOM", 10)
    assert explorer.state()["texts"] == [["your text", explorer.text]]


def test_smollm2_is_a_choice_where_it_is_downloaded_and_else_on_its_six_texts(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr(smollm2, "DOWNLOAD", tmp_path)
    explorer = inspector.attention_inspector()
    assert explorer.models == ["ereg-tiny (recorded)", inspector.RECORDED]
    explorer.model = inspector.RECORDED
    assert explorer.text == explorer.texts[0][1]
    assert explorer.attention.shape[:2] == (30, 9)
    assert "downloads" in explorer.read_only
    assert explorer.predictions == {"why": explorer.read_only}
    explorer.text = "a text of my own"
    assert "prepared texts only" in explorer.trouble
    assert explorer.shown["layers"] == 30
    explorer.model = "ereg-tiny (recorded)"
    assert (explorer.read_only, explorer.trouble) == ("", "")
    assert explorer.predictions["before"]
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(smollm2, "find_spec", lambda name: name)
    monkeypatch.setattr(smollm2, "load_smollm2", lambda: (llama(), tokenizer))
    explorer = inspector.attention_inspector()
    assert explorer.models == ["ereg-tiny (recorded)", smollm2.NAME]
    explorer.model = smollm2.NAME
    assert explorer.attention.shape[:2] == (3, 2)
    monkeypatch.undo()
    monkeypatch.setattr(smollm2, "DOWNLOAD", tmp_path)
    with pytest.raises(ValueError, match="not the pinned file"):
        smollm2.load_smollm2()


def test_the_recorded_readings_are_whole_and_small():
    assert smollm2.READINGS.stat().st_size < 2e6
    readings = smollm2.recorded_readings()
    assert [*readings] == [*inspector.TEXTS]
    for entry in readings.values():
        reading = entry["reading"]
        assert (reading["layers"], reading["heads"], reading["levels"]) == (30, 9, COARSE)
        assert 40 <= len(reading["tokens"]) == reading["total"] <= 64
        assert "".join(reading["tokens"]) == entry["text"]
        assert len(unpacked(reading)) == 30


@pytest.mark.skipif(not smollm2.is_downloaded(), reason="SmolLM2 is not downloaded")
def test_the_recorded_readings_are_what_the_downloaded_model_reads():
    model, tokenizer = smollm2.load_smollm2()
    for entry in smollm2.recorded_readings().values():
        reading = read_attention(model, tokenizer, entry["text"])
        torch.testing.assert_close(unpacked(entry["reading"]), reading.attention.double(), atol=0.006, rtol=0)


def test_the_recorded_model_is_small_and_trained():
    files = list(tiny_model.TINY.iterdir())
    assert sum(path.stat().st_size for path in files) < 1.5e6
    model, tokenizer = tiny_model.load_tiny_model()
    assert model.config.entropy_regularization
    ids = tokenizer("def f(self):\n        return self.value\n", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 5.5  # 7.6 untrained
    with pytest.raises(ValueError, match=r"python data/make/tiny_model\.py"):
        tiny_model.load_tiny_model("nowhere")
