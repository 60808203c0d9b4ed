"""Test the convergence study: the plan, the data, the execution, and the report."""

import json
import os
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState

from benchmarks.run_steps import count_training_flops, time_runs
from common.cli import UserError
from common.machine import count_available_cores
from experiments import budget_record, cells, convergence, results, scheduler, study_data
from experiments.budget import Costs
from experiments.cells import Cell
from experiments.study_numbers import format_numbers
from experiments.study_page import format_tables
from experiments.study_plan import METHODS, SCALES, StudyPlan, choose_blocks, read_blocks
from experiments.tasks import Task
from models.flops import backbone_flops, head_flops
from models.sit import PRESETS, SiTConfig
from tests.helpers import ROOT, train_flags
from training.config import (
    check_batch_size,
    parse_settings,
)
from training.resume import build_args_json

RESULTS = sorted(path for path in (ROOT / "docs").glob("study-*.json") if "knobs" not in path.name)
METHOD_ARGS = (
    *("align", "projector", "target_norm", "zscore"),
    *("repa", "sra", "encoder_weights", "layersync", "selftrans"),
)


@pytest.fixture(autouse=True)
def visible_gpu(monkeypatch):
    """Make the study use one visible GPU."""
    monkeypatch.setattr(convergence, "list_visible_gpus", lambda: ["0"])


def make_plan(scale: str, *flags: str) -> StudyPlan:
    return convergence.make_plan(*convergence.parse(["--scale", scale, *flags]))


def read_default_blocks(scale: str) -> dict[str, int]:
    return read_blocks(make_plan(scale), ROOT / f"docs/study-{scale}-knobs.json")


@pytest.mark.parametrize("scale", SCALES)
def test_runs_with_equal_seeds_differ_only_in_the_method(scale):
    plan = make_plan(scale)
    study_cells = plan.make_study_cells(read_default_blocks(scale))
    expected = [(seed, name) for seed in SCALES[scale].seeds for name in METHODS]
    assert [(cell.seed, cell.name) for cell in study_cells] == expected
    shared_settings, method_settings = set(), set()
    for cell in study_cells:
        shared = []
        method_values = [cell.name]
        for key, value in build_args_json(cell.parse_settings()).items():
            if key.startswith(METHOD_ARGS):
                method_values.append(str(value))
            elif key not in ("exp_name", "seed"):
                shared.append((key, str(value)))
        shared_settings.add(tuple(shared))
        method_settings.add(tuple(method_values))
    assert len(shared_settings) == 1 and len(method_settings) == len(METHODS)


@pytest.mark.parametrize(
    ("steps", "evaluations", "every", "log_every"),
    [(600, 4, 150, 20), (10, 4, 3, 10), (3, 8, 1, 3)],
)
def test_evaluations_are_evenly_spaced(steps, evaluations, every, log_every):
    flags = ("--max-train-steps", str(steps), "--evaluations", str(evaluations))
    settings = make_plan("laptop", *flags).make_study_cells({})[0].parse_settings()
    assert settings.evaluation.every == settings.checkpoint.checkpointing_steps == every
    assert (settings.log.log_every, settings.loop.max_train_steps) == (log_every, steps)


@pytest.mark.parametrize("scale", ["laptop", "gpu"])
def test_blocks_are_tuned_with_other_seeds_than_the_study(scale):
    tune_seeds = {*SCALES[scale].tune_seeds}
    assert not {*SCALES[scale].seeds} & tune_seeds
    result = results.load_result(ROOT / f"docs/study-{scale}-knobs.json", "convergence-knobs")
    assert {run["seed"] for run in result["runs"]} == tune_seeds
    tuning_cells = make_plan(scale, "--tune", "--methods", *result["knobs"]).make_tuning_cells()
    assert {run["name"] for run in result["runs"]} == {cell.name for cell in tuning_cells}
    chosen = choose_blocks(result["runs"], result["metric"])
    assert result["knobs"] == chosen == read_default_blocks(scale)


