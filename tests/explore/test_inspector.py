"""The inspector shows the library's entropies and eager attention's rows, of the recorded model or of any other."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from entropy_lib import attention_entropy, record_entropy
from entropy_lib.explore import tiny_model

pytest.importorskip("ipywidgets")
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


@pytest.mark.parametrize("kind", ["recorded", "llama", "bert"])
def test_entropies_and_rows_agree_and_the_model_is_left_as_it_was(kind, tokenizer):
    model = {
        "recorded": lambda: tiny_model.load_tiny_model()[0],
        "llama": llama,
        "bert": lambda: BertModel(BertConfig(**SIZES, vocab_size=2048, initializer_range=0.5)),
    }[kind]().train()
    before = model.config._attn_implementation
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding)).eval()
    reading = inspector.read_attention(model, tokenizer, "for key in keys: print(key)")
    assert model.training
    assert not frozen.training
    assert model.config._attn_implementation == before
    torch.testing.assert_close(attention_entropy(reading.attention), reading.entropy, atol=1e-5, rtol=1e-4)
    assert reading.attention.shape == (*reading.entropy.shape, len(reading.tokens))
    assert "".join(reading.tokens) == "for key in keys: print(key)"


def test_the_picture_is_the_reading_of_the_chosen_head_and_token(explorer):
    text = "import math\nprint(math.pi)\n"
    explorer._choose(layer=0, head=0)
    for name, value in {"text": text, "layer": 2, "head": 3, "position": 4}.items():
        before = explorer.figure.to_json() + explorer.status.value
        explorer.controls[name].value = value
        assert explorer.figure.to_json() + explorer.status.value != before, name
    model, tokenizer = tiny_model.load_tiny_model()
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad(), record_entropy(model) as recorder:
        model(ids)
    entropy = torch.cat(recorder.entropies)  # [L, H, T]: one sequence
    cells, weights, words, grid, chosen, matrix, here = explorer.figure.data
    torch.testing.assert_close(torch.tensor(grid.z), entropy.mean(-1), atol=1e-5, rtol=1e-4)
    assert grid.zmax == pytest.approx(math.log(ids.shape[1]))
    torch.testing.assert_close(attention_entropy(torch.tensor(matrix.z)), entropy[2, 3], atol=1e-5, rtol=1e-4)
    assert (chosen.x, chosen.y, here.y) == ((3,), (2,), (4, 4))
    row = torch.tensor(matrix.z)[4]
    torch.testing.assert_close(torch.tensor(weights.width), 0.3 * row / row.max())
    assert [x > 0 for x in weights.x] == [True] * 5 + [False] * (len(row) - 5)
    assert list(cells.marker.line.width).index(2) == 4
    nats = entropy[2, 3, 4].item()
    assert f"{nats:.3g} nats, {math.exp(nats):.3g} keys" in explorer.status.value
    assert "of 5" in explorer.status.value
    assert words.text[-1] == "⏎"


def test_the_mouse_chooses_too(explorer):
    cells, _, _, grid, _, matrix, _ = explorer.figure.data
    cells._hover_callbacks[0](cells, SimpleNamespace(point_inds=[3], xs=[0], ys=[0]), None)
    assert explorer.controls["position"].value == 3
    matrix._hover_callbacks[0](matrix, SimpleNamespace(point_inds=[[5, 1]], xs=[1], ys=[5]), None)
    assert explorer.controls["position"].value == 5
    assert tuple(explorer.figure.data[-1].y) == (5, 5)
    grid._click_callbacks[0](grid, SimpleNamespace(point_inds=[[1, 2]], xs=[2], ys=[1]), None)
    assert (explorer.controls["layer"].value, explorer.controls["head"].value) == (1, 2)
    torch.testing.assert_close(torch.tensor(matrix.z), explorer.reading.attention[1, 2])


def test_the_sharpest_head_is_shown_first(explorer):
    means = explorer.reading.entropy.mean(-1)
    assert means[explorer.controls["layer"].value, explorer.controls["head"].value] == means.min()


def test_a_model_of_your_own_stands_beside_the_recorded_one(tokenizer):
    explorer = inspector.attention_inspector(llama(), "a b c", tokenizer=tokenizer, max_tokens=5)
    assert explorer.controls["model"].value == "yours (LlamaForCausalLM)"
    assert explorer.reading.entropy.shape[:2] == (3, 2)
    explorer.controls["layer"].value = 2
    assert explorer.figure.data[4].y == (2,)
    explorer.controls["model"].value = "ereg-tiny (recorded)"
    assert explorer.reading.entropy.shape[:2] == (4, 4)
    assert (explorer.controls["layer"].value, explorer.controls["layer"].max) == (2, 3)
    explorer.controls["layer"].value = 3
    explorer.controls["model"].value = "yours (LlamaForCausalLM)"
    assert explorer.controls["layer"].value == 2
    explorer.controls["text"].value = "one two three four five six seven"
    assert len(explorer.reading.tokens) == 5
    with pytest.raises(ValueError, match="tokenizer"):
        inspector.attention_inspector(llama())


def test_an_empty_text_is_refused_in_place(explorer):
    before = explorer.reading
    explorer.controls["text"].value = ""
    assert "no tokens" in explorer.status.value
    explorer.controls["head"].value = 1
    assert explorer.reading is before
    empty = inspector.attention_inspector(text="")
    empty.controls["position"].value = 3
    assert "type a text" in empty.status.value
    explorer.controls["text"].value = "<b>"
    assert "&lt;" in explorer.figure.data[2].text[0]
    assert "".join(explorer.reading.tokens) == "<b>"


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
