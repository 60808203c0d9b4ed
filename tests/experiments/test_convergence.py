"""The study: its runs differ in the method alone, its data are apart, it goes on, and its pages say what its JSON says."""

import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from benchmarks.run_steps import count_flops, time_runs
from common.cli import UserError
from common.machine import available_cores
from experiments import cells, convergence, results, study_data
from experiments.cells import Cell
from experiments.convergence import parse
from experiments.study_numbers import figures
from experiments.study_page import table
from experiments.study_plan import (
    METHODS,
    SCALES,
    candidates,
    choose,
    flags_of,
    of_study,
    read_knobs,
)
from models.flops import backbone_flops, head_flops
from models.sit import PRESETS, SiTConfig
from tests.helpers import ROOT, train_flags
from training.config import check_args, parse_args

STUDIES = sorted(path for path in (ROOT / "docs").glob("study-*.json") if "knobs" not in path.name)
OF_METHODS = ("align", "projector", "repa", "sra", "encoder_weights")


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    monkeypatch.setattr(convergence, "devices", lambda: ["0"])


def written(scale: str, *more: str):
    return parse(["--scale", scale, *more])


@pytest.mark.parametrize("scale", SCALES)
def test_runs_of_a_seed_differ_in_their_method_alone(scale):
    _, every = of_study(written(scale))
    assert [(cell.seed, cell.name) for cell in every] == [
        (seed, name) for seed in SCALES[scale].seeds for name in METHODS
    ]
    rest, methods = set(), set()
    for cell in every:
        values = {
            key: str(value)
            for key, value in vars(cell.args()).items()
            if key not in ("exp_name", "seed")
        }
        rest.add(
            tuple((key, value) for key, value in values.items() if not key.startswith(OF_METHODS))
        )
        methods.add(
            (cell.name, *(value for key, value in values.items() if key.startswith(OF_METHODS)))
        )
    assert len(rest) == 1 and len(methods) == len(METHODS)


@pytest.mark.parametrize(
    ("steps", "evaluations", "every", "log"), [(600, 4, 150, 20), (10, 4, 3, 10), (3, 8, 1, 3)]
)
def test_a_run_is_measured_as_often_as_was_asked_for_or_less(steps, evaluations, every, log):
    _, [cell, *_] = of_study(
        written("laptop", "--max-train-steps", str(steps), "--evaluations", str(evaluations))
    )
    args = cell.args()
    assert (args.eval_every, args.checkpointing_steps, args.log_every, args.max_train_steps) == (
        every,
        every,
        log,
        steps,
    )


def test_knobs_are_chosen_on_other_seeds():
    for scale in ("laptop", "gpu"):
        assert not {*SCALES[scale].seeds} & {*SCALES[scale].tune_seeds}
        found = results.load(ROOT / f"docs/study-{scale}-knobs.json", "convergence-knobs")
        assert {run["seed"] for run in found["runs"]} == {*SCALES[scale].tune_seeds}
        assert {run["name"] for run in found["runs"]} == {
            cell.name for cell in candidates(written(scale, "--tune"), [0])
        }
        assert (
            found["knobs"] == choose(found["runs"], found["metric"]) == read_knobs(written(scale))
        )


def test_the_block_with_the_lowest_mean_is_chosen():
    ends = {
        ("a", 2, 0): 3.0,
        ("a", 2, 1): 3.2,
        ("a", 4, 0): 2.0,
        ("a", 4, 1): 4.1,
        ("b-c", 2, 0): 5.0,
        ("b-c", 6, 0): 4.0,
    }
    runs = [
        {"name": f"{name}-block{k}", "seed": seed, "metrics": {"FD": [0.0, end]}}
        for (name, k, seed), end in ends.items()
    ]
    assert choose(runs, "FD") == {"a": 4, "b-c": 6}


def test_a_method_aligns_the_block_that_was_chosen_for_it():
    knobs = {"sra2-cosine": 3, "sra2-smooth_l1": 4, "sra": 5, "repa": 6}
    args = written("laptop")
    depth = {}
    for name in METHODS:
        flags = parse_args(
            "",
            [
                "--exp-name",
                "x",
                "--data-dir",
                "x",
                "--model",
                "SiT-Ti/2",
                *flags_of(name, knobs, args),
            ],
        )
        check_args(flags, 1)
        depth[name] = flags.align_depth
        assert set(flags.projector_width) <= {2 * PRESETS["SiT-Ti/2"]["width"]}
    assert depth.pop("vanilla") == [] and depth.pop("sra2+repa") == [3, 6]
    assert {name: [block] for name, block in knobs.items()} == depth


