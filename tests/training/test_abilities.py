"""Recall and loss by position, against the definitions written out."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from entropy_lib import build_model
from entropy_lib.input_dependence import input_dependence
from entropy_lib.training.abilities import loss_by_position, recall
from entropy_lib.training.records import RunRecord
from tests.training.test_training import corpus, train

__all__ = ["corpus"]  # the fixture
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 12, "vocab_size": 50}


def model_of(variant, **sizes):
    torch.manual_seed(0)
    return build_model(variant, "tiny", **{**SIZES, **sizes}).eval()


class CopiesWhatFollowed:
    """Answers with what followed the token's last appearance: all that recall asks for. Or always with 0."""

    def __init__(self, model, looks_back):
        self.config, self.device, self.looks_back = model.config, model.device, looks_back

    def __call__(self, ids, logits_to_keep):
        half, answer = self.config.n_positions // 2, torch.zeros_like(ids[:, -logits_to_keep:])
        if self.looks_back:
            answer[:, :-1] = ids[:, 1:half]
        logits = torch.nn.functional.one_hot(answer, self.config.vocab_size).float()
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("positions", [12, 13])
def test_recall_is_1_for_who_looks_back_and_chance_for_who_does_not(positions):
    model = model_of("SM+LN+R", n_positions=positions)
    assert recall(CopiesWhatFollowed(model, True)) == 1
    assert recall(CopiesWhatFollowed(model, False)) == pytest.approx(1 / 50, abs=0.02)
    assert recall(model, batch=7) == pytest.approx(recall(model), abs=1e-3)
    assert recall(model) < 0.1
    with pytest.raises(ValueError, match="at least 4 positions"):
        recall(model_of("SM+LN+R", n_positions=3))


def test_loss_by_position_is_the_loss_in_parts():
    model, blocks = model_of("SM+LN+R"), torch.randint(50, (5, 12))
    by_position = loss_by_position(model, blocks, batch=2)
    with torch.no_grad():
        logits, loss = model(blocks).logits, model(blocks, labels=blocks).loss
    assert len(by_position) == 11
    assert sum(by_position) / 11 == pytest.approx(loss.item(), rel=1e-6)
    assert by_position[4] == pytest.approx(cross_entropy(logits[:, 4], blocks[:, 5]).item(), rel=1e-5)


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
    by_position = record.loss_by_position
    assert sum(by_position) / len(by_position) == pytest.approx(record.eval_loss, rel=1e-5)
    assert all(low <= 0 <= high and math.isfinite(high - low) for layer in record.logit_range for low, high in layer)
    loaded = RunRecord.load(record.save(tmp_path))
    assert loaded.logit_range == record.logit_range
    assert loaded.input_dependence == record.input_dependence
    assert all(len(heads) == 3 and min(heads) >= 0 for heads in record.input_dependence)
