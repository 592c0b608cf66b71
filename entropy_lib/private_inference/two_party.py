"""A model's forward pass between two parties: the client holds the token ids, the server the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_lib.folding import fold_for_inference
from entropy_lib.logit_range import logit_range
from entropy_lib.modeling import EntropyGPT2LMHeadModel
from entropy_lib.private_inference.architecture import Architecture, whole_number
from entropy_lib.private_inference.llama import is_llama, llama_weights
from entropy_lib.private_inference.methods import apply_method, check_spread, get_method
from entropy_lib.private_inference.parties import run_plan

# The engine's 1/√ is wrong from a mean square of 2¹⁷ on, and the sum of a row's squares must stay below 2²⁷: half of
# each.
ROW_LIMIT = 2.0**8
_NORMS = ("ln_1", "ln_2", "ln_f", "input_layernorm", "post_attention_layernorm", "norm")

_EXPECTED = "expected a model of this library, a GPT2LMHeadModel or one of Llama's kind"


@dataclass(frozen=True)
class TwoPartyResult:
    """What a private forward pass gave and what it cost.

    Attributes:
        logits: [1, T, V], or of the tokens asked for, float32, as the client decoded them.
        max_error: largest absolute difference to the model's own logits.
        steps: one dict an operation, in order: part, operation, bytes (both ways), seconds (wall, both parties on this
            machine), cpu_seconds (processor time of the busier process), messages (sent by the client; not rounds).
    """

    logits: Tensor = field(repr=False)
    max_error: float
    protocol: str
    steps: list[dict] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Sent by both parties during the pass; connecting and setting up keys (about 20 MB) excluded."""
        return sum(step["bytes"] for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step["seconds"] for step in self.steps)

    def to_frame(self):
        """A DataFrame with one row a part: bytes, seconds, cpu_seconds, messages."""
        import pandas as pd

        return pd.DataFrame(self.steps).drop(columns="operation").groupby("part", sort=False).sum()


def run_two_party(
    model: torch.nn.Module, input_ids: Tensor, protocol: str = "SEMI2K", *, method: str = "as given",
    spread: float | None = None, largest_row: float | None = None, logits_to_keep: int = 0, record: list | None = None,
    progress: Callable[[int, int], None] | None = None, **options,
) -> TwoPartyResult:  # fmt: skip
    """The logits of `model` on one sequence, computed by two parties on secret shares.

    Threat model: two parties, semi-honest, that do not collude. The server sees neither the token ids nor anything
    computed from them; the client sees no weight, only the logits. Both know the architecture and the length. This is
    for measurement: the parties run on one machine under one user, links are not encrypted, and an error of one unit
    in the last place of products is allowed. Do not protect real secrets with it.

    Args:
        model: any of this library, which is folded first (`fold_for_inference`), transformers' GPT2LMHeadModel, or one
            of its models of Llama's kind (Llama, Mistral, Qwen2, Qwen3, Gemma); or what was converted from these.
        input_ids: [T] or [1, T], T at least 2.
        protocol: "CHEETAH", two processes that talk over loopback, homomorphic encryption and oblivious transfer, the
            paper's; "SEMI2K", one process with both parties and a trusted dealer: fast, its bytes are not comparable
            with the paper's; or "ABY3", simulated too, with a third party that helps and colludes with neither.
        method: "as given", each operation as the engine has it; "optimized", for fewer bytes and any logits; "bounded
            logits", for fewer still, if attention's logits stay near the mean of their row. See `methods.METHODS`.
        spread: for "bounded logits", how far they reach from it at most, see `logit_range`. None measures it on
            `input_ids`, which a server does not see: it would measure on texts of its own.
        largest_row: root mean square of the largest row that a norm reads, after centring where it centres. What the
            parties' arithmetic bears is `ROW_LIMIT`; where RMSNorms read more (in SmolLM2-135M 1,003, on its first
            token), the whole stream is carried at a smaller scale, which they do not see. None measures it likewise.
        logits_to_keep: of the last so many tokens, 0 for all.
        record, progress, host, ports, timeout, delay: see `parties.run_plan`.

    Raises ValueError for a model with an operation that is not supported, an unknown method, and logits or rows of
    LayerNorms that reach farther than is borne; otherwise as `parties.run_plan`.
    """
    kept = whole_number("logits_to_keep", logits_to_keep)
    bounded = get_method(method).spread is not None
    ids = _sequence(model, input_ids)
    if not 0 <= kept <= len(ids):
        raise ValueError(f"logits_to_keep must be from 0 to {len(ids)}, got {kept}")
    architecture, weights, public = server_weights(model, len(ids))
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()  # the caller's may be in training in another thread
    if bounded:
        check_spread(method, _spread(model, ids) if spread is None else spread)
    plain, measured = _plain_pass(model, ids, kept)
    _carry_rows(architecture, weights, public, measured if largest_row is None else largest_row)
    one_hot = np.eye(architecture.vocabulary, dtype=np.float32)[ids.numpy()]
    shapes = {name: list(array.shape) for name, array in weights.items()}
    plan = forward_plan(architecture, shapes, len(ids), kept, **public)
    plan, values = apply_method(plan, {**weights, "one_hot": one_hot}, method)
    outputs, steps = run_plan(plan, values, protocol, record=record, progress=progress, **options)
    logits = torch.from_numpy(outputs["logits"]).float()[None]
    return TwoPartyResult(logits, (logits - plain).abs().max().item(), protocol, steps)


