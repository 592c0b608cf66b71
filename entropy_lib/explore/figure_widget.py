"""plotly's FigureWidget, reliable in the browser: no change is lost on the way, and a figure fills its cell.

plotly 6 and newer hand 5 MB of JavaScript with every figure to anywidget, which gives them two seconds to start: on a
busy machine they pass, and from then on every change is dropped, the first data among them, since plotly sends those
as a change. Changes that come while the script starts are dropped too. It draws before the figure is on the page, 700
px wide, and hears of the window's size only, not of a side bar's. So here a figure is complete when it is first sent,
anywidget starts a small script, and that one starts plotly's, once a page, keeps what comes meanwhile, draws when
there is a width to fill, and lets changes in whether or not anywidget has given the figure up: even the small script
comes too late where the page is busy with another figure's plotly.

A page that is loaded anew asks for the figure's state, and plotly 6 gives it the figure as it was made: here it gets
the figure as it is.

After every redraw plotly sends the kernel all defaults it filled in, 40 kB that no explorer reads and whose receipt
fails where a default hides an array: here it does not. And a change is one message instead of three.

JupyterLab takes the arrow keys from a list that has the focus, to move between cells: here the explorer keeps them.
The handles of ipywidgets' sliders have no name for a screen reader: here they get their slider's label.
"""

from __future__ import annotations

import threading
import uuid
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import plotly
from traitlets import Unicode

from entropy_lib.explore.figures import go

_SCRIPT = """
const CHANGES = ["_py2js_update", "_py2js_restyle", "_py2js_relayout"];

const start = async (source) => {
  const plotly = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  const silent = { _sendTraceDeltas() {}, _sendLayoutDelta() {} };
  if (plotly.FigureView) Object.assign(plotly.FigureView.prototype, silent);
  return plotly.default;
};

const letChangesIn = async (model) => {
  const real = await model.widget_manager?.get_model?.(model.get("_own_id"));
  if (!real?.comm?.on_msg) return; // no front end of ipywidgets, and no gate of anywidget's
  const widgetModel = Object.getPrototypeOf(Object.getPrototypeOf(real)); // beneath anywidget's
  real.comm.on_msg(widgetModel._handle_comm_msg.bind(real));
};

const keepArrows = (event) => {
  const moves = /^(Arrow|Home|End|Page)/.test(event.key);
  if (moves && event.target.matches?.(".entropy-explorer select")) event.stopPropagation();
};

const nameSliders = (explorer) => {
  for (const slider of explorer?.querySelectorAll(".widget-slider") ?? []) {
    const label = slider.querySelector(".widget-label")?.textContent;
    for (const handle of slider.querySelectorAll("[role=slider]")) handle.setAttribute("aria-label", label);
  }
};

export default () => {
  let figure;
  return {
    initialize({ model }) {
      letChangesIn(model);
      const early = [];
      const keep = CHANGES.map((name) => [name, () => early.push([name, model.get(name)])]);
      for (const [name, listen] of keep) model.on(`change:${name}`, listen);
      if (!globalThis.entropyPlotly) {
        window.addEventListener("keydown", keepArrows, true);
        window.addEventListener("focusin", ({ target }) => nameSliders(target.closest?.(".entropy-explorer")));
      }
      globalThis.entropyPlotly ??= {};
      const plotly = (globalThis.entropyPlotly[model.get("_plotly_version")] ??= start(model.get("_plotly")));
      figure = plotly.then((make) => {
        const made = make();
        for (const [name, listen] of keep) model.off(`change:${name}`, listen);
        made.initialize({ model });
        for (const [name, change] of early) model.set(name, change);
        return made;
      });
    },
    async render({ model, el }) {
      const made = await figure;
      let width = 0, remove;
      const cell = new ResizeObserver(() => {
        if (!el.clientWidth || el.clientWidth === width) return;
        width = el.clientWidth;
        nameSliders(el.closest(".entropy-explorer"));
        if (remove) window.dispatchEvent(new Event("resize"));
        else remove = made.render({ model, el });
      });
      cell.observe(el);
      return () => (cell.disconnect(), remove?.());
    },
  };
};
"""


def figure_widget(figure: go.Figure) -> go.FigureWidget:
    """A FigureWidget with the figure's data and layout. ImportError where plotly wants anywidget and there is none."""
    try:
        made = _widget_class()(figure)
    except ImportError as error:  # plotly 6 and newer need anywidget, 5.24 does not
        raise ImportError("the explorers need anywidget: pip install 'entropy_lib[notebooks]'") from error
    made._config = {"responsive": True}
    go.FigureWidget.open(made)
    return made


@cache
def _widget_class() -> type:
    bundle = Path(plotly.__file__).parent / "package_data" / "widgetbundle.js"
    if not bundle.is_file():  # plotly 5 is an extension of the notebook, with none of this
        return go.FigureWidget

    class FigureWidget(go.FigureWidget):
        _esm = _SCRIPT
        _plotly = Unicode(bundle.read_text(encoding="utf-8")).tag(sync=True)
        _plotly_version = Unicode(plotly.__version__).tag(sync=True)
        _own_id = Unicode().tag(sync=True)

        def __init__(self, *args, **options):
            self._changing = threading.RLock()  # a page may ask while another thread draws
            super().__init__(*args, **options)
            self._model_id = self._own_id = uuid.uuid4().hex  # for the script to find its model by

        def open(self):  # by figure_widget, when it is complete
            pass

        @contextmanager
        def batch_update(self):
            with self._changing, super().batch_update():
                yield

        def get_state(self, key=None, drop_defaults=False):
            state = super().get_state(key, drop_defaults)
            with self._changing:
                for sent, current in (("_widget_data", "_data"), ("_widget_layout", "_layout")):
                    if sent in state:
                        state[sent] = self.trait_metadata(sent, "to_json")(getattr(self, current), self)
            return state

        def _send_update_msg(self, restyle_data, relayout_data, trace_indexes=None, source_view_id=None):
            change = {"style_data": restyle_data, "layout_data": relayout_data, "source_view_id": source_view_id}
            change |= {"style_traces": self._normalize_trace_indexes(trace_indexes)}
            self._py2js_update = {**change, "trace_edit_id": 0, "layout_edit_id": 0}  # whose defaults nobody awaits
            self._py2js_update = None

    return FigureWidget
