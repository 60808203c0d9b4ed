"""The picture of experiments.features: a row a checkpoint, maps of the tokens left, accuracy and CKNNA over blocks right.

m images shown, H W pixels, h w latent side, s tokens a side.
"""

import io
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import write_file

TILE, GAP = 64, 6  # pixels
COLUMNS = 2  # of images shown
INCH = 0.4  # a tile's side
LETTERS = 14.5  # of the caption to an inch
CAPTION = (
    "right of the latent: the tokens after each block, their first three principal components as red, green, blue (of all "
    "tokens of one block and t, so that like colours are like tokens); image and latent are those of $x_t$"
)


class Maps(NamedTuple):
    """What is shown of one checkpoint. Colours are in [0, 1]."""

    images: np.ndarray  # (m, H, W, 3) uint8, decoded
    latents: np.ndarray  # (m, h, w, 3)
    noised: dict[float, np.ndarray]  # t: (m, H, W, 3) uint8, x_t decoded
    x_t: dict[float, np.ndarray]  # t: (m, h, w, 3)
    blocks: dict[tuple[float, int], np.ndarray]  # t and block: (m, s, s, 3)


def tile(picture: np.ndarray) -> np.ndarray:
    """(a, a, 3), uint8 or in [0, 1] -> (TILE, TILE, 3) in [0, 1]: enlarged to the nearest, so that a token is a square, and
    made smaller by averages.
    """
    picture = picture / 255 if picture.dtype == np.uint8 else picture
    factor = max(1, len(picture) // TILE)
    side = len(picture) // factor
    cut = (
        picture[: side * factor, : side * factor]
        .reshape(side, factor, side, factor, 3)
        .mean((1, 3))
    )
    nearest = np.arange(TILE) * side // TILE
    return cut[nearest][:, nearest]


def sheet(shown: Maps, i: int) -> np.ndarray:
    """Image i: a row for the data, then one for each t; columns decoded, latents, blocks. White where there is nothing."""
    times, blocks = list(shown.x_t), sorted({k for _, k in shown.blocks})
    step = TILE + GAP
    canvas = np.ones((step * (1 + len(times)) - GAP, step * (2 + len(blocks)) - GAP, 3))

    def place(row: int, column: int, picture: np.ndarray) -> None:
        canvas[row * step :, column * step :][:TILE, :TILE] = tile(picture)

    place(0, 0, shown.images[i])
    place(0, 1, shown.latents[i])
    for r, t in enumerate(times, 1):
        place(r, 0, shown.noised[t][i])
        place(r, 1, shown.x_t[t][i])
        for c, k in enumerate(blocks, 2):
            place(r, c, shown.blocks[t, k][i])
    return canvas


def draw(figures: dict, pictures: list[Maps], classes: list[str], out: Path) -> None:
    """`figures` is what features.json holds; `pictures` are of its checkpoints, of images of `classes`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {"accuracy": "linear-probe accuracy, held out (95% interval)"}
    if figures["cknna"]:
        kinds["cknna"] = (
            f"CKNNA with {figures['cknna']['features']} features, k = {figures['cknna']['k']}"
        )
    m, checkpoints = len(classes), figures["checkpoints"]
    columns = min(COLUMNS, m)
    rows = -(-m // columns)
    most = max(len(checkpoint["blocks"]) for checkpoint in checkpoints)
    left = max(4.5, INCH * columns * (3.6 + most))
    caption = textwrap.wrap(CAPTION, int(LETTERS * left))
    high = max(
        4.4, rows * (INCH * 1.05 * (1 + len(figures["times"])) + 0.2) + 0.7 + 0.15 * len(caption)
    )
    right = 4.3 * len(kinds)
    figure = plt.figure(figsize=(left + right, high * len(checkpoints)), layout="constrained")
    lines = figure.subfigures(len(checkpoints), 1, squeeze=False)[:, 0]
    for line, checkpoint, shown in zip(lines, checkpoints, pictures):
        line.suptitle(title(checkpoint), x=0.008, ha="left", fontsize=12, fontweight="bold")
        maps, charts = line.subfigures(1, 2, width_ratios=(left, right))
        for i, axis in enumerate(maps.subplots(rows, columns, squeeze=False).flat):
            axis.set_axis_off()
            if i < m:
                show(axis, sheet(shown, i), classes[i], checkpoint["blocks"], figures["times"])
        for axis, (kind, label) in zip(
            charts.subplots(1, len(kinds), squeeze=False)[0], kinds.items()
        ):
            chart(axis, figures, checkpoint, kind)
            axis.set_title(label, fontsize=10)
        maps.suptitle("\n".join(caption), fontsize=9)
        charts.legend(
            *axis.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=9,
            frameon=False,
            fontsize=9,
        )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    write_file(out, png.getvalue())


def title(checkpoint: dict) -> str:
    step = "" if checkpoint["step"] is None else f", step {checkpoint['step']:,}"
    return f"{checkpoint['name']} ({checkpoint['model']}{step}, {checkpoint['path_type']} path)"


def show(axis, canvas: np.ndarray, name: str, blocks: list[int], times: list[float]) -> None:
    axis.set_axis_on()
    axis.imshow(canvas, interpolation="nearest")
    centre = (TILE - 1) / 2 + (TILE + GAP) * np.arange(max(len(blocks) + 2, len(times) + 1))
    axis.set_xticks(
        centre[: len(blocks) + 2],
        ["image", "latent", *(f"block {k}" if k == blocks[0] else str(k) for k in blocks)],
        fontsize=8,
    )
    axis.set_yticks(centre[: len(times) + 1], ["t = 0", *(f"t = {t:g}" for t in times)], fontsize=8)
    axis.tick_params(length=0, pad=2, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.text(centre[2] - TILE / 2, centre[0], name, va="center", fontsize=9)


def chart(axis, figures: dict, checkpoint: dict, kind: str) -> None:
    """A line for each t over the blocks, begun by x_t itself, flattened; the latent, and for accuracy chance, across."""
    import matplotlib.pyplot as plt

    times, blocks = figures["times"], checkpoint["blocks"]
    last = max(part["blocks"][-1] for part in figures["checkpoints"])
    begin = min(0, 1 - 0.08 * last)  # where x_t stands
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.88, len(times)))
    raw = {
        row["t"]: row
        for row in figures["baselines"]
        if row.get("path_type") == checkpoint["path_type"]
    }
    for t, shade in zip(times, shades):
        rows = [row for row in checkpoint["results"] if row["t"] == t]
        axis.plot(
            blocks, values(rows, kind), color=shade, marker="o", markersize=4, label=f"t = {t:g}"
        )
        axis.plot(
            [begin],
            values([raw[t]], kind),
            color=shade,
            marker="D",
            markersize=5,
            markerfacecolor="none",
        )
        axis.plot(
            [begin, blocks[0]],
            values([raw[t], rows[0]], kind),
            color=shade,
            linewidth=0.7,
            linestyle=":",
        )
        if kind == "accuracy":
            axis.fill_between(
                blocks,
                values(rows, "low"),
                values(rows, "high"),
                color=shade,
                alpha=0.15,
                linewidth=0,
            )
    axis.plot(
        [],
        [],
        "D",
        color="0.4",
        markersize=5,
        markerfacecolor="none",
        label="$x_t$ itself, flattened",
    )
    across = {row["space"]: row[kind] for row in figures["baselines"] if "t" not in row}
    if kind == "accuracy":
        across["chance"] = figures["chance"]
    for (name, value), style in zip(across.items(), (":", "--", "-")):
        if value is not None:
            axis.axhline(value, color="0.45", linestyle=style, linewidth=1)
            axis.annotate(
                name,
                (1, value),
                (-2, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8,
                color="0.2",
            )
    rows = [
        *figures["baselines"],
        *(row for part in figures["checkpoints"] for row in part["results"]),
    ]
    known = [row[kind] for row in rows if row[kind] is not None]
    axis.set_ylim(min([0.0, *known]), 1.08 * max([0.01, *known]))
    axis.set_xlim(begin - 0.04 * last, last * 1.04)
    axis.set_xticks([begin, *blocks], ["$x_t$", *map(str, blocks)])
    axis.set_xlabel("after block", fontsize=9)
    axis.grid(True, alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def values(rows: list[dict], kind: str) -> list[float]:
    return [np.nan if row[kind] is None else row[kind] for row in rows]
