"""The ablation study: its grid is the paper's, its runs stop, fail and go on, its figures are those that were measured."""

import json
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
from common.machine import available_cores
from evaluations import evaluate
from experiments import ablate, cells, panels, results
from experiments.cells import Cell
from tests.helpers import ROOT
from training.config import check_args, parse_args
from training.log import read_rows

ALIGN = (
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


def aligned(flags: list[str], processes: int = 1) -> tuple:
    """What train.py makes of the flags of alignment."""
    args = parse_args("", flags)
    check_args(args, processes)
    values = tuple(str(getattr(args, name)) for name in ALIGN)
    return (*values[:-2], values[-2:])


@pytest.mark.parametrize("model", ["SiT-Ti/2", "SiT-B/2", "SiT-XL/2"])
def test_each_run_differs_from_the_default_in_one_axis_and_none_is_run_twice(model):
    named, axes = ablate.grid([*ablate.TITLES], model, 400, demo=True)
    given = {
        name: aligned(["--exp-name", "x", "--data-dir", "x", "--model", model, *words.split()])
        for name, words in named.items()
    }
    assert len(set(given.values())) == len(given)
    for name, values in given.items():
        if name not in ("none", "sra2"):
            assert sum(a != b for a, b in zip(values, given["sra2"])) == 1, name
    assert {value["run"] for panel in axes for value in panel["values"]} | {"none"} == set(named)
    assert all(
        [value["run"] for value in panel["values"] if value["usual"]] == ["sra2"] for panel in axes
    )


def test_blocks_scale_with_the_model():
    labels = {
        model: [value.label for value in ablate.axis("depth", model, 400, True)]
        for model in ("SiT-Ti/2", "SiT-B/2", "SiT-L/2")
    }
    assert labels == {
        "SiT-Ti/2": list("123456"),
        "SiT-B/2": list("2368"),
        "SiT-L/2": ["4", "6", "8", "12", "16"],
    }


def test_imagenet_prints_table_1_as_commands_that_parse(call):
    code, out = call(ablate, "--scale", "imagenet", "--print")
    lines = [shlex.split(line) for line in out.splitlines() if line and not line.startswith("#")]
    assert code == 0 and len(lines) == 3 * 12
    rows = set()
    for training, sampling, evaluation in zip(*[iter(lines)] * 3):
        at = training.index("train.py")
        assert training[:at] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "8"]
        args = parse_args("", training[at + 1 :])
        check_args(args, 8)
        assert (args.model, args.max_train_steps, args.batch_size, args.seed) == (
            "SiT-B/2",
            400_000,
            256,
            0,
        )
        rows.add(
            tuple(str(getattr(args, name)) for name in (*ALIGN[:6], "align_beta"))
            if args.align != ["none"]
            else None
        )
        drawn = sample_ddp.parse_args(sampling[sampling.index("sample_ddp.py") + 1 :])
        sampler = drawn.sampler
        assert drawn.output.num_fid_samples == 50_000
        assert (sampler.mode, sampler.num_steps, sampler.cfg_scale) == ("sde", 250, 1)
        assert drawn.checkpoint.ckpt == args.output_dir / args.exp_name
        judged = evaluate.parse_args(evaluation[evaluation.index("evaluations.evaluate") + 1 :])
        assert judged.samples == drawn.output.sample_dir / f"{drawn.output.name}.npz"
    best = (2, (0.0, 1.0), "smooth_l1", 1.0, 5)
    varied = {
        0: (2, 3, 6, 8),
        1: ((0.0, 0.5), (0.5, 1.0)),
        2: ("cosine", "l2", "l1"),
        3: (0.1,),
        4: (2,),
    }
    paper = {
        best[:i] + (value,) + best[i + 1 :] for i, values in varied.items() for value in values
    }
    told = {
        ("['sra2']", f"[{k}]", f"[{[*window]}]", f"['{loss}']", f"[{w}]", f"[{n}]", "[0.05]")
        for k, window, loss, w, n in paper
    }
    assert rows == told | {None}


