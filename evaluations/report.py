"""Write a one-page report on runs: curves, metrics, samples, memorization check and settings.

    python -m evaluations.report exps/vanilla exps/sra2 --out report.html
    python -m evaluations.report exps/sra2 --nearest data/imagenet/train --out report.html

The page is a single file that works without network access and without JavaScript.
"""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from common import cli
from common.cli import UserError
from common.files import write_file
from evaluations import plots, report_images
from evaluations.extractors import EXTRACTOR_NAMES, add_network_flags
from evaluations.image_batches import Images, NpzImages
from evaluations.metrics_files import (
    Comparison,
    MetricsFile,
    compare_settings,
    find_best,
    find_metrics_files,
    flatten,
    format_value,
    has_unknown_sampling,
    select_identity,
)
from evaluations.nearest import MemorizationCheck, check_memorization
from evaluations.runs import JsonObject, Run, label_columns, name_folders, read_run

TEMPLATES = Path(__file__).with_name("templates")
MAX_RUNS = len(plots.RUN_COLOURS)
MIN_HASH_LENGTH = 32  # minimum number of hexadecimal digits of a hash
# Quantities in the table of last values, in the order of the columns.
LAST_QUANTITIES = (
    "denoising",
    "align",
    "cosine",
    "grad_norm",
    "images_per_s",
    "mfu",
    "matmul_share",
    "peak_memory_gib",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = cli.Parser(__doc__, "python -m evaluations.report", "RUN [RUN ...]")

    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="folders of runs (exps/NAME)")
    add("--out", type=Path, default=Path("report.html"), help="HTML file to write")
    add(
        "--metrics",
        type=Path,
        nargs="+",
        default=[],
        action="extend",
        help="additional metrics files written by evaluations.evaluate",
    )
    add(
        "--sample-dir",
        type=Path,
        default=Path("samples"),
        help="folder to search for metrics of samples of these runs",
    )

    group = parser.add_argument_group("memorization")
    add = group.add_argument
    add(
        "--nearest",
        type=Path,
        metavar="IMAGES",
        help="training images to search for the nearest neighbours of samples: "
        "a folder tree class/image.ext, a zip, or .npz",
    )
    add(
        "--features",
        choices=EXTRACTOR_NAMES,
        help="network whose features define the distance "
        "(default: fashion for 32x32 images, else inception)",
    )
    add_network_flags(group)
    cli.add_device_flag(add, "device that computes features")

    return parser.parse_args(argv)


def main() -> None:
    """Run the command."""
    args = parse_args()
    cli.require_package("jinja2", "evaluations.report")
    cli.require_package("matplotlib", "evaluations.report")
    if args.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {args.out} must end in .html")
    folders = name_folders(args.runs)
    if len(folders) > MAX_RUNS:
        raise UserError(
            f"a report shows at most {MAX_RUNS} runs, but {len(folders)} were passed: remove some"
        )
    if args.nearest and not args.nearest.exists():
        raise UserError(f"--nearest {args.nearest} does not exist")
    runs = [read_run(name, folder) for name, folder in folders.items()]
    files = find_metrics_files(runs, args.metrics, args.sample_dir)
    checks = None
    if args.nearest:
        checks = check_memorization(
            open_newest_samples(runs, files),
            args.nearest,
            args.features,
            args.inception_weights,
            args.batch_size,
            args.device,
        )
    write_file(args.out, render_page(runs, files, checks).encode())
    print(f"report: {args.out}")


def open_newest_samples(runs: list[Run], files: list[MetricsFile]) -> dict[str, Images]:
    """Open the evaluated samples of each run's newest checkpoint, if they still exist.

    Raises:
        UserError: A file is not a valid .npz of images.
    """
    samples: dict[str, Images] = {}
    for run in runs:
        existing = [
            (file.images, file.content.get("count") or 0, file.samples)
            for file in files
            if file.run is run and file.samples and file.samples.exists()
        ]
        if existing:
            *_, path = max(existing, key=lambda entry: entry[:2])
            samples[run.name] = NpzImages(path, "samples")
    return samples