def test_imagenet_prints_the_clusters_commands(call):
    code, out = call(convergence, "--scale", "imagenet", "--gpus", 4, "--seeds", 3, 4)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert code == 0 and len(lines) == 2 * len(METHODS)
    for words in lines:
        at = words.index("train.py")
        assert words[:at] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "4"]
        args = parse_args("", words[at + 1 :])
        check_args(args, 4)
        assert (args.data_dir, args.eval_latents) == (
            [Path("data/imagenet256")],
            Path("data/imagenet256-val"),
        )
        assert (args.model, args.max_train_steps, args.eval_every, args.eval_samples) == (
            "SiT-B/2",
            400_000,
            50_000,
            50_000,
        )
        assert (args.eval_mode, args.eval_num_steps, args.eval_cfg_scale, args.ema_decay) == (
            "sde",
            250,
            1.0,
            [0.9999],
        )
        if "repa" in args.align:
            assert (args.repa_encoder, args.align_depth[-1], args.projector_width[-1]) == (
                None,
                8,
                2048,
            )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--scale is missing"),
        (("--scale", "gpu", "--seeds", "1", "1"), "--seeds 1 1: each only once"),
        (("--scale", "imagenet", "--tune"), "--tune is for --scale laptop and gpu"),
        (("--scale", "gpu", "--out", "x.txt"), "--out x.txt must end in .json"),
        (
            ("--scale", "gpu", "--", "--align-depth", "3"),
            "-- --align-depth: that is for this command to say",
        ),
        (("--scale", "laptop", "--tune", "--gather"), "--gather is for a study, not for --tune"),
        (("--plot", "docs/study.md"), "--plot docs/study.md must end in .json"),
        (
            ("--scale", "gpu", "--", "--encoder-depth", "3"),
            "-- --encoder-depth: that is for this command to say",
        ),
        (("--scale", "gpu", "--", "--seed=3"), "-- --seed=3: that is for this command to say"),
    ],
)
def test_mistakes_are_said_in_a_line(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse([*flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--knobs", "docs/study-gpu-knobs.json"), "is of --scale gpu: run --tune at this one"),
        (("--model", "SiT-S/2"), "is of --model SiT-Ti/2: run --tune at this one"),
        (
            ("--seeds", "9", "0"),
            "--seeds 0: --knobs docs/study-laptop-knobs.json was chosen on it; report on others",
        ),
    ],
)
def test_knobs_of_another_study_are_refused(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=re.escape(message) + "$"):
        read_knobs(written("laptop", "--knobs", "docs/study-laptop-knobs.json", *flags))


def test_knobs_without_a_method_are_refused(tmp_path):
    results.save(
        tmp_path / "k.json",
        "convergence-knobs",
        {"scale": "laptop", "model": "SiT-Ti/2", "knobs": {"sra": 2}},
        [],
    )
    given = "--knobs", str(tmp_path / "k.json")
    assert read_knobs(written("laptop", *given, "--methods", "sra")) == {"sra": 2}
    with pytest.raises(UserError, match=r"has no block for repa sra2-cosine: run --tune with it$"):
        read_knobs(written("laptop", *given, "--methods", "sra", "sra2-cosine", "repa"))


def test_a_gpus_study_needs_one(monkeypatch):
    monkeypatch.setattr(convergence, "devices", list)
    with pytest.raises(UserError, match=r"^--scale gpu needs a GPU, and there is none here"):
        written("gpu")
    assert written("gpu", "--gather").gather and written("laptop").jobs == available_cores()


def test_data_are_made_once_and_of_one_scale(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(study_data, "call", lambda *words: told.append([*map(str, words)]))
    monkeypatch.setattr(
        study_data,
        "images_of",
        lambda scale, folder, given: (folder / "train.zip", folder / "other.zip"),
    )
    study_data.prepare("laptop", tmp_path / "data", None, tmp_path)
    made = {
        words[words.index("--dest") + 1]: words[words.index("--source") + 1] for words in told[:2]
    }
    assert made == {
        f"{tmp_path}/data/train": f"{tmp_path}/data/train.zip",
        f"{tmp_path}/data/held-out": f"{tmp_path}/data/other.zip",
    }
    assert [words[0] for words in told[2:]] == [
        "preprocessing.encode_features"
    ] and f"{tmp_path}/data/train" in told[2]
    study_data.prepare("laptop", tmp_path / "data", None, tmp_path)
    assert len(told) == 3
    with pytest.raises(UserError, match=r"was made for --scale laptop: name another$"):
        study_data.prepare("gpu", tmp_path / "data", None, tmp_path)


def test_images_held_out_do_not_train(tmp_path):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        entries = [[f"{i % 3}/{i}.png", i % 3] for i in range(19)]
        for path, _ in entries:
            archive.writestr(path, f"the image {path}")
        archive.writestr("dataset.json", json.dumps({"labels": entries}))
    study_data.split(
        tmp_path / "whole.zip", tmp_path / "train.zip", tmp_path / "held-out.zip", every=5
    )
    train, held_out, whole = (
        zipfile.ZipFile(tmp_path / f"{name}.zip") for name in ("train", "held-out", "whole")
    )
    labels = {
        name: json.loads(archive.read("dataset.json"))["labels"]
        for name, archive in (("train", train), ("held-out", held_out), ("whole", whole))
    }
    assert (
        sorted(labels["train"] + labels["held-out"]) == sorted(labels["whole"])
        and len(labels["held-out"]) == 4
    )
    for archive, key in ((train, "train"), (held_out, "held-out")):
        assert set(archive.namelist()) == {path for path, _ in labels[key]} | {"dataset.json"}
        path = labels[key][-1][0]
        assert archive.read(path) == whole.read(path)


def test_missing_images_are_told_where_to_get(tmp_path):
    with pytest.raises(
        UserError,
        match=r"^--images .*train-images-idx3-ubyte.gz and .* apt-get install dataset-fashion-mnist",
    ):
        study_data.images_of("gpu", tmp_path, tmp_path / "nowhere")


def test_a_step_is_timed_and_its_arithmetic_counted(cache):
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = {
        name: parse_args("", train_flags(cache, Path("exps"), "x", "--align", name))
        for name in ("none", "sra2")
    }
    for args in flags.values():
        check_args(args, 1)
    seconds = time_runs(flags, rounds=2, calls=1, warm_up=0)
    assert all(0 < each["quartiles"][0] <= each["median"] for each in seconds.values()) and [
        *seconds
    ] == [*flags]
    network = SiTConfig(**PRESETS["SiT-Ti/2"], latent_size=8, num_classes=3)
    head = head_flops(network, {"width": 128, "out": 16, "layers": 5, "hidden": 64})
    assert count_flops(flags["none"]) == 3 * backbone_flops(network)
    assert count_flops(flags["sra2"]) == 3 * (backbone_flops(network) + head)


FAKE = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
flag = lambda name: words[words.index(name) + 1]
folder, seed, last = Path(flag("--output-dir")) / flag("--exp-name"), int(flag("--seed")), int(flag("--max-train-steps"))
folder.mkdir()
if (folder.parent / "broken").exists() and "sra2" in words and seed == 2:
    sys.exit("error: no luck")
(folder / "probe.json").write_text(json.dumps({"t": 0.5, "images": 9, "accuracy": {"3": 0.5 + 0.1 * ("sra2" in words)}}))
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, last + 1):
        images = step * int(flag("--batch-size"))
        print(json.dumps({"step": step, "images": images, "denoising": 1.0}), file=file)
        value = (9.0 + seed) / step * (0.5 if "sra2" in words else 1)
        told = {"FD-fashion": value, "class_agreement": 0.5, "held_out": value / 10, "evaluation": {"ema_decay": 0.99}}
        print(json.dumps({"step": step, "images": images} | told), file=file)
"""


def test_a_study_from_its_runs_to_its_pages(call, cache, tmp_path, monkeypatch):
    """Of runs that write what they are told to: half of vanilla's distance, with each seed, so twice its speed."""
    (tmp_path / "train.py").write_text(FAKE)
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    timed = []
    monkeypatch.setattr(
        convergence,
        "time_runs",
        lambda runs, *how: timed.append([*runs]) or {name: {"median": 0.1} for name in runs},
    )
    monkeypatch.setattr(
        convergence, "count_flops", lambda args: 100 + 25 * (args.align != ["none"])
    )
    data, runs = tmp_path / "data", tmp_path / "runs"
    data.mkdir()
    runs.mkdir()
    for name in ("train", "held-out"):
        (data / name).symlink_to(cache)
    (data / "ready.json").write_text('{"scale": "laptop"}')
    (data / "floor-5000.json").write_text('{"FD-fashion": 0.1, "class_agreement": 0.9}')
    (runs / "broken").touch()
    words = [
        "--scale",
        "laptop",
        "--data-dir",
        data,
        "--output-dir",
        runs,
        "--methods",
        "sra2-cosine",
        "--seeds",
        1,
        2,
    ]
    words += ["--max-train-steps", 4, "--out", tmp_path / "study.json"]
    code, out = call(convergence, *words)
    assert (
        code == 2
        and "1 of 4 runs failed (sra2-cosine-seed2): the same command tries them again" in out
    )
    assert "SRA 2, cosine (1 of 2 seeds)" in out
    (runs / "broken").unlink()
    asked = []
    monkeypatch.setattr(
        cells, "busy", lambda cell, folder: len(asked) < 3 and not asked.append(cell.run)
    )
    (runs / "sra2-cosine-seed2").rmdir()
    code, out = call(convergence, *words)
    assert code == 0 and asked == 3 * ["sra2-cosine-seed2"], out
    found = results.load(tmp_path / "study.json", "convergence")
    assert [(run["name"], run["seed"]) for run in found["runs"]] == [
        (name, seed) for seed in (1, 2) for name in ("vanilla", "sra2-cosine")
    ]
    told = figures(found)
    assert told["sra2-cosine difference"] == "-1.312 (-1.375 to -1.250)"  # half of 10/4 and of 11/4
    assert told["sra2-cosine speed-up"] == "2.00 (2.00 to 2.00)" and told[
        "sra2-cosine speed-up per FLOP"
    ].startswith("1.60")
    assert told["sra2-cosine probe"] == "60.0% (block 3)"
    assert (tmp_path / "study.md").read_text() == table(found) and (
        tmp_path / "study.png"
    ).stat().st_size > 10_000
    monkeypatch.setattr(convergence, "draw", lambda found, out: None)  # once is enough
    assert timed == [["vanilla", "sra2-cosine"]], "it is timed once"
    (runs / "seconds.json").write_text((runs / "seconds.json").read_text().replace("1e-3", "2e-3"))
    assert call(convergence, *words)[0] == 0 and len(timed) == 2, "and again for other flags"
    (
        runs / "sra2-cosine-seed1.json"
    ).unlink()  # as a cluster's runs are, and without the data, as on another machine
    (data / "train").unlink()
    code, out = call(convergence, *words, "--gather")
    again = results.load(tmp_path / "study.json", "convergence")
    assert code == 0 and again["training_images"] is None
    assert figures(again) == {
        key: value for key, value in told.items() if not key.endswith(" FLOP")
    }
    assert [run.get("finished") for run in again["runs"]] == [None, False, None, None]


def test_a_cluster_s_runs_are_gathered_as_far_as_they_are(call, tmp_path):
    for name, seed, steps in (
        ("vanilla", 0, (50, 100, 150)),
        ("sra2-cosine", 0, (50, 100)),
        ("sra", 0, ()),
    ):
        folder = tmp_path / "runs" / f"{name}-seed{seed}"
        folder.mkdir(parents=True)
        evaluation = {"evaluation": {"ema_decay": 0.9999}}
        rows = [{"step": 100, "images": 25600, "denoising": 1.0}]
        rows += [
            {"step": k, "images": 256000 * k, "FID": 99 / k, "held_out": 1.0} | evaluation
            for k in steps
        ]
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
    found = results.load(tmp_path / "study.json", "convergence")
    assert (found["metric"], found["floor"], [run["name"] for run in found["runs"]]) == (
        "FID",
        None,
        ["vanilla", "sra2-cosine"],
    )
    assert "2 of 2 runs have not reached their end: all are compared after 25,600,000 images" in out
    assert figures(found)["sra2-cosine difference"] == "+0.0000" and "| REPA | not run |" in out


def test_gathering_nothing_keeps_what_there_was(call, tmp_path):
    (tmp_path / "study.json").write_text("what there was")
    code, out = call(
        convergence,
        "--scale",
        "gpu",
        "--gather",
        "--output-dir",
        tmp_path / "no",
        "--out",
        tmp_path / "study.json",
    )
    assert code == 2 and out.endswith("no: no run of vanilla SiT has measured anything there yet\n")
    assert (tmp_path / "study.json").read_text() == "what there was"


def test_a_run_that_an_earlier_call_left_behind_is_waited_for(tmp_path):
    """When a study is killed by SIGKILL, its runs go on."""
    cell, pipe = Cell("a", 0, ()), subprocess.PIPE
    holder = "import sys; from pathlib import Path; from files import lock\n"
    holder += "with lock(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    (tmp_path / "a-seed0").mkdir()
    assert not cells.busy(cell, tmp_path) and not [*(tmp_path / "a-seed0").iterdir()]
    words = [sys.executable, "-c", holder, tmp_path / "a-seed0/.lock"]
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        assert cells.busy(cell, tmp_path)
        other.stdin.close()
    assert not cells.busy(cell, tmp_path)


def test_flags_are_compared_by_what_they_amount_to(tmp_path):
    """A flag given twice counts once, where it is --data-dir both."""
    then = ["--data-dir", "a", "--data-dir", "b", "--batch-size", "4", "--batch-size", "8"]
    (tmp_path / "a-seed0.json").write_text(json.dumps({"flags": then}))
    cells.check([Cell("a", 0, ("--batch-size", "8", "--data-dir", "a", "b"))], tmp_path)
    for now in (
        ("--data-dir", "b", "--batch-size", "8"),
        ("--data-dir", "a", "b", "--batch-size", "4"),
    ):
        with pytest.raises(UserError, match="a-seed0 was started with other flags"):
            cells.check([Cell("a", 0, now)], tmp_path)


def test_a_run_that_has_measured_nothing_is_not_gathered(tmp_path):
    (tmp_path / "a-seed0").mkdir()
    (tmp_path / "a-seed0/metrics.jsonl").write_text('{"step": 1, "images": 8, "denoising": 1.0}\n')
    cell = Cell("a", 0, tuple(train_flags(Path("x"), Path("x"), "a", "--align", "none")))
    assert results.gather([cell], tmp_path, unfinished=True) == []


def quoted(text: str) -> set[str]:
    """1.07 (1.04 to 1.10) and its like."""
    return set(re.findall(r"(?:[<>] )?[-+]?\d+\.\d+ \([^()]+ to [^()]+\)", text))


def test_the_pages_say_what_the_runs_measured():
    """Every table is that of its JSON, and every number with an interval, wherever it stands, is one of theirs."""
    page, readme = ((ROOT / name).read_text() for name in ("docs/study.md", "README.md"))
    cells: set[str] = set()
    assert STUDIES
    for path in STUDIES:
        found = results.load(path, "convergence")
        cells |= {
            *figures(
                found | {"runs": [run for run in found["runs"] if run.get("finished", True)]}
            ).values()
        }
        lines = table(found).splitlines()
        rows = [line for line in lines if line.startswith("|")]
        assert rows and not [row for row in rows if row not in page], path
        cells |= {cell.strip() for row in rows for cell in row.split("|")}
        assert f"({path.with_suffix('.png').name})" in page and path.with_suffix(".png").exists()
    for path in (ROOT / "docs").glob("study-*-knobs.json"):
        ends = results.last(results.load(path, "convergence-knobs")["runs"], "FD-fashion")
        for name in ("sra2-cosine", "sra2-smooth_l1"):
            assert (
                ", ".join(f"{end[0]:.3f}" for key, end in ends.items() if key.startswith(name))
                in page
            ), (path, name)
    assert quoted(readme) and quoted(readme) | quoted(page) <= cells
