"""EntropyTrainer, train_variant, the command line: what a run computes, and what happens when it is disturbed."""

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models
from torch.utils.data import BatchSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from entropy_lib import EntropyRegularization, build_model, interface
from entropy_lib.training import records
from entropy_lib.training import train as training
from entropy_lib.training.__main__ import main, outcome
from entropy_lib.training.identity import digest
from entropy_lib.training.recipe import RECIPES, Recipe, get_recipe, training_arguments
from entropy_lib.training.records import RunRecord, compare, load_runs, read_history
from entropy_lib.training.run_folder import MARKER, RunFolder
from entropy_lib.training.train import train_variant
from entropy_lib.training.trainer import EntropyTrainer, TokenBlocks, between, collate_blocks
from entropy_lib.variants import VARIANTS, Variant

EREG = "EReg(SM(t)+ScFuFFN)"
VOCAB, LENGTH = 61, 16
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "initializer_range": 0.2}
RECIPE = Recipe(
    steps=6, context_length=LENGTH, sequences_per_step=8, micro_batch=8, warmup_ratio=0.2, entropy_every=1,
    eval_every=3, checkpoint_every=0, eval_blocks=8, temperature_init=0.5, threshold_init=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    walk = (np.cumsum(rng.integers(0, 5, size=80 * LENGTH)) % VOCAB).reshape(-1, LENGTH)
    splits = {"train": walk[:64], "validation": walk[64:]}
    dataset = DatasetDict({k: Dataset.from_dict({"input_ids": v.tolist()}) for k, v in splits.items()})
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    return dataset, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", bos_token="0")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROPY_LIB_CACHE", str(tmp_path / "cache"))


def train(corpus, variant=EREG, recipe=RECIPE, **kwargs):
    kwargs.setdefault("model_config", MODEL)
    return train_variant(variant, corpus, recipe, progress=False, **kwargs)


def column(record, name):
    return np.array(record.history[name].tolist(), dtype=float)


def first_step(corpus, recipe, tmp_path, threshold, **options):
    """The model before a run's first step, the step's batch, and its row of the history."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": LENGTH, "temperature_init": 0.5, "threshold_init": threshold, **MODEL}
    model = build_model(EREG, **sizes)
    reference, drawn = copy.deepcopy(model), []

    def collate(blocks):
        drawn.append(collate_blocks(blocks)["input_ids"])
        return collate_blocks(blocks)

    trainer = EntropyTrainer(
        model=model, args=training_arguments(recipe, tmp_path, seed=0, eval_strategy="no"), data_collator=collate,
        train_dataset=corpus[0]["train"], regularization=recipe.regularization(), entropy_every=1, **options,
    )  # fmt: skip
    trainer.train()
    return reference, torch.cat(drawn[: recipe.accumulation_steps(1)]), trainer.history[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_is_cross_entropy_plus_penalty(corpus, tmp_path, reduction):
    """Loss, penalty, entropies and the gradient's norm of the first step, from the batch that was drawn."""
    recipe = replace(RECIPE, steps=1, micro_batch=4, reduction=reduction)
    reference, batch, row = first_step(corpus, recipe, tmp_path, threshold=0.9)
    out = reference(input_ids=batch, labels=batch, output_entropies=True)
    entropies, ceiling = torch.stack(out.entropies), np.log(LENGTH)  # [L, B, H, T]
    deviation = entropies - reference.entropy_thresholds()[:, None, :, None] * ceiling
    outside = torch.where(deviation.abs() > 0.2 * ceiling, deviation**2, 0.0)
    penalty = recipe.loss_coeff * (outside.mean() if reduction == "mean" else outside.sum() / (2 * 2))
    (out.loss + penalty).backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    assert row["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert row["penalty"] == pytest.approx(penalty.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    np.testing.assert_allclose(row["entropy"], entropies.mean((1, 3)).detach(), rtol=1e-5)


def test_weights_start_as_wide_as_the_recipe_says(corpus):
    recipe = replace(RECIPE, steps=1, learning_rate=0.0, initializer_range=0.07)
    model = train(corpus, "SM+ScFuFFN", recipe, model_config={"n_layer": 1, "n_head": 2, "n_embd": 64}).model
    assert model.transformer.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.07, rel=0.03)


def test_a_penalty_between_two_tokens_counts_no_other_query(corpus, tmp_path):
    recipe = replace(RECIPE, steps=1, penalty_from=7, penalty_until=3, threshold_init=0.1)
    reference, batch, first = first_step(corpus, recipe, tmp_path, threshold=0.1, penalty_span=(7, 3))
    entropies, total, count = torch.stack(reference(batch, output_entropies=True).entropies), 0.0, 0  # [L, B, H, T]
    for row, ids in enumerate(batch.tolist()):
        inside = False
        for place, token in enumerate(ids):
            inside = token != 3 and (inside or token == 7)
            if inside:
                deviation = entropies[:, row, :, place] - reference.entropy_thresholds() * np.log(LENGTH)
                total += torch.where(deviation.abs() > 0.2 * np.log(LENGTH), deviation**2, 0.0).mean().item()
                count += 1
    assert 0 < count < batch.numel() / 2
    assert total > 0
    assert first["penalty"] == pytest.approx(recipe.loss_coeff * total / count, rel=1e-4)
    once, everywhere = (train(corpus, recipe=given) for given in (recipe, replace(recipe, penalty_from=0)))
    assert column(once, "loss")[0] == column(everywhere, "loss")[0]
    assert 0 < column(once, "penalty")[0] != column(everywhere, "penalty")[0]
    assert between(torch.tensor([[3, 7, 1, 7, 3, 2]]), 7, 3).tolist() == [[False, True, True, True, False, False]]
    for changes in ({"ceiling": "causal"}, {"per": "head"}):
        with pytest.raises(ValueError, match="penalty_from needs ceiling='context' and per='query'"):
            replace(RECIPE, penalty_from=5, **changes)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padding_pays_nothing_in_training(corpus, tmp_path, reduction):
    """One step on a padded batch has the penalty and the entropies of its sequences one by one."""
    model = build_model(EREG, vocab_size=VOCAB, n_positions=LENGTH, temperature_init=0.5, threshold_init=0.9, **MODEL)
    reference, lengths = copy.deepcopy(model), [16, 5, 9, 12, 16, 7, 3, 10]
    drawn = []

    def collate(blocks):
        batch = collate_blocks(blocks)
        mask = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
        batch = {"input_ids": batch["input_ids"], "labels": batch["labels"].masked_fill(~mask, -100)}
        drawn.append(batch["input_ids"])
        return {**batch, "attention_mask": mask.long()}

    recipe = replace(RECIPE, steps=1, reduction=reduction)
    trainer = EntropyTrainer(
        model=model, args=training_arguments(recipe, tmp_path, seed=0, eval_strategy="no"), data_collator=collate,
        train_dataset=corpus[0]["train"], regularization=recipe.regularization(), entropy_every=1,
    )  # fmt: skip
    trainer.train()
    penalty, entropy = 0.0, 0.0
    for ids, n in zip(drawn[0], lengths, strict=True):
        out = reference(ids[None, :n], output_entropies=True)
        share = n / sum(lengths) if reduction == "mean" else 1
        penalty += share * recipe.regularization()(out.entropies, reference.entropy_thresholds()).item()
        entropy += torch.stack(out.entropies)[:, 0].sum(-1).detach() / sum(lengths)
    assert penalty > 0
    assert trainer.history[0]["penalty"] == pytest.approx(penalty, rel=1e-4)
    np.testing.assert_allclose(trainer.history[0]["entropy"], entropy, rtol=1e-4)


