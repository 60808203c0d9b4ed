"""Test the choice of the length and the seeds of a study from measured costs."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.cli import UserError
from experiments import budget, budget_measurement, scheduler
from experiments.budget import Costs
from experiments.budget_record import set_length
from experiments.study_plan import StudyPlan

COSTS = Costs(
    jobs=2,
    images_per_s=1000,
    step_s={"vanilla": 0.1, "sra2-cosine": 0.2, "selftrans": 0.3},
    start_s=5,
    evaluation_s=2,
    end_s=1,
    probe_s=0.5,
)


def make_plan(*methods: str, steps: int = 600, num_seeds: int = 5) -> StudyPlan:
    seeds = tuple(range(10, 10 + num_seeds))
    return StudyPlan("laptop", "SiT-Ti/2", methods, seeds, steps, 4, Path("data"))


def test_run_takes_its_steps_evaluations_start_and_end():
    plan = make_plan("vanilla", num_seeds=1)
    assert COSTS.compute_run_seconds("vanilla", plan) == pytest.approx(5 + 600 * 0.1 + 4 * 2 + 1)
    assert budget.estimate_seconds(plan, COSTS) == pytest.approx(74 + 0.5)


def test_free_slots_take_the_first_run_that_may_start():
    assert budget.compute_end([(3, 0), (1, 0), (1, 0), (2, 0)], jobs=2) == 4
    # The second run waits for the end of the first.
    assert budget.compute_end([(3, 0), (1, 3), (1, 0), (1, 0)], jobs=2) == 4
    assert budget.compute_end([(3, 0), (1, 3)], jobs=2) == 4
    assert budget.compute_end([], jobs=2) == 0


def test_frozen_network_and_the_runs_that_wait_for_it_are_planned():
    plan = make_plan("vanilla", "selftrans", num_seeds=1)
    # The first stage costs as much as a run of SRA 2, and runs at the same time as vanilla SiT.
    # The run of Self-Transcendence starts when the first stage has ended.
    seconds = (14 + 120) + (14 + 180) + 2 * 0.5
    assert budget.estimate_seconds(plan, COSTS) == pytest.approx(seconds)
    finished = {plan.first_stage.name, "vanilla-seed10"}
    assert budget.estimate_seconds(plan, COSTS, finished) == pytest.approx(14 + 180 + 0.5)


def test_longest_runs_that_fit_are_chosen():
    plan = make_plan("vanilla", "sra2-cosine")
    available = 400.0
    chosen = budget.choose_steps(plan, COSTS, available)
    assert 100 < chosen.steps < 600 and chosen.steps % 4 == 0 and chosen.seeds == plan.seeds
    assert budget.estimate_seconds(chosen, COSTS) <= available
    longer = replace(chosen, steps=chosen.steps + 4)
    assert budget.estimate_seconds(longer, COSTS) > available
    assert budget.add_seeds(chosen, COSTS, available) == chosen
    text = budget.describe_choice(chosen, COSTS, available)
    assert f"5 seeds of 2 methods with {chosen.steps} steps: 10 runs to do, 2 at a time" in text


def test_seeds_are_added_once_the_runs_have_the_full_length():
    plan = make_plan("vanilla", "sra2-cosine", steps=200)
    chosen = budget.choose_steps(plan, COSTS, 1000)
    assert chosen.steps == 200
    chosen = budget.add_seeds(chosen, COSTS, 1000)
    assert chosen.seeds == tuple(range(10, 10 + len(chosen.seeds))) and len(chosen.seeds) > 5
    assert budget.estimate_seconds(chosen, COSTS) <= 1000

    # A later call adds seeds of the same length; finished runs take no time.
    finished = {cell.run_name for cell in chosen.make_study_cells({})}
    more = budget.add_seeds(chosen, COSTS, 120, finished)
    assert len(more.seeds) == len(chosen.seeds) + 2 and more.steps == 200
    assert budget.add_seeds(chosen, COSTS, 30, finished) == chosen
    with pytest.raises(UserError, match=r"runs of the 5 seeds take .* raise --minutes by \d+"):
        budget.add_seeds(plan, COSTS, 100)


def test_error_states_what_would_fit():
    plan = make_plan("vanilla", "sra2-cosine", "sra")
    message = (
        r"^--minutes: 5 seeds of 3 methods with 100 steps take about \d+ s, and 200 s are left; "
        r"raise --minutes by \d, or pass 2 --methods, such as vanilla sra2-cosine$"
    )
    with pytest.raises(UserError, match=message):
        budget.choose_steps(plan, COSTS, 200)
    with pytest.raises(UserError, match=r"raise --minutes by \d$"):
        budget.choose_steps(plan, COSTS, 20)


def test_part_of_the_time_is_kept_in_reserve():
    assert budget.compute_available(10, 60) == 600 * 0.9 - 60 - budget.REPORT_SECONDS


def test_slots_are_balanced():
    assert budget.choose_jobs(15, 51) == 13  # four rounds in both cases
    assert budget.choose_jobs(15, 10) == 10
    assert budget.choose_jobs(2, 16) == 2


@pytest.mark.parametrize("steps", [20, 100, 600, 5000])
def test_initial_weights_have_no_share_in_the_first_evaluation(steps):
    decay = budget.choose_ema_decay(steps, 4)
    assert decay >= 0 and decay ** (steps / 4) < 0.01
    assert decay == pytest.approx(1 - 20 / steps, abs=1e-4)


@pytest.mark.parametrize(("scale", "is_compiled"), [("laptop", False), ("gpu", True)])
def test_user_flags_replace_those_of_the_budget(scale, is_compiled):
    plan = replace(make_plan("vanilla"), scale=scale)
    settings = set_length(plan, 200).make_study_cells({})[0].parse_settings()
    assert settings.optimizer.ema_decay == (0.9,) and settings.loop.max_train_steps == 200
    assert settings.device.compile == is_compiled
    plan = replace(plan, train_flags=("--ema-decay", "0.98"))
    settings = set_length(plan, 200).make_study_cells({})[0].parse_settings()
    assert settings.optimizer.ema_decay == (0.98,)


def test_methods_without_a_measurement_are_as_slow_per_flop_as_the_slowest():
    flops = {"a": 10.0, "b": 20.0, "c": 30.0}
    seconds = budget_measurement.extrapolate({"a": 1.0, "b": 4.0}, flops)
    assert seconds == {"a": 1.0, "b": 4.0, "c": 6.0}


# A train.py that logs without training. Its first step is slow, and it saves when it is stopped.
FAKE_TRAIN = """
import json, signal, sys, time
from pathlib import Path

