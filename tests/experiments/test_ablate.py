"""Test the ablation study: the grid, the execution of the runs, and the report."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

import sample_ddp
import train
from common import cli
from common.machine import count_available_cores
from common.metrics_log import read_rows
from evaluations import evaluate
from experiments import ablate, ablation_grid, cells, panels, results, scheduler
from experiments.cells import Cell
from experiments.tasks import Task
from tests.helpers import ROOT
from training.config import (
    check_batch_size,
    parse_settings,
)
from training.resume import build_args_json

TIMEOUT_SECONDS = 120  # much longer than any event takes, even on a busy machine
ALIGN_ARGS = (
    "align",
    "align_depth",
    "align_t_range",
    "align_loss",
    "align_weight",
    "projector_layers",
    "align_stop_step",
    "align_target",
    "align_normalize",
)


def parse_align_args(flags: list[str]) -> tuple:
    """Return the alignment settings of train.py, with target and normalization as one entry."""
    flags = build_args_json(parse_settings(flags))
    *values, target, normalize = (str(flags[name]) for name in ALIGN_ARGS)
    return (*values, (target, normalize))


@pytest.mark.parametrize("model", ["SiT-Ti/2", "SiT-B/2", "SiT-XL/2"])
def test_each_run_differs_from_the_best_run_in_one_axis_and_is_listed_once(model):
    runs, axes = ablation_grid.build_grid([*ablation_grid.AXIS_TITLES], model, 400, demo=True)
    common = ["--exp-name", "x", "--data-dir", "x", "--model", model]
    settings = {name: parse_align_args([*common, *words.split()]) for name, words in runs.items()}
    assert len(set(settings.values())) == len(settings)
    for name, values in settings.items():
        if name not in ("none", "sra2"):
            assert sum(a != b for a, b in zip(values, settings["sra2"])) == 1, name
    values = [value for panel in axes for value in panel["values"]]
    assert {value["run"] for value in values} | {"none"} == set(runs)
    for panel in axes:
        assert [value["run"] for value in panel["values"] if value["usual"]] == ["sra2"]


def test_tried_blocks_scale_with_the_depth_of_the_model():
    expected = {
        "SiT-Ti/2": ["1", "2", "3", "4", "5", "6"],
        "SiT-B/2": ["2", "3", "6", "8"],
        "SiT-L/2": ["4", "6", "8", "12", "16"],
    }
    for model, labels in expected.items():
        assert [*ablation_grid.list_axis_values(model, 400, demo=True)["depth"]] == labels


def test_imagenet_commands_are_valid_and_cover_table_1(call):
    code, out = call(ablate, "--scale", "imagenet", "--print")
    lines = [shlex.split(line) for line in out.splitlines() if line and not line.startswith("#")]
    assert code == 0 and len(lines) == 3 * 12
    settings = set()
    for training, sampling, evaluation in zip(lines[::3], lines[1::3], lines[2::3]):
        start = training.index("train.py")
        assert training[:start] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "8"]
        parsed = parse_settings(training[start + 1 :])
        check_batch_size(parsed.loop, 8)
        assert (parsed.model.model, parsed.loop.max_train_steps) == ("SiT-B/2", 400_000)
        assert (parsed.loop.batch_size, parsed.run.seed) == (256, 0)
        names = (*ALIGN_ARGS[:6], "align_beta")
        flags = build_args_json(parsed)
        settings.add(tuple(str(flags[name]) for name in names) if parsed.alignments else None)

        config = sample_ddp.parse_args(sampling[sampling.index("sample_ddp.py") + 1 :])
        sampler = config.sampler
        assert config.output.num_fid_samples == 50_000
        assert (sampler.mode, sampler.num_steps, sampler.cfg_scale) == ("sde", 250, 1)
        assert config.checkpoint.ckpt == parsed.run.folder / "checkpoints/0400000"
        evaluated = evaluate.parse_args(evaluation[evaluation.index("evaluations.evaluate") + 1 :])
        assert evaluated.samples == config.output.sample_dir / f"{config.output.name}.npz"

    best = (2, (0.0, 1.0), "smooth_l1", 1.0, 5)
    values_by_axis = (
        (2, 3, 6, 8),
        ((0.0, 0.5), (0.5, 1.0)),
        ("cosine", "l2", "l1"),
        (0.1,),
        (2,),
    )
    table_1 = {
        best[:axis] + (value,) + best[axis + 1 :]
        for axis, values in enumerate(values_by_axis)
        for value in values
    }
    expected = {
        ("['sra2']", f"[{block}]", f"[{[*window]}]", f"['{loss}']", f"[{w}]", f"[{n}]", "[0.05]")
        for block, window, loss, w, n in table_1
    }
    assert settings == expected | {None}


def test_t_intervals_equal_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = (dict(enumerate(rng.normal(size=5).tolist())) for _ in range(2))
    expected = stats.ttest_rel([*a.values()], [*b.values()]).confidence_interval(0.95)
    paired = results.compute_paired_difference(a, b)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    expected = stats.ttest_1samp([*a.values()], 0).confidence_interval(0.95)
    single = results.compute_t_interval([*a.values()])
    assert (single.low, single.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_paired_differences_are_taken_per_common_seed():
    baseline = {0: 3.0, 1: 30.0, 2: 300.0}
    shifted = {seed: value - 0.5 for seed, value in baseline.items()}
    assert results.compute_paired_difference(shifted | {7: 1e9}, baseline) == (-0.5, -0.5, -0.5)
    single = results.compute_paired_difference({0: 2.0}, baseline)
    assert single == pytest.approx((-1.0, math.nan, math.nan), nan_ok=True)
    assert results.compute_paired_difference({9: 1.0}, baseline) is None


def test_table_contains_paired_intervals_and_marks_missing_runs(tmp_path):
    _, axes = ablation_grid.build_grid(["layers"], "SiT-Ti/2", 400, demo=True)
    finals = {"none": [3.0, 4.0, 5.0], "sra2": [2.4, 3.5, 4.3]}
    runs = [
        {
            "name": name,
            "seed": seed,
            "metrics": {"FD-fashion": [99.0, value], "class_agreement": [0.0, 0.25]},
        }
        for name, values in finals.items()
        for seed, value in enumerate(values)
    ]
    settings = {"model": "SiT-Ti/2", "steps": 400, "metric": "FD-fashion", "axes": axes}
    path = tmp_path / "made-up.json"
    results.save_result(path, "ablate", settings, runs)
    rows = panels.format_table(results.load_result(path, "ablate")).splitlines()
    assert "| vanilla | 4.000 |  | 25.0% | *33.02* |" in rows
    # The quantile t(0.975, 2) is 4.303, and the standard deviation of the differences is 0.1.
    assert "| 5 | 3.400 | -0.600 (-0.848 to -0.352) | 25.0% | *28.89* |" in rows
    assert "| 2 | not run |  |  | *31.32* |" in rows


FAKE_TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

words = sys.argv[1:]
name = words[words.index("--exp-name") + 1]
output_dir = Path(words[words.index("--output-dir") + 1])
folder = output_dir / name
folder.mkdir(exist_ok=True)

def stop(*_):
    if name.startswith("b"):
        time.sleep(0.2)  # save more slowly than the other runs
    (folder / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
keys = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
with open(folder / "starts", "a") as file:
    file.write(json.dumps({key: os.environ.get(key) for key in keys}) + "\\n")
end = time.monotonic() + 600
while (output_dir / "hold").exists() and time.monotonic() < end:
    time.sleep(0.01)
print("many words")
if (output_dir / f"{name}.broken").exists():
    sys.exit("error: no luck")
row = {"step": 4, "images": 32, "denoising": 1.0}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Return an output folder for a fake train.py, which waits until the file `hold` is removed."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(scheduler, "ROOT", tmp_path)
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.01)
    return tmp_path / "runs"


def make_cells() -> list[Cell]:
    """Return three cells: a, b and c."""
    flags = "--data-dir data --model SiT-Ti/2 --batch-size 8 --max-train-steps 4"
    methods = {"a": "none", "b": "sra2", "c": "sra"}
    return [
        Cell(name, 0, tuple(f"{flags} --align {method}".split()))
        for name, method in methods.items()
    ]


def make_tasks(folder) -> list[Task]:
    return [cell.make_task(folder) for cell in make_cells()]


def count_starts(folder) -> list[int]:
    """Return the number of starts of each of the three cells."""
    files = [folder / f"{name}-seed0/starts" for name in "abc"]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def read_environment(folder, name: str) -> dict:
    return json.loads((folder / f"{name}-seed0/starts").read_text())


def call_after_starts(folder, expected: list[int], action) -> threading.Thread:
    """Start a thread that calls an action when the cells have the expected numbers of starts."""

    def wait():
        end = time.monotonic() + TIMEOUT_SECONDS
        while count_starts(folder) != expected and time.monotonic() < end:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_failed_run_is_reported_and_does_not_affect_the_others(runs, caplog):
    (runs / "a-seed0.broken").touch()
    assert scheduler.run_tasks(make_tasks(runs), runs, jobs=2) == {"a-seed0": "error: no luck"}
    assert "a-seed0: error: no luck" in caplog.text
    assert "many words" in (runs / "a-seed0.log").read_text()
    assert [cells.is_finished(cell, runs) for cell in make_cells()] == [False, True, True]
    (runs / "a-seed0.broken").unlink()
    assert scheduler.run_tasks(make_tasks(runs), runs, jobs=2) == {}
    assert count_starts(runs) == [2, 1, 1]


def test_threads_are_divided_among_the_jobs(runs):
    scheduler.run_tasks(make_tasks(runs)[:1], runs, jobs=2)
    threads = read_environment(runs, "a")["OMP_NUM_THREADS"]
    assert threads == str(max(1, count_available_cores() // 2))


def test_more_jobs_than_tasks_need_no_slots(runs):
    assert len(scheduler.Scheduler(make_tasks(runs), runs, jobs=1_000_000).slots) == 3


def test_simultaneous_runs_use_different_gpus(runs, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(scheduler, "describe_machine", lambda device: {"device": device.type})
    (runs / "hold").touch()
    thread = call_after_starts(runs, [1, 1, 0], (runs / "hold").unlink)
    assert scheduler.run_tasks(make_tasks(runs)[:2], runs, jobs=2) == {}
    thread.join()
    assert {read_environment(runs, name)["CUDA_VISIBLE_DEVICES"] for name in "ab"} == {"3", "5"}
    assert cells.read_record(make_cells()[0], runs)["machine"]["device"] == "cuda"


def test_ctrl_c_stops_all_runs_and_the_next_call_resumes_them(runs):
    (runs / "hold").touch()
    thread = call_after_starts(runs, [1, 1, 0], lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        scheduler.run_tasks(make_tasks(runs), runs, jobs=2)
    thread.join()
    assert count_starts(runs) == [1, 1, 0]
    assert all((runs / f"{name}-seed0/saved").exists() for name in "ab")
    (runs / "hold").unlink()
    assert scheduler.run_tasks(make_tasks(runs), runs, jobs=2) == {}
    assert count_starts(runs) == [2, 2, 1]


def test_second_study_in_a_folder_is_refused(runs):
    code = "import fcntl, sys; file = open(sys.argv[1], 'wb'); fcntl.lockf(file, fcntl.LOCK_EX); "
    code += "print(flush=True); input()"
    command = [sys.executable, "-c", code, runs / ".lock"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(cli.UserError, match="another process is running a study there"):
        scheduler.run_tasks(make_tasks(runs), runs, jobs=1)
    other.communicate(b"\n")
    assert count_starts(runs) == [0, 0, 0]


@pytest.fixture
def commands(monkeypatch):
    """Make studies execute train.py in this process, and return the list of command lines."""
    from accelerate.state import AcceleratorState

    started = []

    class InProcess:
        pid = 0

        def __init__(self, command, **_):
            started.append(command)
            AcceleratorState._reset_state(reset_partial_state=True)
            argv = sys.argv
            sys.argv = command[1:]
            self.returncode = 0
            try:
                cli.run(train.main)
            except SystemExit as stop:
                self.returncode = stop.code or 0
            sys.argv = argv

        def poll(self):
            return self.returncode

    names = ("run", "DEVNULL", "STDOUT", "CalledProcessError")
    attributes = {name: getattr(subprocess, name) for name in names}
    monkeypatch.setattr(scheduler, "subprocess", SimpleNamespace(Popen=InProcess, **attributes))
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0)
    return started


def test_study_is_executed_collected_and_plotted(call, commands, cache, tree, tmp_path):
    small = "--batch-size 8 --log-every 1 --eval-samples 9 --eval-num-steps 3 --eval-batch-size 9"

    def run_study(steps: int = 2) -> tuple[int, str]:
        flags = f"--axis layers --seeds 3 --jobs 1 --max-train-steps {steps}".split()
        flags += ["--data-dir", cache, "--output-dir", tmp_path]
        return call(ablate, *flags, "--", *small.split(), "--eval-reference", tree)

    code, out = run_study()
    assert code == 0 and len(commands) == 3, out
    text = (tmp_path / "layers.json").read_text()
    result = json.loads(text)
    assert [run["name"] for run in result["runs"]] == ["none", "sra2", "layers-2"]
    assert result["metric"] == "FD-fashion"
    for run in result["runs"]:
        rows = read_rows(tmp_path / f"{run['name']}-seed3")
        steps = [row for row in rows if "evaluation" not in row]
        (evaluation,) = (row for row in rows if "evaluation" in row)
        losses = [float(f"{row['denoising']:.6g}") for row in steps]
        assert run["losses"]["denoising"] == losses
        assert run["metrics"]["FD-fashion"] == [float(f"{evaluation['FD-fashion']:.6g}")]
        assert run["metrics"]["images"] == [16]
        assert run["seconds"] > 0 and run["machine"]["torch"]
        assert len(run["commits"]) == 1 and run["seed"] == 3
    # Images, noise and weights are equal before the first update, so the losses are equal.
    assert len({run["losses"]["denoising"][0] for run in result["runs"]}) == 1
    first_characters = {word[0] for word in text.replace('"', " ").split()}
    assert "/" not in first_characters, "the result contains a path of this machine"

    table_path = tmp_path / "layers.md"
    figure_path = tmp_path / "layers.png"
    table = table_path.read_text()
    finals = {run["name"]: run["metrics"]["FD-fashion"][0] for run in result["runs"]}
    for label, name, paper in (
        ("vanilla", "none", "33.02"),
        ("5", "sra2", "28.89"),
        ("2", "layers-2", "31.32"),
    ):
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {label} |"))
        row = line.split(" | ")
        difference = "" if name == "none" else f"{finals[name] - finals['none']:+.3f}"
        assert row[1:3] == [f"{finals[name]:.3f}", difference]
        assert row[-1] == f"*{paper}* |"

    # The report can be recreated, finished runs are not repeated, and flags cannot change.
    table_path.unlink()
    figure_path.unlink()
    code, _ = call(ablate, "--plot", tmp_path / "layers.json")
    assert code == 0 and figure_path.stat().st_size > 5000
    code, _ = run_study()
    assert code == 0 and len(commands) == 3
    assert table_path.read_text() == table
    code, out = run_study(steps=3)
    assert code == 2 and "--max-train-steps was 2 and is now 3" in out
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--axis dept", "invalid choice: 'dept'"),
        ("", "--axis is missing"),
        ("--axis depth --seeds 1 0 1", "--seeds 1 0 1: pass each seed only once"),
        ("--axis depth --data-dir nowhere", "make demo"),
        ("--scale imagenet", "add --print"),
        ("--axis depth --out picture.png", "must end in .json"),
        ("--axis loss -- --align-depth 3", "-- --align-depth: this flag is set by the study"),
        ("--axis loss -- --seed=3", "-- --seed=3: this flag is set by the study"),
        ("--axis loss -- --learning-rat 3", "did you mean --learning-rate?"),
        ("--plot nowhere.json", "nowhere.json does not exist"),
        ("--plot old.json", "version 0"),
        ("--plot other.json", "its study is convergence"),
        ("--plot torn.json", "damaged"),
        ("--plot empty.json --axis loss", "contains depth, not loss"),
        ("--plot empty.json", "no finished run of vanilla"),
    ],
)
def test_user_errors_are_one_line(call, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    heads = {
        "old": {"study": "ablate", "version": 0},
        "other": {"study": "convergence", "version": results.RESULT_VERSION},
    }
    for name, head in heads.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(head))
    (tmp_path / "torn.json").write_text("{")
    results.save_result(tmp_path / "empty.json", "ablate", {"axes": [{"name": "depth"}]}, [])
    code, out = call(ablate, *flags.split())
    assert code == 2 and message in out and len(out.splitlines()) == 1, out


def test_documentation_contains_the_table_of_the_result():
    result = results.load_result(ROOT / "docs/depth-loss.json", "ablate")
    page = (ROOT / "docs/ablations.md").read_text()
    assert panels.format_table(result).split("```bash")[0].strip() in page
    assert result["command"].removesuffix(" --jobs 2") in page
    runs = result["runs"]
    assert len(runs) == 30 and len({(run["name"], run["seed"]) for run in runs}) == 30
    assert len({str(run["commits"]) for run in runs}) == 1


def test_documentation_contains_the_probe_accuracies_of_the_result():
    result = json.loads((ROOT / "docs/features.json").read_text())
    page = (ROOT / "docs/ablations.md").read_text()
    rows = result["checkpoints"][0]["results"]
    inputs = [row for row in result["baselines"] if row["space"] == "x_t, flattened"]
    for t in (0.5, 0.1):
        best_block = max(row["accuracy"] for row in rows if row["t"] == t)
        (input_accuracy,) = (row["accuracy"] for row in inputs if row["t"] == t)
        assert f"{best_block:.1%}" in page and f"{input_accuracy:.1%}" in page
    assert result["command"].replace("python -m experiments.features", "") in page