@torch.no_grad()
def _plain_pass(model: torch.nn.Module, ids: Tensor, kept: int) -> tuple[Tensor, float]:
    """The model's own logits, and the root mean square of the largest row that one of its norms reads."""
    largest = torch.zeros((), dtype=torch.float64)

    def measure(norm, inputs):
        rows = inputs[0].double()
        if hasattr(norm, "bias"):  # a LayerNorm
            rows = rows - rows.mean(-1, keepdim=True)
        largest.copy_(torch.maximum(largest, rows.square().mean(-1).max().sqrt().cpu()))  # NaN stays NaN

    norms = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _NORMS]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms if float(getattr(norm, "blend", 0)) < 1]
    try:
        logits = model(ids[None].to(model.device), logits_to_keep=kept).logits.float().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, largest.item()


def _carry_rows(architecture: Architecture, weights: dict, public: dict, largest: float) -> None:
    """Have the stream at a scale at which norms can take their largest row, or raise ValueError."""
    limit = min(ROW_LIMIT, 2.0**13 / architecture.width**0.5)
    if largest <= limit:
        return
    if not (architecture.norm == "rmsnorm" and architecture.layer_norm and math.isfinite(largest)):
        raise ValueError(
            f"a norm reads rows with a root mean square of up to {largest:.4g}, and the parties' arithmetic bears "
            f"{limit:.4g}: its results would be wrong"
        )
    scale = 2.0 ** math.floor(math.log2(limit / largest))
    public["stream_scale"] = scale
    for name in weights:
        if name == "tokens" or name.split(".")[1:2] in (["attention_out"], ["ffn_out"]):
            weights[name] = weights[name] * np.float32(scale)


def _spread(model: torch.nn.Module, ids: Tensor) -> float:
    heads = [head for layer in logit_range(copy.deepcopy(model), ids[None]) for head in layer]
    return torch.tensor(heads).abs().max().item() if heads else 0.0  # NaN stays NaN