words = sys.argv[1:]
get_flag = lambda name: words[len(words) - words[::-1].index(name)]
folder = Path(get_flag("--output-dir")) / get_flag("--exp-name")
if "sra" in words:
    sys.exit("error: no luck")
folder.mkdir()

def stop(*_):
    (folder / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
graphs = folder.parent / ".compile-cache" / "graphs"
graphs.touch()
step = 0
while True:
    step += int(get_flag("--log-every"))
    row = {"schema": 3, "step": step, "images": step, "step_s": 0.25 if "sra2" in words else 0.125}
    row["evaluation_s"] = 3.0 if step % int(get_flag("--eval-every")) == 0 else 0.0
    if step == 5:
        row["step_s"] = 99.0
    with open(folder / "metrics.jsonl", "a") as file:
        print(json.dumps(row), file=file)
    time.sleep(0.02)
"""


@pytest.fixture
def measured_plan(tmp_path, monkeypatch) -> StudyPlan:
    """A study with a fake train.py and fake FLOPs."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(scheduler, "ROOT", tmp_path)

    def fake_count_flops(settings):
        methods = [alignment.method for alignment in settings.alignments]
        return {"sra2": 150, "selftrans": 200}.get(methods[0], 120) if methods else 100

    monkeypatch.setattr(budget_measurement, "count_training_flops", fake_count_flops)
    monkeypatch.setattr(budget_measurement, "list_visible_gpus", list)
    return replace(make_plan("vanilla", "sra2-cosine", "selftrans"), output_dir=tmp_path / "runs")


def test_costs_are_measured_with_simultaneous_runs(measured_plan):
    probed = []

    def probe(run: Path) -> None:
        assert (run / "saved").exists() and not (run / "probe.json").exists()
        (run / "probe.json").touch()
        probed.append(run.name)

    costs = budget_measurement.measure_costs(measured_plan, {}, 3, 60, probe)
    expected = {"vanilla": 0.125, "sra2-cosine": 0.25, "selftrans": 200 * 0.25 / 150}
    assert costs.step_s == pytest.approx(expected)
    assert costs.images_per_s == 64 * (1 / 0.125 + 2 / 0.25)
    assert costs.evaluation_s == 3 and costs.jobs == 3
    assert 0 <= costs.start_s < 60 and 0 <= costs.end_s < 60
    assert probed == ["sra2-cosine-seed0"] * 2
    assert [path.name for path in measured_plan.output_dir.iterdir() if path.is_dir()] == [
        ".compile-cache"
    ]
    assert (measured_plan.output_dir / ".compile-cache/graphs").exists()


def test_failed_measurement_is_reported(measured_plan):
    plan = replace(measured_plan, methods=("vanilla", "sra"))
    with pytest.raises(
        UserError, match=r"^the measurement failed: sra: error: no luck; fix the problem and rerun"
    ):
        budget_measurement.measure_costs(plan, {}, 2, 60, lambda run: None)
    with pytest.raises(UserError, match=r"the measurement did not end within 0 s"):
        budget_measurement.measure_costs(measured_plan, {}, 1, 0, lambda run: None)
    assert not (plan.output_dir / "measurement").exists()
