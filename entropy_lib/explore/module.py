"""An explorer that is one ES module: it computes and draws in the browser, from the state that Python hands it once.

The same module and state are the cell's HTML, so that it moves without a kernel: in a saved notebook that is trusted,
in `nbconvert --to html`, offline. With a kernel its traits are those of the widget, read and set from Python.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import uuid
from importlib.resources import files

import numpy as np
from traitlets import Unicode

try:
    import anywidget
except ImportError as error:
    raise ImportError("this explorer needs anywidget: pip install 'entropy_lib[notebooks]'") from error

_HERE = files("entropy_lib.explore")

# anywidget's model, as far as our modules use it, over a plain state.
_MODEL = """
const listeners = {};
const model = {
  get: (name) => state[name],
  set: (name, value) => {
    if (JSON.stringify(state[name]) === JSON.stringify(value)) return;
    state[name] = value;
    for (const listen of listeners[`change:${name}`] ?? []) listen();
  },
  on: (event, listen) => (listeners[event] ??= []).push(listen),
  save_changes: () => {},
};
"""


_WAITING = "An explorer: it moves where scripts may run, in JupyterLab once its cell is run."
_TOO_OLD = "This browser is too old for that: Chrome 80, Firefox 113 or Safari 16.4 is needed, or a newer one."


def module_source(name: str) -> str:
    """The ES module of an explorer: the shared drawing, then its own file."""
    return "\n".join((_HERE / file).read_text(encoding="utf-8") for file in ("draw.js", f"{name}.js"))


def keys_worth(entropy: float) -> str:
    """An entropy in nats with its number of equal keys: '2.31 nats, 10.1 keys' worth'."""
    return f"{abs(entropy):.3g} nats, {math.exp(entropy):.3g} keys’ worth"  # one key has -0.0


def zipped(value) -> str:
    """JSON of a value, gzip-compressed, in base64: the same text for the same value."""
    return base64.b64encode(gzip.compress(json.dumps(value, allow_nan=False).encode(), 9, mtime=0)).decode()


def in_planes(numbers: np.ndarray) -> str:
    """Numbers as `woven` of draw.js reads them: base64 of the first byte of each, then of the second, and so on.

    Bytes of a kind stand together, so that gzip takes an eighth off floats.
    """
    flat = np.ascontiguousarray(numbers).reshape(-1)
    return base64.b64encode(flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()).decode()


class ModuleExplorer(anywidget.AnyWidget):
    """A widget whose synced traits tagged `state` are all that its module sees; see the file's docstring."""

    _own_id = Unicode().tag(sync=True)  # for the module to find its widget by

    def __init__(self, **traits):
        own_id = uuid.uuid4().hex
        super().__init__(model_id=own_id, _own_id=own_id, **traits)

    def state(self) -> dict:
        """What the module computes from, by trait."""
        return {name: getattr(self, name) for name in self.traits(state=True)}

    def html(self) -> str:
        """The explorer as it stands, as HTML that needs neither a kernel nor a network."""
        shown = [str(self._esm), self.state()]
        mark = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]  # the same explorer twice on a page is fine
        script = f"""
const el = [...document.querySelectorAll(".entropy-{mark}")].find((found) => !found.dataset.started);
const start = async () => {{
  const bytes = Uint8Array.from(atob("{zipped(shown)}"), (letter) => letter.charCodeAt(0));
  const unzipped = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const [source, state] = await new Response(unzipped).json();{_MODEL}
  const module = await import("data:text/javascript," + encodeURIComponent(source));
  module.default.render({{ model, el }});
}};
if (el) {{
  el.dataset.started = true;
  if (globalThis.DecompressionStream) start();
  else el.append(" {_TOO_OLD}");
}}"""
        name = " ".join(re.findall("[A-Z][a-z]*", type(self).__name__)).capitalize()
        div = f'<div class="entropy-{mark}" data-name="{name}">{_WAITING}</div>'  # where run.py puts a picture
        return f"{div}<script>(() => {{{script}}})();</script>"

    def _repr_mimebundle_(self, **options):
        shown = super()._repr_mimebundle_(**options)
        if shown is not None:  # a pair of data and metadata, or in older versions the data alone
            data = shown[0] if isinstance(shown, tuple) else shown
            data["text/html"] = self.html()
        return shown
