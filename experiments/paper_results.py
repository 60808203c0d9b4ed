"""Collect our values for the paper's tables, and compare them with the paper's values."""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.cost import count_costs
from benchmarks.variants import StepConfig, make_plan
from common.cli import UserError
from evaluations.runs import JsonObject, read_json
from experiments.paper_plan import PaperPlan, PlannedRun
from experiments.paper_progress import measure_progress, read_run_log, summarize_runs
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
from experiments.results import compute_t_interval
from experiments.speedup import count_images_needed


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
        evaluations = [plan.find_evaluation(run, row, seed, is_guided) for run in row.runs]
        contents = [read_json(evaluation.metrics_path) for evaluation in evaluations]
        if all(contents):
            results[seed] = contents
    return results


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
    if not results:
        return []
    key = plan.settings.metrics[metric]
    if key is None:
        return [f"{metric} is not measured at this scale"]
    deviations: dict[str, None] = {}  # an ordered set
    for contents in results.values():
        for run, content in zip(row.runs, contents):
            deviations |= dict.fromkeys(compare_with_protocol(content, table, run, row))
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
        scale, low, high = map(format_setting, guidance)
        yield (
            f"guidance scale and interval of the paper not known (here {scale} from {low} to "
            f"{high})"
        )
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
        ours["relative_speed"] = compute_relative_speed(plan.cost_path, measured)
        if measured["model"] != COST_MODEL:
            deviations.append(f"model {measured['model']} instead of {COST_MODEL}")
        if measured["batch_size"] != BATCH_SIZE:
            deviations.append(f"batch size {measured['batch_size']} instead of {BATCH_SIZE}")
        device = measured["machine"]["device"]
        if "H100" not in device:
            deviations.append(f"{device} instead of an H100")
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


def compute_relative_speed(path: Path, measured: JsonObject) -> float:
    """Return the speed of SRA 2 relative to SiT from a result of benchmarks.cost.

    Raises:
        UserError: If the result contains no timings of both, or does not state how they were made.
    """
    results = measured.get("results", {})
    has_timings = all("step_s" in results.get(name, {}) for name in ("none", "sra2"))
    if not has_timings or not {"model", "batch_size", "machine"} <= {*measured}:
        raise UserError(
            f"{path} is not a complete result of benchmarks.cost; delete the file, and rerun with "
            "--run"
        )
    return results["none"]["step_s"]["median"] / results["sra2"]["step_s"]["median"]


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
        if evaluation.run is not run or evaluation.is_guided:
            continue
        content = read_json(evaluation.metrics_path)
        images_seen = (content.get("sampling") or {}).get("images_seen")
        if images_seen and content["metrics"].get(key) is not None:
            count = content["count"]
            curve[images_seen] = content["metrics"][key]
    _, logged = read_run_log(run)
    for row in logged:
        settings = row["evaluation"]
        is_same = count in (None, settings.get("samples")) and settings.get("cfg_scale") == 1
        if is_same and row.get(key) is not None:
            curve.setdefault(row["images"], row[key])
    return curve