def _sequence(model: torch.nn.Module, input_ids: Tensor) -> Tensor:
    """[T] int64 on the CPU. ValueError for anything that is not one sequence which the model takes."""
    config = getattr(model, "config", None)
    if not (isinstance(config, GPT2Config) or is_llama(model)):
        raise ValueError(f"{_EXPECTED}, got {type(model).__name__}")
    try:
        input_ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected token ids [T] or [1, T], got {type(input_ids).__name__}: {error}") from error
    ids = input_ids.reshape(-1)
    if input_ids.dim() > 2 or (input_ids.dim() == 2 and len(input_ids) != 1) or len(ids) < 2:
        raise ValueError(f"expected one sequence of two or more token ids, got shape {list(input_ids.shape)}")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"token ids must be integers, got {ids.dtype}")
    ids = ids.long().cpu()
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"token ids must be in [0, {config.vocab_size}), got {ids.min()} to {ids.max()}")
    if len(ids) > config.max_position_embeddings:
        raise ValueError(f"input of {len(ids)} tokens exceeds the model's {config.max_position_embeddings} positions")
    return ids


def generate_two_party(
    model: torch.nn.Module, input_ids: Tensor, max_new_tokens: int, protocol: str = "SEMI2K", **options
) -> Tensor:
    """Greedy continuation of [T] or [1, T] ids, every token from a private pass; returns [1, T + max_new_tokens].

    The passes start anew, there being no private key-value cache.
    """
    ids, count = _sequence(model, input_ids)[None], whole_number("max_new_tokens", max_new_tokens)
    most = model.config.max_position_embeddings - ids.shape[1] + 1  # the last token is not read again
    if not 0 <= count <= most:
        raise ValueError(f"max_new_tokens must be 0 to {most}, as far as the model's positions reach, got {count}")
    for _ in range(count):
        token = run_two_party(model, ids, protocol, logits_to_keep=1, **options).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[None].to(ids)], dim=1)
    return ids