def test_block_with_the_lowest_mean_is_chosen():
    finals = {
        ("a", 2, 0): 3.0,
        ("a", 2, 1): 3.2,
        ("a", 4, 0): 2.0,
        ("a", 4, 1): 4.1,
        ("b-c", 2, 0): 5.0,
        ("b-c", 6, 0): 4.0,
    }
    runs = [
        {"name": f"{name}-block{block}", "seed": seed, "metrics": {"FD": [0.0, final]}}
        for (name, block, seed), final in finals.items()
    ]
    assert choose_blocks(runs, "FD") == {"a": 4, "b-c": 6}


def test_methods_align_their_tuned_blocks():
    blocks = {"sra2-cosine": 3, "sra2-smooth_l1": 4, "sra": 5, "repa": 6}
    blocks |= {"layersync": 2, "irepa": 1, "selftrans": 4}
    plan = make_plan("laptop")
    common = ["--exp-name", "x", "--data-dir", "x", "--model", "SiT-Ti/2"]
    aligned = {}
    for name in METHODS:
        alignments = parse_settings([*common, *plan.make_method_flags(name, blocks)]).alignments
        aligned[name] = [alignment.block for alignment in alignments]
        widths = {a.projector_width for a in alignments if a.projector_type == "mlp"}
        assert widths <= {2 * PRESETS["SiT-Ti/2"]["width"]}
        if name == "layersync":  # two sevenths of the depth separate the blocks
            assert alignments[0].settings.target_block == 4
    assert aligned.pop("vanilla") == [] and aligned.pop("sra2+repa") == [3, 6]
    assert aligned.pop("repa-stop") == [6]
    assert aligned == {name: [block] for name, block in blocks.items()}