def test_intervals_are_scipys():
    rng = np.random.default_rng(0)
    a, b = (dict(enumerate(rng.normal(size=5).tolist())) for _ in range(2))
    theirs = stats.ttest_rel([*a.values()], [*b.values()]).confidence_interval(0.9)
    ours = results.paired(a, b, level=0.9)
    assert (
        np.allclose((ours.low, ours.high), (theirs.low, theirs.high), rtol=1e-12)
        and ours.count == 5
    )
    theirs = stats.ttest_1samp([*a.values()], 0).confidence_interval(0.95)
    assert np.allclose(results.estimate([*a.values()])[1:3], (theirs.low, theirs.high), rtol=1e-12)


def test_what_seeds_have_in_common_falls_out():
    baseline = {0: 3.0, 1: 30.0, 2: 300.0}
    shifted = {seed: value - 0.5 for seed, value in baseline.items()}
    assert results.paired(shifted | {7: 1e9}, baseline) == (-0.5, -0.5, -0.5, 3)
    assert (
        results.paired({0: 2.0}, baseline) == (-1.0, None, None, 1)
        and results.paired({9: 1.0}, baseline) is None
    )


def test_a_row_has_the_interval_of_paired_differences_and_what_is_missing_is_said(tmp_path):
    _, axes = ablate.grid(["layers"], "SiT-Ti/2", 400, demo=True)
    values = {"none": [3.0, 4.0, 5.0], "sra2": [2.4, 3.5, 4.3]}
    runs = [
        {
            "name": name,
            "seed": seed,
            "metrics": {"FD-fashion": [99.0, value], "class_agreement": [0.0, 0.25]},
        }
        for name, each in values.items()
        for seed, value in enumerate(each)
    ]
    about = {"model": "SiT-Ti/2", "steps": 400, "metric": "FD-fashion", "axes": axes}
    results.save(tmp_path / "made-up.json", "ablate", about, runs)
    rows = panels.table(results.load(tmp_path / "made-up.json", "ablate")).splitlines()
    assert "| vanilla | 4.000 |  | 25.0% | *33.02* |" in rows
    assert (
        "| 5 | 3.400 | -0.600 (-0.848 to -0.352) | 25.0% | *28.89* |" in rows
    )  # t(0.975, 2) = 4.303, s = 0.1
    assert "| 2 | not run |  |  | *31.32* |" in rows


FAKE = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
flag = lambda name: words[words.index(name) + 1]
folder = Path(flag("--output-dir")) / flag("--exp-name")
folder.mkdir(exist_ok=True)
def stop(*_):
    time.sleep(0.2 * folder.name.startswith("b"))
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
with open(folder / "starts", "a") as file:
    file.write(json.dumps({key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}) + "\\n")
end = time.monotonic() + 20
while (folder.parent / "hold").exists() and time.monotonic() < end:
    time.sleep(0.01)
print("many words")
if (folder.parent / flag("--exp-name")).with_suffix(".broken").exists():
    sys.exit("error: no luck")
(folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "images": 32, "denoising": 1.0}) + "\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder for runs of a train.py that only notes how it was started; it waits while there is a file `hold`."""
    (tmp_path / "train.py").write_text(FAKE)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    monkeypatch.setattr(cells, "POLL", 0.01)
    return tmp_path / "runs"


def three() -> list[Cell]:
    flags = [
        "--data-dir",
        "data",
        "--model",
        "SiT-Ti/2",
        "--batch-size",
        "8",
        "--max-train-steps",
        "4",
    ]
    return [
        Cell(name, 0, (*flags, "--align", align))
        for name, align in (("a", "none"), ("b", "sra2"), ("c", "sra"))
    ]


