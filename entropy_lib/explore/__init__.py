"""Figures and explorers. The explorers are imported on first use: a figure needs plotly only, they need ipywidgets."""

from importlib import import_module

_EXPLORERS = {  # name: its file, named otherwise, since importing a file puts its name in this package
    "penalty_explorer": "penalty",
    "temperature_explorer": "temperature",
    "run_explorer": "recorded_runs",
    "training_playground": "playground",
    "cost_explorer": "pricing",
    "attention_inspector": "inspector",
    "microscope": "inspector",
    "tug_of_war": "toy_head",
    "collapse_film": "film",
}

__all__ = list(_EXPLORERS)


def __getattr__(name: str):
    if name in _EXPLORERS:
        return getattr(import_module(f"{__name__}.{_EXPLORERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
