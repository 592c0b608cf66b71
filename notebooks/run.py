"""Execute the companion's notebooks without a browser: `python notebooks/run.py [NOTEBOOK ...] [--scale SCALE]`.

Runs every cell from top to bottom with this interpreter, in the notebook's own folder, `--jobs` notebooks at a time,
and reports seconds and cells. Exits with 1 if a notebook failed, with 2 if it was asked for something unknown or
impossible, before anything ran. What fails in one notebook is reported beside the others' results, with its name, cell
and line.
"""

from __future__ import annotations

import argparse
import ast
import base64
import html
import io
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import papermill
import yaml
from ipykernel.kernelspec import write_kernel_spec
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

NOTEBOOKS = Path(__file__).resolve().parent
ROOT = NOTEBOOKS.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
FIGURE = "application/vnd.plotly.v1+json"
WIDTH = 800  # px of a picture; a wider one would be cut off by a cell of JupyterLab on a small screen
EXPLORER = re.compile(r'(<div class="entropy-\w+" data-name="([^"]*)">).*?(</div>)', re.DOTALL)
EXPLORER_WIDTH = 900  # px of its picture
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOR_ERROR = 8  # of 255: a palette that is further off somewhere would show in a heat map
# Parameters of the notebooks that train; "smoke" is what they are committed with.
SCALES = {
    "smoke": {},
    "small": {"size": "small", "corpus": "pypi-small", "recipe": "small"},
    "paper": {"size": "gpt2", "corpus": "pypi-medium", "recipe": "paper"},
}
SMOKE_CELL_SECONDS = 900  # a cell takes under two minutes at smoke scale; one that hangs must not hold up the rest


def find_notebook(name: str) -> Path:
    """A path, or the name of a notebook of this folder, with or without its suffix, or its number."""
    for path in (
        Path(name),
        NOTEBOOKS / name,
        NOTEBOOKS / f"{name}.ipynb",
        *NOTEBOOKS.glob(f"{Path(name).name}_*.ipynb"),
    ):
        if path.suffix == ".ipynb" and path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
    raise ValueError(f"no notebook {name!r}; there are {known}")


def parameter_value(name: str, text: str):
    """A Python number, None, True or False (to YAML 1.1, 5e-2 and None are words), or else YAML."""
    with suppress(ValueError, SyntaxError, TypeError):
        value = ast.literal_eval(text)
        if value is None or isinstance(value, int | float):
            return value
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"parameter {name} is neither a Python number nor YAML: {text!r}") from None


def positive_integer(text: str) -> int:
    with suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")


def tidy(notebook):
    """Take out what differs from run to run, and widget state, which is megabytes of JavaScript."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        folded = cell.metadata.get("jupyter", {}).get("source_hidden")
        tags = cell.metadata.get("tags")
        cell.metadata = {"jupyter": {"source_hidden": True}} if folded else {}
        cell.metadata |= {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                page = {kind: words for kind, words in output["data"].items() if kind == "text/html"}  # needs no kernel
                output["data"] = page | {"text/plain": "A control: it appears when this cell is run."}
                output["metadata"] = {}
    return notebook


def add_pictures(notebook) -> None:
    """Give every plotly figure its PNG, for GitHub and exported pages, where plotly does not draw."""
    import plotly.io as pio  # not needed to run notebooks that have no figures

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    outputs = [output for output in outputs if FIGURE in output.get("data", {})]
    figures = [{part: output.data[FIGURE][part] for part in ("data", "layout")} for output in outputs]
    if not figures:
        return
    heights = [figure["layout"].get("height", 450) for figure in figures]  # plotly's own
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.png" for number in range(len(figures))]
        pio.write_images(figures, files, width=WIDTH, height=heights)
        pictures = [with_palette(file.read_bytes()) for file in files]
    for output, figure, height, picture in zip(outputs, figures, heights, pictures, strict=True):
        title = re.sub("<[^>]+>", " ", figure["layout"].get("title", {}).get("text", ""))
        output.data["image/png"] = base64.b64encode(picture).decode()
        output.metadata = {"image/png": {"width": WIDTH, "height": height, "alt": " ".join(title.split())}}


def add_explorer_pictures(notebook) -> None:
    """Put into every explorer's HTML its picture, for GitHub, which runs no script: where one runs, it is replaced."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    outputs = [output for output in outputs if EXPLORER.match(output.get("data", {}).get("text/html", ""))]
    if not outputs:
        return
    from PIL import Image
    from playwright.sync_api import sync_playwright

    browser = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        window = {"viewport": {"width": EXPLORER_WIDTH, "height": 700}, "color_scheme": "light", "offline": True}
        page = playwright.chromium.launch(executable_path=browser).new_page(**window)
        for output in outputs:
            page.set_content('<!doctype html><body style="margin: 0">' + output.data["text/html"])
            said = page.locator(".entropy-status").filter(has_text=re.compile(r"\S")).inner_text()
            page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
            written = io.BytesIO()
            drawn = Image.open(io.BytesIO(page.locator(".entropy-module").screenshot())).convert("RGB")
            few = drawn.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
            few.convert("RGB").save(written, "WEBP", lossless=True, quality=100, method=6)
            picture = f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}"
            div, name, end = EXPLORER.match(output.data["text/html"]).groups()
            alt = f"{name}: {html.escape('; '.join(said.splitlines()))}"
            pictured = f'{div}<img alt="{alt}" style="max-width: 100%" src="{picture}">{end}'
            output.data["text/html"] = pictured + EXPLORER.sub("", output.data["text/html"], count=1)


