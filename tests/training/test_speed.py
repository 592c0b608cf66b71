"""What keeps a GPU busy: batches in one piece, one compiled graph, no waiting; and how the speed is told."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from entropy_lib import build_model
from entropy_lib.regularization import EntropyRegularization
from entropy_lib.training.recipe import training_arguments
from entropy_lib.training.speed import model_flops_per_token, steady_tokens_per_second, training_flops_per_token
from entropy_lib.training.trainer import EntropyTrainer, TokenBlocks, collate_blocks
from tests.training.test_training import EREG, LENGTH, MODEL, RECIPE, VOCAB, column, corpus, private_cache, train

__all__ = ["corpus", "private_cache"]  # fixtures


def test_token_blocks_are_the_rows_of_the_dataset():
    rows = np.random.default_rng(0).integers(0, 300, size=(100, 8)).tolist()
    dataset = Dataset.from_dict({"input_ids": rows}).shuffle(seed=0)  # rows behind an indices mapping
    blocks, order = TokenBlocks(dataset), [7, 3, 99, 3]
    assert len(blocks) == 100
    batch, expected = collate_blocks(blocks.__getitems__(order)), collate_blocks([dataset[i] for i in order])
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name], expected[name])
        assert batch[name].dtype == torch.int64
    assert (batch["labels"][:, 0] == -100).all()
    assert (blocks[7]["input_ids"] == dataset[7]["input_ids"]).all()


def test_the_order_of_the_data_depends_on_the_seed_only(corpus, tmp_path):
    """Not on the variant nor on the micro-batch, over the end of an epoch whose rest fills no step."""

    def drawn(variant, micro_batch, seed=0):
        batches = []

        def collate(blocks):
            batches.append(collate_blocks(blocks)["input_ids"])
            return collate_blocks(blocks)

        recipe = replace(RECIPE, steps=5, micro_batch=micro_batch)
        trainer = EntropyTrainer(
            model=build_model(variant, vocab_size=VOCAB, n_positions=LENGTH, **MODEL), data_collator=collate,
            args=training_arguments(recipe, tmp_path, seed, eval_strategy="no"), entropy_every=100,
            train_dataset=TokenBlocks(corpus[0]["train"].select(range(21))), regularization=EntropyRegularization(),
        )  # fmt: skip
        trainer.train()
        return torch.cat(batches)[: 5 * 8]

    whole = drawn(EREG, 8)
    assert torch.equal(whole, drawn("SM+LN+G", 8))
    assert torch.equal(whole, drawn(EREG, 2))
    assert not torch.equal(whole, drawn(EREG, 8, seed=1))


@pytest.mark.parametrize("variant", ["SM+LN+G", "SM(t)+ScFuFFN", EREG])
def test_one_compiled_graph_and_the_entropies_of_the_plain_run(corpus, variant):
    """Recorded steps and evaluations compile nothing."""

    recipe = replace(RECIPE, entropy_every=2, eval_every=2)
    plain = train(corpus, variant, recipe)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    overrides = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = train(corpus, variant, recipe, training_overrides=overrides)
    # transformers installs what captures entropies at their first request, which may split the regularised model's
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (2 if variant == EREG else 1)
    assert compiled.history["step"].tolist() == [1, 2, 4, 6]
    for name in ("loss", "entropy", "grad_norm"):
        np.testing.assert_allclose(column(compiled, name), column(plain, name), rtol=1e-3, err_msg=name)


def test_recorded_entropies_are_those_of_the_step_before_its_update(corpus):
    """For a variant that trains without entropies: the same numbers as with output_entropies in the same model."""
    record = train(corpus, "SM+SNorm", replace(RECIPE, entropy_every=1))
    seen = []

    class Recompute(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            forward = model.transformer.forward

            def both(*arguments, output_entropies=False, **kwargs):
                if model.training:
                    with torch.no_grad():
                        entropies = forward(*arguments, output_entropies=True, **kwargs).entropies
                    seen.append(torch.stack(entropies).mean((1, 3)))
                return forward(*arguments, output_entropies=output_entropies, **kwargs)

            model.transformer.forward = both

    train(corpus, "SM+SNorm", replace(RECIPE, entropy_every=1), callbacks=[Recompute()])
    np.testing.assert_allclose(column(record, "entropy"), torch.stack(seen), rtol=1e-5)


def test_recording_takes_no_power_iteration(corpus):
    often, once = (train(corpus, "SM+SNorm", replace(RECIPE, entropy_every=n)) for n in (1, 100))
    assert len(often.history) > len(once.history)
    for (name, one), (_, two) in zip(often.model.named_buffers(), once.model.named_buffers(), strict=True):
        assert torch.equal(one, two), name
    assert often.eval_loss == once.eval_loss


class _Event:
    """A copy from the GPU that has arrived when it is waited for."""

    waited = Counter()

    def __init__(self, name):
        self.name = name

    def synchronize(self):
        self.waited[self.name] += 1


def test_norms_are_read_one_step_late_and_none_is_lost(corpus, tmp_path):
    trainer = EntropyTrainer(
        model=build_model(EREG, vocab_size=VOCAB, n_positions=LENGTH, **MODEL), max_skipped_in_a_row=2,
        args=training_arguments(RECIPE, tmp_path, 0, eval_strategy="no"), regularization=EntropyRegularization(),
    )  # fmt: skip
    norms, seen = [1.0, math.nan, 2.0, math.inf, math.nan, 3.0], []
    for step, norm in enumerate(norms):
        trainer._grad_norms.append((torch.tensor(norm), _Event(step)))
        trainer._read_grad_norms(leave=1)
        assert _Event.waited[step] == 0  # the step in the GPU's queue is not waited for
        seen.append((trainer.skipped, trainer.collapsed))
    assert seen == [(0, False), (0, False), (1, False), (1, False), (2, False), (3, True)]
    trainer._read_grad_norms()
    assert (trainer.skipped, trainer.skipped_in_a_row, trainer.grad_norm) == (3, 0, 3.0)
    assert set(_Event.waited.values()) == {1}


def test_a_skipped_step_leaves_the_moments_alone(corpus):
    """By the fused optimiser's flag or, for others, by removed gradients."""

    class Poison(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.optimizer, self.moments = optimizer, {}
            weight = model.transformer.h[0].attn.c_attn.weight
            weight.register_hook(lambda g: g * float("inf") if state.global_step == 2 else g)

        def on_step_end(self, args, state, control, **kwargs):
            states = self.optimizer.state_dict()["state"]
            self.moments[state.global_step] = [v.clone() for s in states.values() for v in s.values()]

    for optimizer in ("adamw_torch_fused", "adamw_torch"):
        watch = Poison()
        record = train(corpus, callbacks=[watch], training_overrides={"optim": optimizer})
        assert record.skipped_steps == 1
        unchanged = {step: all(map(torch.equal, watch.moments[step], watch.moments[step - 1])) for step in range(2, 7)}
        assert unchanged == {2: False, 3: True, 4: False, 5: False, 6: False}, optimizer


def test_steady_speed_leaves_out_compilation_and_evaluation():
    seconds = [60.0, 61.0, 101.0, 102.0, 142.0]  # compiling took 60 s, each evaluation 39 s
    evals = [math.nan, 3.0, math.nan, 2.5, math.nan]
    history = pd.DataFrame({"tokens": [0, 50, 100, 150, 200], "seconds": seconds, "eval_loss": evals})
    history["tokens"] *= 1000
    assert steady_tokens_per_second(history) == 50_000
    assert math.isnan(steady_tokens_per_second(history[:1]))
    assert steady_tokens_per_second(history[1:3]) == pytest.approx(50_000 / 40)  # nothing better to go by


def test_flops_by_hand():
    assert training_flops_per_token(10, layers=2, width=3, context_length=5) == 60 + 12 * 2 * 3 * 5
    model = build_model("SM+LN+G", vocab_size=11, n_positions=5, n_layer=1, n_head=1, n_embd=2)
    # a layer: QKV 2·6+6, output 2·2+2, FFN 2·8+8 and 8·2+2, two LayerNorms of 4; the final one 4; vocabulary 11·2
    parameters = 18 + 6 + 24 + 18 + 8 + 4 + 22
    assert model_flops_per_token(model) == 6 * parameters + 12 * 1 * 2 * 5


def test_a_record_tells_the_steady_speed(corpus):
    record = train(corpus)
    assert record.tokens_per_second == steady_tokens_per_second(record.history)
    assert record.tflops == pytest.approx(record.tokens_per_second * model_flops_per_token(record.model) / 1e12)
    with pytest.raises(ValueError, match=r"64 training blocks .* sequences_per_step=128"):
        train(corpus, recipe=replace(RECIPE, sequences_per_step=128, micro_batch=128))
