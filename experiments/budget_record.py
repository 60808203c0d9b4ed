"""Plan a convergence study with a time budget, and continue it in later calls.

OUTPUT_DIR/budget.json contains the length and the seeds of the runs. The first call chooses both.
Later calls keep the length, complete the seeds, and add as many seeds as fit into their time.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.measure import describe_machine
from common.cli import UserError
from common.files import write_file
from evaluations.runs import read_json
from experiments.budget import (
    Costs,
    add_seeds,
    choose_ema_decay,
    choose_jobs,
    choose_steps,
    compute_available,
    count_runs,
    describe_choice,
)
from experiments.budget_measurement import measure_costs
from experiments.study_plan import SCALES, StudyPlan
from experiments.study_probe import probe_run
from experiments.tasks import make_portable
from latents.cache import LatentCache

FILE_NAME = "budget.json"


def describe_request(plan: StudyPlan) -> dict:
    """Return the settings that must stay the same between calls."""
    return {
        "scale": plan.scale,
        "model": plan.model,
        "evaluations": plan.evaluations,
        "max_train_steps": plan.steps,
        "train_flags": make_portable(plan.train_flags),
    }


def set_length(plan: StudyPlan, steps: int) -> StudyPlan:
    """Return the study with a number of steps, the EMA decay for it and the scale's flags."""
    decay = choose_ema_decay(steps, plan.evaluations)
    flags = (*SCALES[plan.scale].budget_flags, "--ema-decay", str(decay), *plan.train_flags)
    return replace(plan, steps=steps, train_flags=flags)


def read_plan(request: StudyPlan) -> StudyPlan | None:
    """Return the study that an earlier call has chosen, or None.

    Raises:
        UserError: If the earlier call had other settings.
    """
    path = request.output_dir / FILE_NAME
    record = read_json(path)
    if not record:
        return None
    if not {"request", "steps", "seeds"} <= {*record}:
        raise UserError(
            f"{path} is damaged: the request, the steps or the seeds are missing; restore it, or "
            "choose another --output-dir"
        )
    current = describe_request(request)
    changes = [
        f"{key} was {value} and is now {current.get(key)}"
        for key, value in record["request"].items()
        if current.get(key) != value
    ]
    if changes:
        raise UserError(
            f"{path} was written with other settings ({'; '.join(changes)}); choose another "
            "--output-dir, or restore the flags"
        )
    return set_length(replace(request, seeds=tuple(record["seeds"])), record["steps"])


def require_plan(request: StudyPlan) -> StudyPlan:
    """Return the study that an earlier call has chosen.

    Raises:
        UserError: If there is none.
    """
    plan = read_plan(request)
    if plan is None:
        raise UserError(
            f"{request.output_dir / FILE_NAME} does not exist; rerun without --print and --gather"
        )
    return plan


def find_finished_runs(folder: Path) -> set[str]:
    """Return the names of the finished runs in the output directory of a study."""
    records = {path.stem: read_json(path) for path in folder.glob("*-seed*.json")}
    return {name for name, record in records.items() if record.get("finished")}


def read_costs(path: Path, plan: StudyPlan, machine: str, jobs: int) -> Costs | None:
    """Return the costs that an earlier call has measured, or None.

    The number of simultaneous runs and the machine must be the same, and the methods included.
    """
    record = read_json(path)
    if not record or record["machine"] != machine:
        return None
    costs = Costs(**record["costs"])
    if costs.jobs != jobs or not {*plan.methods} <= {*costs.step_s}:
        return None
    return costs


def plan_within_budget(
    request: StudyPlan,
    blocks: dict[str, int],
    minutes: float,
    max_jobs: int,
    measure_elapsed: Callable[[], float],
) -> tuple[StudyPlan, int]:
    """Choose the runs of this call, write OUTPUT_DIR/budget.json and print the choice.

    Args:
        request: The study with its first seeds. Its steps are the maximum.
        blocks: The aligned blocks.
        minutes: The time of this call.
        max_jobs: Maximum number of simultaneous runs.
        measure_elapsed: Returns the seconds since the start of this call.

    Returns:
        The study, and the number of simultaneous runs.

    Raises:
        UserError: If the runs do not fit into the time.
    """
    path = request.output_dir / FILE_NAME
    earlier = read_plan(request)
    jobs = choose_jobs(max_jobs, count_runs(request))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device)["device"]
    costs = read_costs(path, request, machine, jobs)
    if costs is None:
        cache = LatentCache(request.train_cache)
        costs = measure_costs(
            set_length(request, request.steps),
            blocks,
            jobs,
            60 * minutes / 4,
            lambda run: probe_run(run, cache),
        )

    available = compute_available(minutes, measure_elapsed())
    finished = find_finished_runs(request.output_dir)
    if earlier:
        plan = add_seeds(earlier, costs, available, finished)
    else:
        finished = set()
        plan = choose_steps(request, costs, available)
        plan = set_length(add_seeds(plan, costs, available), plan.steps)
    choice = describe_choice(plan, costs, available, finished)
    record = {
        "request": describe_request(request),
        "steps": plan.steps,
        "seeds": plan.seeds,
        "machine": machine,
        "costs": asdict(costs),
        "calls": [
            *read_json(path).get("calls", []),
            {"minutes": minutes, "seeds": plan.seeds, "choice": choice.splitlines()},
        ],
    }
    write_file(path, json.dumps(record, indent=1).encode())
    print(choice)
    return plan, costs.jobs