def with_palette(picture: bytes) -> bytes:
    """The PNG with a palette of 256 colours, a quarter of the bytes; as it is if one colour would be off too much."""
    from PIL import Image, ImageChops

    full = Image.open(io.BytesIO(picture)).convert("RGB")
    small = full.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    if max(high for _, high in ImageChops.difference(full, small.convert("RGB")).getextrema()) > COLOR_ERROR:
        return picture
    written = io.BytesIO()
    small.save(written, "PNG", optimize=True)
    return written.getvalue()


def written_to_stderr(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stderr")


def failing_line(failure: PapermillExecutionError) -> str:
    """The line of the cell that its traceback points to, or the whole cell if it points to none."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(failure.traceback)).splitlines()
    pointed = [line for line in lines if re.match(r"-+> ?\d+ ", line)]
    return pointed[0] if pointed else failure.source


def last_cell(path: Path) -> str:
    """The cell that a notebook was in when its kernel was lost: the last that papermill's executed copy has started."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    started = [cell for cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    return f"cell [{len(started)}]:\n{started[-1].source}\n\n" if started else ""


def run(path: Path, output: Path, parameters: dict, cell_seconds: int | None) -> tuple[str, float, int]:
    """Execute one notebook into `output`; returns (error or "", seconds, code cells)."""
    start, error, cells = time.perf_counter(), "", 0
    try:
        cells = sum(cell.cell_type == "code" for cell in nbformat.read(path, as_version=4).cells)
        papermill.execute_notebook(
            path, output, parameters=parameters, kernel_name="python3",
            language="python", cwd=path.parent,
            progress_bar=False, store_widget_state=False, execution_timeout=cell_seconds, coalesce_streams=True,
        )  # fmt: skip
    except PapermillExecutionError as failure:
        error = f"cell [{failure.exec_count}]:\n{failing_line(failure)}\n\n{failure.ename}: {failure.evalue}"
    except (CellTimeoutError, DeadKernelError) as failure:
        error = f"{last_cell(output)}{type(failure).__name__}: {failure}"
    except Exception as failure:  # a notebook that is no notebook, a folder that cannot be written to
        error = f"{type(failure).__name__}: {failure}"
    return error, time.perf_counter() - start, cells


def write_back(path: Path, executed: Path) -> str:
    """Put an executed copy in its notebook's place; returns why not, or ""."""
    notebook = nbformat.read(executed, as_version=4)
    if noise := written_to_stderr(notebook):  # readers of the committed notebook would wonder at it
        return f"not written back, since it wrote to stderr:\n{noise}"
    tidy(notebook)
    needs = {add_pictures: "figures need Chrome or Chromium, and kaleido"}
    needs[add_explorer_pictures] = "explorers need Chrome or Chromium, and playwright: pip install '.[browser]'"
    for add, what in needs.items():
        try:
            add(notebook)
        except Exception as failure:  # no kaleido, no Pillow, no browser, an old version: each raises something else
            return f"not written back, since pictures of its {what}:\n{failure}"
    nbformat.write(notebook, path)
    return ""


def open_output(folder: Path, paths: list[Path]) -> None:
    """Make the folder of executed copies; ValueError if they cannot be written there, or over a notebook itself."""
    for name, count in Counter(path.name for path in paths).items():
        if count > 1:
            raise ValueError(f"{count} notebooks are called {name}: their copies need an --output each, so a run each")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output must be a folder to write in, got {folder}: {error.strerror}") from None
    for path in paths:
        if (folder / path.name).exists() and path.samefile(folder / path.name):
            raise ValueError(f"--output {folder} would write over {path.name} itself: choose another, or --update")


def list_notebooks() -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        print(path.stem)
        for name, parameter in papermill.inspect_notebook(path).items():
            print(f"    {name} = {parameter['default']}" + (f"  # {parameter['help']}" if parameter["help"] else ""))


def write_junit(file: Path, results: dict[Path, tuple[str, float, int]]) -> None:
    """Results as CI systems read them; an error is the text of a failure."""
    suite = ElementTree.Element("testsuite", name="notebooks", tests=str(len(results)))
    suite.set("failures", str(sum(bool(error) for error, *_ in results.values())))
    for path, (error, seconds, _) in results.items():
        case = ElementTree.SubElement(suite, "testcase", name=path.stem, time=f"{seconds:.1f}")
        if error:
            ElementTree.SubElement(case, "failure", message=error.splitlines()[-1]).text = error
    ElementTree.ElementTree(suite).write(file, encoding="unicode", xml_declaration=True)


def use_this_interpreter(folder: str) -> None:
    """Make "python3" this interpreter's kernel, ahead of any that is installed, with this checkout importable."""
    write_kernel_spec(Path(folder) / "kernels" / "python3", extra_arguments=["--log-level=CRITICAL"])
    for name, value in (("JUPYTER_PATH", folder), ("PYTHONPATH", str(ROOT))):
        os.environ[name] = os.pathsep.join(filter(None, [value, os.environ.get(name)]))
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # keeps the kernel's debugger from warning on stderr


def leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="path, name or number; all if none")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "notebooks", help="folder of executed copies")
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="of what is trained; default: %(default)s")
    parser.add_argument(
        "--cell-timeout", type=positive_integer, metavar="SECONDS",
        help=f"default: {SMOKE_CELL_SECONDS} at smoke scale, else none",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=positive_integer, default=1, metavar="N", help="notebooks at a time; default: %(default)s"
    )
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--update", action="store_true", help="write the results back over the notebooks themselves")
    parser.add_argument("--list", action="store_true", help="print the notebooks with their parameters, run nothing")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML")
    options = parser.parse_args(arguments)
    if options.list:
        list_notebooks()
        return 0
    try:
        parameters = {name: parameter_value(name, text) for name, text in options.p}
        paths = list(dict.fromkeys(map(find_notebook, options.notebooks))) or sorted(NOTEBOOKS.glob("*.ipynb"))
        of_scale = {}  # a notebook that does not train has nothing to scale
        for path in paths:
            try:
                known = papermill.inspect_notebook(path)
            except Exception:  # whatever is wrong with it: running it says so, beside the others' results
                of_scale[path] = {}
                continue
            if unknown := [name for name in parameters if name not in known]:
                has = ", ".join(sorted(known)) or "none"
                raise ValueError(f"{path.name} has no parameter {', '.join(unknown)}; it has {has}")
            of_scale[path] = {name: value for name, value in SCALES[options.scale].items() if name in known}
        if options.update and (parameters or options.scale != "smoke"):
            raise ValueError("--update writes notebooks with their own parameters: leave out -p and --scale")
        open_output(options.output, paths)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    cell_seconds = options.cell_timeout or (SMOKE_CELL_SECONDS if options.scale == "smoke" else None)
    results, interrupted = {}, False
    with tempfile.TemporaryDirectory() as folder:
        use_this_interpreter(folder)
        workers = ProcessPoolExecutor(options.jobs, initializer=leave_ctrl_c_to_the_parent)
        try:
            running = {
                workers.submit(run, path, options.output / path.name, of_scale[path] | parameters, cell_seconds): path
                for path in paths
            }
            for future in as_completed(running):
                path, seconds, cells = running[future], 0.0, 0
                try:
                    error, seconds, cells = future.result()
                    if options.update and not error:
                        error = write_back(path, options.output / path.name)
                except Exception as failure:  # the process that ran it was killed, or it cannot be written back
                    error = f"{type(failure).__name__}: {failure}"
                results[path] = (error, seconds, cells)
                print(f"{path.name}: {'FAILED' if error else 'ok'}, {seconds:.1f} s, {cells} code cells", flush=True)
                if error:
                    print(f"\n{path.name}, {error}\n", flush=True)
        except KeyboardInterrupt:
            interrupted = True
            for worker in multiprocessing.active_children():
                worker.terminate()  # a kernel ends with the process that started it
        finally:
            workers.shutdown(cancel_futures=True)
    width = max([len(path.stem) for path in paths], default=8)
    print(f"\n{'notebook':<{width}}  result   seconds  cells")
    for path in paths:
        error, seconds, cells = results.get(path, ("stopped", 0.0, 0))
        result = ("FAILED" if error else "ok") if path in results else error
        print(f"{path.stem:<{width}}  {result:<7}  {seconds:7.1f}  {cells:5}", flush=True)
    if options.junit:
        write_junit(options.junit, results)
    if interrupted:
        raise KeyboardInterrupt
    return int(any(error for error, *_ in results.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