def render_page(
    runs: list[Run], files: list[MetricsFile], checks: dict[str, MemorizationCheck] | None
) -> str:
    """Render the page as HTML.

    Args:
        runs: Runs to compare.
        files: Metrics files of these runs and of other samples to compare the runs with.
        checks: Results of the memorization check by the name of the run. None if the check was not
            requested.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "field": lambda key: key.removeprefix("sampling."),
        "flatten_setting": plots.flatten_setting,
        "previews": report_images.load_previews,
        "rounded": format_metric,
        "summary": summarize_run,
        "svg": plots.render_svg,
        "text": format_value,
        "thousands": "{:,}".format,
        "tile": lambda pixels: report_images.embed(pixels, report_images.TILE_WIDTH),
    }
    environment.tests["hash"] = is_hash
    title = ", ".join(run.name for run in runs[:3])
    if len(runs) > 3:
        title += f" and {len(runs) - 3} more"
    return environment.get_template("report.html.j2").render(
        title=title,
        date=f"{datetime.now():%d %B %Y, %H:%M}",
        runs=runs,
        files=files,
        checks=checks,
        grids=report_images.load_sample_grids(files),
        settings=compare_runs(runs),
        **describe_curves(runs),
        **describe_metrics(files),
    )


def summarize_run(run: Run) -> str:
    """Return a one-line summary of a run: model, alignment methods and progress."""
    model = run.args.get("model") or run.config.get("model_name") or "unknown model"
    step = run.steps[-1]["step"]
    images = run.images
    if run.config.get("step", 0) > step:  # the checkpoint is newer than the log
        step = run.config["step"]
        images = step * run.config["batch_size"]
    return f"{model} · {summarize_alignment(run.args)} · {step:,} steps · {images:,} images seen"


def summarize_alignment(args: JsonObject) -> str:
    """Return the alignment methods of a run with their blocks, losses and weights."""
    if not args:
        return "args.json is missing"
    columns = []
    for key in ("align", "align_depth", "align_loss", "align_weight"):
        value = args.get(key) or []
        columns.append(value if isinstance(value, list) else [value])
    methods = [
        f"{name}: block {block}, {loss}, weight {weight:g}"
        for name, block, loss, weight in zip(*columns)
    ]
    return "; ".join(methods) or "no alignment"


def describe_curves(runs: list[Run]) -> dict[str, Any]:
    """Return the template variables for the section "Curves"."""
    settings = plots.collect_settings(runs)
    comparison = compare_settings(settings)
    line_styles = {}
    for index, setting in enumerate(settings):
        label = ", ".join(f"{key} {format_value(setting.get(key))}" for key in comparison.differing)
        line_styles[label] = plots.DASHES[plots.select_line_style(index)]

    last_values = []
    for run in runs:
        skipped = sum(row.get("skipped") or 0 for row in run.steps)
        last_values.append(run.steps[-1] | {"skipped": skipped})
    last_columns = ["step", "images", "skipped"]
    for quantity in LAST_QUANTITIES:
        names = dict.fromkeys(name for run in runs for name in label_columns(run, quantity))
        last_columns += [
            name for name in names if any(row.get(name) is not None for row in last_values)
        ]
    return {
        "training": [panel for panel in plots.make_training_panels(runs) if panel.series],
        "smoothing_min_points": plots.SMOOTHING_MIN_POINTS,
        "last_values": last_values,
        "last_columns": last_columns,
        "evaluations": plots.make_evaluation_panels(runs),
        "evaluation_settings": comparison,
        "line_styles": line_styles,
    }


def describe_metrics(files: list[MetricsFile]) -> dict[str, Any]:
    """Return the template variables for the section "Metrics"."""
    identities = [select_identity(file.content) for file in files]
    names = list(dict.fromkeys(name for file in files for name in file.content["metrics"]))
    warnings: dict[str, list[str]] = {}
    distances_by_count = []
    for file in files:
        messages = [format_value(file.content["warning"])] if file.content.get("warning") else []
        if not file.sampling:
            messages.append("generated by other code, with unknown settings")
        for message in messages:
            warnings.setdefault(message, []).append(f"{file.name} ({file.stem})")
        for name, distances in (file.content.get("by_count") or {}).items():
            distances_by_count.append((file, name, distances))
    counts = {count for *_, distances in distances_by_count for count in distances}
    return {
        "identities": identities,
        "metrics_comparison": compare_settings(identities),
        "has_unknown_sampling": any(map(has_unknown_sampling, identities)),
        "metric_names": names,
        "best": {name: find_best(files, name) for name in names},
        "warnings": warnings,
        "distances_by_count": distances_by_count,
        "sample_counts": {count: f"first {int(count):,}" for count in sorted(counts, key=int)},
    }


def compare_runs(runs: list[Run]) -> list[tuple[str, list[JsonObject], Comparison]]:
    """Compare the flags and the configurations of runs.

    Returns:
        One entry for the flags and one for the configurations: title, settings per run, and
        comparison of the settings.
    """
    flags = [{key: value for key, value in run.args.items() if key != "exp_name"} for run in runs]
    configs = [flatten(run.config) for run in runs]
    return [
        (title, settings, compare_settings(settings))
        for title, settings in (("Flags", flags), ("Network and data", configs))
        if any(settings)
    ]


def is_hash(text: str) -> bool:
    """Return whether the text of a setting is the hash of a file."""
    return len(text) >= MIN_HASH_LENGTH and set(text) <= set("0123456789abcdef")


def format_metric(value: float) -> str:
    """Format a metric with three decimals, or with one decimal if it is 100 or more."""
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"


if __name__ == "__main__":
    cli.run(main)