@pytest.mark.parametrize(("reduction", "coefficient"), [("mean", 0.1), ("sum", 1e-3)])
def test_micro_batches_change_nothing(corpus, reduction, coefficient):
    recipe = replace(RECIPE, reduction=reduction, loss_coeff=coefficient)
    whole, split = (train(corpus, recipe=replace(recipe, micro_batch=size)) for size in (8, 2))
    for name in ("loss", "penalty", "grad_norm", "entropy", "thresholds", "temperatures", "alpha"):
        np.testing.assert_allclose(column(whole, name), column(split, name), rtol=2e-4, atol=1e-6, err_msg=name)
    assert column(whole, "penalty").min() > 0


def test_penalty_moves_the_thresholds_and_only_ereg_has_one(corpus):
    record = train(corpus)
    assert np.abs(column(record, "thresholds")[-1] - 0.9).min() > 1e-4
    plain = train(corpus, "SM(t)+ScFuFFN")
    assert (column(plain, "penalty") == 0).all()
    assert plain.history["thresholds"].isna().all()
    assert plain.history["temperatures"].notna().all()


@pytest.mark.parametrize("drop_last", [True, False])
def test_an_evaluation_is_of_every_block_whatever_the_micro_batch(corpus, tmp_path, drop_last):
    recipe, blocks = replace(RECIPE, sequences_per_step=16), corpus[0]["validation"].select(range(7))
    model = build_model(EREG, vocab_size=VOCAB, n_positions=LENGTH, temperature_init=0.5, **MODEL).eval()
    with torch.no_grad():
        expected = model(**collate_blocks(blocks), output_entropies=True)
    for size in (1, 2, 3, 4, 7, 16):  # 16: fewer blocks than a micro-batch
        arguments = training_arguments(
            replace(recipe, micro_batch=16),
            tmp_path,
            0,
            per_device_eval_batch_size=size,
            dataloader_drop_last=drop_last,
        )
        trainer = EntropyTrainer(model=model, args=arguments, eval_dataset=TokenBlocks(blocks))
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == trainer.eval_loss == pytest.approx(expected.loss.item(), rel=1e-6)
        entropy = torch.stack(expected.entropies).mean((1, 3))
        torch.testing.assert_close(trainer.eval_entropy, entropy, rtol=1e-5, atol=1e-6)
        assert trainer.args.dataloader_drop_last is drop_last  # training's own
        trainer.args.prediction_loss_only = False
        assert trainer.predict(TokenBlocks(blocks)).predictions[0].shape == (7, LENGTH, VOCAB)
        assert trainer.evaluate({"a": TokenBlocks(blocks)})["eval_a_loss"] == pytest.approx(trainer.eval_loss)


def test_targets_count_alike_in_batches_of_unequal_lengths(corpus, tmp_path):
    """With labels that are ignored the loss is the mean over targets, not a mean of the batches' means."""

    def collate(blocks):
        batch = collate_blocks(blocks)
        batch["labels"][batch["input_ids"][:, 0] % 2 == 0, 4:] = -100
        return batch

    blocks = corpus[0]["validation"].select(range(7))
    model = build_model(EREG, vocab_size=VOCAB, n_positions=LENGTH, **MODEL).eval()
    with torch.no_grad():
        expected = model(**collate(blocks)).loss.item()
    for size in (1, 2, 7):
        arguments = training_arguments(RECIPE, tmp_path, 0, per_device_eval_batch_size=size)
        trainer = EntropyTrainer(model=model, args=arguments, eval_dataset=blocks, data_collator=collate)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_what_fills_up_a_batch_of_several_processes_is_not_evaluated():
    for processes, size, count in itertools.product((1, 2, 3), (1, 2, 4), range(1, 14)):
        seen = []
        for rank in range(processes):
            sampler = BatchSampler(range(count), size, drop_last=False)
            batches = list(BatchSamplerShard(sampler, processes, rank) if processes > 1 else sampler)
            for number, batch in enumerate(batches, 1):
                end = number == len(batches)
                state = SimpleNamespace(end_of_dataloader=end, remainder=count % (size * processes))
                accelerator = SimpleNamespace(num_processes=processes, process_index=rank, gradient_state=state)
                real = EntropyTrainer._real_sequences(SimpleNamespace(accelerator=accelerator), len(batch))
                seen += batch[:real]
        assert sorted(seen) == list(range(count)), (processes, size, count)


