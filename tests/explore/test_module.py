"""Every explorer sends its page what it has itself."""

import json

import pytest

from entropy_lib import explore
from entropy_lib.clone import CLONE
from entropy_lib.training.records import load_runs

comm = pytest.importorskip("comm")
pytest.importorskip("anywidget")

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
