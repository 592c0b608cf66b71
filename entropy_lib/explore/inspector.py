"""Where each head looks in a text of your own, and how sharply."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import ipywidgets as widgets
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_lib.explore.attention_logits import left_as_it_was
from entropy_lib.explore.controls import CLEAR, Explorer, dropdown, keys_worth, slider
from entropy_lib.explore.figures import IN_NATS, go, laid_out, make_subplots
from entropy_lib.explore.tiny_model import TINY, load_tiny_model
from entropy_lib.recording import record_entropy

TEXT = """def softmax(scores):
    largest = max(scores)
    return [exp(score - largest) for score in scores]
"""
LINE, LINES = 84, 5  # characters in a line of tokens, and lines without squeezing
BLUE, CHOSEN = "#3B9AD9", "#E69F00"
TURN = 0.47  # share of Cividis up to which white words read better on it than black ones, 4.5 to 1 at least
CELL, BELOW = 0.58, 0.14  # of a line's height: a token's cell, and how far below the line's middle its weight starts
_SCALE = [
    [0, CLEAR],
    [0.05, "rgba(59,154,217,0.35)"],
    [0.3, "rgba(59,154,217,0.8)"],
    [1, BLUE],
]  # small weights show too


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it: `tokens`, T strings; `attention` [L, H, T, T]; `entropy` [L, H, T] in nats."""

    tokens: list[str]
    attention: Tensor
    entropy: Tensor