def server_weights(model: torch.nn.Module, context_length: int) -> tuple[Architecture, dict[str, np.ndarray], dict]:
    """What the server brings: the folded weights as float32, with what else is linear moved into them; and what both
    know, the last arguments of `forward_plan`. Of a model of Llama's kind: `llama_weights`.

    1/√d_k goes into W_Q. Without LayerNorm the stream may carry any scale s, so that β costs nothing: a layer reads
    s·X through scaled W, adds its FFN's output over s·β, and hands s·β on. What stays is the temperature's scale of
    the queries and, with LayerNorm, β: products of T·d elements with a value that the server knows.

    Static heads become T×T matrices. Of a value residual, V + b·V₀, b goes out through W_V and W_O: b·(V/b + V₀).
    """
    architecture = Architecture.of(model.config)
    exact = "activation_function" if hasattr(model.config, "activation_function") else "hidden_act"
    if architecture.activation == "gelu" and getattr(model.config, exact) == "gelu":
        raise ValueError(
            "activation 'gelu' is not what the parties compute, which is its tanh form: load the model with "
            f"{exact}='gelu_new', at most 5e-4 from it"
        )
    if is_llama(model):
        return llama_weights(model, context_length)
    context_length = architecture.checked_length(context_length)
    if (architecture.layer_norm or architecture.final_layer_norm) and abs(
        model.config.layer_norm_epsilon - 1e-5
    ) > 1e-9:
        raise ValueError(f"layer_norm_epsilon must be 1e-5, got {model.config.layer_norm_epsilon}")
    if isinstance(model, EntropyGPT2LMHeadModel):
        model = fold_for_inference(model)
    elif isinstance(model, GPT2LMHeadModel):
        with torch.device("meta"):
            known = GPT2LMHeadModel(copy.deepcopy(model.config)).state_dict().keys()
        if strange := sorted(known ^ model.state_dict().keys()):
            raise ValueError(
                f"parameters other than GPT-2's ({strange[0]}, ...): merge adapters into its weights first"
            )
    else:
        raise ValueError(f"{_EXPECTED}, got {type(model).__name__}")
    state = {name: value.detach().double().cpu() for name, value in model.state_dict().items()}
    body = "transformer."
    weights = {
        "tokens": state[body + "wte.weight"],
        "positions": state[body + "wpe.weight"][:context_length],
    }
    size, scale = architecture.width // architecture.heads, 1.0
    for layer in range(architecture.layers):
        here = f"{body}h.{layer}."

        def part(name, here=here):
            return state[f"{here}{name}.weight"], state[f"{here}{name}.bias"]

        beta = state[here + "beta"].item() if architecture.scaled else 1.0
        if architecture.scaled and architecture.layer_norm:
            weights[f"{layer}.beta"], beta = torch.full((context_length, 1), beta), 1.0
        if beta == 0:
            raise ValueError(f"β of layer {layer} is 0: it cannot be moved into the weights")
        qkv, bias = (tensor.clone() for tensor in part("attn.c_attn"))
        qkv *= scale
        dynamic, mixed = architecture.heads_of_layer(layer), 1.0
        if architecture.value_residual and layer:
            mixed = state[here + "attn.value_mix"][1].item()
            if mixed == 0:
                raise ValueError(f"layer {layer} adds 0 times the values of layer 0: that cannot go into the weights")
        for tensor in (qkv, bias):
            tensor[..., : dynamic * size] /= math.sqrt(size)
            tensor[..., -architecture.width :] /= mixed
        weight, out_bias = part("attn.c_proj")
        group = {"qkv": (qkv, bias), "attention_out": (weight * mixed / scale, out_bias / scale)}
        if dynamic < architecture.heads:
            weights[f"{layer}.filters"] = model.transformer.h[layer].attn.static.matrix(context_length).detach()
        if architecture.fused:
            weight, bias = part("mlp.c_proj")
            group["ffn_out"] = (weight / beta, bias / (scale * beta))
        else:
            weight, bias = part("mlp.c_fc")
            group["ffn_in"] = (weight * scale, bias)
            group["ffn_out"] = tuple(x / (scale * beta) for x in part("mlp.c_proj"))
        if architecture.layer_norm:
            group["norm1"], group["norm2"] = part("ln_1"), part("ln_2")
        if architecture.tempered and dynamic:
            weights[f"{layer}.query_scale"] = state[here + "attn.query_scale"][:, :context_length, None]
        for name, (weight, bias) in group.items():
            weights |= {f"{layer}.{name}.weight": weight, f"{layer}.{name}.bias": bias}
        scale *= beta
    if architecture.final_layer_norm:
        weights |= {"norm.weight": state[body + "ln_f.weight"], "norm.bias": state[body + "ln_f.bias"]}
    weights["vocabulary"] = state["lm_head.weight"].T * scale
    arrays = {name: np.ascontiguousarray(value.float().cpu().numpy()) for name, value in weights.items()}
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"weights of the model are not finite once β is moved into them: {', '.join(broken)}")
    return architecture, arrays, {}


