"""One page about one or several runs: curves, metrics with all that identifies them, samples, memorisation, settings.

    python -m evaluations.report exps/vanilla exps/sra2 --out report.html
    python -m evaluations.report exps/sra2 --nearest data/imagenet/train --out report.html

The page is one file, needs no network, and reads without scripts.
"""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from common import cli
from common.cli import UserError
from common.files import write_file
from evaluations import report_curves, report_images, report_metrics
from evaluations.extractors import EXTRACTOR_NAMES
from evaluations.image_batches import Images, NpzFile
from evaluations.nearest import MemorisationCheck, check_memorisation
from evaluations.report_metrics import Measured, differing, flat
from evaluations.report_page import Html, absent, el, page, shown, swatch, table
from evaluations.runs import Run, named, read_run

COLOURS = 8  # that can be told apart


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m evaluations.report", "RUN [RUN ...]")

    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="folders of runs (exps/NAME)")
    add("--out", type=Path, default=Path("report.html"), help="page to write")
    add(
        "--metrics",
        type=Path,
        nargs="+",
        default=[],
        action="extend",
        help="further files of evaluations.evaluate",
    )
    add(
        "--sample-dir",
        type=Path,
        default=Path("samples"),
        help="where metrics of samples of these runs are looked for",
    )

    add = parser.add_argument_group("memorisation").add_argument
    add(
        "--nearest",
        type=Path,
        metavar="IMAGES",
        help="the training images, to show those nearest to samples: "
        "a folder tree class/image.ext, a zip, or .npz",
    )
    add(
        "--features",
        choices=EXTRACTOR_NAMES,
        help="what is near (default: fashion for 32x32 images, else inception)",
    )
    add("--inception-weights", type=Path, help="file (default: torch hub's folder)")
    add("--batch-size", type=cli.positive_int, default=64, help="images a forward pass")
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where features are taken",
    )

    return parser.parse_args(argv)


def summary(run: Run) -> str:
    """A run in one line: model, method, how far it is."""
    args, config = run.args, run.config
    model = args.get("model") or config.get("model_name") or "unknown model"
    if not args:
        method = "args.json is missing"
    else:
        given = (
            args.get(key) or [] for key in ("align", "align_depth", "align_loss", "align_weight")
        )
        names, *how = (value if isinstance(value, list) else [value] for value in given)
        told = [
            f"{name}: block {block}, {loss}, weight {weight:g}"
            for name, block, loss, weight in zip(names, *how)
        ]
        method = "; ".join(told) or "no alignment"
    step, images = run.steps[-1]["step"], run.images
    if config.get("step", 0) > step:  # its newest checkpoint is of later than its last line
        step, images = config["step"], config["step"] * config["batch_size"]
    return f"{model} · {method} · {step:,} steps · {images:,} images seen"


def heading(runs: list[Run], sections: dict[str, str]) -> Html:
    """The runs compared, the date, where to find what."""
    told = [el("span", el("b", run.name), el("span", summary(run), class_="soft")) for run in runs]
    items = [el("li", swatch(k), lines) for k, lines in enumerate(told)]
    links = [el("a", title, href=f"#{name}") for name, title in sections.items()]
    now = datetime.now()
    date = el(
        "p", el("time", f"{now:%d %B %Y, %H:%M}", datetime=f"{now:%Y-%m-%dT%H:%M}"), class_="soft"
    )
    return el(
        "header", el("h1", title_of(runs)), date, el("ul", *items, class_="runs"), el("nav", *links)
    )


def title_of(runs: list[Run]) -> str:
    """The names, the first three of many."""
    more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    return ", ".join(run.name for run in runs[:3]) + more