def test_fewer_validation_blocks_than_a_micro_batch(corpus):
    dataset, tokenizer = corpus
    few = DatasetDict({"train": dataset["train"], "validation": dataset["validation"].select(range(3))})
    whole, split = (train((few, tokenizer), recipe=replace(RECIPE, micro_batch=size)) for size in (8, 2))
    assert whole.status == "finished"
    assert split.eval_loss == pytest.approx(whole.eval_loss, rel=1e-5)
    np.testing.assert_allclose(split.entropy, whole.entropy, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows, wanted at least one block"),
        ([[1] * LENGTH, [1] * 8, [1] * 24], "from 8 to 24 tokens, wanted .* of the same length"),
        ([[1] * (LENGTH + 1)], "17 tokens exceed the model's 16 positions"),
    ],
)
def test_splits_that_cannot_be_evaluated_are_refused_before_training(corpus, rows, message):
    dataset, tokenizer = corpus
    validation = Dataset.from_dict({"input_ids": rows}, features=dataset["train"].features)
    with pytest.raises(ValueError, match=message):
        train((DatasetDict({"train": dataset["train"], "validation": validation}), tokenizer))


def test_fewer_training_blocks_than_a_step_takes(corpus):
    with pytest.raises(ValueError, match=r"has 64 training blocks .* sequences_per_step=128: wanted more text, or"):
        train(corpus, recipe=replace(RECIPE, sequences_per_step=128))


class _InterruptAt(TrainerCallback):
    def __init__(self, step, interrupt=lambda: os.kill(os.getpid(), signal.SIGINT)):
        self.step, self.interrupt = step, interrupt

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.interrupt()


@pytest.mark.parametrize(("by", "optimizer"), [("Ctrl-C", "adamw"), ("an event", "adamw"), ("Ctrl-C", "muon")])
def test_interrupted_run_resumes_to_the_same_losses(corpus, tmp_path, by, optimizer):
    recipe, stop = replace(RECIPE, optimizer=optimizer), threading.Event() if by == "an event" else None
    whole, interrupted = train(corpus, recipe=recipe), _InterruptAt(4, *([stop.set] if stop else []))
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4 of 6"):
        train(corpus, recipe=recipe, run_dir=tmp_path / "run", callbacks=[interrupted], stop=stop)
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    resumed = train(corpus, recipe=recipe, run_dir=tmp_path / "run")
    assert resumed.history["step"].tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "penalty", "entropy", "thresholds", "grad_norm"):
        np.testing.assert_array_equal(column(whole, name), column(resumed, name), err_msg=name)
    assert resumed.eval_loss == whole.eval_loss
    assert not (tmp_path / "run").exists()


def test_an_event_that_is_set_before_the_first_step_stops_there(corpus, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt, match="stopped after step 0 of 6"):
        train(corpus, run_dir=tmp_path / "run", stop=stop)
    assert train(corpus, run_dir=tmp_path / "run").steps == 6


