"""Explorer of the softmax temperature: what it does to the attention and the entropy of real heads."""

from __future__ import annotations

import math

import torch
from plotly.colors import sample_colorscale
from torch import Tensor
from traitlets import Bool, Enum, Float, Int, List, TraitError, Unicode, validate

from entropy_lib.entropy import entropy_from_logits, log_softmax_and_softmax
from entropy_lib.explore.attention_logits import AttentionLogits, as_logits, logits_of, read_logits
from entropy_lib.explore.figures import lines
from entropy_lib.explore.module import ModuleExplorer, in_planes, keys_worth, module_source

LOW, HIGH = 0.01, 100.0  # temperatures
POINTS = 61  # of the curves
_LEAST = -6e4  # that a key which is seen can be in half precision


def temperature_explorer(logits=None, *, model=None, tokenizer=None, text: str | None = None) -> TemperatureExplorer:
    """Attention softmax(z/t) of real logits z, its entropy E(t), and dE/d(log t), for a temperature by head or layer.

    Args:
        logits: [L, H, T_q, T_k] or [H, T_q, T_k], -inf where masked; an `AttentionLogits`; None for the committed
            sample (a tiny model on a few lines of Python) or for the model.
        model, tokenizer, text: a transformers decoder instead, run once on the text.

    The slope is Var(z/t) under the attention (from dE/dβ = -β·Var(z), β = 1/t). Logits are kept in half precision,
    each row's largest as 0. ValueError for logits of another shape, and for a model without tokenizer and text.
    """
    if model is not None:
        if logits is not None or tokenizer is None or text is None:
            raise ValueError("pass logits, or a model with its tokenizer and a text")
        sample = logits_of(model, tokenizer, text)
    else:
        sample = read_logits() if logits is None else as_logits(logits)
    return _explorer_of(sample)