def forward_plan(
    architecture: Architecture, weights: dict[str, list[int]], context_length: int, logits_to_keep: int = 0, *,
    epsilon: float = 1e-5, stream_scale: float = 1.0, frequencies: list[float] | None = None,
    head_order: dict[int, list[int]] | None = None,
) -> dict:  # fmt: skip
    """The plan of a forward pass (see `party`): the client's one-hot ids to logits, or, without a vocabulary, one or
    more blocks from a hidden state that both parties hold shares of. `weights`: name to shape; `epsilon` of RMSNorms,
    `stream_scale` at which the weights carry what they read; `frequencies`: of rotary positions, in radians a token,
    one for each pair of columns of a head; `head_order`: by layer the model's numbers of the heads, softmax heads
    first."""
    a, t = architecture, context_length
    inputs = {name: {"owner": "server", "shape": shape, "dtype": "float32"} for name, shape in weights.items()}
    steps = []

    def step(part, operation, sources, result, function=None, **constants):
        results = [result] if isinstance(result, str) else result
        entry = {"part": part, "operation": operation, "inputs": sources, "outputs": results}
        entry |= {"function": function} if function else {}
        steps.append({**entry, "constants": constants} if constants else entry)

    def linear(part, x, name, result):
        step(part, "linear", [x, f"{name}.weight", f"{name}.bias"], result)

    def norm(name, result, source="x"):
        if a.norm == "rmsnorm":  # its gain is in the next matrix
            step("RMSNorm", "rmsnorm", [source], result, epsilon=epsilon * (stream_scale**2 if source == "x" else 1.0))
        else:
            step("LayerNorm", "layernorm", [source, f"{name}.weight", f"{name}.bias"], result)

    def turn(part, name):
        """Queries or keys, normalised if they are, by their positions."""
        if a.query_key_norm:
            norm(name, part, part)
            step("attention linear", "linear", [part, name], part, function="head_gain")
        if frequencies is not None:
            step("attention linear", "rotary", [part], part, frequencies=frequencies)

    if a.vocabulary:
        inputs["one_hot"] = {"owner": "client", "shape": [t, a.vocabulary], "dtype": "float32"}
        step("embedding", "embed", [name for name in ("one_hot", "tokens", "positions") if name in inputs], "x")
    else:
        inputs["x"] = {"owner": "client", "shape": [t, a.width], "dtype": "float32", "shared": True}
    source = "h" if a.layer_norm else "x"
    for layer in range(a.layers):
        if a.layer_norm:
            norm(f"{layer}.norm1", "h")
        linear("attention linear", source, f"{layer}.qkv", "qkv")
        dynamic, values = a.heads_of_layer(layer), "v" if layer or not a.value_residual else "v0"
        parts = ["q", "k", values] if dynamic else [values]
        if a.norm == "rmsnorm":
            groups = [head * a.groups // a.heads for head in (head_order or {}).get(layer, range(a.heads))]
            keys = [sorted(set(groups[:dynamic])).index(group) for group in groups[:dynamic]]
            step("attention linear", "grouped_heads", ["qkv"], parts, size=a.size, keys=keys, values=groups)
            if dynamic:
                turn("q", f"{layer}.query_gain")
                turn("k", f"{layer}.key_gain")
        else:
            step("attention linear", "heads", ["qkv"], parts, count=a.heads, dynamic=dynamic)
        if a.value_residual and layer:
            step("attention linear", "add", ["v", "v0"], "v")
        if a.tempered and dynamic:
            step("attention linear", "multiply", ["q", f"{layer}.query_scale"], "q")
        if dynamic:
            step("attention linear", "scores", ["q", "k"], "s")
            step("softmax", a.attention, ["s"], "a")
            step("attention linear", "mix", ["a", values], "o")
        if dynamic < a.heads:
            step("attention linear", "static", [values, f"{layer}.filters"], "f" if dynamic else "o")
        if 0 < dynamic < a.heads:
            step("attention linear", "join", ["o", "f"], "o")
        linear("attention linear", "o", f"{layer}.attention_out", "y")
        step("attention linear", "add", ["x", "y"], "x")
        if a.layer_norm:
            norm(f"{layer}.norm2", "h")
        if a.fused:
            linear("FFN linear", source, f"{layer}.ffn_out", "y")
        else:
            linear("FFN linear", source, f"{layer}.ffn_in", "u")
            if a.gated:
                step("FFN linear", "halves", ["u"], ["u", "w"])
            if a.activation != "linear":
                step("activation", a.activation, ["u"], "u")
            if a.gated:
                step("activation", "bilinear", ["u", "w"], "u", function="multiply")
            linear("FFN linear", "u", f"{layer}.ffn_out", "y")
        if a.scaled and a.layer_norm:
            step("FFN linear", "multiply", ["x", f"{layer}.beta"], "x")
        step("FFN linear", "add", ["x", "y"], "x")
    if a.vocabulary:
        if logits_to_keep:
            step("vocabulary projection", "last", ["x"], "x", count=logits_to_keep)
        if a.final_layer_norm:
            norm("norm", "x")
        step("vocabulary projection", "linear", ["x", "vocabulary"], "logits")
    return {"inputs": inputs, "steps": steps, "outputs": ["logits" if a.vocabulary else "x"]}
