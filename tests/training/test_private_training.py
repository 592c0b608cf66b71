"""Training what is beyond the paper: LayerNorm anneals as the recipe says, static heads have no entropy on record."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from entropy_lib import PRIVATE_VARIANTS, VARIANTS, Variant, fold_for_inference
from entropy_lib.entropy import diagnose, entropy_bands
from entropy_lib.training.identity import digest
from entropy_lib.training.recipe import Recipe
from entropy_lib.training.records import RunRecord, compare
from tests.training.test_training import MODEL, RECIPE, corpus, train

__all__ = ["corpus"]  # the fixture
SIZES = {**MODEL, "n_layer": 3, "n_head": 4}
VARIANT = "EReg(SM(3)+LN(a)+R+V)"
FIRST_FIELDS = (
    "name layer_norm ffn_activation fused_ffn weight_normalization norm_placement ffn_scaling learnable_temperature "
    "entropy_regularization"
).split()


def test_a_run_anneals_records_and_comes_back(corpus, tmp_path):
    record = train(corpus, VARIANT, model_config=SIZES)
    norms = [m for m in record.model.modules() if hasattr(m, "blend")]
    assert len(norms) == 6
    assert all(norm.blend == 1 and norm.seen == 1 and norm.log_scale != 0 for norm in norms)
    blocks = torch.tensor(corpus[0]["validation"][:4]["input_ids"])
    with torch.no_grad():
        logits = record.model(blocks).logits
        torch.testing.assert_close(fold_for_inference(record.model)(blocks).logits, logits, rtol=1e-4, atol=1e-5)
    loaded = RunRecord.load(record.save(tmp_path))
    assert [[head is None for head in layer] for layer in loaded.entropy] == [[False] * 3 + [True]] * 3
    assert np.isnan(loaded.entropy_history()[1][:, :, 3]).all()
    assert np.isfinite(loaded.entropy_history()[1][:, :, :3]).all()
    thresholds = np.array(loaded.history["thresholds"].tolist())
    assert np.isfinite(thresholds[:, :, :3]).all()
    assert np.isnan(thresholds[:, :, 3]).all()
    states = diagnose(loaded.entropy, 16)
    assert sum(states.values()).tolist() == [3, 3, 3]
    assert entropy_bands(loaded.entropy).sum() == pytest.approx(1)
    assert compare([loaded])["runs"].item() == 1
    assert Variant(**loaded.variant_config) == PRIVATE_VARIANTS[VARIANT]


def test_penalties_of_micro_batches_are_those_of_the_whole(corpus):
    whole = train(corpus, VARIANT, replace(RECIPE, steps=3), model_config=SIZES)
    halves = train(corpus, VARIANT, replace(RECIPE, steps=3, micro_batch=4), model_config=SIZES)
    assert whole.eval_loss == pytest.approx(halves.eval_loss, rel=1e-5)
    other = train(corpus, VARIANT, replace(RECIPE, steps=3, norm_penalty_coeff=100.0), model_config=SIZES)
    assert other.eval_loss != pytest.approx(whole.eval_loss, rel=1e-5)


def test_without_softmax_there_are_no_bands(corpus):
    record = train(corpus, "R2(0,0,1)+LN(a)+R+V", replace(RECIPE, steps=2), model_config=SIZES)
    assert record.status == "finished"
    assert entropy_bands(record.entropy).isnan().all()
    assert math.isnan(compare([record])["band 1"].item())


@pytest.mark.parametrize("compiled", [False, True])
def test_interrupted_and_resumed_is_one_run(corpus, tmp_path, compiled):
    recipe = replace(RECIPE, steps=4, checkpoint_every=2)
    how = {"model_config": SIZES}
    if compiled:
        how["training_overrides"] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    whole = train(corpus, VARIANT, recipe, **how, run_dir=tmp_path / "whole")
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(corpus, VARIANT, recipe, **how, run_dir=tmp_path / "half", callbacks=[Stop()])
    again = train(corpus, VARIANT, recipe, **how, run_dir=tmp_path / "half")
    assert again.eval_loss == pytest.approx(whole.eval_loss, rel=1e-6)


def test_a_run_has_the_folder_that_it_had_before_the_variant_had_more_fields():
    identity = {"variant": asdict(VARIANTS["SM+LN+R"]), "recipe": asdict(RECIPE)}
    before = {**identity, "variant": {k: v for k, v in identity["variant"].items() if k in FIRST_FIELDS}}
    assert len(before["variant"]) == len(FIRST_FIELDS) < len(identity["variant"])
    assert digest(identity) == digest(before)
    assert digest(identity) != digest({**identity, "variant": {**identity["variant"], "value_residual": True}})


def test_the_schedule():
    recipe = Recipe(steps=10, anneal_start=0.2, anneal_end=0.7)
    blends = [round(recipe.layer_norm_blend(step), 6) for step in range(11)]
    assert blends == [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="would not be constant"):
        Recipe(anneal_start=0.7, anneal_end=0.7)
    with pytest.raises(ValueError, match="would not be constant"):
        Recipe(anneal_end=1.5)
