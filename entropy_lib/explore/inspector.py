"""Where each head looks in a text of your own, how sharply, and what becomes of it at another temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from plotly.colors import sample_colorscale
from torch import Tensor
from traitlets import Bool, Dict, Float, Int, List, TraitError, Unicode, observe, validate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_lib.entropy import attention_entropy
from entropy_lib.explore import smollm2
from entropy_lib.explore.figures import entropy_heatmap
from entropy_lib.explore.module import ModuleExplorer, keys_worth, module_source
from entropy_lib.explore.reading import COARSE, EXACT, Reading, next_tokens, packed, read_attention, unpacked
from entropy_lib.explore.tiny_model import TINY, load_tiny_model

TEXTS = {
    "code": """def softmax(scores):
    largest = max(scores)
    return [exp(score - largest) for score in scores]
""",
    "prose": "The river had risen in the night, and by morning the bridge was gone.",
    "repetition": "The cat sat. The dog ran. The cat sat. The dog ran. The cat",
    "brackets": "[(1, 2), (3, 4), [5, (6, 7)], {8: [9, 10]}]",
    "a pronoun": "Anna lent Peter the book because he had asked her for it twice.",
    "a name to come": "When Tom and Lucy left the station, Tom handed the tickets to",
}
LOW, HIGH = 0.25, 4.0  # temperatures
PARKED = 0.5  # of a head's weight: with more on the first token, it parks there
FOLLOW = 5  # of the tokens that may come next
AT_EVERY_KEY = 5e6  # weights of a model that reads so soon
ROOM = 64_000  # of the page without a kernel: characters of all readings

Load = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def attention_inspector(
    model: PreTrainedModel | None = None, text: str = TEXTS["code"], *,
    tokenizer: PreTrainedTokenizerBase | None = None, max_tokens: int = 64,
) -> AttentionInspector:  # fmt: skip
    """Type a text and see, for every head of a model, how sharply it looks (nats) and at what, as a widget.

    Args:
        model: any transformers model whose attention `record_entropy` can read, with its `tokenizer`. Choices beside
            it, or without it: the recorded tiny model (see data/README.md), and SmolLM2-135M, as notebook 03 downloads
            it or, on six texts, as `microscope` has it.
        text: what stands in the box at the start.
        max_tokens: tokens read, from the start of the text.

    Hover over a token, or move the slider, to choose the query; click a cell, or move the sliders, to choose the
    head. Bars under the tokens are its attention weights, the largest at full height. A dot marks heads that park on
    the first token: more than half of their weight is there (`PARKED`), as a mean over the queries after it. The
    temperature divides the logits of the chosen head alone; what the model then expects next is computed by a forward
    pass. Without a kernel the page has the prepared texts, as the chosen model read them, as far as there is room.
    Raises ValueError for a model without its tokenizer.
    """
    if model is not None and tokenizer is None:
        raise ValueError("pass the model's tokenizer too: attention_inspector(model, tokenizer=tokenizer)")
    models: dict[str, Load | None] = {}
    if model is not None:
        models[f"yours ({type(model).__name__})"] = lambda: (model, tokenizer)
    models[f"{TINY.name} (recorded)"] = cache(load_tiny_model)
    if smollm2.is_downloaded():
        models[smollm2.NAME] = cache(smollm2.load_smollm2)
    elif smollm2.READINGS.is_file():
        models[RECORDED] = None
    return AttentionInspector(models, text, max_tokens)


RECORDED = f"{smollm2.NAME} (on six texts)"


def microscope() -> AttentionInspector:
    """The 270 heads of SmolLM2-135M on six texts, as recorded in data/smollm2_readings.json: no model is needed."""
    return AttentionInspector({RECORDED: None}, None, 64)


class AttentionInspector(ModuleExplorer):
    """See `attention_inspector`. Traits: text, model (a name), layer, head, position (of the query), temperature.

    A number past the end is the last. What the page says is here from the same numbers: `attention` and `words`;
    `predictions` are what the model expects after every token, as it is and with the chosen head's temperature, when
    that is not 1. A text that cannot be read leaves what was shown, and `trouble` says why.
    """

    _esm = module_source("inspector")
    models = List(Unicode()).tag(sync=True, state=True)
    model = Unicode().tag(sync=True, state=True)
    texts = List(List(Unicode())).tag(sync=True, state=True)  # [name, text] of those prepared for the model
    text = Unicode().tag(sync=True, state=True)
    read_only = Unicode().tag(sync=True, state=True)  # why a text of one's own cannot be typed
    readings = Dict().tag(sync=True, state=True)  # by model and text, see `_key`
    slow = Bool(False).tag(sync=True, state=True)  # a text is read when its box is left, not at every key
    trouble = Unicode().tag(sync=True, state=True)
    layer = Int(0, min=0).tag(sync=True, state=True)
    head = Int(0, min=0).tag(sync=True, state=True)
    position = Int(0, min=0).tag(sync=True, state=True)
    temperature = Float(1.0, min=LOW, max=HIGH).tag(sync=True, state=True)
    predictions = Dict().tag(sync=True)
    parked = Float(PARKED).tag(sync=True, state=True)
    colors = List(Unicode(), sample_colorscale("Cividis", 64)).tag(sync=True, state=True)

    def __init__(self, models: dict[str, Load | None], text: str | None, max_tokens: int):
        self._models, self._max_tokens, self._read, self._unpacked = models, max_tokens, None, (None, None)
        self._size = 1  # of the reading that was shown last, in tokens
        name = next(iter(models))
        text = next(iter(self._prepared(name).values())) if text is None else text
        super().__init__(models=list(models), model=name, text=text)
        if self.shown:  # start at the sharpest head that does not park, which has most to show
            means, parks = attention_entropy(self.attention).mean(-1), self.parks
            means = means if parks.all() else means.masked_fill(parks, math.inf)
            self.layer, self.head = divmod(int(means.argmin()), means.shape[1])
        super().open()

    def open(self):  # at the end of __init__: what is sent first is complete
        pass

    # -- reading ------------------------------------------------------------------------------------------------------

    @validate("model")
    def _one_of_them(self, proposal):
        if proposal["value"] not in self._models:
            raise TraitError(f"model is one of {list(self._models)}")
        return proposal["value"]

    @validate("layer", "head", "position")
    def _within(self, proposal):
        if not self.shown:
            return 0
        ends = {"layer": self.shown["layers"], "head": self.shown["heads"], "position": len(self.shown["tokens"])}
        return min(proposal["value"], ends[proposal["trait"].name] - 1)

    @observe("model", "text")
    def _hand_over(self, change):
        prepared, recorded = self._prepared(self.model), self._models[self.model] is None
        if recorded and change["name"] == "model" and self.text not in prepared.values():
            self.text = next(iter(prepared.values()))  # which comes back here
            return
        with self.hold_sync():
            self.texts, self.trouble = [list(pair) for pair in prepared.items()], ""
            self.read_only = "a text of your own needs the model: notebook 03 downloads it" if recorded else ""
            self.slow = not recorded and self._models[self.model]()[0].num_parameters() > AT_EVERY_KEY
            if self._key(self.text) not in self.readings:
                try:
                    read = None if recorded else self._read_with_model(self.text)
                    shown = self._for_page(self.text) if recorded else packed(read, EXACT)
                except ValueError as error:
                    self.trouble = str(error)
                    return
                self._read, self.readings, self.predictions = read, {self._key(self.text): shown}, {}
            ended = self.position == self._size - 1  # where it stays while one types
            self._size = len(self.shown["tokens"])
            self.layer, self.head = self.layer, self.head  # within the new model
            self.position = self._size - 1 if ended else self.position
            self._predict()

    def _prepared(self, model: str) -> dict[str, str]:
        """The texts that stand in the list for a model, by name."""
        if self._models[model] is not None:
            return TEXTS
        return {name: entry["text"] for name, entry in smollm2.recorded_readings().items()}

    def _read_with_model(self, text: str) -> Reading:
        return read_attention(*self._models[self.model](), text, self._max_tokens)

    def _for_page(self, text: str) -> dict:
        if self._models[self.model] is not None:
            return packed(self._read_with_model(text), COARSE)
        for entry in smollm2.recorded_readings().values():
            if entry["text"] == text:
                return entry["reading"]
        raise ValueError(f"{self.model} has read the prepared texts only")

    def _key(self, text: str) -> str:
        return f"{self.model}\n{text}"

    def state(self) -> dict:
        """What the page has without a kernel: the text shown and the prepared ones, those of a model up to `ROOM`."""
        readings, room, names = {}, ROOM, {text: name for name, text in self.texts}
        for text in dict.fromkeys([self.text, *names]):
            try:
                reading = self._for_page(text)
            except ValueError:  # what was typed last
                continue
            room -= len(reading["data"])
            if room < 0 and readings and self._models[self.model] is not None:
                break
            readings[text] = reading
        return super().state() | {
            "models": [self.model],
            "texts": [
                [names.get(text, "your text"), text] for text in dict.fromkeys([*names, *readings]) if text in readings
            ],
            "readings": {self._key(text): reading for text, reading in readings.items()},
            "read_only": "a text of your own needs a running kernel",
        }

    # -- what the page says -------------------------------------------------------------------------------------------

    @property
    def shown(self) -> dict | None:
        """The packed reading that is shown: of the text, or if that could not be read, of the one before."""
        return self.readings.get(self._key(self.text)) or next(iter(self.readings.values()), None)

    @property
    def attention(self) -> Tensor:
        """Weights [L, H, T, T] of the reading that is shown, float64, at t = 1. ValueError if nothing is read."""
        if not self.shown:
            raise ValueError("nothing is read yet: type a text")
        if self._unpacked[0] is not self.shown:
            self._unpacked = self.shown, unpacked(self.shown)
        return self._unpacked[1]

    @property
    def parks(self) -> Tensor:
        """Heads [L, H] that give more than `PARKED` of their weight to the first token, at t = 1."""
        return on_the_first(self.attention) > PARKED

    def rows(self) -> Tensor:
        """Weights [T, T] of the chosen head at its temperature: softmax((log a)/t), float64."""
        return (self.attention[self.layer, self.head].log() / self.temperature).softmax(-1)

    def words(self) -> str:
        """What the explorer says of the query and the head, a line each, and if it cut the text."""
        if not self.shown:
            return self.trouble
        tokens, total, rows = self.shown["tokens"], self.shown["total"], self.rows()
        entropy, keys = self._certain(attention_entropy(rows)), (rows > 0).sum(-1)
        row, seen, most = rows[self.position], int(keys[self.position]), int(rows[self.position].numpy().argmax())
        first, average = on_the_first(rows).item(), self._certain(attention_entropy(rows).mean()).item()
        lines = [
            f"Token {self.position}, {_quoted(tokens[self.position])}, looks with "
            f"{keys_worth(entropy[self.position].item())} of {seen} (at most {math.log(seen):.3g} nats) · "
            f"most on {_quoted(tokens[most])}, {row[most]:.2f}",
            f"Layer {self.layer}, head {self.head}: {keys_worth(average)} on average, "
            f"uniform {keys.double().log().mean().item():.3g} nats · {first:.2f} on the first token, "
            f"which leaves at most {self._certain(habit(rows).mean()).item():.3g} nats",
        ]
        lines[1] += ": it parks there" * (first > PARKED)
        if self.temperature != 1:
            before = self._certain(attention_entropy(self.attention[self.layer, self.head]).mean())
            lines[1] += f" · at t = 1: {before.item():.3g} nats"
        cut = [f"The first {len(tokens)} of {total} tokens."] if total > len(tokens) else []
        return "\n".join([*cut, *lines])

    def _certain(self, nats: Tensor) -> Tensor:
        """Without the digits that a weight in one byte does not give."""
        return nats.round(decimals=3) if self.shown["levels"] == COARSE else nats

    def still(self):
        """Mean entropies of all heads, as a figure."""
        title = f"Mean entropy of every head of {self.model.split(' ')[0]} on {len(self.shown['tokens'])} tokens"
        return entropy_heatmap(attention_entropy(self.attention).mean(-1), len(self.shown["tokens"]), title)

    # -- what comes next ----------------------------------------------------------------------------------------------

    @observe("layer", "head", "temperature")
    def _predict(self, change=None):
        """`predictions` are {"before": T lists of [token, probability], "after": the same or none} or {"why": not}."""
        if self._read is None:
            self.predictions = {"why": self.read_only}
            return
        model, tokenizer = self._models[self.model]()

        def expected(t: float) -> list:
            return likeliest(next_tokens(model, self._read, self.layer, self.head, t), tokenizer)

        try:
            before = self.predictions.get("before") or expected(1.0)
            self.predictions = {"before": before, "after": expected(self.temperature) if self.temperature != 1 else []}
        except ValueError as error:
            self.predictions = {"why": str(error)}


def on_the_first(attention: Tensor) -> Tensor:
    """Weight [..., T, T] -> [...] that queries after the first token give to it, a mean; 0 of a single token."""
    later = attention[..., 1:, 0]
    return later.mean(-1) if later.shape[-1] else attention.new_zeros(attention.shape[:-2])


def habit(attention: Tensor) -> Tensor:
    """The entropy that rows [..., T, T] would have with the same weight on the first token and the rest uniform.

    [..., T] in nats, at least what they have: a head close to it has nothing but that habit.
    """
    first, others = attention[..., 0], (attention > 0).sum(-1) - 1
    rest = (1 - first).clamp(min=0)
    return torch.special.entr(first) + torch.special.entr(rest) + rest * others.clamp(min=1).log()


def likeliest(probabilities: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[list[list]]:
    """The `FOLLOW` likeliest tokens of each of [T, V] rows, as [token, probability]."""
    top = probabilities.topk(min(FOLLOW, probabilities.shape[-1]))
    return [
        [[tokenizer.decode([token]), p] for p, token in zip(values, ids, strict=True)]
        for values, ids in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def _quoted(token: str) -> str:
    return "‘" + (token.replace("\n", "⏎").replace(" ", "·").replace("\t", "→") or "∅") + "’"
