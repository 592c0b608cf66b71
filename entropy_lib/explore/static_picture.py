"""The picture of a figure, for readers without a kernel, wherever kaleido finds Chrome or Chromium."""

from __future__ import annotations

import io
import logging
import warnings

WIDTH, HEIGHT = 800, 420  # px; wider than a cell of JupyterLab on a small screen, a picture would be cut off
COLOR_ERROR = 8  # of 255: a palette that is further off somewhere would show in a heat map
_browser: dict[str, bool] = {}  # "found": whether pictures can be made, known after the first attempt


def png(figure) -> bytes | None:
    """A plotly figure as PNG, `WIDTH` px wide and as high as it says, else `HEIGHT`; None where there is no browser."""
    if not _browser.get("found", True):
        return None
    logger = logging.getLogger("choreographer")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # logs a trace for what it then ignores
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # kaleido's running server says that it has its options already
            picture = with_palette(figure.to_image("png", width=WIDTH, height=figure.layout.height or HEIGHT))
            if not _browser:
                import kaleido

                kaleido.start_sync_server(silence_warnings=True)  # one browser for all further pictures
                _browser["found"] = True
    except Exception:
        # no kaleido, Pillow or browser, an old version: each raises something else, and none is an error here
        _browser["found"] = False
        return None
    finally:
        logger.setLevel(level)
    return picture


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
