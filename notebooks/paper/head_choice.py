"""Which heads keep their softmax? Those that a trained SM+LN+G names, by rules that look at entropy or at the input.

A rule ranks the heads of the record; the best `count` of all layers keep a softmax, and a new model is trained whose
layers have as many. Within a layer heads start alike, so only the numbers matter.
"""

from __future__ import annotations

import numpy as np

from entropy_lib.training.records import RunRecord

COUNTS = (4, 12, 36)
RULES = ("low entropy", "high entropy", "input dependence", "both", "random")  # evenly spread: PRIVATE_VARIANTS


def heads_by_layer(record: RunRecord, rule: str, count: int) -> tuple[int, ...]:
    """Softmax heads by layer if the `count` heads that `rule` ranks first keep theirs.

    "both" adds the ranks by low entropy and by input dependence. ValueError for an unknown rule, more heads than there
    are, and a record without `input_dependence`.
    """
    entropy = np.array(record.entropy)
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}")
    if not 0 <= count <= entropy.size:
        raise ValueError(f"expected 0 to {entropy.size} heads, got {count}")
    if record.input_dependence is None:
        raise ValueError(f"{record.name} has no input dependence on record: train it again")
    dependence = np.array(record.input_dependence)
    scores = {
        "low entropy": entropy,
        "high entropy": -entropy,
        "input dependence": -dependence,
        "both": _ranks(entropy) + _ranks(-dependence),
        "random": np.random.default_rng(0).permutation(entropy.size).reshape(entropy.shape),
    }
    chosen = np.argsort(scores[rule], axis=None, kind="stable")[:count] // entropy.shape[1]
    return tuple(np.bincount(chosen, minlength=len(entropy)).tolist())


def variant_name(counts: tuple[int, ...]) -> str:
    return f"SM({','.join(map(str, counts))})+LN(a)+R+V"


def _ranks(scores: np.ndarray) -> np.ndarray:
    return scores.ravel().argsort(kind="stable").argsort().reshape(scores.shape)
