"""A training and the process around it, such as a notebook's kernel: what is everybody's is left as it was found."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, trainer
from transformers.utils import logging

_ONE_TRAINING, _SEEDING = threading.RLock(), threading.RLock()
# What transformers' `full_determinism` sets.
_OF_DETERMINISM = (
    "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
    "FLASH_ATTENTION_DETERMINISTIC",
)  # fmt: skip


@contextmanager
def one_training_at_a_time() -> Iterator[None]:
    """A training's settings of the process, undone at its end; one in another thread waits for that.

    transformers and accelerate have the precision of matrix products, mixed precision, gradient accumulation and the
    CUDA device once a process, so that two trainings at a time would take each other's.
    """
    with _ONE_TRAINING, ExitStack() as undo:
        for singleton in (PartialState, AcceleratorState, GradientState):
            undo.callback(setattr, singleton, "_shared_state", singleton._shared_state)
            singleton._shared_state = {}  # whoever has an Accelerator goes on with the one it knows
        undo.callback(logging.set_verbosity, logging.get_verbosity())
        undo.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(),
                      warn_only=torch.is_deterministic_algorithms_warn_only_enabled())  # fmt: skip
        undo.callback(_put_back, [(place, name, getattr(place, name)) for place, name in _settings()])
        undo.callback(_put_back_variables, {name: os.environ.get(name) for name in _OF_DETERMINISM})
        if torch.cuda.is_initialized():
            undo.callback(torch.cuda.set_device, torch.cuda.current_device())
        yield


def _settings() -> list[tuple[object, str]]:
    """Attributes of torch that a training may set, those before others that follow them."""
    backends = torch.backends
    settings = [(backends.cudnn, "deterministic"), (backends.cudnn, "benchmark")]
    if hasattr(backends, "fp32_precision"):
        return [(backends, "fp32_precision"), (backends.cuda.matmul, "fp32_precision"), *settings]
    return [(backends.cuda.matmul, "allow_tf32"), (backends.cudnn, "allow_tf32"), *settings]


def _put_back(settings: list[tuple[object, str, object]]) -> None:
    for place, name, value in settings:
        if getattr(place, name) != value:  # set though equal, it would not follow the more general setting any more
            setattr(place, name, value)


def _put_back_variables(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class OwnDraws(TorchDispatchMode):
    """`with OwnDraws(seed):` torch draws, in this thread, as after `torch.manual_seed(seed)`, whose global state stays.

    Other threads draw from the global state meanwhile, and do not see these draws.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.generators = seed, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags or kwargs.get("generator") is not None:
            return function(*args, **kwargs)
        tensor = next((a for a in args if isinstance(a, Tensor)), None)
        device = torch.device(kwargs.get("device") or "cpu") if tensor is None else tensor.device
        generator = self.generators.get(device)
        if generator is None:
            generator = self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        if any(argument.name == "generator" for argument in function._schema.arguments):
            return function(*args, **{**kwargs, "generator": generator})
        like = {"randn_like": Tensor.normal_, "rand_like": Tensor.uniform_}.get(function._schema.name.split("::")[1])
        if like is None:
            raise NotImplementedError(f"{function} draws from the global state only")
        return like(torch.empty_like(*args, **kwargs), generator=generator)


class RandomStateKept(Trainer):
    """A Trainer that leaves the random state of Python, numpy and torch alone, at its end and for other threads.

    transformers' Trainer seeds them all when it is made; then each pass over data draws a number, and a resumed
    training puts back what its checkpoint says. Here the generators are the Trainer's own, with the same numbers. Only
    dropout has no generator but the global one: a model that has it trains with the Trainer's own state as the global
    one for the forward and backward pass of every step, and a thread that draws just then disturbs both.
    """

    def __init__(self, *args, **kwargs):
        with _instead_of_seeding(self._seed_own):
            super().__init__(*args, **kwargs)

    def _seed_own(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)  # of the CPU
        self._rest_of_state = {
            "python": random.Random(seed).getstate(),
            "numpy": np.random.RandomState(seed).get_state(),
        }

    def _keep_own_state(self) -> None:
        self._rest_of_state = _random_state()
        self._generator.set_state(self._rest_of_state["torch"])

    @contextmanager
    def _own_state(self) -> Iterator[None]:
        """The Trainer's own state as the global one."""
        before = _random_state()
        if "devices" not in self._rest_of_state and "devices" in before:
            torch.manual_seed(self.args.seed)  # and that of every device
            self._rest_of_state["devices"] = _random_state()["devices"]
        _set_random_state({**self._rest_of_state, "torch": self._generator.get_state()})
        try:
            yield
        finally:
            self._keep_own_state()
            _set_random_state(before)

    @cached_property
    def _draws(self) -> bool:
        dropout = any(isinstance(module, _DropoutNd) and module.p > 0 for module in self.model.modules())
        return dropout or self.args.neftune_noise_alpha is not None

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        getattr(loader, "base_dataloader", loader).generator = self._generator
        return loader

    def training_step(self, *args, **kwargs):
        with self._own_state() if self._draws else nullcontext():
            return super().training_step(*args, **kwargs)

    def _save_rng_state(self, output_dir):
        with self._own_state() if self._draws else nullcontext():
            super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint):
        if self._draws:
            with self._own_state():
                super()._load_rng_state(checkpoint)


@contextmanager
def _instead_of_seeding(function: Callable[[int], None]) -> Iterator[None]:
    """In this thread, transformers' Trainer calls `function(seed)` where it would seed everybody's generators."""
    thread = threading.get_ident()
    with _SEEDING:
        seed_all, be_deterministic = trainer.set_seed, trainer.enable_full_determinism

        def set_seed(seed, *args, **kwargs):
            if threading.get_ident() == thread:
                function(seed)
            else:
                seed_all(seed, *args, **kwargs)

        def enable_full_determinism(seed, *args, **kwargs):
            before = _random_state()
            be_deterministic(seed, *args, **kwargs)  # which seeds too
            if threading.get_ident() == thread:
                _set_random_state(before)
                function(seed)

        trainer.set_seed, trainer.enable_full_determinism = set_seed, enable_full_determinism
        try:
            yield
        finally:
            trainer.set_seed, trainer.enable_full_determinism = seed_all, be_deterministic


def _random_state() -> dict:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state["numpy"] = np.random.get_state()  # noqa: NPY002
    if torch.accelerator.is_available():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        state["devices"] = module.get_rng_state_all() if _several(module) else module.get_rng_state()
    return state


def _set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "devices" in state:
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        (module.set_rng_state_all if _several(module) else module.set_rng_state)(state["devices"])


def _several(module) -> bool:
    return hasattr(module, "get_rng_state_all")  # of MPS there is one
