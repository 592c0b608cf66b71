"""Fine-tuning what was converted: what a step's loss is, what is on record, and that nothing else changes."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from entropy_lib.private_inference.convert import convert_for_private_inference
from entropy_lib.private_inference.plan import suggest_plan
from entropy_lib.training.recipe import Recipe, training_arguments
from entropy_lib.training.records import RunRecord
from entropy_lib.training.train import fine_tune
from entropy_lib.training.trainer import EntropyTrainer, collate_blocks
from tests.training.test_training import LENGTH, MODEL, RECIPE, VOCAB, corpus, private_cache, train

__all__ = ["corpus", "private_cache"]  # the fixtures
TUNE = replace(RECIPE, steps=10, learning_rate=1e-3, distillation=0.5, anneal_start=0.2, anneal_end=0.6)


@pytest.fixture(scope="module")
def original(corpus):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, suggest_plan(
        model, torch.tensor(corpus[0]["train"]["input_ids"]), 1.0, context_length=LENGTH, constant_norms=True
    )


def converted_to(original, keep=((True, False, False, True), (False,) * 4), **options):
    model, plan = original
    return convert_for_private_inference(model, replace(plan, keep=keep), **options)


def tuned(model, corpus, recipe=TUNE, **options):
    return fine_tune(model, corpus, recipe, name="converted", progress=False, **options)


def test_a_step_s_gradient_is_that_of_the_loss_by_hand(corpus, original, tmp_path):
    """0.7 cross-entropy, 0.3 of the teacher's distance, both penalties; over two micro-batches."""
    model = converted_to(original, keep=((True, False, False, True),) * 2, entropy_regularization=True)
    reference, drawn = copy.deepcopy(model).train(), []

    def collate(blocks):
        drawn.append(collate_blocks(blocks)["input_ids"])
        return collate_blocks(blocks)

    recipe = replace(TUNE, steps=1, micro_batch=4, loss_coeff=2.0)
    trainer = EntropyTrainer(
        model=model, args=training_arguments(recipe, tmp_path, seed=0, eval_strategy="no"), data_collator=collate,
        train_dataset=corpus[0]["train"], regularization=recipe.regularization(), entropy_every=1,
        layer_norm_blend=recipe.layer_norm_blend, norm_penalty_coeff=0.1, teacher=original[0], distillation=0.3,
    )  # fmt: skip
    trainer.train()
    cross_entropies = []
    for batch in drawn[:2]:
        out = reference(input_ids=batch, labels=batch, output_entropies=True)
        with torch.no_grad():
            wanted = original[0](batch).logits[:, :-1].double().softmax(-1)
        found = out.logits[:, :-1].double().softmax(-1)
        distance = (wanted * (wanted / found).log()).sum(-1).mean()
        penalty = recipe.regularization()(out.entropies, reference.entropy_thresholds())
        ((0.7 * out.loss + 0.3 * distance + penalty + 0.1 * out.norm_penalty) / 2).backward()
        cross_entropies.append(out.loss.item())
    gradients = [p.grad for p in reference.parameters() if p.grad is not None]
    row = trainer.history[-1]
    assert row["grad_norm"] == pytest.approx(torch.stack([g.norm() for g in gradients]).norm().item(), rel=1e-4)
    assert row["loss"] == pytest.approx(sum(cross_entropies) / 2, rel=1e-5)
    assert row["penalty"] > 0


def test_a_run_is_on_record(corpus, original, tmp_path):
    model = converted_to(original)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = original[0].train()
    record = tuned(model, corpus, teacher=teacher, output_dir=tmp_path)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    teacher.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    norms = [module for module in record.model.modules() if hasattr(module, "blend")]
    assert len(norms) == 4
    assert all(norm.blend == 1 and norm.seen == 1 for norm in norms)
    loaded = RunRecord.load(tmp_path / "converted-seed0.json")
    assert loaded.summary() == record.summary()
    assert loaded.context_length == LENGTH
    assert loaded.tokens == 10 * 8 * LENGTH
    assert loaded.model_config["entropy_heads"] == [2, 0]
    assert [sum(head is not None for head in layer) for layer in loaded.entropy] == [2, 0]
    assert [len(layer) for layer in loaded.logit_range] == [len(layer) for layer in loaded.input_dependence] == [2, 0]
    assert len(loaded.loss_by_position) == LENGTH - 1
    assert 0 <= loaded.recall <= 1
    again = tuned(model, corpus, teacher=original[0], output_dir=tmp_path)  # the same run, not another's record
    assert again.eval_loss == record.eval_loss
    with pytest.raises(ValueError, match="weights_sha256"):
        tuned(record.model, corpus, teacher=original[0], output_dir=tmp_path)


