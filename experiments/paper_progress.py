"""Compute the progress of the paper's runs and rows, and the remaining GPU-hours."""

import shlex
from functools import cache
from pathlib import Path
from statistics import fmean, median

from benchmarks.run_steps import plan_run
from benchmarks.variants import make_synthetic_manifest
from common.cli import UserError
from evaluations.runs import JsonObject, read_log
from experiments.cells import Cell, open_cache
from experiments.paper_plan import PaperPlan, PlannedRun, make_checkpoint_path
from experiments.paper_tables import Row
from experiments.results import round_float
from experiments.tasks import make_portable
from training.throughput import training_flops

NUM_RATES = 20  # log lines from which the speed of a run is measured


def measure_progress(plan: PaperPlan, row: Row, is_guided: bool) -> float:
    """Return the finished fraction of a row. Training counts 90%, and the evaluation 10%."""
    parts = []
    steps = plan.scale_steps(row.steps)
    for seed in plan.seeds:
        for run in row.runs:
            evaluation = plan.find_evaluation(run, row, seed, is_guided)
            if evaluation.metrics_path.exists():
                parts.append(1.0)
            else:
                parts.append(0.9 * min(1.0, count_steps(evaluation.run) / steps))
    return round(fmean(parts), 4)


def count_steps(run: PlannedRun) -> int:
    """Return the number of steps that a run has logged or saved."""
    saved = [step for step in run.steps if make_checkpoint_path(run.folder, step).exists()]
    logged = [row["step"] for row in read_run_log(run)[0][-1:]]
    return max([0, *saved, *logged])


def read_run_log(run: PlannedRun) -> tuple[list[JsonObject], list[JsonObject]]:
    """Return the training lines and the evaluation lines of a log, or [], [] without a log."""
    try:
        return read_log(run.folder)
    except UserError:
        return [], []


def summarize_runs(plan: PaperPlan, gpus: int) -> list[JsonObject]:
    """Return the progress of each run, and the remaining GPU-hours of its training.

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
    rates = [row["images_per_s"] for row in read_run_log(run)[0][-NUM_RATES:]]
    return median(rates) if rates else None


def estimate_rate(
    plan: PaperPlan, run: PlannedRun, measured: dict[PlannedRun, float]
) -> tuple[float | None, str]:
    """Estimate the images per second of a run from the FLOP/s of other runs, and name the runs."""
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