@torch.no_grad()
def read_attention(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int = 64
) -> Reading:
    """Attention of every head on the first `max_tokens` tokens of a text, at most as many as the model has positions.

    Rows are the weights of transformers' eager attention, entropies those of `record_entropy`: two ways to the same
    numbers. The model must be a decoder, or an encoder with one attention a layer. Raises ValueError for a text
    without tokens and for models that `record_entropy` cannot read.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or max_tokens
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : min(max_tokens, positions)]
    if ids.shape[1] == 0:
        raise ValueError("the text has no tokens: type a word or two")
    ids = ids.to(model.device)
    with left_as_it_was(model):
        model.eval()  # dropout would take weights out of the rows
        with record_entropy(model) as recorder:
            model(ids)
        model.set_attn_implementation("eager")
        weights = model(ids, output_attentions=True).attentions
    entropy = torch.stack([layer[0] for layer in recorder.entropies])
    return Reading(
        [tokenizer.decode([token]) for token in ids[0].tolist()],
        torch.stack([layer[0] for layer in weights]).float().cpu(),
        entropy.float().cpu(),
    )


class AttentionInspector(Explorer):
    """See `attention_inspector`. `reading` is what the chosen model makes of the text."""

    def __init__(self, models: dict, text: str, max_tokens: int):
        self._models, self._max_tokens, self._read, self.reading = models, max_tokens, None, None
        box = widgets.Textarea(value=text, rows=4, layout=widgets.Layout(width="520px"))
        box.add_class("entropy-text")
        controls = {
            "text": box,
            "model": dropdown("model", "Model", list(models)),
            "layer": slider("layer", "Layer", 0, 0, 1, 1, width="190px"),
            "head": slider("head", "Head", 0, 0, 1, 1, width="190px"),
            "position": slider("position", "Token", max_tokens - 1, 0, max_tokens - 1, 1, width="290px"),
        }
        super().__init__(_empty_figure(), controls, [["text", "model"], ["layer", "head", "position"]])
        cells, _, _, grid, _, matrix, _ = self.figure.data
        cells.on_hover(lambda trace, points, state: self._pick(points, position=None))
        grid.on_click(lambda trace, points, state: self._pick(points, layer="ys", head="xs"))
        matrix.on_hover(lambda trace, points, state: self._pick(points, position="ys"))

    def _pick(self, points, **names) -> None:
        """Set controls from where the mouse is: from the point's number, or its coordinate."""
        if not points.point_inds:
            return
        at = {name: getattr(points, where)[0] if where else points.point_inds[0] for name, where in names.items()}
        self._choose(**at)

    def _choose(self, **values) -> None:
        self._drawing = True  # two controls may change, drawn once below
        for name, value in values.items():
            self.controls[name].value = int(value)
        self._drawing = False
        self.redraw("position")

    def draw(self, changed: str | None) -> None:
        if changed in (None, "text", "model"):
            model, tokenizer = self._models[self.controls["model"].value]
            # a large model reads when the box is left, a small one with every key
            self.controls["text"].continuous_update = model.num_parameters() < 5e6
            self.reading = read_attention(model, tokenizer, self.controls["text"].value, self._max_tokens)
            layers, heads, tokens = self.reading.entropy.shape
            for name, size in (("layer", layers), ("head", heads), ("position", tokens)):
                control = self.controls[name]
                follow = name == "position" and control.value == control.max  # the end of the text, while typing
                control.max = size - 1
                control.value = size - 1 if follow else min(control.value, size - 1)
            if changed is None:  # start at the sharpest head, which has most to show
                layer, head = divmod(int(self.reading.entropy.mean(-1).argmin()), heads)
                self.controls["layer"].value, self.controls["head"].value = layer, head
        elif self.reading is None:
            raise ValueError("nothing is read yet: type a text")
        layer, head, position = (self.controls[name].value for name in ("layer", "head", "position"))
        new_text = changed in (None, "text", "model")
        _, _, _, grid, chosen, matrix, here = self.figure.data
        new_head = new_text or matrix.meta != [layer, head]
        self._draw_tokens(layer, head, position, new_text, new_head)
        keys = self.reading.entropy.shape[2]
        if new_text:
            grid.z = self.reading.entropy.mean(-1).numpy()
            grid.zmax = math.log(max(keys, 2))
            layers, heads, _ = self.reading.entropy.shape
            self.figure.layout.yaxis2.range, self.figure.layout.xaxis2.range = [layers - 0.5, -0.5], [-0.5, heads - 0.5]
            self.figure.layout.yaxis3.range, self.figure.layout.xaxis3.range = [keys - 0.5, -0.5], [-0.5, keys - 0.5]
        if new_head:
            matrix.z, matrix.meta = self.reading.attention[layer, head].numpy(), [layer, head]
        chosen.update(x=[head], y=[layer])
        here.update(x=[-0.5, keys - 0.5], y=[position, position])
        self.figure.layout.annotations[1].text = f"<b>Layer {layer}, head {head}: who looks at whom</b>"
        self.say(self._words(layer, head, position))

    def _draw_tokens(self, layer: int, head: int, position: int, new_text: bool, new_head: bool) -> None:
        cells, weights, words, *_ = self.figure.data
        most = math.log(max(len(self.reading.tokens), 2))
        row = self.reading.attention[layer, head, position]
        tall = (0.3 * row / row.max().clamp(min=1e-9)).tolist()
        if new_text:
            self._places = start, width, line, shown = _lay_out(self.reading.tokens)
            middle = [n + BELOW - CELL / 2 for n in line]
            cells.update(y=middle, base=start, x=width)
            cells.marker.cmax, weights.base = most, start
            words.update(x=[s + w / 2 for s, w in zip(start, width, strict=True)], y=middle, text=shown)
            self.figure.layout.yaxis.range = [max(line[-1], LINES - 1) + 0.5, -0.5]
        if new_head:
            entropy = self.reading.entropy[layer, head]
            cells.marker.color = entropy.numpy()
            words.textfont.color = ["#FFFFFF" if nats < TURN * most else "#000000" for nats in entropy.tolist()]
        line, tokens = self._places[2], range(len(self.reading.tokens))
        seen = row > 0  # what lies ahead of a causal query gets no bar, not even a hairline
        long = [width if seen[n] else 0 for n, width in enumerate(self._places[1])]
        weights.update(x=long, width=tall, y=[n + BELOW + 0.03 + t / 2 for n, t in zip(line, tall, strict=True)])
        cells.marker.line.width = [2 if n == position else 0 for n in tokens]
        cells.customdata = [f"{row[n]:.3f}" for n in tokens]

    def _words(self, layer: int, head: int, position: int) -> str:
        reading = self.reading
        row, entropy = reading.attention[layer, head, position], reading.entropy[layer, head, position].item()
        causal = reading.attention.triu(1).max() == 0
        keys, most = position + 1 if causal else len(row), int(row.argmax())
        token = _quoted(reading.tokens[position])
        mean = reading.entropy[layer, head].mean().item()
        return (
            f"Token {position}, {token}, looks with <b>{keys_worth(entropy)}</b> of {keys} "
            f"(at most {math.log(keys):.3g} nats) · most on {_quoted(reading.tokens[most])}, {row[most]:.2f} "
            f"· this head's mean: {keys_worth(mean)}"
        )