class TemperatureExplorer(ModuleExplorer):
    """See `temperature_explorer`. Traits: layer, head, scope (whose t is set), row (a query), single (it alone).

    `t` is the temperature of the head that is shown; setting it sets those in `scope`. What the module shows is here
    by torch: `entropy`, `rows`, `slope`, `words`.
    """

    _esm = module_source("temperature")
    logits = Unicode().tag(sync=True, state=True)  # float16 in planes: of causal ones what each query sees, or all
    shape = List(Int()).tag(sync=True, state=True)
    causal = Bool().tag(sync=True, state=True)
    tokens = List(Unicode()).tag(sync=True, state=True)
    temperatures = List(List(Float())).tag(sync=True, state=True)  # [L][H]
    layer = Int(0, min=0).tag(sync=True, state=True)
    head = Int(0, min=0).tag(sync=True, state=True)
    scope = Enum(["head", "layer", "all"], "head").tag(sync=True, state=True)
    row = Int(0, min=0).tag(sync=True, state=True)
    single = Bool(False).tag(sync=True, state=True)
    colors = List(Unicode(), sample_colorscale("Cividis", 64)).tag(sync=True, state=True)

    @validate("layer", "head", "row")
    def _one_of_them(self, proposal):
        count = self.shape[("layer", "head", "row").index(proposal["trait"].name)]
        if proposal["value"] >= count:
            raise TraitError(f"{proposal['trait'].name} is an index of {count}")
        return proposal["value"]

    @validate("temperatures")
    def _of_every_head(self, proposal):
        layers, heads = self.shape[:2]
        values = proposal["value"]
        if len(values) != layers or any(len(row) != heads for row in values):
            raise TraitError(f"temperatures are [{layers}][{heads}]")
        if not all(LOW <= t <= HIGH for row in values for t in row):
            raise TraitError(f"a temperature is from {LOW} to {HIGH}")
        return values

    @property
    def t(self) -> float:
        return self.temperatures[self.layer][self.head]

    @t.setter
    def t(self, value: float) -> None:
        def meant(layer: int, head: int) -> bool:
            return self.scope == "all" or (layer == self.layer and (self.scope == "layer" or head == self.head))

        self.temperatures = [
            [value if meant(layer, head) else t for head, t in enumerate(row)]
            for layer, row in enumerate(self.temperatures)
        ]

    @property
    def entropy(self) -> Tensor:
        """Mean entropies of all heads, each at its own temperature: [L, H], nats."""
        t = torch.tensor(self.temperatures, dtype=torch.float64)[..., None, None]
        return entropy_from_logits(self.sample.logits / t).mean(-1)

    def rows(self) -> Tensor:
        """The logits that the curve is of, [rows, T_k]: all of the head that is shown, or the one row."""
        logits = self.sample.logits[self.layer, self.head].double()
        return logits[self.row : self.row + 1] if self.single else logits

    def entropies(self, t: Tensor) -> Tensor:
        """Mean entropy of softmax(z/t) over `rows`: t [n] -> [n], nats. Differentiable."""
        rows = self.rows()
        seen = rows > -math.inf  # as a mask, since the gradient of -inf/t is not finite
        return entropy_from_logits(rows.masked_fill(~seen, 0.0) / t[:, None, None], seen).mean(-1)

    def slope(self, t: Tensor) -> Tensor:
        """dE/d(log t) = Var(z/t) under softmax(z/t), mean over `rows`: [n] -> [n]."""
        tempered = self.rows() / t[:, None, None]
        _, weights = log_softmax_and_softmax(tempered)
        tempered = tempered.masked_fill(tempered == -math.inf, 0.0)
        mean = (weights * tempered).sum(-1, keepdim=True)
        return (weights * (tempered - mean).square()).sum(-1).mean(-1)

    @property
    def ceiling(self) -> float:
        """The largest entropy that `rows` can reach, mean over them: log of the keys that each sees."""
        return (self.rows() > -math.inf).sum(-1).double().log().mean().item()

    def words(self) -> str:
        """What the explorer says of the head or row."""
        t = torch.tensor([self.t], dtype=torch.float64)
        entropy, slope = keys_worth(self.entropies(t).item()), self.slope(t).item()
        return f"E = {entropy}, of {self.ceiling:.3g} nats at most · dE/d(log t) = Var(z/t) = {slope:.3g} nats"

    def still(self):
        """E(t) of what is shown, as a figure."""
        t = torch.logspace(math.log10(LOW), math.log10(HIGH), POINTS)
        title = "Entropy rises from 0 to its ceiling as the temperature grows, and never turns back"
        axes = {"x_title": "temperature t", "y_title": "entropy E (nats)", "y_range": (0, 1.1 * max(self.ceiling, 0.1))}
        curve = {f"layer {self.layer}, head {self.head}": (t.tolist(), self.entropies(t).tolist())}
        figure = lines(curve, title=title, log_x=True, reference={"every key the same": self.ceiling}, **axes)
        here = {"x": [self.t], "y": self.entropies(torch.tensor([self.t])).tolist()}
        return figure.add_scatter(**here, mode="markers", marker={"size": 11}, showlegend=False)


def _explorer_of(sample: AttentionLogits) -> TemperatureExplorer:
    seen = sample.logits > -math.inf
    half = sample.logits.clamp(min=_LEAST).half().masked_fill(~seen, -math.inf)
    layers, heads, queries, keys = half.shape
    rows, columns = torch.tril_indices(queries, keys)
    sent = half[..., rows, columns] if sample.causal else half
    explorer = TemperatureExplorer(
        shape=list(half.shape),
        causal=sample.causal,
        logits=in_planes(sent.numpy().astype("<f2")),
        tokens=list(sample.tokens),
        temperatures=[[1.0] * heads for _ in range(layers)],
        layer=layers // 2,
        row=queries - 1,
    )
    explorer.sample = AttentionLogits(half.float(), sample.tokens, sample.origin)
    return explorer
