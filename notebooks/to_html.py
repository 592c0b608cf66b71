"""`python notebooks/to_html.py build/site`: the README, the committed notebooks and a microscope, without Python.

Explorers move, formulas are MathML, and nothing is asked of another host, so that the folder can be opened from a disk
or published as static pages.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from entropy_lib.explore import microscope

NOTEBOOKS = Path(__file__).resolve().parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")
PAGE = r"""
{%- extends 'index.html.j2' -%}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block notebook_css %}{{ super() }}
{{ resources.include_css("static/theme-dark.css") | replace("<style", "<style media='(prefers-color-scheme: dark)'") }}
<style>
  body.jp-Notebook { max-width: 980px; margin: auto; padding: 16px; box-sizing: border-box }
  body { background: var(--jp-layout-color0) }
  .jp-RenderedImage img { background: white; max-width: 100% }
  .jp-RenderedHTMLCommon math[display=block] { margin: 12px 0; overflow-x: auto }
  .jp-RenderedHTMLCommon table { display: block; overflow-x: auto }
  .jp-OutputArea-output { overflow-x: auto }
  nav.series { display: flex; flex-wrap: wrap; gap: 4px 14px; font-family: var(--jp-ui-font-family) }
  nav.series a { color: var(--jp-content-link-color) }
</style>{% endblock %}
{% block body_header %}{{ super() }}
<script>document.body.dataset.jpThemeLight = !matchMedia("(prefers-color-scheme: dark)").matches;</script>
<nav class="series" aria-label="the series">
{% for name, address in resources.series %}<a href="{{ address }}">{{ name }}</a>{% endfor %}</nav>
{% endblock %}
"""


class MathMLRenderer(IPythonRenderer):
    """Formulas as MathML, which browsers draw by themselves."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


class Pages(HTMLExporter):
    """A notebook as a page: without its prompts and folded cells, with links to the other pages."""

    raw_template = PAGE
    exclude_input_prompt = exclude_output_prompt = True
    embed_images = True

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        path = context["resources"]["metadata"]["path"]
        options = {"escape": False, "embed_images": True, "path": path, "exclude_anchor_links": True}
        return MarkdownWithMath(renderer=MathMLRenderer(**options)).render(source)


def linked(markdown: str) -> str:
    """Links to notebooks lead to their pages; what is in the repository alone is its words."""

    def link(found: re.Match) -> str:
        words, address = found.groups()
        page, notebook, part = Path(address).name.partition(".ipynb")
        return f"[{words}]({page}.html{part})" if notebook else words

    return LINK.sub(link, markdown)


def prepared(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source)
        elif cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata["transient"] = {"remove_source": True}
    return notebook


def start_page(readme: str, first: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The README, with the film that notebook 00 opens with in place of its picture."""
    before, after = re.split(r"^!\[.*\n", readme, maxsplit=1, flags=re.MULTILINE)
    film = next(output for cell in first.cells for output in cell.get("outputs", []) if "text/html" in output.data)
    code = nbformat.v4.new_code_cell(outputs=[film], metadata={"jupyter": {"source_hidden": True}})
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(before), code, nbformat.v4.new_markdown_cell(after)]
    )


MICROSCOPE = """# The microscope

SmolLM2-135M has 270 heads, 30 layers of 9, and this is how each of them read six short texts. Choose a text, hover over
a token, click a head: see where it looks, what its entropy is, and how that compares with looking at every key alike
and with the habit of the first token.

Dots mark heads that park: over half of their weight is on the first token, whatever it is. Low entropy is
then no sign of a sharp eye ([03](03_any_transformer.ipynb) says more). Try the repetition, and look for heads that find
what came next the last time; or the code, where a head of layer 11 always looks one token back.
"""


def microscope_page() -> nbformat.NotebookNode:
    """The inspector on the readings of data/smollm2_readings.json."""
    shown = nbformat.v4.new_output("display_data", data={"text/html": microscope().html()})
    code = nbformat.v4.new_code_cell(outputs=[shown], metadata={"jupyter": {"source_hidden": True}})
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(MICROSCOPE), code])


def main(folder: Path) -> None:
    notebooks = {path: nbformat.read(path, as_version=4) for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}
    titles = {path: re.search(r"^# (.*)", book.cells[0].source)[1] for path, book in notebooks.items()}
    series = [("Overview", "index.html"), *((title, f"{path.stem}.html") for path, title in titles.items())]
    series.append(("The microscope", "microscope.html"))
    readme = NOTEBOOKS.parent / "README.md"
    first = next(iter(notebooks.values()))
    pages = {"index": ("entropy_lib and its notebooks", readme, start_page(readme.read_text(encoding="utf-8"), first))}
    pages |= {path.stem: (titles[path], path, notebook) for path, notebook in notebooks.items()}
    pages["microscope"] = ("The microscope", readme, microscope_page())
    folder.mkdir(parents=True, exist_ok=True)
    exporter = Pages()
    for name, (title, path, notebook) in pages.items():
        resources = {"metadata": {"name": title, "path": str(path.parent)}, "series": series}
        page, _ = exporter.from_notebook_node(prepared(notebook), resources)
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    print(f"{len(pages)} pages in {folder}: open {folder / 'index.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python notebooks/to_html.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
