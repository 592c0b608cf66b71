"""JupyterLab and a headless Chromium around a copy of the notebooks: `make test-browser`.

Without Chromium or playwright these tests are skipped; with ENTROPY_LIB_REQUIRE_BROWSER=1 they fail instead.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ipykernel.kernelspec import write_kernel_spec
from marks import OUTPUT

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "09_explorers.ipynb"
GIVEN_UP = "[anywidget] Failed to initialize model."  # on a busy page; without harm, see test_slow_start.py
# No services of its own over the network, and an empty profile every time (Playwright makes and deletes it).
QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
           --disable-component-update --disable-sync --no-proxy-server""".split()
SETTINGS = {  # JupyterLab asks whether it may fetch news, over whatever is to be clicked
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
}


@pytest.fixture(scope="session")
def playwright_and_chromium():
    """Playwright's sync API and the path of Chromium, or a skip that says what is missing."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if chromium and sync_playwright:
        return sync_playwright, chromium
    missing = "Chromium: apt-get install chromium" if sync_playwright else "playwright: pip install '.[browser]'"
    if os.environ.get("ENTROPY_LIB_REQUIRE_BROWSER"):
        pytest.fail(f"there is no {missing}")
    pytest.skip(f"there is no {missing}")


@pytest.fixture(scope="session")
def server(playwright_and_chromium, tmp_path_factory):
    """The address of a JupyterLab over a copy of the notebooks, with ../data and this interpreter as its kernel."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", home / "notebooks")
    (home / "data").symlink_to(ROOT / "data")
    write_kernel_spec(home / "kernel" / "kernels" / "python3")
    for name, values in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    folders = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "jupyter", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTER_PATH": "kernel", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }  # fmt: skip
    environment = {**os.environ, **{name: str(home / folder) for name, folder in folders.items()}}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--ServerApp.root_dir={home / 'notebooks'}", "--LabApp.expose_app_in_browser=True"]
    with open(home / "log", "w") as log:
        # A session of its own: Ctrl-C reaches the tests alone, and they end the server.
        process = subprocess.Popen(
            command, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield _address(process, home)
    finally:
        process.terminate()  # ends its kernels too
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()  # a kernel without its server ends by itself
            process.wait()


def _address(process, home: Path) -> str:
    for _ in range(600):
        for path in (home / "runtime").glob("jpserver-*.json"):
            try:
                server = json.loads(path.read_text())
            except ValueError:  # half written
                continue
            return f"{server['url']}lab/tree/{NOTEBOOK}?token={server['token']}"
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{(home / 'log').read_text()[-3000:]}")


@pytest.fixture(scope="session")
def page(playwright_and_chromium, server):
    """The notebook of the explorers in JupyterLab, all of its cells run."""
    sync_playwright, chromium = playwright_and_chromium
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport={"width": 1300, "height": 1250})
        page.set_default_timeout(60_000)
        page.errors = []
        page.on("console", lambda message: _note(page.errors, message.type, message.text))
        page.on("pageerror", lambda error: _note(page.errors, "error", str(error)))
        page.goto(server, wait_until="domcontentloaded")
        prepare(page)
        page.evaluate("lab.app.commands.execute('notebook:run-all-cells')")
        yield page
        browser.close()


def prepare(page):
    """What page.js has, in a page that is just loaded, once its kernel is there."""
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.evaluate((Path(__file__).parent / "page.js").read_text())
    page.wait_for_function("lab.idle()")
    page.evaluate("lab.listen()")


def _note(errors: list[str], kind: str, text: str):
    if kind == "error" and GIVEN_UP not in text:
        errors.append(text)


@pytest.fixture(autouse=True)
def _no_error_in_the_console(page):
    """In what the test did, nor, for the first, in starting the notebook."""
    yield
    errors, page.errors[:] = list(page.errors), []
    assert not errors
