"""Recall and loss by position, against the definitions written out."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from entropy_lib import build_model
from entropy_lib.explore.tiny_model import load_tiny_model
from entropy_lib.input_dependence import input_dependence
from entropy_lib.training.abilities import PATTERNS, answer_bits, associative_recall, loss_by_position, patterns, recall
from entropy_lib.training.benchmarks import Answer
from entropy_lib.training.records import RunRecord
from tests.training.test_training import corpus, train

__all__ = ["corpus"]  # the fixture
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 12, "vocab_size": 50}


def model_of(variant, **sizes):
    torch.manual_seed(0)
    return build_model(variant, "tiny", **{**SIZES, **sizes}).eval()


class Answers:
    """Says after each token what `answer(tokens so far)` says."""

    def __init__(self, answer, positions=12, vocabulary=50):
        self.config = SimpleNamespace(n_positions=positions, vocab_size=vocabulary)
        self.answer, self.device = answer, torch.device("cpu")

    def __call__(self, ids, logits_to_keep):
        keep = range(ids.shape[1] - logits_to_keep + 1, ids.shape[1] + 1)
        said = torch.tensor([[self.answer(row[:end]) for end in keep] for row in ids.tolist()])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, self.config.vocab_size).float())


def what_followed(so_far):
    """What came after the last token's last appearance, else 0."""
    before = so_far[:-1]
    places = [place for place, token in enumerate(before) if token == so_far[-1]]
    return so_far[places[-1] + 1] if places else 0


@pytest.mark.parametrize("positions", [12, 13])
def test_recall_is_1_for_who_looks_back_and_chance_for_who_does_not(positions):
    model = model_of("SM+LN+R", n_positions=positions)

    def as_far_back(so_far):
        return so_far[len(so_far) - 6]

    assert recall(Answers(as_far_back, positions)) == 1
    assert recall(Answers(lambda so_far: 0, positions)) == pytest.approx(1 / 50, abs=0.02)
    assert recall(model, batch=7) == pytest.approx(recall(model), abs=1e-3)
    assert recall(model) < 0.1
    with pytest.raises(ValueError, match="at least 4 positions"):
        recall(model_of("SM+LN+R", n_positions=3))


@pytest.mark.parametrize("pairs", [1, 3])
def test_associative_recall_asks_for_the_key_s_value_and_not_for_a_distance(pairs):
    vocabulary = 1000  # a value that is also a key would mislead
    assert associative_recall(Answers(what_followed, 12, vocabulary), pairs) == pytest.approx(1, abs=0.01)

    def as_far_back(so_far):
        return so_far[len(so_far) - 2 * pairs]

    assert associative_recall(Answers(as_far_back, 12, vocabulary), pairs) == pytest.approx(1 / pairs, abs=0.06)
    for fake in (Answers(what_followed, 11), Answers(what_followed, 99, vocabulary=2)):
        with pytest.raises(ValueError, match="3 pairs take 12 positions and 3 different tokens, the model has"):
            associative_recall(fake, 3)


@pytest.mark.parametrize(("kind", "answer"), [("copy", "abc"), ("reverse", "cba"), ("rotate", "bca"), ("first", "aaa")])
def test_patterns_are_what_their_names_say(kind, answer):
    """Who knows the rule is right from the first example on, who repeats the last answer never."""
    seen = []

    def rule(so_far):
        place = (len(so_far) - 1) % 8
        seen.append(so_far)
        return so_far[len(so_far) - 1 - place + "abc".index(answer[place - 3])] if 3 <= place < 6 else 0

    found = patterns(Answers(rule, 33, 1000), kind)
    assert found == [1, 1, 1, 1]
    whole = max(seen, key=len)
    assert len({whole[3], whole[11], whole[19]}) == len({whole[7], whole[15], whole[23]}) == 1
    assert patterns(Answers(lambda so_far: so_far[-8] if len(so_far) >= 8 else 0, 33, 1000), kind) == pytest.approx(
        [0, 0, 0, 0], abs=0.01
    )
    with pytest.raises(ValueError, match="unknown pattern 'odd'; there are copy, reverse"):
        patterns(Answers(rule, 33), "odd")
    with pytest.raises(ValueError, match="a pattern takes 8 positions, got 7"):
        patterns(Answers(rule, 7), kind)


