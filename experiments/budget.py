"""Choose the length and the seeds of a convergence study for a time budget.

A run takes start + steps * seconds per step + evaluations * seconds per evaluation + end. The runs
are assigned to free slots in order, as by the scheduler. The probes follow one after the other. A
share of the time is kept in reserve.
"""

import heapq
import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from common.cli import UserError
from experiments.study_plan import StudyPlan

RESERVE = 0.1  # share of the time that is kept in reserve
REPORT_SECONDS = 15.0  # time for the tables and the figure
MIN_SEEDS = 5
MAX_SEEDS = 80
MIN_STEPS = 100  # steps per run, unless --max-train-steps is smaller
# Horizons of the EMA, 1 / (1 - decay) steps, between two evaluations. At the first evaluation, the
# share of the initial weights in the EMA is then less than exp(-5) = 0.7%.
HORIZONS_PER_EVALUATION = 5


@dataclass(frozen=True)
class Costs:
    """The measured seconds of the parts of a run, with `jobs` simultaneous runs.

    Attributes:
        jobs: Number of simultaneous runs.
        images_per_s: Images per second of all simultaneous runs together.
        step_s: Seconds per step, by method.
        start_s: Seconds from the start of the process to the first step, with stored graphs.
        evaluation_s: Seconds per evaluation.
        end_s: Seconds from the last step to the end of the process.
        probe_s: Seconds per probe. Probes are executed one after the other.
    """

    jobs: int
    images_per_s: float
    step_s: dict[str, float]
    start_s: float
    evaluation_s: float
    end_s: float
    probe_s: float

    def compute_run_seconds(self, method: str, plan: StudyPlan) -> float:
        """Return the seconds of a run of a method."""
        fixed = self.start_s + plan.evaluations * self.evaluation_s + self.end_s
        return fixed + plan.steps * self.step_s.get(method, max(self.step_s.values()))


def choose_jobs(jobs: int, num_runs: int) -> int:
    """Return the smallest number of slots that needs as few rounds of runs as `jobs` slots."""
    return math.ceil(num_runs / math.ceil(num_runs / jobs))


def choose_ema_decay(steps: int, evaluations: int) -> float:
    """Return the EMA decay whose horizon is a fifth of the steps between two evaluations."""
    horizon = math.ceil(steps / evaluations) / HORIZONS_PER_EVALUATION
    return math.floor(1e4 * max(0.0, 1 - 1 / horizon)) / 1e4


def count_runs(plan: StudyPlan) -> int:
    """Return the number of runs of a study, including those that precede others."""
    return len(plan.seeds) * len(plan.methods) + len(plan.make_first_stage_cells({}))


def estimate_seconds(plan: StudyPlan, costs: Costs, finished: Collection[str] = ()) -> float:
    """Return the seconds of the unfinished runs and their probes.

    Args:
        plan: The study.
        costs: The measured costs.
        finished: Names of the finished runs.
    """
    first_end = 0.0
    runs: list[tuple[float, float]] = []  # seconds, earliest start
    for cell in plan.make_first_stage_cells({}):
        if cell.run_name not in finished:
            first_end = costs.compute_run_seconds("sra2-cosine", plan)
            runs.append((first_end, 0.0))
    num_first_runs = len(runs)
    for cell in plan.make_study_cells({}):
        if cell.run_name not in finished:
            earliest = first_end if plan.find_inputs(cell) else 0.0
            runs.append((costs.compute_run_seconds(cell.name, plan), earliest))
    num_probes = len(runs) - num_first_runs
    return compute_end(runs, costs.jobs) + num_probes * costs.probe_s


def compute_end(runs: list[tuple[float, float]], jobs: int) -> float:
    """Return the time at which all runs have ended.

    Each free slot takes the first run that may start.

    Args:
        runs: Seconds and earliest start of each run.
        jobs: Number of slots.
    """
    slots = [0.0] * jobs  # times at which the slots become free
    pending = list(runs)
    while pending:
        now = heapq.heappop(slots)
        now = max(now, min(earliest for _, earliest in pending))
        run = next(run for run in pending if run[1] <= now)
        pending.remove(run)
        heapq.heappush(slots, now + run[0])
    return max(slots)


def compute_available(minutes: float, elapsed: float) -> float:
    """Return the seconds for runs and probes.

    Args:
        minutes: The time budget.
        elapsed: Seconds that have passed since the start of the command.
    """
    return 60 * minutes * (1 - RESERVE) - elapsed - REPORT_SECONDS