def starts(folder) -> list[int]:
    """How often each of the three was started."""
    files = [folder / f"{name}-seed0/starts" for name in "abc"]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def test_a_run_that_fails_is_named_and_the_others_go_on(fake, capsys):
    (fake / "a-seed0.broken").touch()
    assert cells.run(three(), fake, jobs=2) == {"a-seed0": "error: no luck"}
    assert (
        "a-seed0: error: no luck" in capsys.readouterr().out
        and "many words" in (fake / "a-seed0.log").read_text()
    )
    assert [cells.finished(cell, fake) for cell in three()] == [False, True, True]
    (fake / "a-seed0.broken").unlink()
    assert cells.run(three(), fake, jobs=2) == {} and starts(fake) == [2, 1, 1]
    assert json.loads((fake / "b-seed0/starts").read_text())["OMP_NUM_THREADS"] == str(
        max(1, available_cores() // 2)
    )


def test_each_at_a_time_has_a_gpu_of_its_own(fake, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(cells, "describe_machine", lambda device: {"device": device.type})
    (fake / "hold").touch()
    threading.Timer(0.3, (fake / "hold").unlink).start()
    assert cells.run(three()[:2], fake, jobs=2) == {}
    seen = {
        json.loads((fake / f"{name}-seed0/starts").read_text())["CUDA_VISIBLE_DEVICES"]
        for name in "ab"
    }
    assert seen == {"3", "5"} and cells.record(three()[0], fake)["machine"]["device"] == "cuda"


def test_ctrl_c_stops_all_and_the_same_call_goes_on(fake):
    (fake / "hold").touch()

    def interrupt():
        end = time.monotonic() + 20
        while starts(fake) != [1, 1, 0] and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        cells.run(three(), fake, jobs=2)
    assert starts(fake) == [1, 1, 0] and all(
        (fake / f"{name}-seed0/saved").exists() for name in "ab"
    )
    (fake / "hold").unlink()
    assert cells.run(three(), fake, jobs=2) == {} and starts(fake) == [2, 2, 1]


def test_a_folder_has_one_master(fake):
    code = f"import fcntl; file = open({str(fake / '.lock')!r}, 'wb'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    with pytest.raises(cli.UserError, match="another process is at it"):
        cells.run(three(), fake, jobs=1)
    other.communicate(b"\n")
    assert starts(fake) == [0, 0, 0]


@pytest.fixture
def in_process(monkeypatch):
    """train.py runs here instead of in processes of its own; the list is of what was run."""
    from accelerate.state import AcceleratorState

    begun = []

    class Here:
        pid = 0

        def __init__(self, command, **_):
            begun.append(command)
            AcceleratorState._reset_state(reset_partial_state=True)
            before, sys.argv, self.returncode = sys.argv, command[1:], 0
            try:
                cli.run(train.main)
            except SystemExit as stop:
                self.returncode = stop.code or 0
            sys.argv = before

        def poll(self):
            return self.returncode

    given = {
        name: getattr(subprocess, name)
        for name in ("run", "DEVNULL", "STDOUT", "CalledProcessError")
    }
    monkeypatch.setattr(cells, "subprocess", SimpleNamespace(Popen=Here, **given))
    monkeypatch.setattr(cells, "POLL", 0)
    return begun


def test_a_grid_is_run_gathered_and_drawn_again(call, in_process, cache, tree, tmp_path):
    short = "--batch-size 8 --log-every 1 --eval-samples 9 --eval-num-steps 3 --eval-batch-size 9"

    def study(steps: int = 2) -> tuple[int, str]:
        where = ["--data-dir", cache, "--output-dir", tmp_path]
        more = ["--", *short.split(), "--eval-reference", tree]
        return call(
            ablate,
            "--axis",
            "layers",
            "--seeds",
            3,
            "--jobs",
            1,
            "--max-train-steps",
            steps,
            *where,
            *more,
        )

    code, out = study()
    assert code == 0 and len(in_process) == 3, out
    text = (tmp_path / "layers.json").read_text()
    found = json.loads(text)
    assert [run["name"] for run in found["runs"]] == ["none", "sra2", "layers-2"] and found[
        "metric"
    ] == "FD-fashion"
    for run in found["runs"]:
        rows = read_rows(tmp_path / f"{run['name']}-seed3")
        assert run["losses"]["denoising"] == [
            float(f"{row['denoising']:.6g}") for row in rows if "evaluation" not in row
        ]
        (evaluation,) = (row for row in rows if "evaluation" in row)
        assert run["metrics"]["FD-fashion"] == [float(f"{evaluation['FD-fashion']:.6g}")] and run[
            "metrics"
        ]["images"] == [16]
        assert (
            run["seconds"] > 0
            and run["machine"]["torch"]
            and len(run["commits"]) == 1
            and run["seed"] == 3
        )
    first = {run["losses"]["denoising"][0] for run in found["runs"]}
    assert len(first) == 1, (
        "common images, noise and weights have a common loss before the first update"
    )
    assert "/" not in {word[0] for word in text.replace('"', " ").split()}, "a path of this machine"

    table, picture = (tmp_path / f"layers.{suffix}" for suffix in ("md", "png"))
    before = table.read_text()
    fd = {run["name"]: run["metrics"]["FD-fashion"][0] for run in found["runs"]}
    for label, run, paper in (
        ("vanilla", "none", "33.02"),
        ("5", "sra2", "28.89"),
        ("2", "layers-2", "31.32"),
    ):
        (row,) = (
            line.split(" | ") for line in before.splitlines() if line.startswith(f"| {label} |")
        )
        assert row[1] == f"{fd[run]:.3f}" and row[-1] == f"*{paper}* |"
        assert row[2] == (f"{fd[run] - fd['none']:+.3f}" if run != "none" else "")
    table.unlink(), picture.unlink()
    assert (
        call(ablate, "--plot", tmp_path / "layers.json")[0] == 0 and picture.stat().st_size > 5000
    )
    assert study()[0] == 0 and len(in_process) == 3, "finished runs are not run again"
    assert table.read_text() == before
    code, out = study(steps=3)
    assert code == 2 and "--max-train-steps was 2, is 3" in out and len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--axis dept", "invalid choice: 'dept'"),
        ("", "--axis is missing"),
        ("--axis depth --seeds 1 0 1", "--seeds 1 0 1: each only once"),
        ("--axis depth --data-dir nowhere", "make demo"),
        ("--scale imagenet", "add --print"),
        ("--axis depth --out picture.png", "must end in .json"),
        ("--axis loss -- --align-depth 3", "-- --align-depth: that is for this command"),
        ("--axis loss -- --seed=3", "-- --seed=3: that is for this command"),
        ("--axis loss -- --learning-rat 3", "did you mean --learning-rate?"),
        ("--plot nowhere.json", "nowhere.json does not exist"),
        ("--plot old.json", "version 0"),
        ("--plot other.json", "but of convergence"),
        ("--plot torn.json", "damaged"),
        ("--plot empty.json --axis loss", "holds depth, not loss"),
        ("--plot empty.json", "no finished run of vanilla"),
    ],
)
def test_mistakes_are_one_line(call, tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    heads = {
        "old": {"study": "ablate", "version": 0},
        "other": {"study": "convergence", "version": results.VERSION},
    }
    for name, head in heads.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(head))
    (tmp_path / "torn.json").write_text("{")
    results.save(tmp_path / "empty.json", "ablate", {"axes": [{"name": "depth"}]}, [])
    code, out = call(ablate, *flags.split())
    assert code == 2 and told in out and len(out.splitlines()) == 1, out


def test_the_page_holds_the_table_of_the_result():
    found = results.load(ROOT / "docs/depth-loss.json", "ablate")
    page = (ROOT / "docs/ablations.md").read_text()
    assert panels.table(found).split("```bash")[0].strip() in page
    assert found["command"].removesuffix(" --jobs 2") in page
    runs = found["runs"]
    assert len(runs) == 30 and len({(run["name"], run["seed"]) for run in runs}) == 30
    assert len({str(run["commits"]) for run in runs}) == 1


def test_the_page_says_of_the_features_what_their_file_says():
    found, page = (
        json.loads((ROOT / "docs/features.json").read_text()),
        (ROOT / "docs/ablations.md").read_text(),
    )
    rows = found["checkpoints"][0]["results"]
    for t in (0.5, 0.1):
        best = max(row["accuracy"] for row in rows if row["t"] == t)
        own = next(
            row["accuracy"]
            for row in found["baselines"]
            if row["space"] == "x_t, flattened" and row["t"] == t
        )
        assert f"{best:.1%}" in page and f"{own:.1%}" in page
    assert found["command"].replace("python -m experiments.features", "") in page