def test_bits_of_answers_are_those_of_their_tokens_one_by_one():
    model, tokenizer = load_tiny_model()
    limit = model.config.n_positions
    short = Answer("import os\n", "def f():\n    return os.sep\n")
    long = Answer("x = 1\n" * limit, "y = 2\nß = 3\n" * limit)
    found = answer_bits(model, tokenizer, [short, Answer("", "pass"), long, short], batch=2)

    def by_hand(answer, window):
        before = tokenizer(answer.context)["input_ids"] or [tokenizer.eos_token_id]
        ids, bits, contexts = before + tokenizer(answer.text)["input_ids"], 0.0, []
        for place in range(len(before), len(ids)):
            start = window(place, len(before), len(ids))
            contexts.append(place - start)
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:place]])).logits[0, -1].double()
            bits -= logits.log_softmax(-1)[ids[place]].item() / math.log(2)
        return bits / len(answer.text.encode()), contexts

    for answer, bits in ((short, found[0]), (Answer("", "pass"), found[1]), (short, found[3])):
        assert bits == pytest.approx(by_hand(answer, lambda *_: 0)[0], rel=1e-4)

    def in_steps_of_half(place, first, count):
        end = first
        while end <= place:
            end = min(count, max(limit, end + limit // 2))
        return max(0, end - limit)

    bits, contexts = by_hand(long, in_steps_of_half)
    assert found[2] == pytest.approx(bits, rel=1e-4)
    assert min(contexts) >= limit // 2
    with pytest.raises(ValueError, match="answer 1 is empty"):
        answer_bits(model, tokenizer, [short, Answer("x", "")])


def test_loss_by_position_is_the_loss_in_parts():
    model, blocks = model_of("SM+LN+R"), torch.randint(50, (5, 12))
    by_position = loss_by_position(model, blocks, batch=2)
    with torch.no_grad():
        logits, loss = model(blocks).logits, model(blocks, labels=blocks).loss
    assert len(by_position) == 11
    assert sum(by_position) / 11 == pytest.approx(loss.item(), rel=1e-6)
    assert by_position[4] == pytest.approx(cross_entropy(logits[:, 4], blocks[:, 5]).item(), rel=1e-5)


def test_lm_eval_takes_a_saved_model_and_gives_the_same_bits(tmp_path, monkeypatch):
    evaluator = pytest.importorskip("lm_eval", reason="make test installs it: pip install '.[evaluation]'")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model, tokenizer = load_tiny_model()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    answers = [Answer("import os", "\nimport sys"), Answer("def f(", "self, x")]  # it moves blanks to the answer
    (tmp_path / "task.json").write_text(json.dumps([answer._asdict() for answer in answers]))
    files = {"data_files": {"test": str(tmp_path / "task.json")}, "cache_dir": str(tmp_path / "datasets")}
    task = ConfigurableTask(config={
        "task": "tiny", "dataset_path": "json", "dataset_kwargs": files, "output_type": "loglikelihood",
        "test_split": "test", "doc_to_text": "{{context}}", "doc_to_target": "{{text}}", "target_delimiter": "",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    })  # fmt: skip
    loaded = HFLM(pretrained=str(tmp_path / "saved"), device="cpu", batch_size=2, trust_remote_code=True)
    assert type(loaded.model).__name__ == type(model).__name__
    found = evaluator.simple_evaluate(loaded, tasks=[task], bootstrap_iters=0)["results"]["tiny"]["perplexity,none"]
    bits = answer_bits(model, tokenizer, answers)
    nats = sum(b * len(a.text.encode()) * math.log(2) for b, a in zip(bits, answers, strict=True))
    assert math.log(found) == pytest.approx(nats / len(answers), rel=1e-4)


@pytest.mark.parametrize("variant", ["SM+LN+R", "SM(0,0,1)+LN(a)+R+V", "R2(0,0,1)+LN(a)+R+V"])
def test_input_dependence_is_the_mean_divergence_from_the_mean_row(variant):
    model, blocks = model_of(variant, initializer_range=0.5), torch.randint(50, (7, 12))
    before = model.config._attn_implementation
    found = input_dependence(model, blocks, batch=3)
    assert model.config._attn_implementation == before
    assert [len(heads) for heads in found] == model.config.entropy_heads()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = iter(model(blocks, output_attentions=True).attentions)
    for heads in filter(None, found):
        rows = next(weights).double()  # [7, h, 12, 12]
        mean = rows.mean(0, keepdim=True)
        divergence = torch.where(rows > 0, rows * (rows / mean).log(), 0.0).sum(-1).mean((0, 2))
        assert heads == pytest.approx(divergence.tolist(), rel=1e-5)
        assert min(heads) > 1e-3


def test_half_precision_gives_nearly_the_same():
    model, blocks = model_of("SM+LN+R", initializer_range=0.5), torch.randint(50, (7, 12))
    exact = torch.tensor(input_dependence(model, blocks))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.tensor(input_dependence(model, blocks))
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.01)
    assert not torch.equal(rounded, exact)


def test_attention_that_never_changes_depends_on_nothing():
    model = model_of("SM+LN+R")
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, :64] = 0  # queries and keys
    assert max(max(heads) for heads in input_dependence(model, torch.randint(50, (7, 12)))) < 1e-9


def test_they_are_on_record(corpus, tmp_path):
    record = train(corpus, "SM(3)+LN(a)+R+V", model_config={"n_head": 4})
    assert 0 <= record.recall <= 1
    assert {pairs: 0 <= share <= 1 for pairs, share in record.associative_recall.items()} == dict.fromkeys("124", True)
    assert {kind: len(shares) for kind, shares in record.patterns.items()} == dict.fromkeys(PATTERNS, 2)
    by_position = record.loss_by_position
    assert sum(by_position) / len(by_position) == pytest.approx(record.eval_loss, rel=1e-5)
    assert all(low <= 0 <= high and math.isfinite(high - low) for layer in record.logit_range for low, high in layer)
    loaded = RunRecord.load(record.save(tmp_path))
    assert loaded.logit_range == record.logit_range
    assert loaded.input_dependence == record.input_dependence
    assert (loaded.associative_recall, loaded.patterns) == (record.associative_recall, record.patterns)
    assert all(len(heads) == 3 and min(heads) >= 0 for heads in record.input_dependence)
