"""Collect what exists of the paper's tables: values, comparability, progress and GPU-hours."""

import math
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.cost import count_costs
from benchmarks.run_steps import plan_run
from benchmarks.variants import StepConfig, make_plan, make_synthetic_manifest
from common.cli import UserError
from evaluations.runs import JsonObject, read_json, read_log
from experiments.cells import Cell, open_cache
from experiments.paper_plan import Evaluation, PaperPlan, PlannedRun
from experiments.paper_tables import (
    BATCH_SIZE,
    COST_MODEL,
    COST_ROWS,
    DEFAULT_GUIDANCE,
    DEFAULT_GUIDANCE_SOURCE,
    EMA_DECAY,
    FID,
    NUM_SAMPLES,
    NUM_STEPS,
    PAPER_GUIDANCE,
    REFERENCE_SHA256,
    SD_VAES,
    SOLVER,
    SOURCE,
    Row,
    Table,
    TrainingRun,
)
from experiments.results import compute_t_interval, round_float
from experiments.speedup import count_images_needed
from experiments.tasks import make_portable
from training.throughput import training_flops

NUM_RATES = 20  # log lines from which the speed of a run is measured


def gather_tables(plan: PaperPlan, gpus: int, fid_levels: list[float]) -> JsonObject:
    """Return the entries of the result, from the files that exist.

    Args:
        plan: The plan of the tables.
        gpus: Number of GPUs of a training run, to convert hours to GPU-hours.
        fid_levels: FIDs for which the number of epochs is computed.
    """
    runs = summarize_runs(plan, gpus)
    tables = []
    for table in plan.tables:
        rows = gather_cost_rows(plan) if table.number == 5 else list(gather_rows(plan, table))
        tables.append({"number": table.number, "title": table.title, "rows": rows})
    hours = [run["remaining_gpu_hours"] for run in runs]
    return {
        "scale": plan.scale,
        "is_evidence": not plan.is_demo,
        "source": SOURCE,
        "seeds": list(plan.seeds),
        "metrics": plan.settings.metrics,
        "guidance": {
            "paper": list(PAPER_GUIDANCE),
            "used": list(plan.guidance),
            "source": DEFAULT_GUIDANCE_SOURCE if plan.guidance == DEFAULT_GUIDANCE else "flags",
        },
        "tables": tables,
        "epochs_to_fid": gather_epochs(plan, fid_levels),
        "gpus_per_run": gpus,
        "remaining_gpu_hours": None if None in hours else math.fsum(hours),
        "progress": runs,
    }


def gather_rows(plan: PaperPlan, table: Table) -> Iterator[JsonObject]:
    """Yield one entry per metric of each row of a table."""
    for row in table.rows:
        results = collect_results(plan, row, table.is_guided)
        for metric, paper in row.numbers.items():
            key = plan.settings.metrics[metric]
            entry: JsonObject = {
                "label": row.label,
                "steps": row.steps,
                "metric": metric,
                "paper": paper,
                "source": f"{SOURCE}, Table {table.number}",
                "note": row.note,
                "run": row.run.name if row.run else None,
            }
            if row.run:
                entry["measured_metric"] = key
                entry |= measure_row(results, key)
                entry["deviations"] = list_deviations(plan, table, row, metric, results)
                ours = entry["ours"] if key == metric else None
                entry["difference"] = subtract(ours, paper)
                entry["seeds_done"] = len(results)
                entry["progress"] = measure_progress(plan, row, table.is_guided)
            yield entry


def subtract(ours: float | None, paper: float | None) -> float | None:
    """Return the difference from the paper's value, or None if a value is missing."""
    return None if ours is None or paper is None else ours - paper


Results = dict[int, list[JsonObject]]  # contents of metrics.json by seed, one per run of a row


def collect_results(plan: PaperPlan, row: Row, is_guided: bool) -> Results:
    """Return the results of the seeds for which all checkpoints of the row are evaluated."""
    if row.run is None:
        return {}
    results = {}
    for seed in plan.seeds:
        contents = [
            read_metrics(find_evaluation(plan, run, row, seed, is_guided)) for run in row.runs
        ]
        if all(contents):
            results[seed] = contents
    return results


