"""What every explorer is made of: a figure that reads well on light and dark pages, labelled controls, one redraw."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import plotly.io as pio
import torch

from entropy_lib.explore.figure_widget import figure_widget
from entropy_lib.explore.figures import GRID, INK, OVERLOAD, VARIANT_COLORS, go

try:
    import ipywidgets as widgets
except ImportError as error:
    raise ImportError("the explorers need ipywidgets: pip install 'entropy_lib[notebooks]'") from error

MID_INK, MID_GRID = "#757B85", "rgba(140,146,156,0.28)"  # 4.2 to 1 on white and 4.5 to 1 on JupyterLab's dark page
CLEAR = "rgba(0,0,0,0)"
# Numbers and titles of axes in the page's own ink where the page names one (JupyterLab, VS Code, Colab). Annotations
# keep the ink of the figure, since their colours mean something. `min-width: 0` lets the figure shrink with the cell.
_INK = f"var(--jp-content-font-color1, var(--vscode-foreground, var(--colab-primary-text-color, {MID_INK})))"
_TEXTS = [".g-gtitle", "[class*=tick]", "[class^=g-x]", "[class^=g-y]", ".colorbar", "[class^=legend]"]
_FILLED = ", ".join(f".entropy-explorer .js-plotly-plot {text} text" for text in _TEXTS)
# Out of sight an explorer is not composed: in a page of several that took the browser 10 ms a frame.
_OWN = f"min-width: 0; color: {_INK}; content-visibility: auto; contain-intrinsic-size: auto 700px"
_STYLE = f"<style>.entropy-explorer {{{_OWN}}} {_FILLED} {{fill: {_INK} !important}}</style>"


def slider(
    name: str, label: str, value: float, low: float, high: float, step: float, *, log: bool = False, form: str = ".2f",
    tip: str = "", width: str = "290px",
) -> widgets.FloatSlider | widgets.IntSlider | widgets.FloatLogSlider:  # fmt: skip
    """A labelled slider with the CSS class entropy-<name>: whole numbers if value, low, high and step are `int`.

    With `log`, low and high stay values (not exponents) and `step` is in powers of ten. `form` formats the readout.
    """
    options = {"value": value, "readout_format": form, "continuous_update": True}
    if log:
        options |= {"base": 10, "min": math.log10(low), "max": math.log10(high), "step": step}
        made = widgets.FloatLogSlider(**options)
    elif all(isinstance(number, int) for number in (value, low, high, step)):
        made = widgets.IntSlider(**{**options, "readout_format": "d"}, min=low, max=high, step=step)
    else:
        made = widgets.FloatSlider(**options, min=low, max=high, step=step)
    return _labelled(made, name, label, tip, width)


def dropdown(name: str, label: str, options: Sequence, value=None, *, tip: str = "", width: str = "auto"):
    """A labelled choice with the CSS class entropy-<name>; `options` are values or (label, value) pairs."""
    made = widgets.Dropdown(options=options) if value is None else widgets.Dropdown(options=options, value=value)
    return _labelled(made, name, label, tip, width)


def row(*items) -> widgets.HBox:
    """Widgets side by side, going on below where the page is narrow."""
    layout = widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px 18px", overflow="visible")
    return widgets.HBox(list(items), layout=layout)


class Explorer(widgets.VBox):
    """Controls above a line of words above a figure; a subclass says in `draw` what the figure shows.

    `figure` is the plotly FigureWidget, `controls` {name: widget}, `status` the line of words. `arrangement` is a
    list of rows of controls' names (or of other widgets). When a control changes, `draw(name)` runs once inside
    `figure.batch_update()`, so that the browser redraws once; `draw(None)` draws everything. Inside a batch the figure
    still reads as it was. A control that `draw` itself sets does not draw again. A ValueError in `draw` is shown in
    the line of words, and the figure stays.
    """

    def __init__(self, figure: go.Figure, controls: Mapping[str, widgets.Widget], arrangement: Sequence[Sequence]):
        self.figure, self.controls = _repainted(figure), dict(controls)
        self.status = widgets.HTML()
        self.status.add_class("entropy-status")
        self._drawing, self._said = False, None
        self.redraw()
        self.figure = figure_widget(self.figure)
        rows = [row(*(self.controls[c] if isinstance(c, str) else c for c in names)) for names in arrangement]
        super().__init__([widgets.HTML(_STYLE), *rows, self.status, self.figure])
        self.add_class("entropy-explorer")
        for name, control in self.controls.items():
            control.observe(lambda _, name=name: self.redraw(name), "value")

    def draw(self, changed: str | None) -> None:
        raise NotImplementedError

    def redraw(self, changed: str | None = None) -> None:
        if self._drawing:
            return
        self._drawing, self._said = True, None
        try:
            with _one_thread(), self.figure.batch_update():
                self.draw(changed)
        except ValueError as error:
            self.say(coloured(f"{error}", OVERLOAD))
        finally:
            self._drawing = False
            if self._said is not None:  # after the figure, which takes the page longer to draw
                self.say(self._said)

    def say(self, words: str) -> None:
        """Put one line of HTML above the figure; screen readers are told too. In `draw`: once the figure is sent."""
        if self._drawing:
            self._said = words
        else:
            self.status.value = f'<div role="status" aria-live="polite" style="line-height:1.5">{words}</div>'

    def still(self) -> go.Figure:
        """The figure as it stands, without a kernel: for `figures.show`, `figures.save` and pictures."""
        still = go.Figure(self.figure.to_dict()).update_layout(paper_bgcolor="white", plot_bgcolor="white")
        return still.update_traces(uid=None)  # random: the same figure would never be the same output


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch in this thread without helpers, whose start takes longer than these small sums, above all on busy cores.

    `torch.set_num_threads` is for the process: a thread that begins meanwhile, a training's say, keeps its 1 for good.
    """
    openmp, mkl = _thread_counts()
    threads = torch.get_num_threads()  # also what makes torch set this thread's number, which it does but once
    openmp(1)
    products = mkl(1)
    try:
        yield
    finally:
        openmp(threads)
        mkl(products)