def choose_steps(plan: StudyPlan, costs: Costs, available: float) -> StudyPlan:
    """Return the study with the largest number of steps for which all runs fit into the time.

    Args:
        plan: The study with its first `MIN_SEEDS` seeds. Its steps are the maximum.
        costs: The measured costs.
        available: Seconds for the runs and the probes.

    Returns:
        The plan with a number of steps that is a multiple of the number of evaluations.

    Raises:
        UserError: If runs of `MIN_STEPS` do not fit.
    """

    def estimate(num_intervals: int) -> float:
        return estimate_seconds(replace(plan, steps=num_intervals * plan.evaluations), costs)

    largest = max(1, plan.steps // plan.evaluations)
    smallest = min(largest, math.ceil(MIN_STEPS / plan.evaluations))
    if estimate(smallest) > available:
        raise UserError(format_budget_error(plan, costs, smallest * plan.evaluations, available))
    # Bisection: `smallest` fits, and all numbers above `largest` are too large.
    while smallest < largest:
        middle = (smallest + largest + 1) // 2
        if estimate(middle) <= available:
            smallest = middle
        else:
            largest = middle - 1
    return replace(plan, steps=smallest * plan.evaluations)


def format_budget_error(plan: StudyPlan, costs: Costs, steps: int, available: float) -> str:
    """Return the error message for a study that does not fit into the time, with the remedies."""
    needed = estimate_seconds(replace(plan, steps=steps), costs)
    fitting = len(plan.methods) - 1
    while fitting and (
        estimate_seconds(replace(plan, steps=steps, methods=plan.methods[:fitting]), costs)
        > available
    ):
        fitting -= 1
    remedy = f"raise --minutes by {count_minutes(needed - available)}"
    if fitting > 1:
        remedy += f", or pass {fitting} --methods, such as {' '.join(plan.methods[:fitting])}"
    return (
        f"--minutes: {len(plan.seeds)} seeds of {len(plan.methods)} methods with {steps} steps "
        f"take about {needed:.0f} s, and {max(0.0, available):.0f} s are left; {remedy}"
    )


def count_minutes(seconds: float) -> int:
    """Return the minutes by which the budget must grow to contain additional seconds."""
    return math.ceil(seconds / 60 / (1 - RESERVE))


def add_seeds(
    plan: StudyPlan, costs: Costs, available: float, finished: Collection[str] = ()
) -> StudyPlan:
    """Return the study with as many additional seeds as fit into the time.

    Args:
        plan: The study with the seeds that it must complete.
        costs: The measured costs.
        available: Seconds for the runs and the probes.
        finished: Names of the finished runs.

    Raises:
        UserError: If the unfinished runs of the study do not fit.
    """
    needed = estimate_seconds(plan, costs, finished)
    if needed > available:
        raise UserError(
            f"--minutes: the unfinished runs of the {len(plan.seeds)} seeds take about "
            f"{needed:.0f} s, and {max(0.0, available):.0f} s are left; "
            f"raise --minutes by {count_minutes(needed - available)}"
        )
    while len(plan.seeds) < MAX_SEEDS:
        larger = replace(plan, seeds=(*plan.seeds, max(plan.seeds) + 1))
        if estimate_seconds(larger, costs, finished) > available:
            break
        plan = larger
    return plan


def describe_choice(
    plan: StudyPlan, costs: Costs, available: float, finished: Collection[str] = ()
) -> str:
    """Describe the choice and its estimated time in two lines."""
    seconds = estimate_seconds(plan, costs, finished)
    method = max(plan.methods, key=costs.step_s.__getitem__)
    longest = costs.compute_run_seconds(method, plan)
    num_runs = sum(cell.run_name not in finished for cell in plan.make_study_cells({}))
    return (
        f"{len(plan.seeds)} seeds of {len(plan.methods)} methods with {plan.steps} steps: "
        f"{num_runs} runs to do, {costs.jobs} at a time at {costs.images_per_s:.0f} images/s, and "
        f"their probes take {seconds:.0f} of {available:.0f} s ({RESERVE:.0%} of the time is kept "
        f"in reserve)\n"
        f"longest run ({method}): {costs.start_s:.1f} s start + {plan.steps} steps x "
        f"{costs.step_s[method]:.3f} s + {plan.evaluations} evaluations x {costs.evaluation_s:.1f} "
        f"s + {costs.end_s:.1f} s end = {longest:.0f} s; probe {costs.probe_s:.1f} s; EMA decay "
        f"{choose_ema_decay(plan.steps, plan.evaluations)}"
    )
