"""Shared by all tests: one thread, fixed seeds, and tiny models whose every parameter is off its initial value."""

import signal

import pytest
import torch
from hypothesis import settings

from entropy_lib import VARIANTS, build_model
from entropy_lib.annealed_layer_norm import AnnealedLayerNorm
from entropy_lib.variants import NORM_PLACEMENTS, PRIVATE_VARIANTS

torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 97, "n_positions": 24}
WIDE = {"n_layer": 3, "n_head": 4}  # where a pattern of heads by layer shows
CASES = [(name, place) for name in VARIANTS for place in (NORM_PLACEMENTS if "Norm" in name else (None,))]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's cache, nor that of another test process, whose runs it would claim."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTROPY_LIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_model(variant, norm_placement=None, dtype=torch.float64, **config):
    """Large initial weights and randomised scales, so that a wrong temperature, α, mask or gain shows in the logits."""
    sizes = {**TINY, **WIDE} if variant in PRIVATE_VARIANTS else TINY
    config = {**sizes, "initializer_range": 0.2, "temperature_init": 0.8, **config}
    if norm_placement:
        config["norm_placement"] = norm_placement
    model = build_model(variant, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "log_temperature" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, AnnealedLayerNorm):  # as at the end of training
                module.log_scale += 0.3 * torch.randn(1)
                module.seen.fill_(1)
                module.blend.fill_(1)
    return model.to(dtype).eval()


@pytest.fixture(name="tiny_model")
def _tiny_model():
    return tiny_model


@pytest.fixture(params=PRIVATE_VARIANTS)
def private_model(request):
    """Every variant beyond the paper, its annealed LayerNorms at their end, in float64 and eval mode."""
    torch.manual_seed(0)
    return tiny_model(request.param)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(filter(None, case)))
def model(request):
    """The paper's variants, and every placement of weight and spectral normalisation, in float64 and eval mode."""
    torch.manual_seed(0)
    return tiny_model(*request.param)
