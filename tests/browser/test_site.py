"""`make site`: pages from the file system that ask no other host, and whose explorers answer without a kernel."""

import re
import subprocess
import sys

import pytest

from entropy_lib.clone import CLONE as ROOT
from entropy_lib.explore import microscope, penalty_explorer, run_explorer

PAGES = ["index", *sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")), "microscope"]
MODULES = {"index": 1, "00_start_here": 2, "06_entropy_guided_attention": 1, "09_explorers": 6, "11_private_gpt2": 1}
MODULES |= {"01_entropy_math": 1, "03_any_transformer": 1, "13_what_the_paper_asked": 1, "microscope": 1}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, ROOT / "notebooks" / "to_html.py", folder], check=True, cwd=folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
    return folder


@pytest.fixture
def opened(page, site):
    """(name) -> that page of the site without a network, with `asked`, addresses, and `errors`, its console."""
    context = page.context.browser.new_context(offline=True, viewport={"width": 900, "height": 700})

    def open_page(name):
        opened = context.new_page()
        opened.asked, opened.errors = [], []
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.on("console", lambda message: opened.errors.append(message.text))
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.goto((site / f"{name}.html").as_uri())
        return opened

    yield open_page
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_by_itself(opened, site, name):
    page = opened(name)
    for index in range(MODULES.get(name, 0)):
        page.locator(".entropy-module").nth(index).wait_for()
    for control in page.locator(".entropy-module").locator("input, select, button").all():
        if control.is_enabled():
            control.focus()
            page.keyboard.press("ArrowRight")
            if control.evaluate("control => control.localName") == "button":
                control.click()
    page.wait_for_timeout(200)
    assert page.locator(".entropy-module").count() == MODULES.get(name, 0)
    assert "An explorer: it moves where scripts may run" not in page.locator("body").inner_text()
    assert "$" not in "".join(page.locator(".jp-RenderedMarkdown p").all_inner_texts())
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    links = page.locator("a").evaluate_all("all => all.map((a) => a.getAttribute('href'))")
    assert len(links) >= len(PAGES)
    for link in links:
        assert re.match(r"https://|#", link) or (site / link.split("#")[0]).exists(), link
    assert [url for url in page.asked if not re.match(r"file:|data:|blob:", url)] == []
    assert page.errors == []


def test_the_explorers_of_the_site_say_what_the_library_does(opened):
    page = opened("09_explorers")
    penalty, runs = penalty_explorer(), run_explorer()
    shown = page.locator(".entropy-module", has=page.locator(".entropy-gamma"))
    shown.locator(".entropy-theta").focus()
    page.keyboard.press("ArrowLeft")
    told = shown.locator("label", has=page.locator(".entropy-theta")).locator("output")
    told.filter(has_not_text="0.5").wait_for()  # it is drawn at the next frame
    penalty.theta = float(told.inner_text())
    assert penalty.theta != 0.5
    shown.locator(".entropy-status", has_text=penalty.words()).wait_for()
    shown = page.locator(".entropy-module", has=page.locator(".entropy-right"))
    shown.locator(".entropy-step").focus()
    page.keyboard.press("End")
    shown.locator("output").filter(has_text=re.compile(r"\d{4}")).wait_for()
    runs.step = int(shown.locator("output").inner_text())
    assert runs.step > 3000
    shown.locator(".entropy-status", has_text=runs.words()).wait_for()


def test_the_microscope_says_what_the_library_does(opened, site):
    page, explorer = opened("microscope"), microscope()
    page.locator(".entropy-status", has_text=explorer.words()).wait_for()
    assert page.locator(".entropy-cell").count() == 270
    page.locator(".entropy-layer").focus()
    page.keyboard.press("End")
    page.locator(".entropy-tokens span").nth(3).hover()
    explorer.layer, explorer.position = 29, 3
    page.locator(".entropy-status", has_text=explorer.words()).wait_for()
    assert page.errors == []
    assert (site / "microscope.html").stat().st_size < 2.5e6
    assert 'href="microscope.html"' in (site / "index.html").read_text()
