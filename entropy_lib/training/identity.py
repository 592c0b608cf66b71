"""What makes two training runs the same, as plain data: for the folder of a run, and for its record."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict

import torch
from datasets import DatasetDict

from entropy_lib.training.corpus import CODEPARROT_TOKENS, CORPORA, corpus_hash, max_tokens_of
from entropy_lib.training.recipe import Recipe
from entropy_lib.variants import VARIANTS, Variant


def run_identity(
    variant: Variant,
    *,
    size: str,
    seed: int,
    corpus: dict,
    recipe: Recipe | dict,
    model_config: dict | None = None,
    training_overrides: dict | None = None,
) -> dict:
    """Everything that determines a run's result, as plain JSON types.

    `corpus` is what is known of it: "sha256" and "vocab_size", or "name" and "max_tokens" of a known one. `recipe` may
    be one on record, see `_whole_recipe`. ValueError for what JSON does not hold.
    """
    model_config = dict(model_config or {})
    if placement := model_config.pop("norm_placement", None):
        variant = variant.placed(placement)
    recipe = asdict(recipe) if isinstance(recipe, Recipe) else _whole_recipe(recipe, asdict(variant))
    return {
        "variant": plain("variant", asdict(variant)),
        "size": size,
        "seed": seed,
        "corpus": corpus,
        "recipe": plain("recipe", recipe),
        "model_config": plain("model_config", model_config),
        "training_overrides": plain("training_overrides", training_overrides or {}),
    }


def record_identity(summary: dict) -> dict:
    """The identity of a run on record, from what its JSON file holds."""
    variant = summary.get("variant_config") or asdict(VARIANTS.get(summary["variant"], Variant(summary["variant"])))
    if "max_tokens" in summary:
        max_tokens = summary["max_tokens"]
    else:  # recorded before the field was: the command tells
        given = re.findall(r"--max-t[a-z-]*[= ](\d+)", summary["command"])
        max_tokens = int(given[-1]) if given else None
    return run_identity(
        Variant(**variant),
        size=summary["size"],
        seed=summary["seed"],
        corpus={
            **known_corpus(summary["corpus"], max_tokens),
            "sha256": summary["corpus_sha256"],
            "vocab_size": summary["vocab_size"],
        },
        recipe=summary["recipe"],
        model_config=summary["model_config"],
        training_overrides=summary.get("training_overrides"),
    )


def corpus_identity(dataset: DatasetDict, vocab_size: int) -> dict:
    """A known corpus's name is for it alone: text of the user's own that is called like one is "./name"."""
    info = dataset["train"].info
    name = info.dataset_name or "unnamed"
    if name in CORPORA and info.description != CORPORA[name][0]:
        name = f"./{name}"
    return {**known_corpus(name, max_tokens_of(dataset)), "sha256": corpus_hash(dataset), "vocab_size": vocab_size}


def known_corpus(name: str, max_tokens: int | None) -> dict:
    """The identity of one of `CORPORA`: the same name gives the same tokens anywhere."""
    return {"name": name, "max_tokens": max_tokens or (CODEPARROT_TOKENS if name == "codeparrot" else None)}


def differences(wanted: dict, found: dict) -> str:
    """Where an identity differs from the one that is wanted, in words; "" if nowhere. Of the corpus, what is wanted."""
    corpus, variant = found.get("corpus") or {}, found.get("variant") or {}
    recipe = _whole_recipe(found.get("recipe") or {}, variant)
    found = {**found, "corpus": {key: corpus.get(key) for key in wanted["corpus"]}, "recipe": recipe}
    found["variant"] = {**plain("variant", asdict(Variant(""))), **variant}
    names, details = [], []
    for name, value in wanted.items():
        if found.get(name) == value:
            continue
        names.append(name)
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            for key in sorted({*value, *found[name]}):
                if value.get(key) != found[name].get(key):
                    details.append(f"{key} {found[name].get(key)!r}, wanted {value.get(key)!r}")
        else:
            details.append(f"{name} {found.get(name)!r}, wanted {value!r}")
    return f"{', '.join(names)} differ: {'; '.join(details)}" if names else ""


# A field of `Variant` goes into a run's digest even with its default, unless it is one of these.
_ADDED_TO_VARIANT = (
    "dynamic_heads", "attention", "annealed_layer_norm", "final_layer_norm", "value_residual", "ffn_multiple",
)  # fmt: skip


def digest(identity: dict) -> str:
    """SHA-256 (hex), the same before and after a field with a default was added to `Recipe` or `Variant`."""
    default, of_variant = asdict(Recipe()), asdict(Variant(""))
    changed = {key: value for key, value in identity["recipe"].items() if key not in default or default[key] != value}
    variant = {k: v for k, v in identity["variant"].items() if k not in _ADDED_TO_VARIANT or of_variant[k] != v}
    essence = {**identity, "recipe": changed, "variant": variant}
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()


def scaled_before_the_field(variant: dict) -> bool:
    """How residual projections started until `Recipe.scaled_residual_init` was a field, by `asdict` of the variant.

    transformers passed over those of all modules without parameters of their own: the d→4d→d FFN, and attention
    without temperature and thresholds.
    """
    own_parameters = variant.get("learnable_temperature") or variant.get("entropy_regularization")
    return bool(own_parameters and variant.get("fused_ffn"))


def _whole_recipe(recipe: dict, variant: dict) -> dict:
    """With the fields that a recipe on record lacks: they were added since and have their defaults, save one."""
    return {**asdict(Recipe()), "scaled_residual_init": scaled_before_the_field(variant), **recipe}


def weights_hash(model) -> str:
    """SHA-256 (hex) of a model's parameters and buffers, by name."""
    hashed = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        hashed.update(name.encode())
        hashed.update(raw.numpy())
    return hashed.hexdigest()


def plain(name: str, values: dict) -> dict:
    """`values` as JSON gives them back; ValueError for what it cannot hold."""
    found = {}
    for key, value in values.items():
        try:
            found[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name} goes on record, as JSON, which cannot hold {key}={value!r}: {error}") from error
    return found
