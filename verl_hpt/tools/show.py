"""Tables for a terminal and pictures for a file: what every command prints or draws goes through here."""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections.abc import Sequence
from contextlib import contextmanager

from verl_hpt.errors import UserError

# Okabe and Ito's colours, told apart with every kind of colour vision, and four line styles beside them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
RC = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}


def table(rows: Sequence[Sequence[str]], widths: Sequence[int] | None = None) -> str:
    """Rows of cells as text, the first of them underlined.

    widths: terminal columns of each cell, in which it wraps; by default columns are as wide as their widest cell.
    """
    lines = rows
    if widths is None:
        widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    else:
        wrapped = ([_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows)
        lines = [line for cells in wrapped for line in itertools.zip_longest(*cells, fillvalue="")]
    head, *body = lines
    shown = [head, ["─" * width for width in widths], *body]
    return "\n".join(
        "  ".join(cell + " " * (width - _columns(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in shown
    )


def _wrapped(cell: str, width: int) -> list[str]:
    return textwrap.wrap(cell, width, break_on_hyphens=False) or [""]


def _columns(cell: str) -> int:
    """Columns of a terminal: combining marks (the bar of H̄) take none."""
    return sum(not unicodedata.combining(char) for char in cell)


def look(i: int) -> dict[str, str]:
    """Colour and line style of the i-th of many curves; the first 28 all differ."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}


@contextmanager
def picture(path: str, option: str, rows: int, columns: int, size: tuple[float, float], dpi: int = 130):
    """A figure and its grid of axes, (rows, columns), to draw on; saved afterwards. The file's ending is its format.

    option: the command's option that chose the file, for the error. size: inches, width and height.

    Raises:
        UserError: the file cannot be written, or matplotlib does not know its ending.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(RC):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            yield figure, axes
            try:
                figure.savefig(path, dpi=dpi)
            except ValueError as error:
                raise UserError(f"{option} {path}: {error}") from error
            except OSError as error:
                raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from error
        finally:
            plt.close(figure)