def find_evaluation(
    plan: PaperPlan, run: TrainingRun, row: Row, seed: int, is_guided: bool
) -> Evaluation:
    """Return the evaluation of a run at the checkpoint of a row."""
    return plan.evaluations[run.name, seed, plan.scale_steps(row.steps), is_guided]


def read_metrics(evaluation: Evaluation) -> JsonObject:
    """Return the content of the metrics.json of an evaluation, or {} if it does not exist."""
    return read_json(evaluation.metrics_path)


def measure_row(results: Results, key: str | None) -> JsonObject:
    """Return the mean of a metric over seeds and its interval.

    With several seeds, the interval is the t interval of the mean over seeds. A single run has no
    such interval; the interval of its metrics.json over images is returned if there is one.
    """
    values = []
    intervals = []
    for contents in results.values():
        numbers = [content["metrics"].get(key) for content in contents]
        if all(number is not None for number in numbers):
            # A row with `minus` reports the difference between two runs.
            values.append(numbers[0] - sum(numbers[1:]))
            # A difference of runs has no interval over images.
            interval = contents[0].get("intervals", {}).get(key) if len(contents) == 1 else None
            intervals.append(interval)
    if not values:
        return {"ours": None, "interval": None, "interval_over": None, "values": []}
    measured: JsonObject = {"ours": fmean(values), "values": values}
    if len(values) > 1:
        estimate = compute_t_interval(values)
        return measured | {"interval": [estimate.low, estimate.high], "interval_over": "seeds"}
    (interval,) = intervals
    return measured | {"interval": interval, "interval_over": "images" if interval else None}


def list_deviations(
    plan: PaperPlan, table: Table, row: Row, metric: str, results: Results
) -> list[str]:
    """Return the settings in which our values differ from the paper's protocol.

    Without results, the list is empty, because nothing has been measured.
    """
    key = plan.settings.metrics[metric]
    if results and key is None:
        return [f"{metric} is not measured at this scale"]
    deviations: dict[str, None] = {}  # an ordered set
    for contents in results.values():
        for run, content in zip(row.runs, contents):
            deviations |= dict.fromkeys(compare_with_protocol(content, table, run, row))
    if not results:
        return []
    if key != metric:
        deviations[f"{key} instead of {metric}"] = None
    if plan.train_flags:
        deviations[f"flags of train.py: {' '.join(plan.train_flags)}"] = None
    return [*deviations]


def compare_with_protocol(
    content: JsonObject, table: Table, run: TrainingRun, row: Row
) -> Iterator[str]:
    """Yield the deviations of a metrics.json from the protocol of the paper."""
    sampling = content.get("sampling") or {}

    def differs(setting: str, value: Any, expected: Any) -> Iterator[str]:
        if value != expected:
            yield f"{setting} {format_setting(value)} instead of {format_setting(expected)}"

    # Training.
    yield from differs("model", sampling.get("model"), run.model)
    yield from differs("steps", sampling.get("step"), row.steps)
    yield from differs("images seen", sampling.get("images_seen"), row.steps * BATCH_SIZE)
    yield from differs("EMA decay", sampling.get("ema_decay"), EMA_DECAY)

    # Sampling.
    yield from differs("solver", sampling.get("solver"), SOLVER)
    yield from differs("sampling steps", sampling.get("num_steps"), NUM_STEPS)
    yield from differs("samples", content.get("count"), NUM_SAMPLES)
    yield from differs("labels", sampling.get("labels"), "random")
    if table.is_guided:
        guidance = [sampling.get(f) for f in ("cfg_scale", "guidance_low", "guidance_high")]
        if None in PAPER_GUIDANCE:
            scale, low, high = map(format_setting, guidance)
            yield (
                f"guidance scale and interval of the paper not known (here {scale} from {low} to "
                f"{high})"
            )
        else:
            yield from differs("guidance", guidance, list(PAPER_GUIDANCE))
    else:
        yield from differs("guidance scale", sampling.get("cfg_scale"), 1.0)
    if sampling.get("vae") not in SD_VAES:
        yield f"VAE {format_path(sampling.get('vae'))} instead of an SD-VAE"

    # Evaluation.
    if "inception" not in content.get("features", {}):
        yield f"features {' '.join(content.get('features', {}))} instead of inception"
    if content.get("reference_sha256") != REFERENCE_SHA256:
        yield f"reference {format_path(content.get('reference'))} instead of ADM's"