def test_an_interrupted_run_goes_on(corpus, original):
    class Stop:
        def __init__(self, after):
            self.left = after

        def is_set(self):
            self.left -= 1
            return self.left < 0

        def set(self):
            self.left = -1

    model = converted_to(original, entropy_regularization=True)
    whole = tuned(model, corpus, teacher=original[0])
    with pytest.raises(KeyboardInterrupt, match="converted: stopped after step 4 of 10"):
        tuned(model, corpus, teacher=original[0], seed=0, stop=Stop(4), run_dir=None)
    resumed = tuned(model, corpus, teacher=original[0])
    assert resumed.eval_loss == whole.eval_loss
    assert resumed.history["loss"].tolist() == whole.history["loss"].tolist()


def test_a_teacher_pulls(corpus, original):
    """With the teacher alone the model comes nearer to it than with the text alone."""
    model = converted_to(original)
    blocks = torch.tensor(corpus[0]["validation"]["input_ids"])

    @torch.no_grad()
    def distance(student):
        wanted, found = (m(blocks).logits.log_softmax(-1) for m in (original[0], student))
        return (wanted.exp() * (wanted - found)).sum(-1).mean().item()

    recipe = replace(TUNE, steps=30, learning_rate=3e-3, anneal_start=0.0, anneal_end=0.1)
    taught = tuned(model, corpus, replace(recipe, distillation=1.0), teacher=original[0])
    alone = tuned(model, corpus, replace(recipe, distillation=0.0))
    assert distance(taught.model) < 0.9 * distance(model)
    assert distance(taught.model) < 0.9 * distance(alone.model)
    assert alone.eval_loss < taught.eval_loss


def test_a_compiled_run_follows_the_plain_one(corpus, original):
    model = converted_to(original)
    how = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    plain, compiled = (tuned(model, corpus, teacher=original[0], training_overrides=given) for given in (None, how))
    torch.testing.assert_close(compiled.history["loss"].tolist(), plain.history["loss"].tolist(), rtol=1e-4, atol=0)
    assert compiled.eval_loss == pytest.approx(plain.eval_loss, rel=1e-4)


def test_gpt2_is_tuned_too(corpus, original):
    start = train(corpus, "SM+LN+G", model_config={**MODEL, "n_head": 4}).model
    blocks = torch.tensor(corpus[0]["train"]["input_ids"])
    plan = suggest_plan(start, blocks, 1.0, context_length=LENGTH, constant_norms=True)
    model = convert_for_private_inference(start, replace(plan, keep=((True, False, False, False),) * 2))
    record = tuned(model, corpus, teacher=start)
    assert record.status == "finished"
    assert record.model_config["entropy_heads"] == [1, 1]
    assert record.model_config["activation"] == "relu"


def test_a_run_that_makes_it_worse_says_so(corpus, original):
    recipe = replace(TUNE, steps=12, learning_rate=3.0, distillation=0.0, max_grad_norm=0.0, warmup_from_zero=False)
    with pytest.warns(UserWarning, match="the loss has risen from .* to .* nats a token at step"):
        tuned(converted_to(original), corpus, recipe)


def test_what_does_not_fit_together_says_so(corpus, original):
    model = converted_to(original)
    with pytest.raises(ValueError, match="fine_tune trains what convert_for_private_inference returns, got LlamaFor"):
        tuned(original[0], corpus, teacher=original[0])
    with pytest.raises(ValueError, match=r"a teacher and recipe.distillation above 0 go together, got 0.5"):
        tuned(model, corpus)
    with pytest.raises(ValueError, match=r"train_variant has no teacher for distillation=0\.5: see fine_tune"):
        train(corpus, "SM", TUNE)
    with pytest.raises(ValueError, match=r"distillation must be in \[0, 1\], got 1.5"):
        Recipe(distillation=1.5)
    small = converted_to((AutoModelForCausalLM.from_config(_smaller(original[0].config)), original[1]))
    with pytest.raises(ValueError, match="the corpus has 61 tokens, the model knows 50"):
        tuned(small, corpus, teacher=original[0])


def _smaller(config):
    config = copy.deepcopy(config)
    config.vocab_size = 50
    return config