def side_by_side(runs: list[Run], values: list[dict[str, Any]], what: str) -> list[Html]:
    """Settings that differ on top and marked, those that agree folded."""
    fields = differing(values)
    keys = list(dict.fromkeys(key for each in values for key in each))
    head = [what, *(el("th", swatch(k), " ", run.name, scope="col") for k, run in enumerate(runs))]

    rows = [
        [
            el("th", key, scope="row"),
            *(el("td", shown(each.get(key)), class_="differs") for each in values),
        ]
        for key in fields
    ]
    same = [key for key in keys if key not in fields]
    parts = [el("h3", what)]
    if fields:
        parts.append(table(head, rows, "settings"))
    elif len(runs) > 1:
        parts.append(el("p", "They agree in all of them.", class_="soft"))
    if same:
        agreeing = [
            [el("th", key, scope="row"), el("td", shown(values[0].get(key)))] for key in same
        ]
        summary = el("summary", f"{len(same)} " + ("that agree" if len(runs) > 1 else "settings"))
        parts.append(el("details", summary, table([what, "value"], agreeing, "settings")))
    return parts


def settings(runs: list[Run]) -> Html:
    """args.json of each run, then config.json of its newest checkpoint."""
    parts: list[Html] = []
    for run in runs:
        if not run.args:
            parts.append(
                absent(f"{run.folder / 'args.json'} is missing: train.py writes it when it starts.")
            )
        if not run.config:
            parts.append(
                absent(
                    f"{run.name} has no checkpoint yet: train.py --checkpointing-steps N saves them."
                )
            )
    if any(run.args for run in runs):
        parts += side_by_side(
            runs, [{k: v for k, v in run.args.items() if k != "exp_name"} for run in runs], "flags"
        )
    if any(run.config for run in runs):
        parts += side_by_side(runs, [flat(run.config) for run in runs], "network and data")
    return el("div", *parts)


def newest_samples(runs: list[Run], rows: list[Measured]) -> dict[str, Images]:
    """Of each run the measured .npz of its latest checkpoint that is still there. Raises UserError."""
    found: dict[str, Images] = {}
    for run in runs:
        there = [row for row in rows if row.run is run and row.samples and row.samples.exists()]
        if there:
            latest = max(there, key=lambda row: (row.images, row.content.get("count") or 0))
            found[run.name] = NpzFile(latest.samples, "samples").open_images()
    return found


def build(
    runs: list[Run], rows: list[Measured], checks: dict[str, MemorisationCheck] | None
) -> str:
    """The whole page."""
    sections = {
        "curves": ("Curves", lambda: report_curves.section(runs)),
        "metrics": ("Metrics", lambda: report_metrics.section(rows)),
        "samples": (
            "Samples",
            lambda: el(
                "div",
                report_images.over_time(runs),
                el("h3", "Measured samples"),
                report_images.grids(rows),
            ),
        ),
        "nearest": ("Nearest training images", lambda: report_images.nearest(runs, checks)),
        "settings": ("Settings", lambda: settings(runs)),
    }
    parts = [heading(runs, {name: title for name, (title, _) in sections.items()})]
    parts += [
        el("section", el("h2", title), make(), id=name) for name, (title, make) in sections.items()
    ]
    return page(f"{title_of(runs)} · report", el("main", *parts))


def main() -> None:
    args = parse_args()
    torch.backends.cudnn.allow_tf32 = False  # as in evaluations.evaluate
    if args.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {args.out} must end in .html")
    folders = named(args.runs)
    if len(folders) > COLOURS:
        raise UserError(
            f"{len(folders)} runs are too many: a page tells at most {COLOURS} apart, name fewer"
        )
    if args.nearest and not args.nearest.exists():
        raise UserError(f"--nearest {args.nearest} does not exist")
    runs = [read_run(name, folder) for name, folder in folders.items()]
    rows = report_metrics.collect(runs, args.metrics, args.sample_dir)
    checks = None
    if args.nearest:
        samples = newest_samples(runs, rows)
        checks = check_memorisation(
            samples,
            args.nearest,
            args.features,
            args.inception_weights,
            args.batch_size,
            args.device,
        )
    write_file(args.out, build(runs, rows, checks).encode())
    print(f"report: {args.out}")


if __name__ == "__main__":
    cli.run(main)
