"""How the parties compute an operation: as given, or another way for fewer bytes, with an error that is stated here.

The numbers of a `quartic`, q·((x + h)² + k)² + m·x + c, are those of data/make/prices.py's `fit_quartic`: of all
polynomials of degree 4 the one whose largest error is least. Two squarings compute it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from entropy_lib.private_inference.parties import ENGINE

# Largest errors: GELU (tanh form) 1.7e-3, SiLU 7.4e-3.
_GELU = {"quartic": [-0.0210793, -2.1851438, -1.4763009, -0.0695224, 0.2277183], "bound": 3.2}
_SILU = {"quartic": [-0.0033661, -3.8363600, -4.3587887, -0.0601085, 0.3684164], "bound": 6.0}
# exp(z) for z from -10 to 0: 8e-5; below, 0 stands for up to 5e-5.
_EXPONENTIAL = {"quartic": [0.01983452, 1.8105073, 2.535977, 0.1637173, 0.3295417], "squarings": 2}
# exp(z) / 64 for z from -12 to 12: relative to the larger of exp(z) and 1, 4.2e-3.
_SPREAD = 12.0
_BOUNDED = {"quartic": [0.0387524, 0.6221487, 2.5734085, 0.3117629, 0.2549653], "squarings": 3}


@dataclass(frozen=True)
class Method:
    """How a plan's operations are computed.

    Attributes:
        functions: operation -> the function of `party` that computes it, and its constants; others are as given.
        engine: settings of the engine that those functions need.
        spread: the largest distance of a logit from the mean of its row that the softmax bears; None: any.
    """

    functions: dict[str, tuple[str, dict]] = field(default_factory=dict)
    engine: dict = field(default_factory=dict)
    spread: float | None = None


_FAST = {
    "softmax": ("packed_softmax", _EXPONENTIAL),
    "relu_attention": ("packed_relu_attention", {}),
    "relu2_attention": ("packed_relu2_attention", {}),
    "square_attention": ("packed_square_attention", {}),
    "layernorm": ("normalize", {}),  # gain and bias go into the next matrix
    "rmsnorm": ("normalize", {"centre": False}),
    "gelu": ("segments", _GELU),
    "silu": ("segments", _SILU),
    "relu2": ("fast_relu2", {}),
    "square": ("fast_square", {}),
    "multiply": ("scale_rows", {}),
}
_ENGINE = {"fxp_exp_iters": 1}  # its exponential becomes a squaring, see `party.fast_square`
METHODS = {
    "as given": Method(),
    "optimized": Method(_FAST, _ENGINE),
    "bounded logits": Method({**_FAST, "softmax": ("bounded_softmax", _BOUNDED)}, _ENGINE, _SPREAD),
}


def get_method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def own_operations(name: str) -> list[str]:
    """The operations that no method before this one computes the same way: those to measure."""
    before = list(METHODS.values())[: list(METHODS).index(name)]
    functions = get_method(name).functions
    return [o for o, function in functions.items() if all(function != m.functions.get(o) for m in before)]


def prices_name(name: str) -> str:
    """Of the method's unit prices and, after "measured-", of the record that it is fitted to."""
    return ("" if name == "as given" else name.replace(" ", "-") + "-") + f"spu-{ENGINE}-cheetah"


def apply_method(plan: dict, values: dict[str, np.ndarray], name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """A plan as given and its values, changed to a method of METHODS."""
    method = get_method(name)
    plan, values = (_fold_norms if "layernorm" in method.functions else lambda *same: same)(plan, values)
    steps = []
    for step in plan["steps"]:
        if step["operation"] in method.functions:
            function, constants = method.functions[step["operation"]]
            step = {**step, "function": function, "constants": {**step.get("constants", {}), **constants}}
        steps.append(step)
    return {**plan, "steps": steps, "engine": method.engine}, values


def _fold_norms(plan: dict, values: dict) -> tuple[dict, dict]:
    """(g⊙x + b)·W + c = x·(diag(g)·W) + (b·W + c), for every LayerNorm and the matrices that read it."""
    inputs, steps, values, open_norms = dict(plan["inputs"]), [], dict(values), {}
    for step in plan["steps"]:
        names = step["inputs"]
        if step["operation"] == "layernorm":
            step = {**step, "inputs": names[:1]}
        elif norm := next((open_norms[name] for name in names if name in open_norms), None):
            if step["operation"] != "linear" or names[0] not in open_norms:
                raise ValueError(f"{step['operation']} reads a LayerNorm, whose gain only a matrix can take in")
            matrix, bias = (*names[1:], f"{names[1]}.bias")[:2]
            (gain, shift), weight = (values[name].astype(np.float64) for name in norm), values[matrix]
            values[bias] = (shift @ weight + values.get(bias, 0.0)).astype(np.float32)
            values[matrix] = (gain[:, None] * weight).astype(np.float32)
            inputs[bias] = {**inputs[matrix], "shape": list(values[bias].shape)}
            step = {**step, "inputs": [names[0], matrix, bias]}
        for result in step["outputs"]:
            open_norms.pop(result, None)
        if step["operation"] == "layernorm":
            open_norms[step["outputs"][0]] = names[1:]
        steps.append(step)
    gone = {name for step in plan["steps"] if step["operation"] == "layernorm" for name in step["inputs"][1:]}
    inputs, values = ({name: x for name, x in named.items() if name not in gone} for named in (inputs, values))
    return {**plan, "inputs": inputs, "steps": steps}, values


def check_spread(name: str, spread: float) -> None:
    """ValueError if a method cannot bear logits that reach so far from the mean of their row; NaN is too far."""
    limit = get_method(name).spread
    if limit is not None and not spread <= limit:
        raise ValueError(
            f"method {name!r} bears logits up to {limit:g} from the mean of their row, and these reach {spread:.3g}: "
            "use method 'optimized'"
        )