def format_setting(value: Any) -> str:
    """Format the value of a setting, with separators of thousands."""
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_path(value: str | None) -> str:
    """Return the last two parts of a path, which do not depend on the machine."""
    return "/".join(value.split("/")[-2:]) if value else "unknown"


def measure_progress(plan: PaperPlan, row: Row, is_guided: bool) -> float:
    """Return the finished fraction of a row. Training counts 90%, and the evaluation 10%."""
    parts = []
    steps = plan.scale_steps(row.steps)
    for seed in plan.seeds:
        for run in row.runs:
            evaluation = find_evaluation(plan, run, row, seed, is_guided)
            if evaluation.metrics_path.exists():
                parts.append(1.0)
            else:
                parts.append(0.9 * min(1.0, count_steps(evaluation.run) / steps))
    return round(fmean(parts), 4)


def count_steps(run: PlannedRun) -> int:
    """Return the number of steps that a run has logged or saved."""
    saved = [step for step in run.steps if (run.folder / f"checkpoints/{step:07d}").exists()]
    logged = [row["step"] for row in read_training_rows(run)]
    return max([0, *saved, *logged[-1:]])


def read_training_rows(run: PlannedRun) -> list[JsonObject]:
    """Return the training lines of the log of a run, or [] if there are none."""
    try:
        return read_log(run.folder)[0]
    except UserError:
        return []


def summarize_runs(plan: PaperPlan, gpus: int) -> list[JsonObject]:
    """Return the progress of each run, and the GPU-hours that its training still needs.

    The hours follow from the measured images per second of the run. The speed of a run that has not
    logged any is estimated from the FLOP/s of the runs with the same model, or of all runs.
    """
    rates = {planned: measure_rate(planned) for planned in plan.runs}
    measured = {planned: rate for planned, rate in rates.items() if rate}
    runs: list[JsonObject] = []
    for planned in plan.runs:
        steps_done = count_steps(planned)
        images = max(0, planned.steps[-1] - steps_done) * plan.settings.batch_size
        rate, origin = rates[planned], "log"
        if images and not rate:
            rate, origin = estimate_rate(plan, planned, measured)
        hours = 0.0 if not images else None
        if images and rate:
            hours = images / rate / 3600 * gpus
        runs.append(
            {
                "run": planned.run.name,
                "seed": planned.cell.seed,
                "model": planned.run.model,
                "command": shlex.join(make_portable(["python", *planned.train.command])),
                "steps_done": steps_done,
                "steps": planned.steps[-1],
                "images_per_s": round_float(rate) if rate else None,
                "rate_from": origin,
                "remaining_gpu_hours": round_float(hours),
            }
        )
    return runs


def measure_rate(run: PlannedRun) -> float | None:
    """Return the images per second in the last lines of a run's log, or None without lines."""
    rates = [row["images_per_s"] for row in read_training_rows(run)[-NUM_RATES:]]
    return median(rates) if rates else None


def estimate_rate(
    plan: PaperPlan, run: PlannedRun, measured: dict[PlannedRun, float]
) -> tuple[float | None, str]:
    """Return the images per second of a run from the FLOP/s of other runs, and the kind of runs."""
    same_model = [other for other in measured if other.run.model == run.run.model]
    others = same_model or [*measured]
    if not others:
        return None, "no run"
    speed = median(measured[other] * count_flops(plan, other) for other in others)
    return speed / count_flops(plan, run), "the same model" if same_model else "other models"


def count_flops(plan: PaperPlan, run: PlannedRun) -> int:
    """Return the FLOPs of the training step of a run per image."""
    return _count_flops(run.cell, plan.data_dir, 8 if plan.is_demo else 32)


@cache
def _count_flops(cell: Cell, data_dir: Path, latent_size: int) -> int:
    try:
        manifest = open_cache(data_dir).manifest
    except UserError:  # the cache is on another machine, or does not exist yet
        manifest = make_synthetic_manifest(latent_size)
    planned = plan_run(cell.parse_settings(), manifest)
    return training_flops(planned.network, planned.align, planned.cache)


