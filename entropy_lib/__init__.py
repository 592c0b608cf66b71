"""Attention entropy: measure it, regularise it, and train the variants of "Entropy-Guided Attention for Private LLMs".

The core (entropy, regularisation, attention, models) needs torch and transformers only. Names of the optional parts
(corpora, training, run records, private inference), and what needs transformers' Trainer, are imported on first use.
"""

from importlib import import_module

from entropy_lib import modeling_llama  # noqa: F401, so that AutoModelForCausalLM knows its models
from entropy_lib.attention import entropy_attention, entropy_of_attention
from entropy_lib.entropy import attention_entropy, diagnose, entropy_bands, entropy_from_logits, max_entropy
from entropy_lib.folding import fold_for_inference
from entropy_lib.modeling import EntropyGPT2Config, EntropyGPT2LMHeadModel, build_model
from entropy_lib.recording import entropy_callback, record_entropy
from entropy_lib.regularization import EntropyRegularization
from entropy_lib.variants import PRIVATE_VARIANTS, VARIANTS, Variant

_OPTIONAL = {
    "EntropyRegularizedTrainer": "entropy_lib.regularized_trainer",
    "load_corpus": "entropy_lib.training.corpus",
    "EntropyTrainer": "entropy_lib.training.train",
    "Recipe": "entropy_lib.training.train",
    "train_variant": "entropy_lib.training.train",
    "RunRecord": "entropy_lib.training.records",
    "inference_cost": "entropy_lib.private_inference.costs",
    "suggest_plan": "entropy_lib.private_inference.plan",
    "convert_for_private_inference": "entropy_lib.private_inference.convert",
    "run_two_party": "entropy_lib.private_inference.two_party",
}

__all__ = [
    "PRIVATE_VARIANTS",
    "VARIANTS",
    "EntropyGPT2Config",
    "EntropyGPT2LMHeadModel",
    "EntropyRegularization",
    "Variant",
    "attention_entropy",
    "build_model",
    "diagnose",
    "entropy_attention",
    "entropy_bands",
    "entropy_callback",
    "entropy_from_logits",
    "entropy_of_attention",
    "fold_for_inference",
    "max_entropy",
    "record_entropy",
    *_OPTIONAL,
]


def __getattr__(name: str):
    if name in _OPTIONAL:
        return getattr(import_module(_OPTIONAL[name]), name)
    raise AttributeError(f"module 'entropy_lib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
