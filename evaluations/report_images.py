"""Pictures of samples: as training went on, as they were measured, and beside the training images nearest to them."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from evaluations.nearest import MemorisationCheck, NearestMatch
from evaluations.report_metrics import Measured
from evaluations.report_page import Html, absent, el, picture, picture_file
from evaluations.runs import Run

MOST_PREVIEWS = 8  # of a run
PREVIEW_WIDTH, GRID_WIDTH, TILE = 560, 860, 96  # pixels that a picture is cut down to


def previews(run: Run) -> list[tuple[int, Path]]:
    """Step and path of a run's previews of its first average: the first, the last, and some between."""
    found = [
        (int(path.stem), path)
        for path in (run.folder / "samples").glob("*.png")
        if re.fullmatch(r"\d+", path.stem)
    ]
    found.sort()
    return (
        [
            found[i]
            for i in np.unique(np.linspace(0, len(found) - 1, MOST_PREVIEWS).round().astype(int))
        ]
        if found
        else []
    )


def over_time(runs: list[Run]) -> Html:
    """Each run's previews, oldest first; every one has the same noise and classes."""
    parts = []
    for run in runs:
        parts.append(el("h3", run.name))
        figures = []
        for step, path in previews(run):
            images = run.args.get("batch_size")
            caption = f"step {step:,}" + (f" · {step * images:,} images" if images else "")
            figures.append(
                el(
                    "figure",
                    el("figcaption", caption),
                    picture_file(path, f"{run.name}: {caption}", PREVIEW_WIDTH),
                )
            )
        none = absent("No previews: train.py --sampling-steps N draws them.")
        parts.append(el("div", *figures, class_="previews") if figures else none)
    return el("div", *parts)


def grids(rows: list[Measured]) -> Html:
    """The grid that sample_ddp.py drew beside each set of measured samples."""
    figures = []
    for row in rows:
        path = (
            row.samples.with_suffix(".png")
            if row.samples
            else row.file.with_name(f"{row.stem}.png")
        )  # samples not kept
        if path.exists():
            name = f"{row.run.name}: {path.stem}" if row.run else path.stem
            figures.append(
                el(
                    "figure",
                    el("figcaption", name),
                    picture_file(path, f"samples of {name}", GRID_WIDTH),
                )
            )
    if not figures:
        return absent(
            "No grids beside measured samples: sample_ddp.py draws NAME.png with NAME.npz."
        )
    return el("div", *figures, class_="grids")


def _tile(pixels: np.ndarray, alt: str) -> Html:
    return picture(Image.fromarray(np.ascontiguousarray(pixels)), alt, TILE)


def _match(match: NearestMatch, limit: float) -> Html:
    cells = [
        el(
            "div",
            _tile(match.image, f"sample {match.sample_index}"),
            f"sample {match.sample_index}",
        )
    ]
    for number, distance, image in match.neighbours:
        told = el("span", f"{distance:#.3g}", class_="close" if distance < limit else None)
        cells.append(
            el("div", _tile(image, f"training image {number}, at distance {distance:.3g}"), told)
        )
    return el("div", *cells, class_="match")


def nearest(runs: list[Run], checks: dict[str, MemorisationCheck] | None) -> Html:
    """The memorisation check of each run; None where it was not asked for."""
    if checks is None:
        return absent(
            "Not looked for: --nearest IMAGES, the training images, shows those nearest to samples."
        )
    parts = []
    for run in runs:
        parts.append(el("h3", run.name))
        found = checks.get(run.name)
        if found is None:
            parts.append(
                absent(
                    "No samples of this run: sample_ddp.py, then python -m evaluations.evaluate, make them known."
                )
            )
            continue
        told = (
            f" of {found.num_samples:,} samples lie closer to a training image than {found.first_percentile:.3g}, which is the first "
            f"percentile of how far {found.num_probes:,} of the {found.num_train_images:,} training images lie from the nearest other one; "
            f"the median of that is {found.median_distance:.3g}. A model that does not copy stays near 1% or below."
        )
        parts.append(el("p", el("b", f"{found.close_fraction:.1%}"), told))
        for title, matches in (
            ("The closest of all", found.closest),
            ("Evenly over the samples", found.evenly_spaced),
        ):
            parts.append(el("p", title, class_="soft"))
            parts.append(
                el(
                    "div",
                    *(_match(match, found.first_percentile) for match in matches),
                    class_="matches",
                )
            )
    return el("div", *parts)
