"""What a trained model can do beside its perplexity: recall, patterns from examples, answers, loss by position.

All but `answer_bits` are of random tokens, which no model of the language knows: only the context answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_lib.training.benchmarks import Answer

SEQUENCES = 256
LOGITS = 32_768  # tokens whose logits are in memory at a time, 6 GB for a vocabulary of 49,152
WORD = 3  # tokens
PATTERNS = {"copy": (0, 1, 2), "reverse": (2, 1, 0), "rotate": (1, 2, 0), "first": (0, 0, 0)}


def recall(
    model: PreTrainedModel,
    positions: int | None = None,
    sequences: int = SEQUENCES,
    seed: int = 1,
    batch: int | None = None,
) -> float:
    """Share of right next tokens in the second half of random tokens that are written twice.

    No model of the language learns them: only looking back at what followed the first time answers. A guess is right
    once in a vocabulary. Sequences have so many positions (None: all the model's), or one less if these are odd.
    """
    positions = _positions(model, positions)
    half = positions // 2
    if half < 2:
        raise ValueError(f"recall needs at least 4 positions, got {positions}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (sequences, half), generator=generator).repeat(1, 2)
    return _right(model, ids, batch, half).double().mean().item()


def associative_recall(
    model: PreTrainedModel, pairs: int, sequences: int = SEQUENCES, seed: int = 1, batch: int | None = None
) -> float:
    """Share of right values after a key, when `pairs` keys with a value each were read and are asked in another order.

    Random tokens k₁ v₁ … kₙ vₙ, then every key once more with its value: 4n positions. Keys differ, so that the last
    appearance of a key tells its value and how far back it was does not (Zoology's multi-query recall,
    arXiv 2312.04927, on models that were not trained for it).
    """
    vocabulary, positions = model.config.vocab_size, _positions(model)
    if not 1 <= pairs <= min(positions // 4, vocabulary):
        raise ValueError(f"{pairs} pairs take {4 * pairs} positions and {pairs} different tokens, the model has "
                         f"{positions} positions and {vocabulary} tokens")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    keys = torch.stack([torch.randperm(vocabulary, generator=generator)[:pairs] for _ in range(sequences)])
    table = torch.stack([keys, torch.randint(vocabulary, keys.shape, generator=generator)], -1)  # [N, n, 2]
    order = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(sequences)])
    asked = table.gather(1, order[..., None].expand_as(table))
    ids = torch.cat([table, asked], 1).flatten(1)
    return _right(model, ids, batch, 2 * pairs)[:, ::2].double().mean().item()


def patterns(
    model: PreTrainedModel,
    kind: str,
    positions: int | None = None,
    sequences: int = SEQUENCES,
    seed: int = 1,
    batch: int | None = None,
) -> list[float]:
    """Share of right tokens of a pattern's answer, by the number of examples before it: 0, 1, 2, ... as many as fit.

    kind: "copy", "reverse", "rotate" (abc → bca) or "first" (abc → aaa) of three random tokens. An example is the
    three, a sign, the answer and an end; sign and end are two tokens of their own in every sequence.
    """
    if kind not in PATTERNS:
        raise ValueError(f"unknown pattern {kind!r}; there are {', '.join(PATTERNS)}")
    each, vocabulary, positions = 2 * WORD + 2, model.config.vocab_size, _positions(model, positions)
    examples = positions // each
    if not examples:
        raise ValueError(f"a pattern takes {each} positions, got {positions}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(vocabulary, generator=generator)[:2] for _ in range(sequences)])
    sign, end = (drawn[:, column, None, None].expand(-1, examples, 1) for column in (0, 1))
    words = torch.randint(vocabulary, (sequences, examples, WORD), generator=generator)
    ids = torch.cat([words, sign, words[..., list(PATTERNS[kind])], end], -1).flatten(1)
    right = _right(model, ids, batch, ids.shape[1])  # of the token after each: an answer's begin at the sign
    right = pad(right, (0, 1)).view(sequences, examples, each)[:, :, WORD : 2 * WORD]
    return right.double().mean((0, 2)).tolist()


def _positions(model: PreTrainedModel, positions: int | None = None) -> int:
    return positions or getattr(model.config, "n_positions", None) or model.config.max_position_embeddings


@torch.no_grad()
def _right(model: PreTrainedModel, ids: Tensor, batch: int | None, last: int) -> Tensor:
    """[N, last-1]: whether each of the `last` tokens but the first is the most likely after those before it."""
    parts = ids.to(model.device).split(batch or max(1, LOGITS // last))
    guesses = [model(part, logits_to_keep=last).logits[:, :-1].argmax(-1) for part in parts]
    return torch.cat(guesses).cpu() == ids[:, 1 - last :]


@torch.no_grad()
def answer_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer],
    positions: int | None = None,
    batch: int = 64,
) -> list[float]:
    """Bits a byte (UTF-8) of each right answer after its context: less is better, and models of other tokens compare.

    Context and answer are tokenized apart. What is longer than the model's positions is read in windows that go on by
    half of them, so that every token has at least half of the positions before it, or all there is.
    """
    positions, windows, owner = _positions(model, positions), [], []
    for number, answer in enumerate(answers):
        before = tokenizer(answer.context, verbose=False)["input_ids"] or [tokenizer.eos_token_id]
        wanted = tokenizer(answer.text, verbose=False)["input_ids"]
        if not wanted:
            raise ValueError(f"answer {number} is empty")
        ids, done = before + wanted, len(before)
        while done < len(ids):
            end = min(len(ids), max(positions, done + positions // 2))
            start = max(0, end - positions)
            windows.append((ids[start:end], done - start))
            owner.append(number)
            done = end
    bits = torch.zeros(len(answers), dtype=torch.float64)
    for first in range(0, len(windows), batch):
        part = windows[first : first + batch]
        longest = max(len(ids) for ids, _ in part)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in part], device=model.device)
        logits = model(ids).logits[:, :-1].transpose(1, 2).float()
        nats = cross_entropy(logits, ids[:, 1:], reduction="none").double().cpu()
        for row, (ids, begin), number in zip(nats, part, owner[first : first + batch], strict=True):
            bits[number] += row[begin - 1 : len(ids) - 1].sum() / math.log(2)
    return [bit / len(answer.text.encode()) for bit, answer in zip(bits.tolist(), answers, strict=True)]


@torch.no_grad()
def loss_by_position(model: PreTrainedModel, blocks: Tensor, batch: int | None = None) -> list[float]:
    """Mean cross-entropy in nats of the tokens at positions 1 to T-1 of blocks [N, T]; their mean is the loss."""
    batch = batch or max(1, LOGITS // blocks.shape[1])
    total = torch.zeros(blocks.shape[1] - 1, dtype=torch.float64)
    for part in blocks.split(batch):
        part = part.to(model.device)
        logits = model(part).logits[:, :-1].transpose(1, 2).float()
        total += cross_entropy(logits, part[:, 1:], reduction="none").sum(0).double().cpu()
    return (total / len(blocks)).tolist()