def test_run_dir_of_another_variant_is_refused(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(corpus, run_dir=tmp_path / "run", callbacks=[_InterruptAt(2)])
    with pytest.raises(ValueError, match=r"another run .*variant"):
        train(corpus, "SM+LN+G", run_dir=tmp_path / "run")


@pytest.fixture(scope="module")
def interrupted(corpus, tmp_path_factory):
    """A run's folder after Ctrl-C in step 4; `started` gives each test a copy of its own."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(corpus, run_dir=folder, callbacks=[_InterruptAt(4)])
    return folder


@pytest.fixture
def started(interrupted, tmp_path):
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


@pytest.fixture(scope="module")
def uninterrupted(corpus):
    return column(train(corpus), "loss").tolist()


@pytest.fixture(scope="module")
def short(corpus):
    return train(corpus, recipe=replace(RECIPE, steps=1))


class _NoStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise AssertionError("a step was made")


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# -- what is somebody's


@pytest.mark.parametrize("resumed", [False, True])
def test_training_deletes_only_what_it_wrote(corpus, tmp_path, resumed):
    folder = tmp_path / "mine"
    for name in ("notes.txt", "deep/er/model.safetensors", "checkpoint-best/weights.pt", "checkpoint-9/mine.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = tree(folder)

    class Probe(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "probe.txt").write_text("mine too")

    options = {"recipe": replace(RECIPE, checkpoint_every=2), "run_dir": folder, "output_dir": folder}
    if resumed:
        with pytest.raises(KeyboardInterrupt):
            train(corpus, callbacks=[_InterruptAt(3)], **options)
    train(corpus, callbacks=[Probe()], **options)
    after = tree(folder)
    assert after.items() >= before.items()
    names = {f"{EREG}-seed0.json", f"{EREG}-seed0.parquet"}
    names |= {f"checkpoint-{step}{file}" for step in ((4, 6) if resumed else (2, 4, 6)) for file in ("", "/probe.txt")}
    assert set(after) - set(before) == names
    assert RunRecord.load(folder / f"{EREG}-seed0.json").steps == 6


def test_a_run_that_never_began_leaves_nothing(corpus, tmp_path):
    for folder in (tmp_path / "new", tmp_path / "old"):
        if folder.name == "old":
            folder.mkdir()
        with pytest.raises(ValueError, match="to place at 'QK'"):
            train(corpus, run_dir=folder, output_dir=folder, model_config={"norm_placement": "QK"})
        with pytest.raises(ValueError, match="divisible by num_heads"):
            train(corpus, run_dir=folder, output_dir=folder, model_config={"n_embd": 32, "n_head": 5})
    assert tree(tmp_path).keys() - {"cache", "cache/runs"} == {"old"}


def test_checkpoints_that_are_not_this_runs_are_neither_used_nor_deleted(corpus, started):
    (started / "run.json").unlink()
    (started / "checkpoint-4" / MARKER).unlink()  # as another Trainer writes them
    before = tree(started)
    with pytest.raises(ValueError, match=r"checkpoint-4 is of another run, .*choose another run_dir"):
        train(corpus, run_dir=started, callbacks=[_NoStep()])
    assert tree(started) == before


# -- identity


ANOTHER = {
    "variant": {"variant": Variant(**{**VARIANTS[EREG].__dict__, "ffn_activation": "relu"})},
    "size": {"size": "small"},
    "recipe": {"recipe": replace(RECIPE, weight_decay=0.2)},
    "model_config": {"model_config": {**MODEL, "attn_pdrop": 0.1}},
    "training_overrides": {"training_overrides": {"lr_scheduler_type": "constant"}},
    "seed": {"seed": 1},
    "corpus": {"corpus": None},
}


@pytest.mark.parametrize("what", ANOTHER)
def test_what_determines_the_result_makes_another_run(corpus, started, tmp_path, short, what):
    changes = dict(ANOTHER[what])
    if what == "corpus":
        dataset, tokenizer = corpus
        changes["corpus"] = DatasetDict(dataset | {"validation": dataset["train"]}), tokenizer
    arguments = {"corpus": corpus, **changes, "callbacks": [_NoStep()]}
    with pytest.raises(ValueError, match=f"another run .*{what}"):
        train(**arguments, run_dir=started)
    if what == "seed":  # of another name
        return
    path = replace(short, recipe=short.recipe | {"steps": RECIPE.steps}).save(tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match=f"{what} differ.*choose another output_dir"):
        train(**arguments, output_dir=path.parent)
    assert tree(tmp_path / "out") == before


def test_a_record_of_another_run_is_replaced_on_demand_only(corpus, tmp_path):
    short = replace(RECIPE, steps=1)
    train(corpus, recipe=short, output_dir=tmp_path)
    train(corpus, recipe=short, output_dir=tmp_path)  # the same run: nothing is lost
    with pytest.raises(ValueError, match="steps 1, wanted 2"):
        train(corpus, recipe=replace(RECIPE, steps=2), output_dir=tmp_path)
    train(corpus, recipe=replace(RECIPE, steps=2), output_dir=tmp_path, overwrite=True)
    assert [record.steps for record in load_runs(tmp_path)] == [2]


@pytest.mark.parametrize(
    "name", [entry.name for entry in fields(Recipe) if getattr(RECIPE, entry.name) == entry.default]
)
def test_a_claim_from_before_a_field_of_the_recipe_is_of_its_default(started, name):
    claim = json.loads((started / "run.json").read_text())
    identity = json.loads(json.dumps(claim["identity"]))
    del claim["identity"]["recipe"][name]
    (started / "run.json").write_text(json.dumps(claim))
    assert digest(claim["identity"]) == digest(identity)  # the name of a folder in the cache, and in a checkpoint
    with RunFolder(started, identity) as folder:
        assert folder.last_checkpoint() == started / "checkpoint-4"


# -- one process at a time


@pytest.mark.parametrize("option", ["run_dir", "output_dir"])
def test_a_folder_is_one_processs(corpus, tmp_path, option):
    folder, recipe, seen = tmp_path / "run", replace(RECIPE, steps=2), []

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            before = tree(folder)
            with pytest.raises(ValueError, match="wait for it, or give another") as refused:
                train(corpus, recipe=recipe, callbacks=[_NoStep()], **{option: folder})
            seen.append(str(refused.value))
            assert tree(folder) == before

    record = train(corpus, recipe=recipe, callbacks=[Second()], **{option: folder})
    assert (record.steps, len(seen)) == (2, 2)
    if option == "run_dir":
        assert f"process {os.getpid()} on " in seen[0]


def test_a_killed_process_lets_go(corpus, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    hold = "lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", f"import sys, time, filelock; {hold}", str(folder / "run.lock")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process trains this run there"):
            train(corpus, run_dir=folder, callbacks=[_NoStep()])
    finally:
        other.kill()
        other.communicate()
    assert (folder / "run.lock").exists()
    train(corpus, recipe=replace(RECIPE, steps=1), run_dir=folder)
    assert tree(folder) == {}


def test_only_the_main_process_claims_and_all_hear_of_it(monkeypatch):
    def refuse():
        raise ValueError("in use")

    sent = []
    monkeypatch.setattr(training, "broadcast_object_list", lambda outcome: sent.append(list(outcome)))
    main_process, other = (type("Arguments", (), {"process_index": rank, "world_size": 2}) for rank in (0, 1))
    with pytest.raises(ValueError, match="in use"):
        training._on_main_process(main_process, refuse)
    assert sent == [[None, "in use"]]
    assert training._on_main_process(main_process, lambda: Path("checkpoint-4")) == Path("checkpoint-4")
    monkeypatch.setattr(training, "broadcast_object_list", lambda outcome: outcome.__setitem__(slice(None), sent[0]))
    with pytest.raises(ValueError, match="in use"):
        training._on_main_process(other, lambda: pytest.fail("claimed twice"))


# -- torn files


@pytest.mark.parametrize("text", ["", "\0\0\0", "{", None])
def test_a_torn_claim_is_stepped_over(corpus, started, uninterrupted, text, capsys):
    claim = started / "run.json"
    whole = claim.read_text()
    claim.write_text(whole[: len(whole) // 2] if text is None else text)
    record = train(corpus, run_dir=started)
    assert column(record, "loss").tolist() == uninterrupted
    assert f"{claim} is torn" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["my notes", '{"mine": 1}', "[]"])
def test_a_file_that_is_no_claim_is_left_alone(corpus, tmp_path, text):
    claim = tmp_path / "run.json"
    claim.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is .*choose another run_dir"):
        train(corpus, run_dir=tmp_path, callbacks=[_NoStep()])
    assert claim.read_text() == text


CUT = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "history.parquet")


@pytest.mark.parametrize("damage", ["missing", "half", "empty"])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", CUT)
def test_a_checkpoint_that_was_cut_off_is_recognised(started, name, marked, damage, capsys):
    torn = Path(shutil.copytree(started / "checkpoint-4", started / "checkpoint-5"))
    state = json.loads((torn / "trainer_state.json").read_text())
    (torn / "trainer_state.json").write_text(json.dumps({**state, "global_step": 5}))
    if not marked:  # of an earlier version
        for checkpoint in started.glob("checkpoint-*"):
            (checkpoint / MARKER).unlink()
    whole = (torn / name).read_bytes()
    if damage == "missing":
        (torn / name).unlink()
    else:
        (torn / name).write_bytes(whole[: len(whole) // 2] if damage == "half" else b"")
    (torn / "mine.txt").write_text("mine")
    identity = json.loads((started / "run.json").read_text())["identity"]
    with RunFolder(started, identity) as folder:
        assert folder.last_checkpoint() == started / "checkpoint-4"
        told = capsys.readouterr().err
        assert f"{torn} ({name}" in told
        assert "goes on from checkpoint-4" in told
        assert [path.name for path in torn.iterdir()] == ["mine.txt"]
        (started / "checkpoint-4" / name).unlink()
        assert folder.last_checkpoint() is None
        assert "starts from the beginning" in capsys.readouterr().err
    assert [path.name for path in started.iterdir()] == ["checkpoint-5"]  # with what is not training's


@pytest.mark.parametrize("first", [False, True])
def test_a_kill_while_a_checkpoint_is_written_costs_at_most_what_came_after_the_one_before(
    corpus, tmp_path, uninterrupted, first
):
    class KilledWhileSaving(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if first or state.global_step == 4:
                raise KeyboardInterrupt

    recipe, steps = replace(RECIPE, checkpoint_every=2), []
    with pytest.raises(KeyboardInterrupt):
        train(corpus, recipe=recipe, run_dir=tmp_path / "run", callbacks=[KilledWhileSaving()])

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step + 1)

    record = train(corpus, recipe=recipe, run_dir=tmp_path / "run", callbacks=[Steps()])
    assert steps == list(range(1 if first else 3, 7))
    assert record.history["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert column(record, "loss").tolist() == uninterrupted
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["history", "summary", "in place"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_record_is_written_whole_or_not_at_all(short, tmp_path, monkeypatch, fails, replaced):
    record = replace(short)
    if replaced:
        record.save(tmp_path / "out")
    (tmp_path / "out").mkdir(exist_ok=True)
    before, moves = tree(tmp_path / "out"), []
    record.history = record.history.assign(loss=0.0)

    def half_written(frame, path):
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    def second_fails(source, target, move=os.replace):
        moves.append(target)
        if len(moves) == 2:
            raise OSError(5, "Input/output error")
        move(source, target)

    if fails == "history":
        monkeypatch.setattr(records, "write_history", half_written)
    elif fails == "summary":
        record.minutes = float("nan")
    else:
        monkeypatch.setattr(records.os, "replace", second_fails)
    with pytest.raises((OSError, ValueError)):
        record.save(tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_torn_or_mismatched_record_names_its_file(corpus, tmp_path):
    path = train(corpus, recipe=replace(RECIPE, steps=1), output_dir=tmp_path).save(tmp_path)
    history, text = path.with_suffix(".parquet"), path.read_text()
    other = train(corpus, recipe=replace(RECIPE, steps=1), seed=1).save(tmp_path / "other").with_suffix(".parquet")
    whole = history.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", other.read_bytes()):
        history.write_bytes(torn)
        with pytest.raises(ValueError, match=r"seed0\.parquet is torn, or the history of another run.* delete"):
            RunRecord.load(path)
    history.write_bytes(whole)
    for torn in (text[: len(text) // 2], "", "[]", json.dumps({"variant": "SM"})):
        path.write_text(torn)
        for read in (RunRecord.load, lambda p: load_runs(p.parent), lambda p: train(corpus, output_dir=p.parent)):
            with pytest.raises(ValueError, match=r"seed0\.json is (torn|not a run record)"):
                read(path)
    path.write_text(json.dumps({**json.loads(text), "colour": "green"}))
    with pytest.raises(ValueError, match=r"seed0\.json has fields of a later version .*colour"):
        RunRecord.load(path)
    path.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "history_sha256"}))  # an old record
    history.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"seed0\.parquet is torn .* delete"):
        _ = RunRecord.load(path).history


# -- refused before the first step


def _bad_places(folder):
    (folder / "file").write_text("mine")
    (folder / "taken" / f"{EREG}-seed0.json").mkdir(parents=True)
    (folder / "taken2" / f"{EREG}-seed0.parquet").mkdir(parents=True)
    yield {"output_dir": folder / "file"}
    yield {"output_dir": folder / "file" / "below"}
    yield {"output_dir": folder / "taken"}
    yield {"output_dir": folder / "taken2"}
    yield {"run_dir": folder / "file"}
    yield {"run_dir": folder / "file" / "below"}
    for name in ("a/b", "../a", "x" * 300):
        yield {"output_dir": folder / "out", "variant": replace(VARIANTS["SM"], name=name)}


def test_a_place_that_cannot_be_written_to_is_refused_before_the_first_step(corpus, tmp_path):
    for places in _bad_places(tmp_path):
        before = tree(tmp_path)
        with pytest.raises(ValueError, match=r"choose another|another name"):
            train(corpus, callbacks=[_NoStep()], **places)
        assert {**tree(tmp_path), "cache": False, "cache/runs": False} == {
            **before, "cache": False, "cache/runs": False
        }, places  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_config": {**MODEL, "note": float("nan")}}, "model_config goes on record, .*note=nan"),
        ({"model_config": {**MODEL, "dtype": torch.float32}}, "model_config goes on record, .*dtype=torch"),
        ({"model_config": {**MODEL, "n_inner": np.int64(8)}}, "model_config goes on record, .*n_inner"),
        ({"training_overrides": {"adam_beta1": float("inf")}}, "training_overrides goes on record, .*adam_beta1=inf"),
        ({"training_overrides": {"optim_args": object()}}, "training_overrides goes on record"),
        ({"training_overrides": {"output_dir": "elsewhere"}}, "give run_dir"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": 2**32}, "seed must be an integer from 0"),
        ({"seed": 0.5}, "seed must be an integer from 0"),
        ({"corpus": ("dataset", "tokenizer")}, "a corpus is a name, a path, or"),
        ({"corpus": 5}, "a corpus is a name, a path, or"),
    ],
)
def test_what_cannot_go_on_record_is_refused_before_the_first_step(corpus, tmp_path, options, message):
    options = {"corpus": corpus, **options}
    with pytest.raises(ValueError, match=message):
        train(**options, output_dir=tmp_path / "out", callbacks=[_NoStep()])
    assert not (tmp_path / "out").exists()


def test_half_a_corpus_is_refused(corpus):
    dataset, tokenizer = corpus
    for wrong in (
        (DatasetDict({"train": dataset["train"]}), tokenizer),
        (dataset, tokenizer.backend_tokenizer),
        (DatasetDict(dataset | {"validation": dataset["validation"].select([])}), tokenizer),
    ):
        with pytest.raises(ValueError, match=r"a corpus is a name|validation split .* has no rows"):
            train(wrong, callbacks=[_NoStep()])


@pytest.mark.parametrize("entry", fields(Recipe), ids=lambda entry: entry.name)
def test_every_field_of_a_recipe_can_go_on_record(entry):
    number = entry.default is None or type(entry.default) in (int, float)
    wrong = [float("nan"), float("inf"), -1, -0.5, True, "1", [1]] if number else [0, None, 1.5, "fp8", ["mean"]]
    wrong += [1.5] if number and not isinstance(entry.default, float) else []
    for value in wrong:
        with pytest.raises(ValueError, match=entry.name):
            get_recipe("smoke", **{entry.name: value})
    if number and entry.name not in ("warmup_ratio", "anneal_start"):
        recipe = get_recipe("smoke", **{entry.name: np.float32(1) if isinstance(entry.default, float) else np.int64(1)})
        assert json.dumps(getattr(recipe, entry.name)) in ("1", "1.0")
    assert all(recipe == replace(recipe) for recipe in RECIPES.values())


@pytest.mark.parametrize("variant", [EREG, "SM(1)+LN(a)+R+V"])
def test_a_run_without_one_finite_step_goes_on_record_too(corpus, tmp_path, variant):
    class Poison(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.transformer.wte.weight.data.fill_(float("nan"))

    recipe = replace(RECIPE, max_skipped_in_a_row=2)
    saved = train(corpus, variant, recipe, callbacks=[Poison()], output_dir=tmp_path)
    (record,) = load_runs(tmp_path)
    assert (record.status, record.steps, record.eval_loss) == ("collapsed", 2, None)
    assert record.entropy == [[0.0, 0.0 if variant == EREG else None]] * 2  # the second head is static
    assert len(record.history) == len(saved.history) == 0
    assert record.summary() == saved.summary()


class _NaNGradients(TrainerCallback):
    """NaN gradients in the named steps, and the parameters before and after each step."""

    def __init__(self, steps):
        self.steps, self.before, self.changed = steps, None, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model, self.state = model, state
        weight = model.transformer.h[1].mlp.c_proj.weight
        weight.register_hook(lambda g: g * float("nan") if state.global_step + 1 in self.steps else g)

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = [p.detach().clone() for p in self.model.parameters()]

    def on_step_end(self, args, state, control, **kwargs):
        after = self.model.parameters()
        self.changed[state.global_step] = any((a != b).any().item() for a, b in zip(after, self.before, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_non_finite_step_is_skipped_and_counted(corpus, optimizer):
    watch = _NaNGradients({3})
    record = train(corpus, recipe=replace(RECIPE, warmup_ratio=0.0, optimizer=optimizer), callbacks=[watch])
    assert record.status == "finished"
    assert record.skipped_steps == 1
    assert watch.changed == {1: True, 2: True, 3: False, 4: True, 5: True, 6: True}
    assert record.history.set_index("step")["skipped"].to_dict() == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}


@pytest.mark.parametrize("variant", [EREG, "SM+SNorm", "SM(1)+LN(a)+R+V"])
def test_one_batch_that_overflows_costs_one_step_and_not_the_run(corpus, variant):
    class Overflow(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            def scaled(module, args, output):
                return output * float("inf") if module.training and state.global_step + 1 == 3 else output

            model.transformer.wte.register_forward_hook(scaled)

    record = train(corpus, variant, recipe=replace(RECIPE, warmup_ratio=0.0), callbacks=[Overflow()])
    assert (record.status, record.skipped_steps) == ("finished", 1)
    assert all(value.isfinite().all() for value in record.model.state_dict().values())


def test_many_in_a_row_end_the_run_as_collapsed(corpus, tmp_path):
    recipe = replace(RECIPE, steps=50, max_skipped_in_a_row=3)
    record = train(corpus, recipe=recipe, callbacks=[_NaNGradients(range(4, 50))], output_dir=tmp_path)
    assert (record.status, record.steps, record.skipped_steps) == ("collapsed", 6, 3)
    assert np.isfinite(record.entropy).all()
    assert RunRecord.load(tmp_path / f"{EREG}-seed0.json").status == "collapsed"


def test_a_model_of_nans_is_a_collapse_with_its_last_entropies(corpus):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.transformer.wte.weight.data.fill_(float("nan"))

    record = train(corpus, recipe=replace(RECIPE, max_skipped_in_a_row=2), callbacks=[Poison()])
    assert record.status == "collapsed"
    assert record.eval_loss is None
    np.testing.assert_allclose(record.entropy, record.history["entropy"].iloc[-1])
    json.dumps(record.summary(), allow_nan=False)


def test_weight_decay_is_for_matrices_only(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Trainer makes a folder there
    model = build_model("SM+WNorm", **MODEL)
    trainer = EntropyTrainer(model=model, regularization=EntropyRegularization())
    names = trainer.get_decay_parameter_names(model)
    gain = "transformer.h.0.mlp.c_fc.parametrizations.weight.0.gain"
    assert gain in dict(model.named_parameters())
    assert gain not in names
    assert all(dict(model.named_parameters())[name].dim() == 2 for name in names)
    ereg = build_model(EREG, **MODEL)
    kept = set(dict(ereg.named_parameters())) - set(trainer.get_decay_parameter_names(ereg))
    for part in ("log_temperature", "reg_threshold_weights", "alpha", "beta", "c_attn.bias"):
        assert any(name.endswith(part) for name in kept), part
    assert any(name.endswith("c_attn.weight") for name in trainer.get_decay_parameter_names(ereg))


@pytest.mark.parametrize("variant", [EREG, "SM+LN+G", "SM(1)+LN(a)+R+V"])
def test_muon_moves_the_blocks_matrices_and_adamw_the_rest(corpus, variant):
    """Against the closed forms of a first step at rate r: U Vᵀ of the gradient's SVD, and the gradient's sign."""
    rate, decay, seen = 1e-3, 0.1, {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()})

    recipe = replace(RECIPE, steps=1, learning_rate=rate, weight_decay=decay, warmup_ratio=0.0, optimizer="muon")
    after = dict(train(corpus, variant, recipe, callbacks=[Watch()]).model.named_parameters())
    matrices = {n for n in seen if n.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    assert len(matrices) == sum(p.dim() == 2 and ".h." in n for n, p in after.items()) - sum(
        n.endswith(("log_temperature", "static.filter")) for n in after
    )
    for name, (before, gradient) in seen.items():
        step = (before - after[name].detach()) / rate
        if name in matrices:
            step = (step - decay * before) / (0.2 * max(before.shape) ** 0.5)
            left, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
            along = torch.einsum("ik,ij,kj->k", left, step.double(), right)  # 1 each, but for Newton-Schulz
            strong = along[values > 0.1 * values.max()]
            assert 0.6 < strong.min() <= strong.max() < 1.3, name
            # and nothing beside the gradient's singular directions
            assert (step - (left * along) @ right).norm() < 0.15 * step.norm(), name  # in bfloat16
        elif name.endswith(("wte.weight", "wpe.weight")):
            step = step - decay * before
            clear = gradient.abs() > 1e-5
            torch.testing.assert_close(step[clear], gradient[clear].sign(), rtol=1e-2, atol=1e-2)


def test_bfloat16_and_compiled_runs_follow_the_plain_one(corpus):
    plain = train(corpus)
    compiled = train(corpus, training_overrides={"torch_compile": True, "torch_compile_backend": "aot_eager"})
    np.testing.assert_allclose(column(compiled, "loss"), column(plain, "loss"), rtol=1e-4)
    np.testing.assert_allclose(column(compiled, "entropy"), column(plain, "entropy"), rtol=1e-3)
    half = train(corpus, recipe=replace(RECIPE, precision="bfloat16"))
    np.testing.assert_allclose(column(half, "loss"), column(plain, "loss"), rtol=0.03)
    assert (column(half, "loss") != column(plain, "loss")).any()


@pytest.mark.parametrize("variant", [EREG, "SM+LN+G"])
def test_compiled_training_gets_no_mask(corpus, variant, monkeypatch):
    """A whole mask, which transformers builds here unless told otherwise, would shut out the fused kernels."""

    def without_mask(function):
        def checked(*args, **kwargs):
            masks = [m for m in (*args[4:], kwargs.get("mask"), kwargs.get("attention_mask")) if m is not None]
            if masks:
                raise AssertionError(f"{function.__name__} was given a mask")
            return function(*args, **kwargs)

        return checked

    for name in ("entropy_attention", "sdpa_attention_forward"):
        monkeypatch.setattr(interface, name, without_mask(getattr(interface, name)))
    torch._dynamo.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    record = train(corpus, variant=variant, training_overrides=compiled)
    torch._dynamo.reset()
    assert record.status == "finished"


def test_a_process_trains_on_one_gpu_however_many_it_sees(tmp_path, monkeypatch):
    def sees_two(self, setup=TrainingArguments.__post_init__):
        setup(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", sees_two)
    arguments = training_arguments(RECIPE, tmp_path, 0)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, RECIPE.micro_batch)
    assert arguments.parallel_mode is ParallelMode.NOT_PARALLEL


def test_the_command_of_a_notebook_is_the_call(monkeypatch):
    monkeypatch.setattr(training.sys, "orig_argv", ["python", "-m", "entropy_lib.training", "--variant", "SM+LN+G"])
    assert training._command("SM+LN+G", "tiny", 0).endswith("-m entropy_lib.training --variant SM+LN+G")
    monkeypatch.setattr(training.sys, "orig_argv", ["python", "-m", "ipykernel_launcher", "-f", "/somewhere/1.json"])
    assert training._command("SM", "tiny", 3) == "train_variant('SM', ..., size='tiny', seed=3), in a notebook"


def test_the_order_of_the_data_has_a_seed_of_its_own(corpus):
    short = replace(RECIPE, steps=2, eval_every=0)
    first = column(train(corpus, recipe=short), "loss")
    assert np.array_equal(column(train(corpus, recipe=replace(short, data_seed=0)), "loss"), first)
    other = column(train(corpus, recipe=replace(short, data_seed=1)), "loss")
    other_init = column(train(corpus, recipe=replace(short, data_seed=0), seed=1), "loss")
    assert abs(other[0] - first[0]) > 1e-4
    assert abs(other_init[0] - first[0]) > 1e-4


def test_warm_up_starts_at_zero_or_one_step_later(corpus):
    short = replace(RECIPE, steps=5, warmup_ratio=0.4, learning_rate=1.0, eval_every=0, max_skipped_in_a_row=9)
    for from_zero, wanted in ((True, [0, 1 / 2, 1, 2 / 3, 1 / 3]), (False, [1 / 2, 1, 1, 2 / 3, 1 / 3])):
        rates = []

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, optimizer, rates=rates, **kwargs):
                rates.append(optimizer.param_groups[0]["lr"])

        train(corpus, recipe=replace(short, warmup_from_zero=from_zero), callbacks=[Watch()])
        assert rates == pytest.approx(wanted)


def test_checkpointed_activations_change_nothing(corpus):
    plain = train(corpus)
    saved = train(corpus, training_overrides={"gradient_checkpointing": True})
    np.testing.assert_allclose(column(saved, "loss"), column(plain, "loss"), rtol=1e-5)
    np.testing.assert_allclose(column(saved, "thresholds"), column(plain, "thresholds"), rtol=1e-5)


def _text_corpus(folder):
    path = folder / "text.txt"
    rng = np.random.default_rng(1)
    path.write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta", "rho"], size=6000)))
    return path


# accelerate has FSDP for GPUs alone, though torch's runs on a CPU: this process takes its own for one.
FSDP_ON_CPU = """
import sys
from accelerate.state import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from entropy_lib.training.__main__ import main

def as_on_gpus(self, *args, set_up=PartialState.__init__, **kwargs):
    set_up(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

def watched(self, *args, evaluate=Trainer.evaluate, **kwargs):
    assert isinstance(self.model, FSDPModule)
    return evaluate(self, *args, **kwargs)

PartialState.__init__, Trainer.evaluate = as_on_gpus, watched
sys.exit(main())
"""


@pytest.mark.xdist_group("training")
def test_two_processes_give_the_losses_of_one(tmp_path):
    """With the whole model in each, and with the model shared out."""
    text, variants = _text_corpus(tmp_path), [EREG, "SM(1)+LN(a)+R+V"]
    options = [
        "--variant", *variants, "--corpus", str(text), "--steps", "4", "--micro-batch", "4",
        "--sequences-per-step", "8", "--context-length", "16", "--entropy-every", "1", "--eval-every", "2",
        "--eval-blocks", "7", "--threshold-init", "0.9",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ENTROPY_LIB_CACHE": str(tmp_path / "cache")}
    environment["ACCELERATE_USE_CPU"] = "true"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = tmp_path / "fsdp_on_cpu.py"
    script.write_text(FSDP_ON_CPU)
    commands = {
        "one": [sys.executable, "-m", "entropy_lib.training"],
        "two": [*launch, "-m", "entropy_lib.training"],
        "fsdp": [*launch, str(script), "--fsdp", "--checkpoint-activations"],
    }
    found = {}
    for name, command in commands.items():
        output = ["--output", str(tmp_path / name)]
        done = subprocess.run(
            [*command, *options, *output], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = {record.variant: record for record in load_runs(tmp_path / name)}
    for variant in variants:
        one = found["one"][variant]
        for two in (found["two"][variant], found["fsdp"][variant]):
            assert (one.processes, two.processes) == (1, 2)
            for name in ("loss", "penalty", "entropy", "grad_norm", *(["thresholds", "alpha"] * (variant == EREG))):
                np.testing.assert_allclose(column(two, name), column(one, name), rtol=2e-4, atol=1e-6, err_msg=name)
            # 7 blocks in two batches of 4: one comes twice
            assert two.eval_loss == pytest.approx(one.eval_loss, rel=1e-5)
            np.testing.assert_allclose(np.array(two.entropy, float), np.array(one.entropy, float), rtol=1e-4)


def test_command_line(tmp_path, capsys):
    text = _text_corpus(tmp_path)
    options = ["--corpus", str(text), "--steps", "2", "--micro-batch", "2", "--sequences-per-step", "2",
               "--context-length", "16", "--eval-blocks", "2", "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(["--variants", "SM+LN+G", "SM", *options]) == 0
    assert "SM-seed0: finished" in capsys.readouterr().out
    assert [record.variant for record in load_runs(tmp_path / "out")] == ["SM+LN+G", "SM"]
    assert main(["--variant", "SM+LM+G", *options]) == 2
    assert "unknown variant 'SM+LM+G'" in capsys.readouterr().err


def test_record_keeps_what_was_trained(corpus, tmp_path):
    record = train(corpus, output_dir=tmp_path, seed=3)
    loaded = RunRecord.load(tmp_path / f"{EREG}-seed3.json")
    assert loaded.summary() == record.summary()
    assert loaded.tokens == 6 * 8 * LENGTH
    assert loaded.eval_perplexity == pytest.approx(np.exp(loaded.eval_loss))
    _, entropy = loaded.entropy_history()
    assert entropy.shape == (6, 2, 2)
    assert (entropy > 0).all()
    assert (entropy <= np.log(LENGTH)).all()
    assert loaded.history["eval_loss"].notna().tolist() == [False, False, True, False, False, True]
    with torch.no_grad():  # the record's model is the trained one, and its entropies those of the record
        batch = collate_blocks([corpus[0]["validation"][i] for i in range(8)])
        out = record.model(**batch, output_entropies=True)
    assert out.loss.item() == pytest.approx(record.eval_loss, rel=1e-5)
    np.testing.assert_allclose(torch.stack(out.entropies).mean((1, 3)), record.entropy, rtol=1e-4)


def test_a_collapsed_run_tells_no_perplexity(corpus):
    record = train(corpus, recipe=replace(RECIPE, steps=1))
    assert f"finished, perplexity {record.eval_perplexity:.2f}, " in outcome(record)
    record.status = "collapsed"  # its last weights still give a validation loss
    assert "collapsed, perplexity none, " in outcome(record)


def test_histories_are_read_at_first_use(corpus, tmp_path, monkeypatch):
    saved = train(corpus, recipe=replace(RECIPE, steps=1), output_dir=tmp_path)
    read = []
    monkeypatch.setattr(records, "read_history", lambda path: read.append(path) or read_history(path))
    (record,) = load_runs(tmp_path)
    compare([record])
    assert record.summary() == saved.summary()
    assert "history" not in repr(record)
    assert read == []
    assert copy.copy(record).history["loss"].tolist() == saved.history["loss"].tolist()
    assert record.history is record.history
    assert len(read) == 2  # one for the copy
    with pytest.raises(AttributeError, match="no attribute 'histories'"):
        _ = record.histories
    (tmp_path / f"{record.name}.parquet").unlink()
    with pytest.raises(ValueError, match="no history beside it"):
        load_runs(tmp_path)


def test_records_from_before_a_field_still_load():
    records = load_runs(Path(__file__).parents[2] / "data" / "runs")
    assert len(records) >= 3
    assert all(len(record.history) and record.tokens_per_second > 0 for record in records)


def test_compare_table(corpus, tmp_path):
    for seed in (0, 1):
        train(corpus, "SM+LN+G", replace(RECIPE, steps=1), seed=seed, output_dir=tmp_path)
    train(corpus, "SM", replace(RECIPE, steps=1), output_dir=tmp_path)
    records = load_runs(tmp_path)
    table = compare(records)
    ppl = {(r.variant, r.seed): r.eval_perplexity for r in records}
    mean = (ppl["SM+LN+G", 0] + ppl["SM+LN+G", 1]) / 2
    assert table.loc["SM+LN+G", "perplexity"] == pytest.approx(mean)
    assert table.loc["SM+LN+G", "spread"] == pytest.approx(abs(ppl["SM+LN+G", 0] - ppl["SM+LN+G", 1]) / 2**0.5)
    assert table.loc["SM", "gap"] == pytest.approx(ppl["SM", 0] / mean - 1)
    assert table.loc["SM", "runs"] == 1
    assert table.filter(like="band").sum(axis=1).to_numpy() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no run records"):
        compare([])
    with pytest.raises(ValueError, match="within one corpus"):
        compare([records[0], replace(records[1], corpus="another")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_coeff": -1.0}, "loss_coeff"),
        ({"tolerance_margin_factor": -0.1}, "tolerance_margin_factor"),
        ({"steps": 0}, "steps"),
        ({"precision": "fp8"}, "precision"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
    ],
)
def test_recipe_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        get_recipe("smoke", **changes)


def test_batches_that_do_not_divide_are_refused(corpus):
    with pytest.raises(ValueError, match="multiple of micro_batch"):
        train(corpus, recipe=replace(RECIPE, micro_batch=3))
    with pytest.raises(ValueError, match="unknown recipe 'large'"):
        get_recipe("large")
    with pytest.raises(ValueError, match="blocks of 16 tokens"):
        train(corpus, recipe=replace(RECIPE, context_length=8))