@cache
def _thread_counts() -> tuple[Callable[[int], object], Callable[[int], int]]:
    """What sets the calling thread's number in OpenMP and in MKL; nothing where torch comes without these."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
    except OSError:
        library = None
    names = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")
    return tuple(getattr(library, name, lambda threads: 0) for name in names)


def _repainted(figure: go.Figure) -> go.Figure:
    if "entropy_any_page" not in pio.templates:
        template = go.layout.Template(pio.templates["entropy"].to_plotly_json())
        # Every redraw would measure all labels anew, a third of its time: the explorers' margins have room for them.
        axis = {"automargin": False, "ticklabeloverflow": "allow"}
        template.layout.update(paper_bgcolor=CLEAR, plot_bgcolor=CLEAR, xaxis=axis, yaxis=axis)
        pio.templates["entropy_any_page"] = go.layout.Template(_repaint(template.to_plotly_json()))
    described = figure.to_plotly_json()
    described["layout"].pop("template", None)
    made = go.Figure(_repaint(described))
    return made.update_layout(template="entropy_any_page", autosize=True, width=None, uirevision="explorer")


def coloured(words: str, color: str) -> str:
    return f'<span style="color:{legible(color)};font-weight:600">{words}</span>'


def keys_worth(entropy: float) -> str:
    """An entropy in nats with its number of equal keys: '2.31 nats, 10.1 keys' worth'."""
    return f"{abs(entropy):.3g} nats, {math.exp(entropy):.3g} keys’ worth"  # one key has -0.0


def legible(color: str) -> str:
    """A colour #rrggbb that can be seen on a dark page too: a dark one is mixed with white, black becomes the ink."""
    if color in (INK, "#000000"):
        return MID_INK
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    while _luminance(rgb) < 0.117:  # contrast of 3 to 1 with JupyterLab's dark page, #111111
        rgb = [channel + (255 - channel) * 0.05 for channel in rgb]
    return "#" + "".join(f"{round(channel):02X}" for channel in rgb)


def _luminance(rgb: Sequence[float]) -> float:
    """Relative luminance of sRGB 0..255, as WCAG 2 defines it."""
    linear = [c / 12.92 if (c := channel / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for channel in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _repaint(described):
    """A figure's description with the inks of the light look exchanged for those of any page."""
    if isinstance(described, dict):
        return {key: _repaint(value) for key, value in described.items()}
    if isinstance(described, list | tuple):
        return [_repaint(value) for value in described]
    return _PAINT.get(described, described) if isinstance(described, str) else described


_PAINT = {INK: MID_INK, GRID: MID_GRID, **{color: legible(color) for color in VARIANT_COLORS.values()}}


def _labelled(made, name: str, label: str, tip: str, width: str):
    made.description = label
    made.layout.width = width
    made.style.description_width = "initial"
    if tip:  # ipywidgets 8 calls it tooltip, 7 description_tooltip
        setattr(made, "tooltip" if made.has_trait("tooltip") else "description_tooltip", tip)
    made.add_class(f"entropy-{name}")
    return made