def test_imagenet_prints_valid_commands_for_a_cluster(call):
    code, out = call(convergence, "--scale", "imagenet", "--gpus", 4, "--seeds", 3, 4)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert code == 0 and len(lines) == 2 * len(METHODS) + 1
    stage1 = lines[0][lines[0].index("--exp-name") + 1]
    for words in lines:
        if "selftrans" in words:
            checkpoint = words[words.index("--selftrans-checkpoint") + 1]
            assert checkpoint == f"exps/study-imagenet/{stage1}"
        start = words.index("train.py")
        assert words[:start] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "4"]
        settings = parse_settings(words[start + 1 :])
        evaluation = settings.evaluation
        check_batch_size(settings.loop, 4)
        assert settings.data.data_dir == (Path("data/imagenet256"),)
        assert evaluation.latents == Path("data/imagenet256-val")
        assert (settings.model.model, settings.loop.max_train_steps) == ("SiT-B/2", 400_000)
        assert (evaluation.every, evaluation.samples) == (50_000, 50_000)
        assert (evaluation.mode, evaluation.num_steps) == ("sde", 250)
        assert (evaluation.cfg_scale, settings.optimizer.ema_decay) == (1.0, (0.9999,))
        for alignment in settings.alignments:
            if alignment.method == "repa":
                assert alignment.settings.encoder == "dinov2-b"
                assert alignment.block == 4
                is_irepa = alignment.projector_type == "conv"
                assert alignment.weight == (1.0 if is_irepa else 0.5)
                assert alignment.target_norm == ("zscore" if is_irepa else "none")
                assert is_irepa or alignment.projector_width == 2048


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--scale is missing"),
        ("--scale gpu --seeds 1 1", "--seeds 1 1: pass each seed only once"),
        ("--scale imagenet --minutes 9", "--minutes requires --scale laptop or gpu"),
        ("--scale gpu --minutes 9 --seeds 1", "--seeds cannot be combined with --minutes"),
        ("--scale gpu --minutes 9 --reuse x", "--reuse cannot be combined with --minutes"),
        ("--scale imagenet --tune", "--tune requires --scale laptop or gpu"),
        ("--scale gpu --out x.txt", "--out x.txt must end in .json"),
        ("--scale gpu -- --align-depth 3", "-- --align-depth: this flag is set by the study"),
        ("--scale laptop --tune --gather", "--gather cannot be combined with --tune"),
        ("--plot docs/study.md", "--plot docs/study.md must end in .json"),
        ("--scale gpu -- --encoder-depth 3", "-- --encoder-depth: this flag is set by the study"),
        ("--scale gpu -- --eval-latents x", "-- --eval-latents: this flag is set by the study"),
        ("--scale gpu -- --seed=3", "-- --seed=3: this flag is set by the study"),
    ],
)
def test_invalid_flags_are_rejected(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        convergence.parse(flags.split())


@pytest.mark.parametrize(
    ("knobs", "flags", "message"),
    [
        ("gpu", (), "belongs to --scale gpu; run --tune with --scale laptop"),
        (
            "laptop",
            ("--model", "SiT-S/2"),
            "belongs to --model SiT-Ti/2; run --tune with --model SiT-S/2",
        ),
        (
            "laptop",
            ("--seeds", "9", "0"),
            "--seeds 0: --knobs docs/study-laptop-knobs.json was tuned with these seeds; "
            "pass other seeds",
        ),
    ],
)
def test_blocks_of_another_study_are_rejected(knobs, flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=re.escape(message) + "$"):
        read_blocks(make_plan("laptop", *flags), Path(f"docs/study-{knobs}-knobs.json"))


def test_methods_that_were_not_tuned_align_the_default_block(tmp_path, caplog):
    path = tmp_path / "knobs.json"
    settings = {"scale": "laptop", "model": "SiT-Ti/2", "knobs": {"sra": 2}}
    results.save_result(path, "convergence-knobs", settings, [])
    assert read_blocks(make_plan("laptop", "--methods", "sra"), path) == {"sra": 2}
    plan = make_plan("laptop", "--methods", "sra", "sra2-cosine", "repa")
    assert not caplog.messages
    assert read_blocks(plan, path) == {"sra": 2}
    assert "has no block for repa sra2-cosine" in caplog.messages[0]
    flags = plan.make_method_flags("repa", {"sra": 2})
    assert flags[flags.index("--align-depth") + 1] == "auto"


def test_gpu_scale_requires_a_gpu(monkeypatch):
    monkeypatch.setattr(convergence, "list_visible_gpus", list)
    with pytest.raises(UserError, match=r"^--scale gpu requires a GPU, but no GPU is visible"):
        convergence.parse(["--scale", "gpu"])
    args, _ = convergence.parse(["--scale", "gpu", "--gather"])
    assert args.gather
    args, _ = convergence.parse(["--scale", "laptop"])
    assert args.jobs == count_available_cores()


def test_data_are_prepared_once_and_for_one_scale(tmp_path, monkeypatch):
    commands = []

    def fake_run_tasks(tasks, folder, jobs):
        commands.extend([*task.command[1:]] for task in tasks)
        return {}

    monkeypatch.setattr(study_data, "run_tasks", fake_run_tasks)
    archives = (tmp_path / "train.zip", tmp_path / "other.zip")
    monkeypatch.setattr(study_data, "prepare_images", lambda *_: archives)
    data = tmp_path / "data"
    study_data.prepare_data("laptop", data, tmp_path, tmp_path)
    caches = {
        words[words.index("--dest") + 1]: words[words.index("--source") + 1]
        for words in commands[:2]
    }
    assert caches == {f"{data}/train": str(archives[0]), f"{data}/held-out": str(archives[1])}
    features = commands[2]
    assert features[:2] == ["preprocessing.encode_features", f"{data}/train"]
    study_data.prepare_data("laptop", data, tmp_path, tmp_path)
    assert len(commands) == 3
    with pytest.raises(UserError, match=r"was created for --scale laptop; pass another folder$"):
        study_data.prepare_data("gpu", data, tmp_path, tmp_path)


def test_training_and_held_out_images_are_disjoint(tmp_path):
    paths = {name: tmp_path / f"{name}.zip" for name in ("whole", "train", "held-out")}
    entries = [[f"{i % 3}/{i}.png", i % 3] for i in range(19)]
    with zipfile.ZipFile(paths["whole"], "w") as archive:
        for path, _ in entries:
            archive.writestr(path, f"the image {path}")
        archive.writestr("dataset.json", json.dumps({"labels": entries}))
    study_data.split_zip(paths["whole"], paths["train"], paths["held-out"], interval=5)
    archives = {name: zipfile.ZipFile(path) for name, path in paths.items()}
    labels = {
        name: json.loads(archive.read("dataset.json"))["labels"]
        for name, archive in archives.items()
    }
    assert len(labels["held-out"]) == 4
    assert sorted(labels["train"] + labels["held-out"]) == sorted(entries)
    for name in ("train", "held-out"):
        names = {path for path, _ in labels[name]}
        assert set(archives[name].namelist()) == names | {"dataset.json"}
        path, _ = labels[name][-1]
        assert archives[name].read(path) == archives["whole"].read(path)


def test_error_about_missing_fashion_mnist_names_its_sources(tmp_path):
    message = "^--images .*train-images-idx3-ubyte.gz and .* apt-get install dataset-fashion-mnist"
    with pytest.raises(UserError, match=message):
        study_data.prepare_images("gpu", tmp_path, tmp_path / "nowhere")


def test_steps_are_timed_and_flops_are_counted_per_method(cache):
    AcceleratorState._reset_state(reset_partial_state=True)
    runs = {
        name: parse_settings(train_flags(cache, Path("exps"), "x", "--align", name))
        for name in ("none", "sra2")
    }
    seconds = time_runs(runs, rounds=2, calls=1, warm_up=0)
    assert [*seconds] == [*runs]
    assert all(0 < timing["quartiles"][0] <= timing["median"] for timing in seconds.values())
    network = SiTConfig(**PRESETS["SiT-Ti/2"], latent_size=8, num_classes=3)
    head = head_flops(network, {"width": 128, "out": 16, "layers": 5, "hidden": 64})
    assert count_training_flops(runs["none"]) == 3 * backbone_flops(network)
    assert count_training_flops(runs["sra2"]) == 3 * (backbone_flops(network) + head)
    stopped = train_flags(cache, Path("exps"), "x", "--align-stop-step", "1")  # of three steps
    assert count_training_flops(parse_settings(stopped)) == 3 * backbone_flops(network) + head


FAKE_TRAIN = """
import json, sys, time
from pathlib import Path

words = sys.argv[1:]
get_flag = lambda name: words[words.index(name) + 1]
output_dir = Path(get_flag("--output-dir"))
folder = output_dir / get_flag("--exp-name")
seed = int(get_flag("--seed"))
decay = float(words[len(words) - words[::-1].index("--ema-decay")])  # the last one applies
is_aligned = "sra2" in words
folder.mkdir()
if (output_dir / "broken").exists() and is_aligned and seed == 2:
    sys.exit("error: no luck")
if "--selftrans-checkpoint" in words:
    frozen = Path(get_flag("--selftrans-checkpoint")) / "checkpoints/0000004"
    if not frozen.exists():
        sys.exit("error: no frozen network")
if "selftrans-stage1" in folder.name:
    time.sleep(0.3)
    (folder / "checkpoints/0000004").mkdir(parents=True)
accuracy = 0.6 if is_aligned else 0.5
probe = {"t": 0.5, "images": 9, "accuracy": {"3": accuracy}}
(folder / "probe.json").write_text(json.dumps(probe))
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, int(get_flag("--max-train-steps")) + 1):
        position = {"step": step, "images": step * int(get_flag("--batch-size"))}
        print(json.dumps(position | {"denoising": 1.0}), file=file)
        value = (9.0 + seed) / step * (0.5 if is_aligned else 1)
        metrics = {"FD-fashion": value, "class_agreement": 0.5, "held_out": value / 10}
        print(json.dumps(position | metrics | {"evaluation": {"ema_decay": decay}}), file=file)
"""


@pytest.fixture
def study(cache, tmp_path, monkeypatch) -> SimpleNamespace:
    """A study with a fake train.py. SRA 2 has half the distance of vanilla SiT."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(scheduler, "ROOT", tmp_path)
    timed_methods = []

    def fake_time_runs(runs, *_):
        timed_methods.append([*runs])
        return {name: {"median": 0.1} for name in runs}

    def fake_count_flops(settings):
        return 125 if settings.alignments else 100

    monkeypatch.setattr(convergence, "time_runs", fake_time_runs)
    monkeypatch.setattr(convergence, "count_training_flops", fake_count_flops)
    data, runs, result_path = tmp_path / "data", tmp_path / "runs", tmp_path / "study.json"
    data.mkdir()
    runs.mkdir()
    for name in ("train", "held-out"):
        (data / name).symlink_to(cache)
    (data / "ready.json").write_text('{"scale": "laptop"}')
    (data / "floor-5000.json").write_text('{"FD-fashion": 0.1, "class_agreement": 0.9}')
    flags = "--scale laptop --methods sra2-cosine --seeds 1 2 --max-train-steps 4"
    words = [*flags.split(), "--data-dir", data, "--output-dir", runs, "--out", result_path]
    return SimpleNamespace(
        words=words, data=data, runs=runs, path=result_path, timed_methods=timed_methods
    )


def test_study_is_executed_resumed_and_gathered(call, study, tmp_path, monkeypatch):
    words, data, runs, result_path = study.words, study.data, study.runs, study.path

    # If a run fails, the result contains the other runs.
    (runs / "broken").touch()
    code, out = call(convergence, *words)
    assert code == 2 and "1 of 4 tasks failed (sra2-cosine-seed2); rerun the same command" in out
    assert "SRA 2, cosine (1 of 2 seeds)" in out

    # The next call waits for another process that is training the missing run, and then starts it.
    (runs / "broken").unlink()
    (runs / "sra2-cosine-seed2").rmdir()
    checked_runs = []

    def is_running_three_times(task, folder):
        checked_runs.append(task.name)
        return len(checked_runs) <= 3

    monkeypatch.setattr(scheduler, "is_running", is_running_three_times)
    code, out = call(convergence, *words)
    assert code == 0 and set(checked_runs) == {"sra2-cosine-seed2"}, out
    result = results.load_result(result_path, "convergence")
    assert [(run["name"], run["seed"]) for run in result["runs"]] == [
        (name, seed) for seed in (1, 2) for name in ("vanilla", "sra2-cosine")
    ]
    numbers = format_numbers(result)
    # The differences are half of the final distances of vanilla SiT, 10/4 and 11/4.
    assert numbers["sra2-cosine FD-fashion difference"] == "-1.312 (-1.375 to -1.250)"
    assert numbers["sra2-cosine speed-up"] == "2.00 (2.00 to 2.00)"
    assert numbers["sra2-cosine speed-up per FLOP"].startswith("1.60")
    assert numbers["sra2-cosine probe"] == "60.0% (block 3)"
    assert (tmp_path / "study.md").read_text() == format_tables(result)
    assert (tmp_path / "study.png").stat().st_size > 10_000

    # Steps are timed once for the same flags.
    monkeypatch.setattr(convergence, "draw_figure", lambda result, path: None)
    assert study.timed_methods == [["vanilla", "sra2-cosine"]]
    seconds = runs / "seconds.json"
    seconds.write_text(seconds.read_text().replace("1e-3", "2e-3"))
    assert call(convergence, *words)[0] == 0 and len(study.timed_methods) == 2

    # Runs on a cluster have no record, and the data may be on another machine.
    (runs / "sra2-cosine-seed1.json").unlink()
    (data / "train").unlink()
    code, out = call(convergence, *words, "--gather")
    gathered = results.load_result(result_path, "convergence")
    assert code == 0 and gathered["training_images"] is None
    without_flops = {
        key: text for key, text in numbers.items() if not key.endswith((" FLOP", "equal FLOPs"))
    }
    assert format_numbers(gathered) == without_flops
    assert [run.get("finished") for run in gathered["runs"]] == [None, False, None, None]


def test_runs_of_an_earlier_result_are_not_repeated(call, study, tmp_path, monkeypatch):
    assert call(convergence, *study.words)[0] == 0
    earlier = results.load_result(study.path, "convergence")
    by_run = {(run["name"], run["seed"]): run for run in earlier["runs"]}
    # A repeated flag with the same value is ignored; a different learning rate is not.
    by_run["vanilla", 1]["flags"] += ["--batch-size", "64"]
    by_run["vanilla", 1]["seconds"] = 777.0
    by_run["sra2-cosine", 2]["flags"] += ["--learning-rate", "3e-3"]
    reused = tmp_path / "earlier.json"
    results.save_result(reused, "convergence", {}, earlier["runs"])

    words = [*study.words, "--methods", "sra2-cosine", "sra", "--reuse", reused]
    words[words.index(study.runs)] = tmp_path / "more-runs"
    code, out = call(convergence, *words, "--print")
    assert code == 0 and len(re.findall("--exp-name (sra-|sra2-cosine-seed2)", out)) == 3
    assert len(re.findall("^python", out, re.MULTILINE)) == 3, out

    code, out = call(convergence, *words)
    assert code == 0, out
    assert sorted(path.name for path in (tmp_path / "more-runs").iterdir() if path.is_dir()) == [
        "sra-seed1",
        "sra-seed2",
        "sra2-cosine-seed2",
    ]
    result = results.load_result(study.path, "convergence")
    assert [(run["name"], run["seed"]) for run in result["runs"]] == [
        (name, seed) for seed in (1, 2) for name in ("vanilla", "sra2-cosine", "sra")
    ]
    assert result["runs"][0] == by_run["vanilla", 1]
    assert result["runs"][4]["flags"] == by_run["sra2-cosine", 1]["flags"]
    assert all(run["probe"] for run in result["runs"])
    assert study.timed_methods[-1] == ["vanilla", "sra2-cosine", "sra"]
    assert all(method["step_s"] for method in result["methods"])

    # --gather uses the earlier result too, and prefers a run that was repeated in the folder.
    code, out = call(convergence, *words, "--gather")
    gathered = results.load_result(study.path, "convergence")
    assert code == 0 and gathered["runs"] == result["runs"]

    # A result without any matching run is an error.
    code, out = call(convergence, *words, "--seeds", 3)
    assert code == 2 and "earlier.json contains no finished run with the name, seed and" in out
    code, out = call(convergence, *words, "--seeds", 2, "--", "--learning-rate", "5e-3")
    assert code == 2 and "--learning-rate was 3e-3 and is now 5e-3" in out

    # A damaged result is an error.
    run = earlier["runs"][0]
    head = {"study": "convergence", "version": results.RESULT_VERSION}
    for content in ({}, {"runs": [{"name": "vanilla"}]}):
        reused.write_text(json.dumps(head | content))
        code, out = call(convergence, *words, "--print")
        assert code == 2 and "earlier.json is damaged: the runs, or their names" in out
    del run["flags"]
    reused.write_text(json.dumps(head | {"runs": [run]}))
    code, out = call(convergence, *words, "--print")
    assert code == 2 and "earlier.json contains no finished run with the name" in out


def test_runs_wait_for_their_frozen_network(call, study, monkeypatch):
    monkeypatch.setattr(convergence, "draw_figure", lambda result, path: None)
    words = [{"sra2-cosine": "selftrans", "2": "3"}.get(str(word), word) for word in study.words]
    code, out = call(convergence, *words, "--jobs", 3)
    assert code == 0, out
    names = {run["name"] for run in results.load_result(study.path, "convergence")["runs"]}
    assert names == {"vanilla", "selftrans"}
    assert (study.runs / "selftrans-stage1-4-seed100").exists()


def test_study_with_a_time_budget_is_continued(call, study, monkeypatch):
    costs = Costs(
        jobs=2,
        images_per_s=640,
        step_s={"vanilla": 0.1, "sra2-cosine": 0.1},
        start_s=5,
        evaluation_s=1,
        end_s=0,
        probe_s=0,
    )
    measured_jobs = []

    def fake_measure(plan, blocks, jobs, limit_s, probe):
        measured_jobs.append(jobs)
        return costs

    monkeypatch.setattr(budget_record, "measure_costs", fake_measure)
    monkeypatch.setattr(budget_record, "compute_available", lambda minutes, elapsed: 60 * minutes)
    monkeypatch.setattr(convergence, "draw_figure", lambda result, path: None)
    words = [word for word in study.words if word not in ("--seeds", "1", "2")]
    words[words.index("--max-train-steps") + 1] = "200"
    words += ["--jobs", "2", "--minutes"]

    code, out = call(convergence, *words, 1, "--print")
    assert code == 2 and "budget.json does not exist; rerun without --print and --gather" in out
    study.runs.mkdir(exist_ok=True)
    (study.runs / "budget.json").write_text('{"steps": 4, "seeds": [10]}')
    code, out = call(convergence, *words, 1, "--print")
    assert code == 2 and "budget.json is damaged: the request, the steps or the seeds" in out
    (study.runs / "budget.json").unlink()
    # Ten runs in five rounds: (60 s / 5 - 9 s) / 0.1 s = 30 steps, which are too few.
    code, out = call(convergence, *words, 1)
    assert code == 2 and "5 seeds of 2 methods with 100 steps take about 95 s" in out
    assert not study.path.exists() and not (study.runs / "budget.json").exists()

    # (120 s / 5 - 9 s) / 0.1 s = 150 steps, in multiples of 4.
    code, out = call(convergence, *words, 2)
    assert code == 0 and "5 seeds of 2 methods with 148 steps: 10 runs to do" in out, out
    assert "all 10 runs have ended" in out and measured_jobs == [2, 2] and not study.timed_methods
    result = results.load_result(study.path, "convergence")
    assert (result["steps"], len(result["runs"])) == (148, 10)
    assert result["budget"]["costs"]["step_s"] == costs.step_s
    assert all(run["probe"] for run in result["runs"])
    decay = 1 - 5 / 37
    ema_decays = {run["evaluation"]["ema_decay"] for run in result["runs"]}
    assert [*ema_decays] == pytest.approx([decay], abs=1e-4)

    # A later call repeats no run and adds seeds of the same length, here two rounds of 23.8 s.
    record = study.runs / "vanilla-seed10.json"
    modified = record.stat().st_mtime_ns
    code, out = call(convergence, *words, 1)
    assert code == 0 and "7 seeds of 2 methods with 148 steps: 4 runs to do" in out, out
    assert measured_jobs == [2, 2] and record.stat().st_mtime_ns == modified
    result = results.load_result(study.path, "convergence")
    assert sorted({run["seed"] for run in result["runs"]}) == [*range(10, 17)]
    assert [call["minutes"] for call in result["budget"]["calls"]] == [2, 1]

    # An interrupted call is completed before seeds are added.
    (study.runs / "sra2-cosine-seed12.json").unlink()
    shutil.rmtree(study.runs / "sra2-cosine-seed12")
    code, out = call(convergence, *words, 0.5)
    assert code == 0 and "7 seeds of 2 methods with 148 steps: 1 runs to do" in out, out
    code, out = call(convergence, *words, 0.5, "--gather")
    assert code == 0 and len(results.load_result(study.path, "convergence")["runs"]) == 14
    code, out = call(convergence, *words, 1, "--evaluations", 2)
    assert code == 2 and "evaluations was 4 and is now 2); choose another --output-dir" in out


def test_unfinished_runs_on_a_cluster_are_gathered(call, tmp_path):
    for name, thousands_of_steps in (
        ("vanilla", (50, 100, 150)),
        ("sra2-cosine", (50, 100)),
        ("sra", ()),
    ):
        folder = tmp_path / "runs" / f"{name}-seed0"
        folder.mkdir(parents=True)
        rows = [{"step": 100, "images": 25600, "denoising": 1.0}]
        for k in thousands_of_steps:
            metrics = {"FID": 99 / k, "held_out": 1.0, "evaluation": {"ema_decay": 0.9999}}
            rows.append({"step": k, "images": 256000 * k, **metrics})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--scale",
        "imagenet",
        "--gather",
        "--output-dir",
        tmp_path / "runs",
        "--out",
        tmp_path / "study.json",
    ]
    code, out = call(convergence, *words, "--data-dir", tmp_path / "nowhere")
    assert code == 0, out
    result = results.load_result(tmp_path / "study.json", "convergence")
    assert result["metric"] == "FID" and result["floor"] is None
    assert [run["name"] for run in result["runs"]] == ["vanilla", "sra2-cosine"]
    assert "2 of 2 runs are unfinished; all runs are compared at 25,600,000 images" in out
    assert format_numbers(result)["sra2-cosine FID difference"] == "+0.0000"
    assert "| REPA | not run |" in out


def test_gathering_without_evaluations_keeps_the_previous_result(call, tmp_path):
    path = tmp_path / "study.json"
    path.write_text("the previous result")
    words = ["--scale", "gpu", "--gather", "--output-dir", tmp_path / "no", "--out", path]
    code, out = call(convergence, *words)
    assert code == 2 and "no contains no evaluation of vanilla; rerun after" in out
    assert path.read_text() == "the previous result"


def test_task_left_by_a_killed_study_is_recognised_as_running(tmp_path, monkeypatch):
    """The process of a task holds the lock on its log after the scheduler has been killed."""
    (tmp_path / "wait.py").write_text("import sys; sys.stdin.read()")
    monkeypatch.setattr(scheduler, "ROOT", tmp_path)
    task = Task("a", ("wait.py",))
    assert not scheduler.is_running(task, tmp_path) and not task.log_path(tmp_path).exists()
    pipe, other_end = os.pipe()
    monkeypatch.setattr(subprocess, "DEVNULL", pipe)  # the standard input of the process
    process = scheduler.TaskProcess(task, tmp_path, 1, [])
    os.close(pipe)
    assert scheduler.is_running(task, tmp_path)
    os.close(other_end)
    assert process.popen.wait(timeout=60) == 0
    assert not scheduler.is_running(task, tmp_path)


def test_repeated_flags_are_compared_by_their_effect(tmp_path):
    """Values of a repeated --data-dir accumulate; other repeated flags use the last value."""
    recorded = "--data-dir a --data-dir b --batch-size 4 --batch-size 8"
    (tmp_path / "a-seed0.json").write_text(json.dumps({"flags": recorded.split()}))
    same = Cell("a", 0, ("--batch-size", "8", "--data-dir", "a", "b"))
    cells.check_cells([same], tmp_path)
    for changed in ("--data-dir b --batch-size 8", "--data-dir a b --batch-size 4"):
        with pytest.raises(UserError, match="a-seed0 was started with other flags"):
            cells.check_cells([Cell("a", 0, tuple(changed.split()))], tmp_path)


def test_runs_without_an_evaluation_are_not_collected(tmp_path):
    (tmp_path / "a-seed0").mkdir()
    (tmp_path / "a-seed0/metrics.jsonl").write_text('{"step": 1, "images": 8, "denoising": 1.0}\n')
    cell = Cell("a", 0, tuple(train_flags(Path("x"), Path("x"), "a", "--align", "none")))
    assert results.collect_runs([cell], tmp_path, include_unfinished=True) == []


def find_estimates(text: str) -> set[str]:
    """Return all numbers with an interval in a text, such as "1.07 (1.04 to 1.10)"."""
    return set(re.findall(r"(?:[<>] )?[-+]?\d+\.\d+ \([^()]+ to [^()]+\)", text))


def read_study_pages() -> str:
    return "".join((ROOT / f"docs/{name}.md").read_text() for name in ("study", "study-details"))


def test_documented_tables_and_estimates_equal_the_results():
    page = read_study_pages()
    readme = (ROOT / "README.md").read_text().split("### Speed and cost")[0]
    known: set[str] = set()
    assert RESULTS
    for path in RESULTS:
        result = results.load_result(path, "convergence")
        finished = [run for run in result["runs"] if run.get("finished", True)]
        known |= {*format_numbers(result | {"runs": finished}).values()}
        lines = format_tables(result).split("```bash")[0].splitlines()
        rows = [line for line in lines if line.startswith("|")]
        assert rows
        for line in lines:
            assert line in page, path
        for row in rows:
            known |= {cell.strip() for cell in row.split("|")}
        assert f"({path.with_suffix('.png').name})" in page and path.with_suffix(".png").exists()
    assert find_estimates(readme)
    assert find_estimates(readme) | find_estimates(page) <= known


def test_documented_tuning_runs_equal_the_results():
    page = " ".join(read_study_pages().split())
    for path in (ROOT / "docs").glob("study-*-knobs.json"):
        result = results.load_result(path, "convergence-knobs")
        finals = results.collect_final_values(result["runs"], "FD-fashion")
        for name in ("sra2-cosine", "sra2-smooth_l1"):
            values = [
                f"{by_seed[0]:.3f}" for key, by_seed in finals.items() if key.startswith(name)
            ]
            assert ", ".join(values) in page, (path, name)
