"""Draw the figure of experiments.features.

The figure has one row per checkpoint, with colour maps of the tokens on the left, and the accuracy
of linear probes and CKNNA per block on the right.

Shapes: m images of height H and width W, latents of height h and width w, s tokens per side.
"""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.plotting import add_grid, load_pyplot, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TILE_SIZE = 64  # pixels
TILE_GAP = 6  # pixels
MAX_COLUMNS = 2  # maximum number of sheets per row
TILE_INCHES = 0.4
CHARACTERS_PER_INCH = 14.5  # in the caption
CAPTION = (
    "Block columns: the first three principal components of the tokens after the block, as red, "
    "green and blue. They are fitted to all tokens of a block and t, so that similar colours mean "
    "similar tokens. The images and latents show $x_t$."
)

# The maps of one checkpoint in rows and columns. The first row contains the data, and each of the
# other rows contains x_t for one t. The columns are the decoded images (m, H, W, 3) in uint8, the
# latents (m, h, w, 3), and, in the rows of x_t, the blocks (m, s, s, 3). Colours are in [0, 1].
ColourMaps = list[list[np.ndarray]]


def resize_to_tile(image: np.ndarray) -> np.ndarray:
    """Resize a square image (a, a, 3) in uint8 or [0, 1] to (TILE_SIZE, TILE_SIZE, 3) in [0, 1].

    Small images are enlarged by nearest-neighbour interpolation, so that each token is a square.
    Large images are reduced by averaging.
    """
    if image.dtype == np.uint8:
        image = image / 255
    factor = max(1, len(image) // TILE_SIZE)
    side = len(image) // factor
    cropped = image[: side * factor, : side * factor]
    reduced = cropped.reshape(side, factor, side, factor, 3).mean((1, 3))
    nearest = np.arange(TILE_SIZE) * side // TILE_SIZE
    return reduced[nearest][:, nearest]


def make_sheet(maps: ColourMaps, index: int) -> np.ndarray:
    """Arrange the maps of one image in rows and columns on a white canvas, called a sheet."""
    step = TILE_SIZE + TILE_GAP
    canvas = np.ones((step * len(maps), step * max(map(len, maps)), 3))
    for i, row in enumerate(maps):
        for k, images in enumerate(row):
            tile = canvas[i * step :, k * step :][:TILE_SIZE, :TILE_SIZE]
            tile[:] = resize_to_tile(images[index])
    return canvas[:-TILE_GAP, :-TILE_GAP]


def draw_figure(result: dict, maps: list[ColourMaps], classes: list[str], path: Path) -> None:
    """Draw the figure and write it to a PNG file.

    Args:
        result: The content of the JSON file.
        maps: The maps of each checkpoint of the result.
        classes: The class names of the images in the maps.
        path: The PNG file to write.
    """
    plt = load_pyplot()
    checkpoints = result["checkpoints"]
    titles = {"accuracy": "held-out accuracy of linear probes (95% interval)"}
    if result["cknna"]:
        network = result["cknna"]["features"]
        titles["cknna"] = f"CKNNA with {network} features, k = {result['cknna']['k']}"

    # Compute the sizes in inches.
    num_columns = min(MAX_COLUMNS, len(classes))
    num_rows = -(-len(classes) // num_columns)
    max_blocks = max(len(checkpoint["blocks"]) for checkpoint in checkpoints)
    maps_width = max(4.5, TILE_INCHES * num_columns * (3.6 + max_blocks))
    charts_width = 4.3 * len(titles)
    caption = textwrap.wrap(CAPTION, int(CHARACTERS_PER_INCH * maps_width))
    sheet_height = TILE_INCHES * 1.05 * (1 + len(result["times"])) + 0.2
    row_height = max(4.4, num_rows * sheet_height + 0.7 + 0.15 * len(caption))

    size = (maps_width + charts_width, row_height * len(checkpoints))
    figure = plt.figure(figsize=size, layout="constrained")
    rows = figure.subfigures(len(checkpoints), 1, squeeze=False)[:, 0]
    for row, checkpoint, checkpoint_maps in zip(rows, checkpoints, maps):
        row.suptitle(format_title(checkpoint), x=0.008, ha="left", fontsize=12, fontweight="bold")
        left, right = row.subfigures(1, 2, width_ratios=(maps_width, charts_width))

        grid = left.subplots(num_rows, num_columns, squeeze=False).flat
        for index, name in enumerate(classes):
            sheet = make_sheet(checkpoint_maps, index)
            draw_sheet(grid[index], sheet, name, checkpoint["blocks"], result["times"])
        for axes in grid[len(classes) :]:
            axes.set_axis_off()

        charts = right.subplots(1, len(titles), squeeze=False)[0]
        for axes, (metric, title) in zip(charts, titles.items()):
            draw_chart(axes, result, checkpoint, metric)
            axes.set_title(title, fontsize=10)
        left.suptitle("\n".join(caption), fontsize=9)
        legend = charts[-1].get_legend_handles_labels()
        right.legend(*legend, loc="outside lower center", ncols=9, frameon=False, fontsize=9)
    save_png(figure, path)


def format_title(checkpoint: dict) -> str:
    """Return the title of the row of a checkpoint."""
    details = [checkpoint["model"]]
    if checkpoint["step"] is not None:
        details.append(f"step {checkpoint['step']:,}")
    details.append(f"{checkpoint['path_type']} path")
    return f"{checkpoint['name']} ({', '.join(details)})"


def draw_sheet(
    axes: "Axes", sheet: np.ndarray, name: str, blocks: list[int], times: list[float]
) -> None:
    """Draw the maps of one image, its class, and the labels of the rows and columns."""
    columns = ["image", "latent", f"block {blocks[0]}", *map(str, blocks[1:])]
    rows = [f"t = {t:g}" for t in (0, *times)]
    centres = np.arange((TILE_SIZE - 1) / 2, max(sheet.shape), TILE_SIZE + TILE_GAP)
    axes.imshow(sheet, interpolation="nearest")
    axes.set_xticks(centres[: len(columns)], columns, fontsize=8)
    axes.set_yticks(centres[: len(rows)], rows, fontsize=8)
    axes.tick_params(length=0, pad=2, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.text(centres[2] - TILE_SIZE / 2, centres[0], name, va="center", fontsize=9)


def draw_chart(axes: "Axes", result: dict, checkpoint: dict, metric: str) -> None:
    """Draw a metric per block, with one line per t.

    The lines start at a marker for the flattened x_t. Horizontal lines show the metric of the
    latents and, for the accuracy, the chance level.
    """
    times = result["times"]
    blocks = checkpoint["blocks"]
    last_block = max(other["blocks"][-1] for other in result["checkpoints"])
    x_of_input = min(0, 1 - 0.08 * last_block)
    shades = load_pyplot().get_cmap("viridis")(np.linspace(0, 0.88, len(times)))
    diamond: dict[str, Any] = {"marker": "D", "markersize": 5, "markerfacecolor": "none"}
    inputs = [row for row in result["baselines"] if row.get("path_type") == checkpoint["path_type"]]
    for t, shade in zip(times, shades):
        start, *values = select_values([*inputs, *checkpoint["results"]], t, metric)
        axes.plot(blocks, values, color=shade, marker="o", markersize=4, label=f"t = {t:g}")
        axes.plot([x_of_input], [start], color=shade, **diamond)
        link = {"color": shade, "linewidth": 0.7, "linestyle": ":"}
        axes.plot([x_of_input, blocks[0]], [start, values[0]], **link)
        if metric == "accuracy":
            low, high = (select_values(checkpoint["results"], t, end) for end in ("low", "high"))
            axes.fill_between(blocks, low, high, color=shade, alpha=0.15, linewidth=0)
    axes.plot([], [], color="0.4", linestyle="", label="flattened $x_t$", **diamond)

    levels = {row["space"]: row[metric] for row in result["baselines"] if "t" not in row}
    if metric == "accuracy":
        levels["chance"] = result["chance"]
    for (name, level), linestyle in zip(levels.items(), (":", "--", "-")):
        if level is not None:
            draw_level(axes, name, level, linestyle)

    results = [row for other in result["checkpoints"] for row in other["results"]]
    known_values = [
        row[metric] for row in (*result["baselines"], *results) if row[metric] is not None
    ]
    axes.set_ylim(min([0.0, *known_values]), 1.08 * max([0.01, *known_values]))
    axes.set_xlim(x_of_input - 0.04 * last_block, last_block * 1.04)
    axes.set_xticks([x_of_input, *blocks], ["$x_t$", *blocks])
    axes.set_xlabel("after block", fontsize=9)
    add_grid(axes)


def draw_level(axes: "Axes", name: str, level: float, linestyle: str) -> None:
    """Draw a labelled horizontal line."""
    axes.axhline(level, color="0.45", linestyle=linestyle, linewidth=1)
    axes.annotate(
        name,
        (1, level),
        (-2, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color="0.2",
    )


def select_values(rows: list[dict], t: float, metric: str) -> np.ndarray:
    """Return a metric of the rows for time t, with NaN for missing values."""
    return np.array([row[metric] for row in rows if row["t"] == t], float)
