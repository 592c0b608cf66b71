"""Execute the companion's notebooks without a browser: `python notebooks/run.py [NOTEBOOK ...] [--scale SCALE]`.

Runs every cell from top to bottom with this interpreter, in the notebook's own folder, `--jobs` notebooks at a time,
and reports seconds, cells and the assertions that held. Exits with 1 if a notebook failed, with 2 if it was asked
for something unknown.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
import papermill
import yaml
from ipykernel.kernelspec import write_kernel_spec
from IPython.core.inputtransformer2 import TransformerManager
from papermill.exceptions import PapermillExecutionError

NOTEBOOKS = Path(__file__).resolve().parent
ROOT = NOTEBOOKS.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
# Parameters of the notebooks that train; "smoke" is what they are committed with.
SCALES = {
    "smoke": {},
    "small": {"size": "small", "corpus": "pypi-small", "recipe": "small"},
    "paper": {"size": "gpt2", "corpus": "pypi-medium", "recipe": "paper"},
}
SMOKE_CELL_SECONDS = 900  # a cell takes under two minutes at smoke scale; one that hangs must not hold up the rest


def parse(source: str) -> ast.Module:
    return ast.parse(TransformerManager().transform_cell(source))  # without %magics and !commands


def find_notebook(name: str) -> Path:
    """A path, or the name of a notebook of this folder with or without its suffix."""
    for path in (Path(name), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb"):
        if path.suffix == ".ipynb" and path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
    raise ValueError(f"no notebook {name!r}; there are {known}")


def parameter_names(path: Path) -> set[str]:
    """What the cell tagged `parameters` assigns."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    nodes = [node for cell in cells for node in parse(cell.source).body]
    targets = [t for node in nodes for t in getattr(node, "targets", [getattr(node, "target", None)])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def count_asserts(notebook) -> int:
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return sum(isinstance(node, ast.Assert) for source in code for node in ast.walk(parse(source)))


def tidy(notebook):
    """Take out what differs from run to run, and widget state, which is megabytes of JavaScript."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                output["data"] = {"text/plain": "A control: it appears when this cell is run."}
                output["metadata"] = {}
    return notebook


def written_to_stderr(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stderr")


def run(path: Path, output: Path, parameters: dict, cell_seconds: int | None) -> tuple[str, float, int, int]:
    """Execute one notebook into `output`; returns (error or "", seconds, code cells, assertions)."""
    source = nbformat.read(path, as_version=4)
    start, error = time.perf_counter(), ""
    try:
        papermill.execute_notebook(
            path, output, parameters=parameters, kernel_name="python3",
            language="python", cwd=path.parent,
            progress_bar=False, store_widget_state=False, execution_timeout=cell_seconds, coalesce_streams=True,
        )  # fmt: skip
    except PapermillExecutionError as failure:
        error = f"cell [{failure.exec_count}]:\n{failure.source}\n\n{failure.ename}: {failure.evalue}"
    except Exception as failure:  # a kernel that died, a cell past its limit, a notebook that is no notebook
        error = f"{type(failure).__name__}: {failure}"
    seconds = time.perf_counter() - start
    return error, seconds, sum(cell.cell_type == "code" for cell in source.cells), count_asserts(source)


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
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="path or name; all of this folder if none")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "notebooks", help="folder of executed copies")
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="of what is trained; default: %(default)s")
    parser.add_argument(
        "--cell-timeout", type=int, metavar="SECONDS", help=f"default: {SMOKE_CELL_SECONDS} at smoke scale, else none"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time; default: %(default)s")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--update", action="store_true", help="write the results back over the notebooks themselves")
    options = parser.parse_args(arguments)
    try:
        parameters = {name: yaml.safe_load(value) for name, value in options.p}
        paths = [find_notebook(name) for name in options.notebooks] or sorted(NOTEBOOKS.glob("*.ipynb"))
        of_scale = {}  # a notebook that does not train has nothing to scale
        for path in paths:
            known = parameter_names(path)
            if unknown := [name for name in parameters if name not in known]:
                raise ValueError(
                    f"{path.name} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(known))}"
                )
            of_scale[path] = {name: value for name, value in SCALES[options.scale].items() if name in known}
        if options.update and (parameters or options.scale != "smoke"):
            raise ValueError("--update writes notebooks with their own parameters: leave out -p and --scale")
    except (ValueError, yaml.YAMLError, SyntaxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    options.output.mkdir(parents=True, exist_ok=True)
    cell_seconds = options.cell_timeout or (SMOKE_CELL_SECONDS if options.scale == "smoke" else None)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        use_this_interpreter(folder)
        workers = ProcessPoolExecutor(max(1, options.jobs), initializer=leave_ctrl_c_to_the_parent)
        try:
            running = {
                workers.submit(run, path, options.output / path.name, of_scale[path] | parameters, cell_seconds): path
                for path in paths
            }
            for future in as_completed(running):
                path = running[future]
                error, seconds, cells, asserts = future.result()
                if options.update and not error:
                    executed = nbformat.read(options.output / path.name, as_version=4)
                    if noise := written_to_stderr(executed):  # readers of the committed notebook would wonder at it
                        error = f"not written back, since it wrote to stderr:\n{noise}"
                    else:
                        nbformat.write(tidy(executed), path)
                results[path] = ("FAILED" if error else "ok", seconds, cells, asserts)
                counts = f"{seconds:.1f} s, {cells} code cells, {asserts} assertions"
                print(f"{path.name}: {results[path][0]}, {counts}", flush=True)
                if error:
                    print(f"\n{path.name}, {error}\n", flush=True)
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()  # a kernel ends with the process that started it
            raise
        finally:
            workers.shutdown(cancel_futures=True)
    width = max([len(path.stem) for path in paths], default=8)
    print(f"\n{'notebook':<{width}}  result  seconds  cells  assertions")
    for path in paths:
        result, seconds, cells, asserts = results[path]
        print(f"{path.stem:<{width}}  {result:<6}  {seconds:7.1f}  {cells:5}  {asserts:10}")
    return int(any(result == "FAILED" for result, *_ in results.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
