"""The sums, the blocks they stand in, which answers count as right, and a rehearsal of a run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from entropy_lib.explore.tiny_model import load_tiny_model
from entropy_lib.training.trainer import between
from paper import arithmetic
from paper.arithmetic import DIGITS, END, SIGN, Bytes


@pytest.fixture(scope="module")
def tokenizer():
    return load_tiny_model()[1]


def test_problems_are_right_and_of_the_size_that_was_asked_for():
    generator = np.random.default_rng(0)
    for operation, sizes in DIGITS.items():
        for digits in sizes:
            for question, answer in arithmetic.problems(generator, [operation] * 50, [digits] * 50):
                first, second = question.removesuffix(SIGN).split(operation)
                assert {len(first), len(second)} == {digits}
                wanted = int(first) + int(second) if operation == "+" else int(first) * int(second)
                assert answer == str(wanted)[::-1] + END
    kinds = {
        (question[len(question) // 2 - 1], len(question)) for question, _ in arithmetic.any_problems(generator, 500)
    }
    assert kinds == {(operation, 2 * digits + 2) for operation, sizes in DIGITS.items() for digits in sizes}


def test_half_of_the_blocks_are_sums_and_an_answer_is_what_the_penalty_is_held_to(tokenizer):
    data, given = arithmetic.mixed("sample", 60, seed=0)
    ids = torch.tensor(data["train"][:]["input_ids"])
    sign, end = Bytes(given)(SIGN + END)
    sums = (ids == sign).any(1)
    assert ids.shape == (60, 128)
    assert sums.sum() == 30
    assert 0 < sums[:30].sum() < 30
    text = given.decode(ids[sums][0])
    inside = between(ids[sums][:1], sign, end)[0]
    answers = "".join(part.split(END)[0] + END for part in text.split(SIGN)[1:])
    assert given.decode(ids[sums][0, 1:][inside[:-1]]) == answers  # what these queries predict
    same, other = (arithmetic.mixed("sample", 60, seed=seed)[0] for seed in (0, 1))
    assert same["train"][:] == data["train"][:] != other["train"][:]
    assert data["validation"][:8] != data["train"][:8]


def test_an_answer_is_right_if_all_of_its_tokens_are(tokenizer, monkeypatch):
    monkeypatch.setattr(arithmetic, "ASKED", 40)
    encode = Bytes(tokenizer)
    character = {ids[0]: text for text, ids in encode.ids.items()}

    def calculates(ids, spoil):
        said = torch.zeros_like(ids)
        for row, tokens in enumerate(ids.tolist()):
            text = "".join(character.get(token, "?") for token in tokens)
            for place in range(len(text)):
                if SIGN in (problem := text[: place + 1].split(END)[-1]):
                    question, so_far = problem.split(SIGN)
                    answer = str(eval(question))[::-1] + END
                    if len(so_far) < len(answer):
                        said[row, place] = encode.ids[spoil(answer, len(so_far))][0]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, tokenizer.vocab_size).float())

    def model(spoil):
        return type("Model", (), {"device": "cpu", "__call__": lambda self, ids: calculates(ids, spoil)})()

    right = arithmetic.accuracy(model(lambda answer, place: answer[place]), tokenizer)
    assert right == {operation: [1.0] * len(sizes) for operation, sizes in DIGITS.items()}
    never_ends = arithmetic.accuracy(model(lambda answer, place: answer[place].replace(END, "0")), tokenizer)
    assert never_ends == {operation: [0.0] * len(sizes) for operation, sizes in DIGITS.items()}
    no_third = arithmetic.accuracy(model(lambda answer, place: answer[place] if place != 2 else "0"), tokenizer)
    assert no_third["+"][0] < 1  # the end of two-digit answers
    assert 0 < no_third["+"][5] < 0.3  # one in ten is a 0


def test_a_rehearsal_is_on_record_and_in_the_table(tmp_path, monkeypatch, capsys):
    recipe = {"sequences_per_step": 4, "micro_batch": 4, "eval_blocks": 4, "precision": "float32", "compile": False}
    monkeypatch.setattr(arithmetic, "RECIPE", arithmetic.replace(arithmetic.RECIPE, **recipe))
    monkeypatch.setattr(arithmetic, "ASKED", 4)
    options = ["--only", "penalty", "low entropy on answers", "--sizes", "tiny", "--seeds", "0", "--steps", "4"]
    options += ["--output", str(tmp_path)]
    assert arithmetic.main(options) == 0
    assert "low entropy on answers, tiny, seed 0: finished" in capsys.readouterr().out
    results = [arithmetic.json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    by_class, plain = (result["summary"]["recipe"] for result in results)
    assert (by_class["threshold_init"], plain["threshold_init"]) == (0.1, 0.5)
    assert plain["penalty_from"] == 0 != by_class["penalty_from"] != by_class["penalty_until"] != 0
    assert arithmetic.main(options) == 0
    assert "penalty, tiny, seed 0: on record" in capsys.readouterr().out
    assert arithmetic.main(["--table", "--output", str(tmp_path)]) == 0
    assert "6 +" in capsys.readouterr().out