def gather_cost_rows(plan: PaperPlan) -> list[JsonObject]:
    """Return the rows of Table 5. Counts are exact; the speed is that of benchmarks.cost."""
    counts = count_costs(make_plan(StepConfig(model=COST_MODEL), ["sra2"]))
    measured = read_json(plan.cost_path)
    ours: dict[str, float | None] = {
        "head_parameters": counts["parameters"]["heads"] / 1e6,
        "external_parameters": counts["parameters"]["external"] / 1e6,
        "more_forward_flops": counts["more_forward_flops"],
    }
    deviations = []
    if measured:
        steps = {name: entry["step_s"]["median"] for name, entry in measured["results"].items()}
        ours["relative_speed"] = steps["none"] / steps["sra2"]
        if measured["model"] != COST_MODEL:
            deviations.append(f"model {measured['model']} instead of {COST_MODEL}")
        if measured["batch_size"] != BATCH_SIZE:
            deviations.append(f"batch size {measured['batch_size']} instead of {BATCH_SIZE}")
        deviations.append(f"{measured['machine']['device']} instead of an H100")
    rows = []
    for row in COST_ROWS:
        row_deviations = deviations if row.quantity == "relative_speed" else []
        value = ours.get(row.quantity)
        rows.append(
            {
                "label": row.label,
                "quantity": row.quantity,
                "paper": row.paper,
                "source": f"{SOURCE}, Table 5",
                "format": row.spec,
                "note": row.note,
                "ours": value,
                "difference": None if row_deviations else subtract(value, row.paper),
                "deviations": row_deviations,
            }
        )
    return rows


def gather_epochs(plan: PaperPlan, levels: list[float]) -> list[JsonObject]:
    """Return the epochs at which the curve of each run first reaches given FIDs (EP_FID@k).

    A curve consists of the evaluated checkpoints without guidance, and of evaluations during
    training with the same metric and number of samples. Seeds are averaged at the points that all
    of them have. Between points, log(FID) is interpolated linearly in log(epochs). The bounds
    [low, high] are equal if the crossing is inside the curve; high is None if the FID is never
    reached.
    """
    key = plan.settings.metrics[FID] or FID
    epoch = plan.settings.images_per_epoch
    entries = []
    for run in dict.fromkeys(planned.run for planned in plan.runs):
        curves = [read_curve(plan, planned, key) for planned in plan.runs if planned.run == run]
        curves = [curve for curve in curves if curve]
        points = sorted(set.intersection(*map(set, curves))) if curves else []
        if not points:
            continue
        means = [fmean(curve[images] for curve in curves) for images in points]
        bounds = {}
        for level in levels:
            low, high = count_images_needed(np.array(points), np.array(means), np.array(level))
            ends = [float(low) / epoch, float(high) / epoch]
            bounds[f"{level:g}"] = [ends[0], None if math.isinf(ends[1]) else ends[1]]
        entries.append(
            {
                "run": run.name,
                "metric": key,
                "epochs": [images / epoch for images in points],
                "values": means,
                "reached": bounds,
            }
        )
    return entries


def read_curve(plan: PaperPlan, run: PlannedRun, key: str) -> dict[int, float]:
    """Return the unguided values of a metric of one run, by the number of images seen."""
    curve = {}
    count = None
    for evaluation in plan.evaluations.values():
        content = read_metrics(evaluation) if evaluation.run is run else {}
        images_seen = (content.get("sampling") or {}).get("images_seen")
        if images_seen and not evaluation.is_guided and content["metrics"].get(key) is not None:
            count = content["count"]
            curve[images_seen] = content["metrics"][key]
    try:
        logged = read_log(run.folder)[1]
    except UserError:
        logged = []
    for row in logged:
        evaluation_settings = row["evaluation"]
        is_same = count in (None, evaluation_settings.get("samples"))
        if is_same and evaluation_settings.get("cfg_scale") == 1 and row.get(key) is not None:
            curve.setdefault(row["images"], row[key])
    return curve