def attention_inspector(
    model: PreTrainedModel | None = None, text: str = TEXT, *, tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = 64,
) -> AttentionInspector:  # fmt: skip
    """Type a text and see, for every head of a model, how sharply it looks (nats) and at what, as a widget.

    Args:
        model: any transformers model whose attention `record_entropy` can read, with its `tokenizer`; the recorded
            tiny model (see data/README.md) is a choice beside it, and the only one if None.
        text: what stands in the box at the start.
        max_tokens: tokens read, from the start of the text.

    Hover over a token, or move the slider, to choose the query; click a cell, or move the sliders, to choose the
    head. Bars under the tokens are its attention weights, the largest at full height. Raises ValueError for a model
    without its tokenizer.
    """
    if model is not None and tokenizer is None:
        raise ValueError("pass the model's tokenizer too: attention_inspector(model, tokenizer=tokenizer)")
    models = {} if model is None else {f"yours ({type(model).__name__})": (model, tokenizer)}
    return AttentionInspector({**models, f"{TINY.name} (recorded)": load_tiny_model()}, text, max_tokens)


def _quoted(token: str) -> str:
    return f"‘<code>{html.escape(_visible(token))}</code>’"


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace(" ", "·").replace("\t", "→") or "∅"


def _lay_out(tokens: list[str]) -> tuple[list[float], list[float], list[int], list[str]]:
    """Left edge and width in characters, line, and text of every token; a line ends with its newline."""
    starts, widths, lines, shown = [], [], [], []
    at, line = 0.0, 0
    for token in tokens:
        text = _visible(token)
        width = len(text) + 0.6
        if at and at + width > LINE:
            at, line = 0.0, line + 1
        starts.append(at)
        widths.append(width)
        lines.append(line)
        shown.append(html.escape(text))
        at += width + 0.25
        if "\n" in token:
            at, line = 0.0, line + 1
    return starts, widths, lines, shown


def _empty_figure() -> go.Figure:
    """Traces: cells, weights and words of the tokens; entropies of heads, the chosen one; the matrix, its row."""
    figure = make_subplots(
        2, 2, specs=[[{"colspan": 2}, None], [{}, {}]], row_heights=[0.28, 0.72], vertical_spacing=0.1,
        horizontal_spacing=0.2, subplot_titles=["", "<b>Mean entropy of every head</b>", " "],
    )  # fmt: skip
    flat = {"orientation": "h", "showlegend": False, "row": 1, "col": 1}
    hover = "%{marker.color:.3g} nats<br>%{customdata} of the chosen token’s weight<extra></extra>"
    look = {"colorscale": "Cividis", "cmin": 0, "line": {"color": CHOSEN, "width": 0}}
    figure.add_bar(x=[], y=[], width=CELL, marker=look, hovertemplate=hover, **flat)
    figure.add_bar(x=[], y=[], marker={"color": BLUE, "line": {"width": 0}}, hoverinfo="skip", **flat)
    font = {"family": "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace", "size": 12}
    style = {"mode": "text", "textfont": font, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=[], y=[], **style, row=1, col=1)
    bar = {"title": IN_NATS, "tickfont": {"size": 13}}
    bar |= {"x": 0.41, "len": 0.68, "y": 0.32, "thickness": 12, "outlinewidth": 0}
    figure.add_heatmap(
        z=[[0]], zmin=0, xgap=2, ygap=2, colorscale="Cividis", colorbar=bar, row=2, col=1,
        hovertemplate="layer %{y}, head %{x}<br>%{z:.3g} nats, click to choose<extra></extra>",
    )  # fmt: skip
    square = {"symbol": "square-open", "size": 22, "color": CHOSEN, "line": {"width": 3}}
    figure.add_scatter(x=[0], y=[0], mode="markers", marker=square, hoverinfo="skip", showlegend=False, row=2, col=1)
    figure.add_heatmap(
        z=[[0]], zmin=0, zmax=1, colorscale=_SCALE, showscale=False, row=2, col=2,
        hovertemplate="token %{y} on token %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    line = {"mode": "lines", "line": {"color": CHOSEN, "width": 1.5}, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=[], y=[], **line, row=2, col=2)
    bare = {"showgrid": False, "showline": False, "ticks": "", "zeroline": False}
    figure.update_xaxes(**bare, title_standoff=6).update_yaxes(**bare)
    figure.update_xaxes(visible=False, range=[0, LINE], row=1, col=1).update_yaxes(visible=False, row=1, col=1)
    figure.update_xaxes(title_text="head", dtick=1, row=2, col=1).update_yaxes(title_text="layer", row=2, col=1)
    figure.update_yaxes(tick0=0, dtick=1, row=2, col=1)
    figure.update_xaxes(title_text="key (token)", row=2, col=2).update_yaxes(title_text="query (token)", row=2, col=2)
    figure.update_layout(barmode="overlay", hovermode="closest").update_annotations(font_size=13)
    return laid_out(figure, "", 580).update_layout(margin={"l": 48, "t": 8})
