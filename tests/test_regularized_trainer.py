"""EntropyRegularizedTrainer: three lines of a user, and everything that a Trainer does with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from entropy_lib import EntropyRegularization, EntropyRegularizedTrainer, entropy_callback, record_entropy

LENGTH, VOCABULARY = 12, 61
CLOSE = {"rtol": 1e-4, "atol": 1e-7}


def gpt2(**fields):
    config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**{**config, **dropout, "initializer_range": 0.3, **fields}))


def llama(**fields):
    config = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
    torch.manual_seed(1)
    size = {"intermediate_size": 24, "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**{**config, **size, "initializer_range": 0.3, **fields}))


MODELS = {"gpt2": gpt2, "llama": llama}


def rows(lengths=(LENGTH,) * 16):
    """Sequences padded to LENGTH, in turns on the left and on the right."""
    torch.manual_seed(2)
    made = []
    for index, length in enumerate(lengths):
        real = torch.arange(LENGTH) < length if index % 2 else torch.arange(LENGTH) >= LENGTH - length
        ids = torch.where(real, torch.randint(1, VOCABULARY, (LENGTH,)), 0)
        positions = (real.cumsum(0) - 1).clamp(min=0)
        row = {"input_ids": ids, "attention_mask": real.long(), "position_ids": positions}
        made.append({**row, "labels": torch.where(real, ids, -100)})
    return made


UNEQUAL = rows((12, 3, 7, 12, 5, 9, 2, 11))


class Gradients(TrainerCallback):
    """θ and its gradient at every step."""

    def __init__(self):
        self.thresholds, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append(self.trainer.thresholds.grad.clone())
        self.thresholds.append(self.trainer.thresholds.detach().clone())


def trainer_for(folder, model=None, data=None, kind=EntropyRegularizedTrainer, regularization=None, **settings):
    regularization = regularization or EntropyRegularization(2.0, 0.05, reduction="mean")
    options = {
        name: settings.pop(name) for name in list(settings) if name not in TrainingArguments.__dataclass_fields__
    }
    defaults = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **quiet, **settings})
    watch = Gradients()
    trainer = watch.trainer = kind(
        model=model or gpt2(),
        args=args,
        train_dataset=data or rows(),
        regularization=regularization,
        callbacks=[watch],
        **options,
    )
    trainer.watch = watch
    return trainer


def trained(*args, **kwargs):
    trainer = trainer_for(*args, **kwargs)
    trainer.train()
    return trainer


def logged(trainer, name):
    return torch.tensor([row[name] for row in trainer.state.log_history if name in row])


class OwnLoss:
    def __call__(self, outputs, labels, num_items_in_batch=None):
        loss = nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return loss / num_items_in_batch


@pytest.mark.parametrize("name", MODELS)
def test_three_lines(tmp_path, name):
    model = MODELS[name]()
    regularization = EntropyRegularization(loss_coeff=2.0, tolerance_margin_factor=0.05, reduction="mean")
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, weight_decay=0.5
    )
    trainer = EntropyRegularizedTrainer(model=model, args=args, train_dataset=rows(), regularization=regularization)
    trainer.train()
    thresholds = trainer.thresholds.detach()
    assert thresholds.shape == (model.config.num_hidden_layers, model.config.num_attention_heads)
    assert thresholds.dtype == torch.float32
    assert (thresholds != 0.5).any()
    assert ((thresholds - 0.5).abs() < 1e-3).all()  # no weight decay: two steps of Adam at 5e-5
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_those_of_the_whole_step(tmp_path, name):
    """As one forward and backward pass over all of its sequences, written out."""
    trainer = trained(
        tmp_path, MODELS[name](), UNEQUAL, max_steps=1, gradient_accumulation_steps=1, lr_scheduler_type="constant"
    )
    model, thresholds = MODELS[name](), nn.Parameter(torch.full(trainer.thresholds.shape, 0.5))
    penalties, count = 0.0, 0
    for row in UNEQUAL:  # one by one and without padding
        ids = row["input_ids"][row["attention_mask"].bool()][None]
        with record_entropy(model) as recorder:
            model(ids)
        one = EntropyRegularization(2.0, 0.05, reduction="sum")
        penalties, count = penalties + one(recorder.entropies, thresholds), count + ids.numel()
    (penalties / count).backward()
    torch.testing.assert_close(trainer.watch.gradients[0], thresholds.grad, **CLOSE)
    torch.testing.assert_close(logged(trainer, "entropy_penalty"), (penalties / count).detach()[None], **CLOSE)


SPLITS = [(8, 1), (2, 4), (1, 8)]


@pytest.mark.parametrize("loss", ["model", "model without loss kwargs", "label smoothing", "own", "scaled by hand"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_is_the_same_however_it_is_split(tmp_path, reduction, loss):
    runs = []
    for size, accumulation in SPLITS if loss == "model" else SPLITS[:2]:
        model, options = gpt2(), {"max_steps": 2}
        kind = EntropyRegularizedTrainer
        if loss == "model without loss kwargs":
            model.accepts_loss_kwargs = False
        elif loss == "label smoothing":
            options["label_smoothing_factor"] = 0.1
        elif loss == "own":
            options["compute_loss_func"] = OwnLoss()
        elif loss == "scaled by hand":

            class Scaled(EntropyRegularizedTrainer):
                loss_is_scaled_for_ga = False

                def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                    return super().compute_loss(model, inputs, return_outputs, None)

            kind = Scaled
        data = UNEQUAL if loss == "model" else rows((LENGTH,) * 8)  # a mean of means weighs tokens otherwise
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        runs.append(
            trained(
                tmp_path, model, data, kind, EntropyRegularization(0.05, 0.05, reduction=reduction), **split, **options
            )
        )
    whole, *parts = runs
    assert whole.watch.gradients[0].abs().max() > 1e-5
    for part in parts:
        for step in range(2):
            torch.testing.assert_close(part.watch.gradients[step], whole.watch.gradients[step], **CLOSE)
        torch.testing.assert_close(part.thresholds, whole.thresholds, **CLOSE)
        for name in ("loss", "grad_norm", "entropy_penalty", "attention_entropy"):
            torch.testing.assert_close(logged(part, name), logged(whole, name), rtol=1e-3, atol=1e-5)


def test_heads_penalised_by_their_mean(tmp_path):
    """With several micro-batches it is the mean of what each gives: the same where they hold the same."""
    for reduction in ("mean", "sum"):
        regularization = EntropyRegularization(2.0, 0.05, reduction=reduction, per="head")
        data = rows((LENGTH,)) * 8
        whole = trained(tmp_path, None, data, regularization=regularization, max_steps=1)
        split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        halves = trained(tmp_path, None, data, regularization=regularization, max_steps=1, **split)
        assert whole.watch.gradients[0].abs().max() > 1e-3
        torch.testing.assert_close(halves.watch.gradients[0], whole.watch.gradients[0], **CLOSE)


def test_an_incomplete_last_step(tmp_path):
    """Six sequences in steps of four: the second is a mean over two."""
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    parts = trained(tmp_path, None, UNEQUAL[:6], **split)
    whole = trained(tmp_path, None, UNEQUAL[:6], per_device_train_batch_size=4, max_steps=2)
    torch.testing.assert_close(parts.watch.gradients[1], whole.watch.gradients[1], **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path, name):
    settings = {
        "data": UNEQUAL,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
    }
    whole = trained(tmp_path / "whole", MODELS[name](), **settings)
    again = trainer_for(tmp_path / "again", MODELS[name](), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(again.watch.thresholds, whole.watch.thresholds[2:], rtol=0, atol=0)
    torch.testing.assert_close(again.thresholds, whole.thresholds, rtol=0, atol=0)
    states = [trainer.optimizer.state[trainer.thresholds] for trainer in (whole, again)]
    assert states[0]["step"] == states[1]["step"] == 4
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))  # the same object once more
    torch.testing.assert_close(again.thresholds, whole.thresholds, rtol=0, atol=0)


def test_what_cannot_be_resumed_from(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, **settings)
    file = tmp_path / "checkpoint-2" / "entropy_thresholds.pt"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"entropy_thresholds\.pt cannot be read, resume from another checkpoint"):
        trainer_for(tmp_path, **settings).train(resume_from_checkpoint=True)
    file.unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no entropy_thresholds\.pt.* load the model from it"):
        trainer_for(tmp_path, **settings).train(resume_from_checkpoint=True)


def test_the_best_model_has_its_thresholds(tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_total_limit": 3,
    }
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trained(tmp_path, eval_dataset=rows(), **settings, **best)  # the worst here: the first
    assert trainer.state.best_global_step == 1
    torch.testing.assert_close(trainer.thresholds.detach(), trainer.watch.thresholds[1])


def test_the_saved_model_is_a_stock_one(tmp_path):
    trainer = trained(tmp_path)
    before = {name for name, _ in gpt2().named_parameters()}
    assert {name for name, _ in trainer.model.named_parameters()} == before
    trainer.save_model(tmp_path / "saved")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "gpt2"
    for one, other in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    start = torch.load(tmp_path / "saved" / "entropy_thresholds.pt", weights_only=True)
    torch.testing.assert_close(start, trainer.thresholds.detach())
    later = trained(tmp_path, model, threshold_init=start, max_steps=1)
    torch.testing.assert_close(later.watch.thresholds[0], start)


def test_losses_are_comparable_with_any_others(tmp_path):
    """Without an update, training and validation loss are the stock Trainer's; the penalty stands beside them."""
    settings = {
        "max_steps": 2,
        "learning_rate": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": UNEQUAL,
    }
    ours = trained(tmp_path, None, UNEQUAL, **settings)

    class Stock(Trainer):
        thresholds = nn.Parameter(torch.zeros(1))

        def __init__(self, *args, regularization, **kwargs):
            super().__init__(*args, **kwargs)
            self.thresholds.grad = torch.zeros(1)

    stock = trained(tmp_path, None, UNEQUAL, Stock, **settings)
    for name in ("loss", "eval_loss"):
        torch.testing.assert_close(logged(ours, name), logged(stock, name), rtol=1e-5, atol=0)
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    assert (logged(ours, "entropy_penalty") > 0.01).all()
    with torch.no_grad(), record_entropy(ours.model.eval(), mean=True) as recorder:
        ours.model(**{name: torch.stack([row[name] for row in UNEQUAL]) for name in UNEQUAL[0]})
    expected = recorder.head_means().mean().expand(2)
    torch.testing.assert_close(logged(ours, "attention_entropy"), expected, **CLOSE)


