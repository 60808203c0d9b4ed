"""Draw and save figures with matplotlib, which is an optional package."""

import io
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from common import cli
from common.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def load_pyplot() -> ModuleType:
    """Import matplotlib.pyplot with a backend that needs no display.

    Raises:
        UserError: If matplotlib is not installed.
    """
    cli.require_package("matplotlib", "the figure")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def add_grid(axes: "Axes", direction: Literal["both", "x", "y"] = "both") -> None:
    """Draw a light grid, and hide the upper and right edges of a plot."""
    axes.grid(True, axis=direction, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save_png(figure: "Figure", path: Path) -> None:
    """Write a pyplot figure to a PNG file atomically, and close the figure."""
    import matplotlib.pyplot as plt

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    write_file(path, png.getvalue())
