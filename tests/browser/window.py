"""One explorer in the page: its controls by keyboard and mouse, its figure's data as the browser holds them."""

from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "browser"
MARKS = {"runs": "play", "playground": "learning_rate", "inspector": "text"}  # a control that only this explorer has


class Window:
    def __init__(self, page, name: str):
        self.page = page
        self.root = page.locator(f".entropy-explorer:has(.entropy-{MARKS[name]})")
        self.figure = self.root.locator(".js-plotly-plot")
        self.root.scroll_into_view_if_needed()

    def traces(self) -> list[dict]:
        return self.figure.evaluate("figure => lab.traces(figure)")

    def layout(self, path: str):
        return self.figure.evaluate("(figure, path) => path.split('.').reduce((o, k) => o[k], figure.layout)", path)

    def status(self) -> str:
        return self.root.locator(".entropy-status").inner_text()

    def settle(self, quiet: int = 300):
        self.figure.evaluate("(figure, quiet) => lab.settled(figure, quiet)", quiet)

    def control(self, name: str):
        """What takes the keyboard: the handle of a slider, a list, a check box."""
        return self.root.locator(f".entropy-{name}").locator(".noUi-handle, select, input[type=checkbox], textarea")

    def readout(self, name: str) -> float:
        return float(self.root.locator(f".entropy-{name} .widget-readout").inner_text())

    def press(self, name: str, key: str, times: int = 1):
        self.control(name).focus()
        for _ in range(times):
            self.page.keyboard.press(key)
        self.settle()

    def choose(self, name: str, label: str):
        """An item of a list, by arrow keys from its top."""
        select = self.control(name)
        labels = self._texts(select.locator("option"))
        select.focus()
        self.page.keyboard.press("Home")
        for _ in range(labels.index(label)):
            self.page.keyboard.press("ArrowDown")
        self.settle()
        assert self._texts(select.locator("option:checked")) == [label]

    @staticmethod
    def _texts(items) -> list[str]:
        return [text.replace("\u00a0", " ") for text in items.all_text_contents()]  # ipywidgets writes such blanks

    def drag(self, name: str, share: float):
        """Move a slider's handle with the mouse, to a share of the track."""
        slider = self.root.locator(f".entropy-{name}")
        handle, track = (slider.locator(f".noUi-{part}").bounding_box() for part in ("handle", "base"))
        y = handle["y"] + handle["height"] / 2
        self.page.mouse.move(handle["x"] + handle["width"] / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(track["x"] + share * track["width"], y, steps=8)
        self.page.mouse.up()
        self.settle()
