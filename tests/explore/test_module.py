"""Every explorer sends its page what it has itself, and writes it into its HTML."""

import base64
import gzip
import json
import re

import numpy as np
import pytest

from entropy_lib import explore
from entropy_lib.clone import CLONE
from entropy_lib.training.records import load_runs

comm = pytest.importorskip("comm")
ipywidgets = pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")
from entropy_lib.explore.module import in_planes  # noqa: E402

RUNS = CLONE / "data" / "runs"
MAKE = {
    "penalty_explorer": lambda make: make(),
    "temperature_explorer": lambda make: make(),
    "run_explorer": lambda make: make(load_runs(RUNS / "pypi-small")),
    "training_playground": lambda make: make(),
    "cost_explorer": lambda make: make(),
    "attention_inspector": lambda make: make(),
    "microscope": lambda make: make(),
    "tug_of_war": lambda make: make(),
    "collapse_film": lambda make: make(load_runs(RUNS / "collapse"), last_step=306),
}


@pytest.mark.skipif(ipywidgets.__version__ < "8", reason="sends by another class")
@pytest.mark.parametrize("name", explore.__all__)
def test_a_page_has_the_state_that_python_has(name, monkeypatch):
    """A trait that is changed in place after it was set never arrives."""
    page = {}

    class Recording(comm.DummyComm):
        def publish_msg(self, msg_type, data=None, **options):
            page.update(json.loads(json.dumps((data or {}).get("state", {}))))

    monkeypatch.setattr(comm, "create_comm", Recording)
    explorer = MAKE[name](getattr(explore, name))
    traits = json.loads(json.dumps({trait: getattr(explorer, trait) for trait in explorer.traits(state=True)}))
    assert {trait: page.get(trait, "never sent") for trait in traits} == traits


@pytest.mark.parametrize("name", explore.__all__)
def test_its_html_has_its_module_and_its_state_zipped(name):
    explorer = MAKE[name](getattr(explore, name))
    html = explorer.html()
    (packed,) = re.findall(r'atob\("([^"]+)"\)', html)
    unzipped = gzip.decompress(base64.b64decode(packed))
    assert json.loads(unzipped) == [str(explorer._esm), json.loads(json.dumps(explorer.state()))]
    assert len(html) - len(packed) < 2_000
    assert base64.b64decode(packed)[4:8] == bytes(4)  # no time of its own: the same output in a committed notebook


def test_numbers_in_planes():
    numbers = np.random.default_rng(0).random((3, 5)).astype("<f4")
    planes = np.frombuffer(base64.b64decode(in_planes(numbers[:, ::2])), np.uint8).reshape(4, 9)
    np.testing.assert_array_equal(planes.T.copy().view("<f4").reshape(3, 3), numbers[:, ::2])
