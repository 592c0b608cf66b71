"""A call leaves what is everybody's in the process as it was: random states, threads, signals, defaults."""

import logging
import os
import random
import runpy
import signal
import sys
import tempfile
import threading
import warnings
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models
from tqdm.std import tqdm
from transformers import PreTrainedTokenizerFast, TrainerCallback

from entropy_lib import VARIANTS, EntropyGPT2Config, build_model, inference_cost, record_entropy
from entropy_lib.training.corpus import load_corpus
from entropy_lib.training.global_state import OwnDraws
from entropy_lib.training.recipe import Recipe, training_arguments
from entropy_lib.training.records import compare, load_runs
from entropy_lib.training.train import train_variant
from entropy_lib.training.trainer import EntropyTrainer, TokenBlocks, collate_blocks

pytest.importorskip("ipywidgets")
from entropy_lib import explore
from entropy_lib.explore import (
    attention_logits,
    figures,
    playground,
    reading,
    recorded_runs,
    tiny_model,
)

EREG = "EReg(SM(t)+ScFuFFN)"
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16}
RECIPE = Recipe(
    steps=4, context_length=16, sequences_per_step=8, micro_batch=4, warmup_ratio=0.2, entropy_every=1, eval_every=2,
    checkpoint_every=0, eval_blocks=8, temperature_init=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    walk = (np.cumsum(np.random.default_rng(0).integers(0, 5, size=32 * 16)) % 50).reshape(-1, 16)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(50)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", bos_token="0")
    splits = {"train": walk[:20], "validation": walk[24:]}  # no whole number of steps an epoch
    return DatasetDict({k: Dataset.from_dict({"input_ids": v.tolist()}) for k, v in splits.items()}), tokenizer


@pytest.fixture(autouse=True)
def _private_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROPY_LIB_CACHE", str(tmp_path / "cache"))


def in_a_new_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def of_everybody() -> dict:
    """What others in the process would see changed."""
    torch_state = {
        name: getattr(torch, name)()
        for name in (
            "get_default_dtype", "get_default_device", "is_grad_enabled", "are_deterministic_algorithms_enabled",
            "is_deterministic_algorithms_warn_only_enabled", "get_num_threads", "get_num_interop_threads",
            "is_anomaly_enabled",
        )
    }  # fmt: skip
    backends = {
        f"{place.__name__}.{name}": getattr(place, name, None)
        for place in (torch.backends, torch.backends.cudnn)
        for name in ("fp32_precision", "deterministic", "benchmark", "enabled")
    }
    if torch.cuda.is_available():
        torch_state["cuda"] = (torch.stack(torch.cuda.get_rng_state_all()).tolist(), torch.cuda.current_device())
    transformers_logging = transformers.utils.logging
    return {
        **torch_state,
        **backends,
        "torch's random state": torch.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "NumPy's random state": str(np.random.get_state()),  # noqa: NPY002
        "threads of a new thread": in_a_new_thread(torch.get_num_threads),
        "products in float32": torch.backends.cuda.matmul.fp32_precision,
        "how torch prints": vars(torch._tensor_str.PRINT_OPTS).copy(),
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "sys.path": list(sys.path),
        "sys.excepthook": (sys.excepthook, threading.excepthook),
        "signal handlers": {name: signal.getsignal(name) for name in signal.valid_signals()},
        "threads": {thread for thread in threading.enumerate() if not thread.name.startswith("Thread-")},
        "warnings": ([it for it in warnings.filters if "plotly" not in f"{it[1]}"], warnings.showwarning),  # on import
        "logging": {name: (it.level, list(it.handlers), it.propagate, it.disabled) for name, it in loggers().items()},
        "transformers": (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()),
        "datasets": (
            datasets.logging.get_verbosity(),
            datasets.is_progress_bar_enabled(),
            datasets.is_caching_enabled(),
        ),
        "accelerate": [dict(it._shared_state) for it in (PartialState, AcceleratorState, GradientState)],
        "plotly": (pio.templates.default, pio.renderers.default),
        "pandas": str(pd._config.config._global_config),
        "NumPy": (np.geterr(), np.get_printoptions()),
        "folder of temporary files": tempfile.tempdir,
    }


KNOWN = set()  # the loggers that there are before the first call


def loggers() -> dict[str, logging.Logger]:
    names = [name for name, it in logging.root.manager.loggerDict.items() if isinstance(it, logging.Logger)]
    return {"": logging.root, **{name: logging.getLogger(name) for name in names if not KNOWN or name in KNOWN}}


tqdm(total=1).close()  # the first bar starts tqdm's thread
logging.getLogger("choreographer")
KNOWN = set(loggers())


def train(corpus, variant=EREG, recipe=RECIPE, **options):
    return train_variant(variant, corpus, recipe, progress=False, **{"model_config": MODEL, **options})


class Calls(TrainerCallback):
    """Calls a function after the second step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.function()


def failed(corpus):
    def fail():
        raise RuntimeError("of a callback")

    with pytest.raises(RuntimeError, match="of a callback"):
        train(corpus, callbacks=[Calls(fail)])


def interrupted_and_resumed(corpus, **options):
    """A run that draws in its steps, taken up again: the losses of one that was not interrupted."""
    options["model_config"] = {**MODEL, "resid_pdrop": 0.2}
    with pytest.raises(KeyboardInterrupt, match="after step 2"):
        train(corpus, callbacks=[Calls(lambda: os.kill(os.getpid(), signal.SIGINT))], **options)
    torch.rand(3)  # of somebody else
    state = torch.get_rng_state()
    resumed = train(corpus, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    np.testing.assert_array_equal(train(corpus, **options).history.loss, resumed.history.loss)


def settings_of_a_gpu():
    """What a training in float32 sets where there is TF32."""
    torch.backends.fp32_precision = "tf32"


def inspected():
    made = explore.attention_inspector()
    made.text, made.temperature = "a b", 2.0
    made.html()
    made.still()
    made.close()


def trained_in_the_playground(corpus, steps=4):
    made = playground.training_playground(corpus, RECIPE, variant=EREG)
    made.run()
    assert made.wait(60) == "finished"
    made.close()


def shown(monkeypatch):
    figures.show(figures.entropy_heatmap(torch.zeros(2, 2), 16), "figure")


def recorded_by(model):
    with record_entropy(model) as recorder:
        model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    assert recorder.entropies


def read(path):
    path.write_text("def f(x):\n    return x + 1\n" * 3000)
    load_corpus(path, 16)


MODEL_AND_TOKENIZER = tiny_model.load_tiny_model()
CALLS = {
    "train_variant": lambda corpus, **_: train(corpus),
    "train_variant, dropout": lambda corpus, **_: train(corpus, model_config={**MODEL, "embd_pdrop": 0.1}),
    "train_variant, bfloat16": lambda corpus, **_: train(corpus, recipe=replace(RECIPE, precision="bfloat16")),
    "train_variant, determinism": lambda corpus, **_: train(corpus, training_overrides={"full_determinism": True}),
    "train_variant, TF32": lambda corpus, **_: train(corpus, callbacks=[Calls(settings_of_a_gpu)]),
    "train_variant, loud": lambda corpus, **_: train(corpus, training_overrides={"log_level": "error"}),
    "train_variant, failing": lambda corpus, **_: failed(corpus),
    "load_corpus": lambda tmp_path, **_: read(tmp_path / "text.txt"),
    "record_entropy": lambda **_: recorded_by(MODEL_AND_TOKENIZER[0]),
    "penalty_explorer": lambda **_: explore.penalty_explorer().still(),
    "temperature_explorer": lambda **_: explore.temperature_explorer().still(),
    "run_explorer": lambda **_: explore.run_explorer().still(),
    "cost_explorer": lambda **_: explore.cost_explorer().still(),
    "attention_inspector": lambda **_: inspected(),
    "training_playground": lambda corpus, **_: trained_in_the_playground(corpus),
    "logits_of": lambda **_: attention_logits.logits_of(*MODEL_AND_TOKENIZER, "a b c"),
    "read_attention": lambda **_: reading.read_attention(*MODEL_AND_TOKENIZER, "a b c"),
    "load_tiny_model": lambda **_: tiny_model.load_tiny_model(),
    "show": lambda monkeypatch, **_: shown(monkeypatch),
    "compare": lambda **_: compare(load_runs(recorded_runs.RUNS / "table3")),
    "inference_cost": lambda **_: inference_cost(EntropyGPT2Config(**VARIANTS[EREG].config_fields()), 128),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_nothing_global_changed(call, corpus, tmp_path, monkeypatch):
    torch.manual_seed(5)
    before = of_everybody()
    CALLS[call](corpus=corpus, tmp_path=tmp_path, monkeypatch=monkeypatch)
    after = of_everybody()
    assert {name: value for name, value in after.items() if value != before[name]} == {}


def test_an_interrupted_and_a_resumed_training_leave_nothing_changed(corpus):
    before = {name: value for name, value in of_everybody().items() if "random" not in name}
    interrupted_and_resumed(corpus)
    after = of_everybody()
    assert {name: after[name] for name in before if after[name] != before[name]} == {}


def test_building_a_model_changes_torch_s_random_state_alone():
    before = of_everybody()
    build_model(EREG)
    after = of_everybody()
    assert [name for name in before if after[name] != before[name]] == ["torch's random state"]


def test_importing_the_figures_leaves_plotly_s_default_template():
    before = pio.templates.default
    try:
        pio.templates.default = "plotly"
        runpy.run_path(figures.__file__)
        assert pio.templates.default == "plotly"
    finally:
        pio.templates.default = before


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "Norm" not in name] + ["SM+WNorm", "SM+SNorm"])
def test_own_draws_are_those_after_seeding(variant):
    torch.manual_seed(3)
    seeded = build_model(variant)
    state = torch.get_rng_state()
    with OwnDraws(3):
        own = build_model(variant)
    assert torch.equal(torch.get_rng_state(), state)
    assert seeded.state_dict().keys() == own.state_dict().keys()
    for name, value in seeded.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_draws_of_others_do_not_change_a_training(dropout, corpus, tmp_path):
    """Somebody who draws between the steps gets the numbers of their seed, and the training those of its own."""

    class Draws(TrainerCallback):
        drawn = []

        def on_step_end(self, args, state, control, **kwargs):
            self.drawn += [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002

    def trained(callbacks):
        torch.manual_seed(1)
        model = build_model("SM+LN+G", vocab_size=50, n_positions=16, resid_pdrop=dropout, **MODEL)
        arguments = training_arguments(RECIPE, tmp_path, seed=4)
        blocks = {split + "_dataset": TokenBlocks(corpus[0][name]) for split, name in SPLITS.items()}
        trainer = EntropyTrainer(model=model, args=arguments, **blocks, callbacks=callbacks)
        random.seed(8), np.random.seed(8), torch.manual_seed(8)  # noqa: NPY002
        trainer.train()
        return model.state_dict()

    alone, disturbed = trained([]), trained([Draws()])
    assert all(torch.equal(alone[name], disturbed[name]) for name in alone)
    random.seed(8), np.random.seed(8), torch.manual_seed(8)  # noqa: NPY002
    for n in range(0, len(Draws.drawn), 3):
        assert Draws.drawn[n : n + 3] == [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002


SPLITS = {"train": "train", "eval": "validation"}


def test_dropout_is_that_of_transformers_trainer(corpus, tmp_path):
    """The same numbers as if the training had the global state to itself."""
    weights = []
    for kind in (transformers.Trainer, EntropyTrainer):
        torch.manual_seed(1)
        model = build_model("SM+LN+G", vocab_size=50, n_positions=16, resid_pdrop=0.2, **MODEL)
        arguments = training_arguments(replace(RECIPE, micro_batch=8), tmp_path, 4)
        options = {"train_dataset": TokenBlocks(corpus[0]["train"].select(range(16))), "data_collator": collate_blocks}
        kind(model=model, args=arguments, eval_dataset=TokenBlocks(corpus[0]["validation"]), **options).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_kernel_draws_its_own_numbers_while_the_playground_trains(corpus):
    """From before the run begins until after its end, at every moment."""
    made = playground.training_playground(corpus, RECIPE, variant=EREG)
    torch.manual_seed(2)
    drawn = [torch.rand(4)]
    made.run()
    while made.shown.alive:
        drawn.append(torch.rand(4))
    made.close()
    torch.manual_seed(2)
    assert made.runs[0].state == "finished"
    assert len(drawn) > 50
    assert all(torch.equal(torch.rand(4), numbers) for numbers in drawn)


def test_a_training_in_another_thread_is_waited_for(corpus, tmp_path):
    seen, begun = [], threading.Event()

    class Notes(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def on_step_end(self, args, state, control, **kwargs):
            seen.append(self.name)
            begun.set()
            if self.name == "first" and state.global_step == 1:
                threading.Event().wait(0.5)  # time for the other to begin

    first = threading.Thread(target=lambda: train(corpus, callbacks=[Notes("first")], run_dir=tmp_path))
    first.start()
    begun.wait(60)
    train(corpus, recipe=replace(RECIPE, micro_batch=8), callbacks=[Notes("second")])
    first.join()
    assert seen == ["first"] * 4 + ["second"] * 4


def test_an_accelerator_of_one_s_own_stays_what_it_is(corpus):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        mine = Accelerator(cpu=True, gradient_accumulation_steps=3)
        train(corpus, recipe=replace(RECIPE, precision="bfloat16"), training_overrides={"use_cpu": True})
        assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("no", 3)
        assert Accelerator().state.__dict__ is mine.state.__dict__
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
