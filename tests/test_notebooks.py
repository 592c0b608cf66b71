"""Committed notebooks are executed, light and honest; their runner reports what fails and refuses what it cannot do."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[1]
RUNNER = ROOT / "notebooks" / "run.py"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_every_code_cell_was_executed_in_order_and_without_error(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_every_figure_has_its_picture_and_the_words_for_it(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    for output in outputs:
        if "application/vnd.plotly.v1+json" in output.get("data", {}):
            assert "image/png" in output.data
            assert output.metadata["image/png"]["alt"]
        html = output.get("data", {}).get("text/html", "")
        assert not html.startswith('<div class="entropy-') or re.search(r'<img alt="[^"]+"', html)


def test_one_parameters_cell_of_plain_assignments(notebook):
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert not [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]


def test_light_and_without_widget_state_or_timings(path, notebook):
    assert path.stat().st_size < 1_000_000
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(set(cell.metadata) <= {"tags", "jupyter"} for cell in notebook.cells)


def test_a_notebook_is_no_book(notebook):
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert (len(notebook.cells) <= 45, words <= 2000) == (True, True), (len(notebook.cells), words)


def test_cells_are_short(notebook):
    long = {cell.id: cell.source.count("\n") + 1 for cell in code_cells(notebook) if cell.source.count("\n") >= 25}
    assert not long


def test_a_key_table_for_nbval_with_output(notebook):
    checked = [cell for cell in code_cells(notebook) if cell.source.startswith("# NBVAL_CHECK_OUTPUT")]
    assert checked
    assert all(cell.outputs for cell in checked)
    assert not any("nbval-skip" in cell.metadata.get("tags", []) for cell in checked)


def test_no_machine_paths(path):
    found = re.findall(r"/(?:home|root|Users|tmp|work|workspace|content)/[\w./-]+|[A-Z]:\\\\Users", path.read_text())
    assert not found


def test_links_lead_to_files(path, notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert not [target for target in targets if target and not (path.parent / target).exists()]


# ---- the runner


def make_notebook(folder, name, *sources, parameters="count = 2"):
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    python = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=python), folder / f"{name}.ipynb")
    return str(folder / f"{name}.ipynb")


def run(*arguments, runner=RUNNER):
    pytest.importorskip("papermill")
    command = [sys.executable, str(runner), *map(str, arguments)]
    environment = {**os.environ, "BROWSER_PATH": os.devnull}  # the same with and without a browser
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.parametrize(
    "extra",
    [
        ["-p", "cuont", "3"],
        ["-p", "count", "3", "-p", "more", "1"],
        ["--update", "-p", "count", "1"],
        ["--update", "--scale", "small"],
    ],
)
def test_runner_refuses_what_the_notebook_cannot_take(tmp_path, extra):
    result = run(make_notebook(tmp_path, "a", "assert count == 2"), "--output", tmp_path / "out", *extra)
    assert result.returncode == 2
    assert "parameter" in result.stderr
    assert not (tmp_path / "out").exists()


def test_runner_refuses_an_unknown_notebook():
    result = run("99_nothing")
    assert result.returncode == 2
    assert "99_nothing" in result.stderr
    assert "01_entropy_math" in result.stderr


def test_runner_reports_a_failing_cell_and_runs_the_rest(tmp_path):
    bad = make_notebook(tmp_path, "bad", "value = count - 2", "print(1 / value)", "assert False, 'not reached'")
    good = make_notebook(tmp_path, "good", "import sys", f"assert sys.executable == {sys.executable!r}\nassert count")
    result = run(bad, good, "--output", tmp_path / "out")
    assert result.returncode == 1
    assert "print(1 / value)" in result.stdout
    assert "ZeroDivisionError: division by zero" in result.stdout
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[-2:]}
    assert rows["bad"][0] == "FAILED"
    assert rows["good"][0] == "ok"
    assert rows["good"][2:] == ["3"]
    assert (tmp_path / "out" / "good.ipynb").is_file()


def test_results_for_machines_and_a_list_for_people(tmp_path):
    paths = [make_notebook(tmp_path, "bad", "x = 0\n1 / x"), make_notebook(tmp_path, "good", "assert count")]
    result = run(*paths, "--output", tmp_path / "out", "--junit", tmp_path / "results.xml")
    assert "----> 2 1 / x" in result.stdout
    suite = ElementTree.parse(tmp_path / "results.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert {case.get("name"): case.find("failure") is None for case in suite} == {"bad": False, "good": True}
    assert '    size = "tiny"' in run("--list").stdout


def test_what_breaks_a_notebook_is_reported_beside_the_others(tmp_path):
    """Whatever it is: each failure with its name, and its cell if it came to one; the rest runs."""
    notebooks = {
        "syntax": (["x = (1,", "assert False, 'not reached'"], "count = 2"),
        "dies": (["import os\nos._exit(3)"], "count = 2"),
        "good": (["assert count\nassert True"], "count = 2"),
    }
    paths = [make_notebook(tmp_path, name, *cells, parameters=first) for name, (cells, first) in notebooks.items()]
    for name, text in {"empty": "", "list": "[1]", "other": '{"a": 1}', "bytes": "\0"}.items():
        (tmp_path / f"{name}.ipynb").write_text(text)
        paths.insert(0, tmp_path / f"{name}.ipynb")
    result = run(*paths, "--output", tmp_path / "out", "--jobs", "2", "-p", "count", "1")
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[-len(paths) :]}
    assert {name: row[0] for name, row in rows.items() if row[0] != "FAILED"} == {"good": "ok"}
    assert rows["good"][2:] == ["2"]
    assert set(rows) == {Path(path).stem for path in paths}
    assert re.search(r"\nsyntax.ipynb, cell \[\d+\]:\n[^\0]*?x = \(1,\n\n\w+Error: ", result.stdout)
    assert "\ndies.ipynb, cell [3]:\nimport os\nos._exit(3)\n\nDeadKernelError: " in result.stdout


def test_runner_refuses_an_output_that_it_cannot_write_to_or_should_not(tmp_path, capsys):
    path, file = make_notebook(tmp_path, "a", "assert count"), tmp_path / "notes.txt"
    file.write_text("mine")
    (tmp_path / "b").mkdir()
    namesake, before = make_notebook(tmp_path / "b", "a", "assert count"), Path(path).read_text()
    out = ["--output", tmp_path / "out"]
    cases = [
        ([path, "--output", file], "must be a folder to write in"),
        ([path, "--output", file / "below"], "must be a folder to write in"),
        ([path, "--output", tmp_path], "would write over a.ipynb itself"),
        ([path, namesake, *out], "2 notebooks are called a.ipynb"),
        ([path, "--jobs", "0", *out], "--jobs: must be a positive integer, got '0'"),
        ([path, "--jobs", "two", *out], "--jobs: must be a positive integer, got 'two'"),
        ([path, "--cell-timeout", "-1", *out], "--cell-timeout: must be a positive integer"),
        ([path, "-p", "count", "[1", *out], "parameter count is neither"),
    ]
    main = runner_main()
    for arguments, words in cases:
        try:
            status = main([str(word) for word in arguments])
        except SystemExit as stop:  # of argparse
            status = stop.code
        assert status == 2, words
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert file.read_text() == "mine"
    assert Path(path).read_text() == before


def runner_main():
    """The runner in this process, for what it refuses before it starts another."""
    pytest.importorskip("papermill")
    spec = importlib.util.spec_from_file_location("runner", RUNNER)
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    return runner.main


def test_notebook_00_has_no_parameter_that_could_contradict_its_records(tmp_path, capsys):
    arguments = ["00_start_here", "-p", "context_length", "64", "--output", str(tmp_path / "out")]
    assert runner_main()(arguments) == 2
    assert "00_start_here.ipynb has no parameter context_length; it has every_step, runs" in capsys.readouterr().err


def test_runner_passes_typed_parameters_and_writes_nothing_but_its_notebooks(tmp_path):
    first = "count = 2\nrate = 0.1\nname = 'x'\nlive = True"
    check = "assert [count, rate, name, live] == [[1, 2.5], 0.05, None, False]"
    path, mine = make_notebook(tmp_path, "a", check, parameters=first), tmp_path / "out" / "mine.ipynb"
    mine.parent.mkdir()
    mine.write_text("mine")
    values = {"count": "[1, 2.5]", "rate": "5e-2", "name": "None", "live": "no"}
    pairs = [word for name, value in values.items() for word in ("-p", name, value)]
    result = run(path, path, "--output", tmp_path / "out", *pairs)
    assert result.returncode == 0
    assert result.stdout.count("a.ipynb: ok") == 1  # asked for twice, run once
    assert sorted(file.name for file in mine.parent.iterdir()) == ["a.ipynb", "mine.ipynb"]
    assert mine.read_text() == "mine"


def test_scale_sets_what_a_notebook_trains(tmp_path):
    check = "assert (size, recipe, mine) == ('small', 'small', 3)"
    trains = make_notebook(tmp_path, "a", check, parameters='size = "tiny"\nrecipe = "smoke"\nmine = 3')
    reads = make_notebook(tmp_path, "b", "assert count == 2")
    assert run(trains, reads, "--output", tmp_path / "out", "--scale", "small").returncode == 0
    assert run(trains, "--output", tmp_path / "out").returncode == 1


def test_a_cell_that_hangs_fails_and_the_rest_runs(tmp_path):
    hangs = make_notebook(tmp_path, "hangs", "import time\ntime.sleep(100)")
    good = make_notebook(tmp_path, "good", "assert count")
    result = run(hangs, good, "--output", tmp_path / "out", "--cell-timeout", "2")
    assert result.returncode == 1
    assert "Timeout" in result.stdout
    assert [line.split()[1] for line in result.stdout.splitlines()[-2:]] == ["FAILED", "ok"]


def test_ctrl_c_ends_all_that_run_side_by_side(tmp_path):
    started = "import os, pathlib, time\npathlib.Path(f'{os.getpid()}.kernel').touch()\ntime.sleep(100)"
    notebooks = [make_notebook(tmp_path, "done", "assert count"), *(make_notebook(tmp_path, n, started) for n in "abc")]
    command = [sys.executable, RUNNER, *notebooks, "--output", tmp_path / "out", "--jobs", "2"]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while len(kernels := list(tmp_path.glob("*.kernel"))) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        assert len(kernels) == 2
        runner.send_signal(signal.SIGINT)
        results, errors = runner.communicate(timeout=20)
        assert (runner.returncode, errors.strip()) == (130, "stopped")
        end = time.monotonic() + 10  # a kernel looks for its parent every second
        while (left := [k for k in kernels if Path(f"/proc/{k.stem}").exists()]) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left
        assert len(list(tmp_path.glob("*.kernel"))) == 2  # the third was not started any more
        assert [line.split()[1] for line in results.splitlines()[-4:]] == ["ok", "stopped", "stopped", "stopped"]
    finally:
        runner.kill()


TWICE = "import time\nfor _ in range(2):\n    print('ran', flush=True)\n    time.sleep(0.5)"


def test_update_writes_back_a_clean_notebook(tmp_path):
    path = make_notebook(tmp_path, "a", "import ipywidgets\nipywidgets.IntSlider()", TWICE)
    before = nbformat.read(path, as_version=4)
    assert run(path, "--output", tmp_path / "out", "--update").returncode == 0
    after = nbformat.read(path, as_version=4)
    assert [cell.id for cell in after.cells] == [cell.id for cell in before.cells]
    assert [cell.execution_count for cell in after.cells] == [1, 2, 3]
    assert set(after.metadata) == {"kernelspec", "language_info"}
    assert list(after.cells[1].outputs[0].data) == ["text/plain"]
    assert [output.text for output in after.cells[2].outputs] == ["ran\nran\n"]  # however many messages it came in
    assert [dict(cell.metadata) for cell in after.cells] == [{"tags": ["parameters"]}, {}, {}]


def test_update_writes_back_what_it_can(tmp_path):
    """Nothing after a warning, nothing where it cannot, and the others all the same."""
    path = make_notebook(tmp_path, "a", "import warnings\nwarnings.warn('odd')")
    gone = make_notebook(tmp_path, "gone", "import os\nos.remove('gone.ipynb')\nos.mkdir('gone.ipynb')")
    drawn = make_notebook(tmp_path, "drawn", "import plotly.graph_objects as go", "go.Figure().show('plotly_mimetype')")
    moved = make_notebook(tmp_path, "moved", "from entropy_lib.explore import tug_of_war\ntug_of_war()")
    good = make_notebook(tmp_path, "good", "assert count")
    before = Path(path).read_text()
    result = run(path, gone, drawn, moved, good, "--output", tmp_path / "out", "--update")
    assert result.returncode == 1, result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines()[-5:]] == [*["FAILED"] * 4, "ok"]
    assert "pictures of its figures need Chrome or Chromium" in result.stdout
    assert "pictures of its explorers need Chrome or Chromium, and playwright: pip install" in result.stdout
    assert "UserWarning: odd" in result.stdout
    assert "gone.ipynb, IsADirectoryError" in result.stdout
    assert Path(path).read_text() == before
    assert nbformat.read(good, as_version=4).cells[1].execution_count == 2


# ---- the notebooks notice a wrong library


@pytest.mark.parametrize(
    ("file", "formula", "mistake"),
    [
        ("entropy.py", "weights.masked_fill(~positive, 1.0).log()", "weights.masked_fill(~positive, 1.0).log2()"),
        ("regularization.py", "> self.tolerance_margin_factor * ceiling", "> self.tolerance_margin_factor"),
    ],
    ids=["entropy in bits", "margin in nats"],
)
def test_notebook_fails_when_a_formula_of_the_library_is_wrong(tmp_path, file, formula, mistake):
    """In a copy of the library, which its runner puts ahead of the installed one."""
    shutil.copytree(ROOT / "entropy_lib", tmp_path / "entropy_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("*.png"))
    source = (tmp_path / "entropy_lib" / file).read_text()
    assert source.count(formula) == 1
    (tmp_path / "entropy_lib" / file).write_text(source.replace(formula, mistake))
    result = run("01_entropy_math", "--output", tmp_path / "out", runner=tmp_path / "notebooks" / "run.py")
    assert result.returncode == 1
    assert "AssertionError" in result.stdout