def test_logged_means_are_over_the_steps_since_the_last_log(tmp_path):
    each = logged(trained(tmp_path, max_steps=4), "entropy_penalty")
    pairs = trained(tmp_path, max_steps=4, logging_steps=2)
    torch.testing.assert_close(logged(pairs, "entropy_penalty"), each.reshape(2, 2).mean(1))


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_nothing(tmp_path, name):
    plain = trained(tmp_path, MODELS[name](), UNEQUAL)
    for kwargs in (None, {"use_reentrant": False}):
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
        saved = trained(tmp_path, MODELS[name](), UNEQUAL, **settings)
        torch.testing.assert_close(saved.watch.gradients, plain.watch.gradients, **CLOSE)
        torch.testing.assert_close(logged(saved, "grad_norm"), logged(plain, "grad_norm"), **CLOSE)
    assert saved.model.config._attn_implementation == "sdpa"


def test_reentrant_checkpointing_is_refused_before_the_first_update(tmp_path):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = trainer_for(tmp_path, llama(), **settings)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert trainer.model.config._attn_implementation == "sdpa"


def test_unequal_heads_are_refused_before_the_first_update(tmp_path):
    model = llama()
    attention = model.model.layers[1].self_attn  # a layer with two of its four heads
    attention.q_proj, attention.o_proj = nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False)
    attention.k_proj = attention.v_proj = nn.Linear(16, 4, bias=False)
    trainer = trainer_for(tmp_path, model)
    with pytest.raises(ValueError, match="heads"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert trainer.optimizer.state == {}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_step_that_fails_leaves_the_model_as_it_was(tmp_path, when):
    class Fails(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if not model.training:
                return loss
            if when == "forward":
                raise RuntimeError("it is forward")
            loss.register_hook(lambda gradient: (_ for _ in ()).throw(RuntimeError("it is backward")))
            return loss

    class Both(EntropyRegularizedTrainer, Fails):
        pass

    trainer = trainer_for(tmp_path, kind=Both)
    with pytest.raises(RuntimeError, match=f"it is {when}"):
        trainer.train()
    assert trainer.model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())
    assert trainer.evaluate(rows())["eval_loss"] > 0


def test_with_another_trainer(tmp_path):
    """Its own arguments, data preparation, loss and saved files stay in force."""

    class Other(Trainer):
        def __init__(self, *args, factor=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.factor = factor

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
            self.seen = outputs.logits.shape
            return (self.factor * loss, outputs) if return_outputs else self.factor * loss

    class Both(EntropyRegularizedTrainer, Other):
        pass

    both, alone = trained(tmp_path, kind=Both, factor=3.0, max_steps=1), trained(tmp_path, max_steps=1)
    assert both.seen == (8, LENGTH, VOCABULARY)
    torch.testing.assert_close(logged(both, "loss"), 3 * logged(alone, "loss"))
    torch.testing.assert_close(both.watch.gradients, alone.watch.gradients)


def test_a_loss_that_leaves_the_penalty_out_is_an_error(tmp_path):
    class Own(EntropyRegularizedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    with pytest.raises(ValueError, match=r"call super\(\)\.compute_loss"):
        trained(tmp_path, kind=Own)


def test_an_optimizer_of_ones_own(tmp_path):
    for decayed in (True, False):
        model = gpt2()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        if not decayed:
            optimizer.add_param_group({"params": [], "weight_decay": 0.0})
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = trainer_for(tmp_path, model, optimizers=(optimizer, scheduler))
        if decayed:
            with pytest.raises(ValueError, match="decays all of its parameter groups"):
                trainer.train()
        else:
            trainer.train()
            assert (trainer.thresholds != 0.5).any()
            assert optimizer.param_groups[1]["params"][0] is trainer.thresholds


def test_training_again(tmp_path):
    """Goes on with what is there; a model_init begins anew."""
    trainer = trained(tmp_path, max_steps=2)
    first = trainer.thresholds.detach().clone()
    trainer.train()
    torch.testing.assert_close(trainer.watch.thresholds[2], first)
    groups = trainer.optimizer.param_groups
    assert sum(p is trainer.thresholds for group in groups for p in group["params"]) == 1

    regularization = EntropyRegularization(2.0, 0.05, reduction="mean")
    fresh = trainer_for(tmp_path, regularization=regularization, max_steps=2)
    fresh.model_init = lambda: gpt2()
    for _ in range(2):
        fresh.train()
    assert len(fresh.watch.thresholds) == 4
    torch.testing.assert_close(fresh.watch.thresholds[2:], fresh.watch.thresholds[:2])


@pytest.mark.parametrize("start", [torch.full((3,), 0.4), torch.zeros(1, 1, 1)])
def test_a_start_of_another_shape(tmp_path, start):
    with pytest.raises(ValueError, match=r"threshold_init must .* \[2, 2\] \(layers, heads\), got \[(3|1, 1, 1)\]"):
        trained(tmp_path, threshold_init=start)


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed", "data parallel", "tensor parallel"])
def test_what_is_not_supported_is_refused_at_once(tmp_path, kind):
    class Elsewhere(EntropyRegularizedTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = kind == "fsdp"
            self.is_deepspeed_enabled = kind == "deepspeed"
            self.args._n_gpu = 2 if kind == "data parallel" else 1
            if kind == "tensor parallel":
                self.model._tp_size = 2

    with pytest.raises(ValueError, match="not with FSDP, DeepSpeed, tensor parallelism"):
        trainer_for(tmp_path, kind=Elsewhere)


def test_beside_the_callback_and_inputs_without_a_mask(tmp_path):
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
    callback = entropy_callback(every=1)
    masked, watched = trained(tmp_path), trainer_for(tmp_path, None, data)
    watched.add_callback(callback)
    watched.train()
    torch.testing.assert_close(watched.watch.gradients, masked.watch.gradients, **CLOSE)
    means = torch.tensor([row["entropy"] for row in callback.history]).mean((1, 2))
    torch.testing.assert_close(logged(watched, "attention_entropy"), means, **CLOSE)
    assert watched.model.config._attn_implementation == "sdpa"


def test_compiled(tmp_path):
    settings = {"data": UNEQUAL, "max_steps": 1}
    plain = trained(tmp_path, gpt2(n_layer=1), **settings)
    compiled = trained(tmp_path, gpt2(n_layer=1), **settings, torch_compile=True, torch_compile_backend="eager")
    torch.testing.assert_close(compiled.watch.gradients, plain.watch.gradients, **CLOSE)


def results(folder, size, reduction, checkpointing):
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    regularization = EntropyRegularization(0.05, 0.05, reduction=reduction)
    trainer = trained(
        folder, llama(), UNEQUAL, regularization=regularization, gradient_checkpointing=checkpointing, **settings
    )
    kept = torch.load(Path(folder) / "checkpoint-3" / "entropy_thresholds.pt", weights_only=True)
    logs = {name: logged(trainer, name) for name in ("loss", "entropy_penalty", "attention_entropy")}
    return {**logs, "thresholds": trainer.thresholds.detach(), "saved": kept}


BOTH = [("mean", True), ("sum", False)]


@pytest.mark.xdist_group("training")
def test_two_processes_train_as_one(tmp_path):
    lines = [
        "import os, torch",
        "from test_regularized_trainer import BOTH, results",
        f"each = [results({str(tmp_path / 'two')!r}, 2, *options) for options in BOTH]",
        f"torch.save(each, {str(tmp_path)!r} + '/' + os.environ['RANK'])",
    ]
    (tmp_path / "script.py").write_text("\n".join(lines))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    zero, other = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for index, options in enumerate(BOTH):
        one = results(tmp_path / "one", 4, *options)
        assert (one["thresholds"] - 0.5).abs().max() > 1e-3
        for two in (zero[index], other[index]):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
        assert (zero[index]["thresholds"] == other[index]["thresholds"]).all()
        assert (zero[index]["thresholds"] == zero[index]["saved"]).all()
