"""Test the reproduction of the paper's tables: the data, the commands, the jobs and the report."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from accelerate.state import AcceleratorState

import sample_ddp
from checkpointing.storage import progress_digest
from common.cli import UserError
from evaluations import evaluate
from experiments import engine, paper, paper_tables, results, scheduler
from experiments.paper_page import draw_figure, format_tables
from experiments.paper_plan import PaperPlan
from experiments.paper_results import gather_tables
from experiments.paper_scales import DEMO_STEPS, SCALES
from experiments.paper_slurm import PURPOSES, format_submit_script
from experiments.paper_tables import FID, REFERENCE_SHA256, SCORE, TABLES, Row, Table
from experiments.tasks import Task
from models.sit import PRESETS
from tests.helpers import ROOT
from training.config import check_batch_size, parse_settings
from training.resume import build_args_json

PARSERS = {
    "train.py": parse_settings,
    "sample_ddp.py": sample_ddp.parse_args,
    "evaluations.evaluate": evaluate.parse_args,
}


def make_plan(folder: Path, *tables: Table, scale: str = "imagenet", **settings) -> PaperPlan:
    settings = {"seeds": (0,), "data_dir": folder / "data", "output_dir": folder} | settings
    return PaperPlan(scale, tables or tuple(TABLES.values()), **settings)


def find_program(words: list[str]) -> tuple[str, list[str]]:
    """Return the script or module of a command line, and its arguments."""
    start = next(k for k, word in enumerate(words) if word in PARSERS)
    return words[start], words[start + 1 :]


def test_unknown_values_and_missing_methods_are_marked():
    rows = [row for table in TABLES.values() for row in table.rows]
    unknown = {row.label for row in rows for value in row.numbers.values() if value is None}
    assert unknown == {"aligned block: 3", "timesteps aligned: [0.5, 1]"}
    assert {row.label for row in rows if row.run is None} == {
        "VA-VAE",
        "VA-VAE + SRA 2",
        "REG, 800 epochs",
    }
    assert all(row.note for row in rows if row.run is None or None in row.numbers.values())
    assert None in paper_tables.PAPER_GUIDANCE
    assert {row.steps for row in rows if row.run} == {*DEMO_STEPS}
    assert max(DEMO_STEPS.values()) <= 100
    assert [*DEMO_STEPS.values()] == sorted({*DEMO_STEPS.values()})


def test_values_in_the_readme_are_those_of_the_tables():
    readme = (ROOT / "README.md").read_text()
    for number, label, value in (
        (2, "SiT-B/2", "33.0"),
        (2, "SiT-B/2 + SRA 2", "28.9"),
        (2, "SiT-L/2", "18.8"),
        (2, "SiT-L/2 + SRA 2", "14.3"),
        (3, "SiT, 1400 epochs", "2.06"),
        (3, "SRA 2, 800 epochs", "1.52"),
    ):
        (row,) = (row for row in TABLES[number].rows if row.label == label)
        assert row.numbers[FID] == float(value) and value in readme


@pytest.mark.parametrize("scale", SCALES)
def test_commands_are_valid_and_runs_are_shared(call, scale, tmp_path):
    gpus = 8 if scale == "imagenet" else 1
    flags = ["--scale", scale, "--gpus", gpus, "--output-dir", tmp_path, "--seeds", 3]
    code, out = call(paper, "--print", *flags)
    lines = [shlex.split(line) for line in out.splitlines() if line and not line.startswith("#")]
    assert code == 0
    assert ("preprocessing.encode_latents" in lines[0]) and "--keep-images" in lines[0]
    names: dict[str, list] = {program: [] for program in PARSERS}
    checkpoints: dict[Path, set] = {}
    for words in lines:
        if not {*words} & {*PARSERS}:
            continue
        program, arguments = find_program(words)
        parsed = PARSERS[program](arguments)
        names[program].append(parsed)
        if program == "train.py":
            check_batch_size(parsed.loop, gpus)
            assert parsed.run.seed == 3
        if program == "sample_ddp.py":
            checkpoint = parsed.checkpoint.ckpt
            checkpoints.setdefault(checkpoint.parents[1], set()).add(int(checkpoint.name))
    # 12 runs of Table 1, two of SiT-L/2 and five of SiT-XL/2, which several rows share.
    assert len(names["train.py"]) == 19
    assert len(names["sample_ddp.py"]) == len(names["evaluations.evaluate"]) == 28
    for parsed in names["train.py"]:
        steps = checkpoints[parsed.run.folder]
        assert max(steps) == parsed.loop.max_train_steps
        for step in steps:  # the checkpoint is saved and kept
            is_last = step == max(steps)
            save = parsed.checkpoint
            assert is_last or step % math.gcd(save.milestone_steps, save.checkpointing_steps) == 0
            assert is_last or step % save.milestone_steps == 0
    guided = [config for config in names["sample_ddp.py"] if config.sampler.cfg_scale > 1]
    assert len(guided) == 5
    if scale == "imagenet":
        batches = {parsed.loop.batch_size for parsed in names["train.py"]}
        samplers = {(c.sampler.solver, c.sampler.num_steps) for c in names["sample_ddp.py"]}
        assert batches == {256} and samplers == {("euler-maruyama", 250)}


def test_blocks_of_the_demo_keep_their_relative_depth(tmp_path):
    plan = make_plan(tmp_path, scale="demo")
    original = make_plan(tmp_path)
    for demo, real in zip(plan.runs, original.runs):
        settings = demo.cell.parse_settings()
        assert settings.model.model == "SiT-Ti/2"
        depth = PRESETS[real.run.model]["depth"]
        pairs = zip(settings.alignments, real.cell.parse_settings().alignments, strict=True)
        for a, b in pairs:
            assert (a.method, a.loss, a.weight) == (b.method, b.loss, b.weight)
            assert abs(a.block / 6 - b.block / depth) <= 1 / 12 or a.block == 1


# The content of a metrics.json that agrees with the paper's protocol, for SiT-B/2 at 400K steps.
CONFORMING = {
    "metrics": {"FID": 30.0, "sFID": 6.5, "inception_score": 60.0},
    "intervals": {"FID": [29.0, 31.0]},
    "count": 50_000,
    "reference": "x/VIRTUAL_imagenet256_labeled.npz",
    "reference_sha256": REFERENCE_SHA256,
    "features": {"inception": "..."},
    "sampling": {
        "model": "SiT-B/2",
        "step": 400_000,
        "images_seen": 102_400_000,
        "ema_decay": 0.9999,
        "solver": "euler-maruyama",
        "num_steps": 250,
        "cfg_scale": 1.0,
        "guidance_low": 0.0,
        "guidance_high": 1.0,
        "labels": "random",
        "vae": "stabilityai/sd-vae-ft-mse",
    },
}


def write_metrics(plan: PaperPlan, key: tuple, fid: float, **changes) -> None:
    """Write a metrics.json that agrees with the protocol, except for the given entries."""
    evaluation = plan.evaluations[key]
    content = json.loads(json.dumps(CONFORMING))
    content["metrics"]["FID"] = fid
    content["sampling"] |= {
        "model": evaluation.run.run.model,
        "step": evaluation.step,
        "images_seen": evaluation.step * 256,
    }
    for name, value in changes.items():
        (content["sampling"] if name in content["sampling"] else content)[name] = value
    evaluation.metrics_path.parent.mkdir(exist_ok=True)
    evaluation.metrics_path.write_text(json.dumps(content))


def write_log(plan: PaperPlan, name: str, rows: list[dict]) -> None:
    """Write the log of a run with seed 0."""
    (planned,) = (planned for planned in plan.runs if planned.cell.run_name == f"{name}-seed0")
    planned.folder.mkdir()
    text = "".join(json.dumps({"schema": 3, **row}) + "\n" for row in rows)
    (planned.folder / "metrics.jsonl").write_text(text)


def get_row(result: dict, number: int, label: str, metric: str = FID, steps: int = 0) -> dict:
    (table,) = (table for table in result["tables"] if table["number"] == number)
    rows = [row for row in table["rows"] if row["label"] == label and row["metric"] == metric]
    return next(row for row in rows if steps in (0, row["steps"]))


def test_values_have_the_interval_that_their_runs_allow(tmp_path):
    key = ("b2-none", 0, 400_000, False)
    plan = make_plan(tmp_path, TABLES[2])
    write_metrics(plan, key, 32.0)
    row = get_row(gather_tables(plan, 8, [10.0]), 2, "SiT-B/2")
    assert (row["ours"], row["difference"]) == (32.0, pytest.approx(-1.0))
    assert row["interval"] == [29.0, 31.0] and row["interval_over"] == "images"
    assert row["deviations"] == [] and row["progress"] == 1
    write_metrics(plan, key, 32.0, intervals={})
    row = get_row(gather_tables(plan, 8, [10.0]), 2, "SiT-B/2")
    assert row["interval"] is None and row["interval_over"] is None

    plan = make_plan(tmp_path, TABLES[2], seeds=(0, 1, 2))
    write_metrics(plan, ("b2-none", 1, 400_000, False), 34.0)
    row = get_row(gather_tables(plan, 8, [10.0]), 2, "SiT-B/2")
    # t(0.975, 1) = 12.706, and the standard error of 32 and 34 is 1.
    assert row["interval"] == pytest.approx([33 - 12.706, 33 + 12.706], abs=1e-3)
    assert row["interval_over"] == "seeds" and row["seeds_done"] == 2
    assert row["progress"] == pytest.approx(2 / 3, abs=1e-4)

    # The metrics of a seed may lack the value of a row.
    write_metrics(plan, ("b2-none", 2, 400_000, False), 30.0, metrics={"sFID": 6.5})
    write_metrics(plan, ("b2-none", 1, 400_000, False), 30.0, metrics={"sFID": 6.5})
    write_metrics(plan, key, 32.0)
    row = get_row(gather_tables(plan, 8, [10.0]), 2, "SiT-B/2")
    assert row["values"] == [32.0] and row["interval_over"] == "images"

    # Samples without the JSON file next to them have no record of the sampling.
    write_metrics(plan, key, 32.0, sampling=None)
    result = gather_tables(plan, 8, [10.0])
    assert "model unknown instead of SiT-B/2" in get_row(result, 2, "SiT-B/2")["deviations"]
    assert not result["epochs_to_fid"]


@pytest.mark.parametrize(
    ("changes", "deviation"),
    [
        ({"count": 5000}, "samples 5,000 instead of 50,000"),
        ({"solver": "heun"}, "solver heun instead of euler-maruyama"),
        ({"num_steps": 50}, "sampling steps 50 instead of 250"),
        ({"cfg_scale": 1.5}, "guidance scale 1.5 instead of 1.0"),
        ({"labels": "balanced"}, "labels balanced instead of random"),
        ({"vae": "/a/b/vae"}, "VAE b/vae instead of an SD-VAE"),
        ({"reference_sha256": "0"}, "reference x/VIRTUAL_imagenet256_labeled.npz instead of ADM's"),
        ({"features": {"fashion": "0"}}, "features fashion instead of inception"),
        ({"model": "SiT-S/2"}, "model SiT-S/2 instead of SiT-B/2"),
        ({"step": 8}, "steps 8 instead of 400,000"),
        ({"images_seen": 8}, "images seen 8 instead of 102,400,000"),
        ({"ema_decay": 0.9}, "EMA decay 0.9 instead of 0.9999"),
    ],
)
def test_each_deviation_from_the_protocol_is_named(tmp_path, changes, deviation):
    plan = make_plan(tmp_path, TABLES[2])
    write_metrics(plan, ("b2-none", 0, 400_000, False), 32.0, **changes)
    assert get_row(gather_tables(plan, 8, [10.0]), 2, "SiT-B/2")["deviations"] == [deviation]


def test_additional_flags_of_the_runs_are_a_deviation(tmp_path):
    plan = make_plan(tmp_path, TABLES[2], train_flags=("--batch-size", "128"))
    write_metrics(plan, ("b2-none", 0, 400_000, False), 32.0)
    row = get_row(gather_tables(plan, 8, [10.0]), 2, "SiT-B/2")
    assert row["deviations"] == ["flags of train.py: --batch-size 128"]
    assert get_row(gather_tables(plan, 8, [10.0]), 2, "SiT-L/2")["deviations"] == []


def test_guidance_and_differences_from_another_run(tmp_path):
    plan = make_plan(tmp_path, TABLES[2], TABLES[3])
    write_metrics(plan, ("xl2-sra2", 0, 4_000_000, True), 1.6, cfg_scale=1.8, guidance_high=0.7)
    write_metrics(plan, ("xl2-repa", 0, 200_000, False), 11.0)
    result = gather_tables(plan, 8, [10.0])
    score = get_row(result, 3, "SRA 2, 800 epochs", SCORE)
    assert score["ours"] == 60.0 and score["interval"] is None
    assert score["deviations"] == [
        "guidance scale and interval of the paper not known (here 1.8 from 0.0 to 0.7)"
    ]
    label = "REPA + SRA 2, minus REPA"
    assert get_row(result, 2, label, steps=200_000)["ours"] is None
    write_metrics(plan, ("xl2-sra2-repa", 0, 200_000, False), 9.5)
    row = get_row(gather_tables(plan, 8, [10.0]), 2, label, steps=200_000)
    assert (row["ours"], row["paper"], row["interval"]) == (-1.5, -1.9, None)


def test_epochs_and_gpu_hours_follow_from_the_log(tmp_path):
    """FID 100 / epochs reaches 20 after five epochs. The other speeds follow from the FLOPs."""
    plan = make_plan(tmp_path, TABLES[2])
    epoch = 1_281_167
    rows: list[dict] = [
        {"step": k * 5000, "images": k * epoch, "images_per_s": rate}
        for k, rate in ((1, 900.0), (2, 1000.0), (3, 1100.0))
    ]
    for k in (2, 4, 8):
        evaluation = {"ema_decay": 0.9999, "samples": 50_000, "cfg_scale": 1.0}
        rows.append(
            {"step": k * 5000, "images": k * epoch, "FID": 100 / k, "evaluation": evaluation}
        )
    write_log(plan, "b2-sra2", rows)
    result = gather_tables(plan, 4, [60.0, 20.0, 5.0])
    (entry,) = result["epochs_to_fid"]
    assert entry["run"] == "b2-sra2" and entry["reached"]["20"] == pytest.approx([5.0, 5.0])
    assert entry["reached"]["60"] == [0.0, 2.0] and entry["reached"]["5"] == [8.0, None]

    by_name = {run["run"]: run for run in result["progress"]}
    run = by_name["b2-sra2"]
    assert run["steps_done"] == 15_000
    hours = (400_000 - 15_000) * 256 / 1000 / 3600 * 4
    assert run["remaining_gpu_hours"] == pytest.approx(hours, rel=1e-5)
    other = by_name["b2-none"]
    ratio = 1000 / other["images_per_s"]
    assert 0.85 < ratio < 0.95 and other["rate_from"] == "the same model"
    expected = 400_000 * 256 / 1000 / 3600 * 4 * ratio
    assert other["remaining_gpu_hours"] == pytest.approx(expected, rel=1e-5)
    assert by_name["xl2-none"]["rate_from"] == "other models"
    # Training counts 90% of the progress.
    progress = get_row(result, 2, "SiT-B/2 + SRA 2")["progress"]
    assert progress == pytest.approx(0.9 * 15_000 / 400_000, abs=1e-4)
    total = math.fsum(run["remaining_gpu_hours"] for run in result["progress"])
    assert result["remaining_gpu_hours"] == pytest.approx(total)

    # A run of more tables may have been trained further than the selected tables need.
    write_log(plan, "b2-none", [{"step": 500_000, "images": 1, "images_per_s": 1000.0}])
    result = gather_tables(plan, 4, [60.0])
    (run,) = (run for run in result["progress"] if run["run"] == "b2-none")
    assert run["remaining_gpu_hours"] == 0
    assert get_row(result, 2, "SiT-B/2")["progress"] == 0.9


def test_saved_checkpoints_are_progress(tmp_path):
    """The log may be missing, for example because only the checkpoints were copied."""
    plan = make_plan(tmp_path, TABLES[2])
    (tmp_path / "xl2-repa-seed0/checkpoints/0200000").mkdir(parents=True)
    result = gather_tables(plan, 4, [60.0])
    (run,) = (run for run in result["progress"] if run["run"] == "xl2-repa")
    assert run["steps_done"] == 200_000
    assert run["remaining_gpu_hours"] is result["remaining_gpu_hours"] is None  # no known speed


def test_epochs_are_computed_from_comparable_values(tmp_path):
    """Guided samples and evaluations with other numbers of samples are ignored."""
    plan = make_plan(tmp_path, TABLES[2], TABLES[3], seeds=(0, 1))
    write_metrics(plan, ("xl2-sra2", 0, 1_000_000, False), 10.0)
    write_metrics(plan, ("xl2-sra2", 0, 4_000_000, True), 1.5)
    protocol = {"samples": 50_000, "cfg_scale": 1.0}
    rows: list[dict] = [{"step": 1, "images": 256, "images_per_s": 9.0}]
    for epochs, fid, changes in (
        (100, 20.0, {}),
        (120, 1.0, {"samples": 5000}),
        (140, 1.0, {"cfg_scale": 1.5}),
        (160, 12.0, {}),
    ):
        images = epochs * 1_281_167
        rows.append({"step": 1, "images": images, "FID": fid, "evaluation": protocol | changes})
    rows.append({"step": 1, "images": 256_000_000, "FID": 99.0, "evaluation": protocol})
    write_log(plan, "xl2-sra2", rows)
    (entry,) = gather_tables(plan, 8, [15.0])["epochs_to_fid"]
    assert entry["epochs"] == pytest.approx([100, 160, 256_000_000 / 1_281_167])
    assert entry["values"] == [20.0, 12.0, 10.0]

    # Seeds are averaged at the points that all of them have.
    write_metrics(plan, ("xl2-sra2", 1, 1_000_000, False), 11.0)
    (entry,) = gather_tables(plan, 8, [15.0])["epochs_to_fid"]
    assert entry["epochs"] == [256_000_000 / 1_281_167] and entry["values"] == [10.5]


def test_costs_are_counted_and_compared(tmp_path):
    plan = make_plan(tmp_path, TABLES[5])
    result = gather_tables(plan, 8, [10.0])
    rows = {row["quantity"]: row for row in result["tables"][0]["rows"]}
    assert rows["head_parameters"]["ours"] == pytest.approx(18.6, abs=0.05)
    assert rows["more_forward_flops"]["ours"] == pytest.approx(0.04, abs=0.001)
    assert rows["relative_speed"]["ours"] is None
    cost = {
        "model": "SiT-Ti/2",
        "batch_size": 256,
        "machine": {"device": "a laptop"},
        "results": {"none": {"step_s": {"median": 0.9}}, "sra2": {"step_s": {"median": 1.0}}},
    }
    plan.cost_path.write_text(json.dumps(cost))
    rows = {r["quantity"]: r for r in gather_tables(plan, 8, [1.0])["tables"][0]["rows"]}
    assert rows["relative_speed"]["ours"] == pytest.approx(0.9)
    assert rows["relative_speed"]["difference"] is None
    assert rows["relative_speed"]["deviations"] == [
        "model SiT-Ti/2 instead of SiT-XL/2",
        "a laptop instead of an H100",
    ]
    assert result["remaining_gpu_hours"] == 0  # Table 5 needs no training

    # With the protocol of the paper, the difference is computed.
    cost |= {"model": "SiT-XL/2", "machine": {"device": "NVIDIA H100 80GB HBM3"}}
    plan.cost_path.write_text(json.dumps(cost))
    rows = {r["quantity"]: r for r in gather_tables(plan, 8, [1.0])["tables"][0]["rows"]}
    assert rows["relative_speed"]["deviations"] == []
    assert rows["relative_speed"]["difference"] == pytest.approx(0.9 - 7.2 / 8.1)

    without_machine = {key: value for key, value in cost.items() if key != "machine"}
    for damaged in (without_machine, cost | {"results": {"none": {}, "sra2": {}}}):
        plan.cost_path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"table-5.json is not a complete result .*; delete"):
            gather_tables(plan, 8, [1.0])


def test_report_shows_the_existing_values_and_is_regenerated(call, tmp_path):
    plan = make_plan(tmp_path, TABLES[1], TABLES[2])
    for key, fid in (
        (("b2-none", 0, 400_000, False), 32.0),
        (("l2-none", 0, 400_000, False), 19.0),
    ):
        write_metrics(plan, key, fid, **({"count": 10_000} if key[0] == "l2-none" else {}))
    out_path = tmp_path / "paper.json"
    flags = ["--output-dir", tmp_path, "--data-dir", tmp_path / "data", "--tables", 1, 2]
    code, out = call(paper, "--gather", *flags)
    assert code == 0, out
    page = (tmp_path / "paper.md").read_text()
    assert (
        "| vanilla SiT | 400K | FID | 33.02 | 32.00 | 29.00 to 31.00 (images of one run) | -1.02 "
        "| 100% | yes |"
    ) in page
    assert "| 18.80 | 19.00 |" in page and "no: samples 10,000 instead of 50,000 |" in page
    assert "| aligned block: 3 | 400K | FID | not known | not measured |" in page
    assert "| VA-VAE | 400K | FID | 4.90 | reference only |" in page
    assert "NO EVIDENCE" not in page
    figure = (tmp_path / "paper.png").read_bytes()
    (tmp_path / "paper.md").unlink()
    (tmp_path / "paper.png").unlink()
    assert call(paper, "--plot", out_path)[0] == 0
    assert (tmp_path / "paper.md").read_text() == page
    assert (tmp_path / "paper.png").read_bytes() == figure


def test_report_states_what_is_estimated_or_not_known(tmp_path):
    plan = make_plan(tmp_path, TABLES[2], seeds=(0, 1))
    for seed, fid in ((0, 32.0), (1, 34.0)):
        write_metrics(plan, ("b2-none", seed, 400_000, False), fid)

    def format_page() -> list[str]:
        settings = gather_tables(plan, 8, [40.0, 30.0])
        results.save_result(tmp_path / "paper.json", "paper", settings, [])
        result = results.load_result(tmp_path / "paper.json", "paper")
        return format_tables(result).splitlines()

    lines = format_page()
    assert any("| 33.00 | 20.29 to 45.71 (2 seeds) |" in line for line in lines)
    assert "| b2-none | 1 | < 79.93 | > 79.93 |" in lines
    assert "| b2-none | 0 | 0 of 400,000 | not measured | not known |" in lines
    assert any("needs **an unknown number of GPU-hours**" in line for line in lines)
    write_log(plan, "b2-none", [{"step": 400_000, "images": 1, "images_per_s": 1000.0}])
    lines = format_page()
    assert "| b2-none | 0 | 400,000 of 400,000 | 1000 | 0 |" in lines
    pattern = r"\| b2-none \| 1 \| 0 of 400,000 \| 1000 \(estimated from the same model\) \| 228 \|"
    assert any(re.fullmatch(pattern, line) for line in lines)


def test_flags_replace_the_defaults_of_the_scale(call):
    flags = "--images a --reference b.npz --cfg-scale 2.5 --guidance-low 0.1 --guidance-high 0.6"
    code, out = call(paper, "--print", "--tables", 3, *flags.split())
    assert code == 0
    assert "--source a " in out and "--reference b.npz" in out and "VIRTUAL" not in out
    assert out.count("--cfg-scale 2.5 --guidance-low 0.1 --guidance-high 0.6") == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "no action is selected; pass --print, --slurm DIR, --run or --gather"),
        ("--print --tables 4", "invalid choice: 4"),
        ("--print --cfg-scale 0.5", "--cfg-scale must be at least 1"),
        ("--print --gpus 7", "--batch-size 256 (global) is not a multiple of 7"),
        ("--print -- --align none", "-- --align: this flag is set by the study"),
        ("--print -- --projector-layers 2", "-- --projector-layers: this flag is set by"),
        ("--print -- --repa-encoder x", "-- --repa-encoder: this flag is set by the study"),
        ("--print -- --milestone-steps 9", "-- --milestone-steps: this flag is set by the study"),
        ("--gather --out x.txt", "--out x.txt must end in .json"),
    ],
)
def test_user_errors_are_one_line(call, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    code, out = call(paper, *flags.split())
    assert code == 2 and message in out and len(out.splitlines()) == 1, out


def test_runs_need_as_many_gpus_as_are_requested(call, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "list_visible_gpus", lambda: ["2", "3"])
    monkeypatch.setattr(paper, "run_tasks", lambda tasks, folder, jobs, gpus: {})
    flags = ["--run", "--tables", 5, "--output-dir", tmp_path]
    code, out = call(paper, *flags)
    assert code == 2 and "--gpus 8 is more than the 2 visible GPUs; pass --gpus 2" in out
    assert call(paper, *flags, "--gpus", 2)[0] == 0
    assert call(paper, "--print", "--tables", 5)[0] == 0  # the commands may run elsewhere
    assert paper.parse(["--run", "--gpus", "1"])[0].jobs == 2
    assert paper.parse(["--run", "--gpus", "2"])[0].jobs == 1


def test_failed_tasks_are_counted_among_all_tasks(call, tmp_path, monkeypatch):
    """One cache, one encoder, 19 runs, 28 samples, 28 evaluations and one benchmark."""
    monkeypatch.setattr(paper, "run_tasks", lambda *_: {"encode": "no luck", "encoder": "no luck"})
    monkeypatch.setattr(paper, "run_in_this_process", lambda *_: {"sample-b2-none": "no luck"})
    code, out = call(paper, "--scale", "demo", "--run", "--output-dir", tmp_path)
    assert code == 2 and "3 of 78 tasks failed (encode, encoder, sample-b2-none); rerun" in out


# Tasks.
COPY = "import sys; from pathlib import Path; Path(sys.argv[2]).write_text(sys.argv[1])"


def test_tasks_start_when_their_inputs_exist(tmp_path, monkeypatch, capsys):
    """The tasks are given in the reverse order. The failed task blocks only one other task."""
    (tmp_path / "copy.py").write_text(COPY)
    (tmp_path / "fail.py").write_text("raise SystemExit('error: no luck')")
    monkeypatch.setattr(scheduler, "ROOT", tmp_path)
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(scheduler, "list_visible_gpus", list)
    (tmp_path / "idle.py").touch()
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    tasks = [
        Task("last", ("copy.py", "2", str(b)), (a,), (b,)),
        Task("blocked", ("copy.py", "4", str(d)), (c,), (d,)),
        Task("failing", ("fail.py",), (), (c,)),
        Task("first", ("copy.py", "1", str(a)), (), (a,)),
        Task("idle", ("idle.py",), (), (e,)),
    ]
    errors = scheduler.run_tasks(tasks, tmp_path, jobs=2)
    assert errors == {
        "idle": f"has ended without creating {e}",
        "failing": "error: no luck",
        "blocked": f"needs {c}, which does not exist",
    }
    assert (a.read_text(), b.read_text()) == ("1", "2")
    finished = {task.name for task in tasks if task.read_record(tmp_path).get("finished")}
    assert finished == {"first", "last"}
    assert capsys.readouterr().err.startswith("2 failed: 2 of 5 task in ")


def test_progress_of_training_runs_is_a_number_of_images(tmp_path, monkeypatch, capsys):
    """Of three runs of 100 images, one is finished, one stopped after 40, and one has no log."""
    (tmp_path / "fail.py").write_text("raise SystemExit('error: no luck')")
    monkeypatch.setattr(scheduler, "ROOT", tmp_path)
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(scheduler, "list_visible_gpus", list)
    tasks = []
    for name in ("finished", "stopped", "new"):
        run = tmp_path / name
        run.mkdir()
        outputs = (run / "checkpoint",)
        tasks.append(Task(name, ("fail.py",), outputs=outputs, run=run, total_images=100))
    (tmp_path / "finished/checkpoint").touch()
    (tmp_path / "stopped/metrics.jsonl").write_text('{"step": 4, "images": 40}\n')
    scheduler.run_tasks(tasks, tmp_path, jobs=1)
    # The images of earlier calls do not count for the rate.
    line = capsys.readouterr().err
    assert re.fullmatch(r"1 of 3 tasks, 2 failed: 140 of 300 img in \S+, (0\.00|\?)img/s\n", line)


def test_failed_task_in_this_process_does_not_affect_the_others(tmp_path, monkeypatch):
    called = []

    def fake_call(command):
        called.append(command[0])
        if command[0] == "failing":
            raise UserError("no luck")

    monkeypatch.setattr(engine, "call_command", fake_call)
    missing = tmp_path / "missing"
    (tmp_path / "done").touch()
    tasks = [
        Task("failing", ("failing",), outputs=(missing,)),
        Task("blocked", ("blocked",), inputs=(missing,)),
        Task("finished", ("finished",), outputs=(tmp_path / "done",)),
        Task("last", ("last",), outputs=(missing,)),
    ]
    errors = engine.run_in_this_process(tasks, tmp_path)
    assert errors == {"failing": "no luck", "blocked": f"needs {missing}, which does not exist"}
    assert called == ["failing", "last"]


def test_commands_on_several_gpus_use_a_launcher(monkeypatch):
    task = Task("a", ("-m", "evaluations.evaluate", "x"))
    words = scheduler.make_command(task, 4)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[3:] == ["--standalone", "--nproc_per_node", "4", "-m", *task.command[1:]]
    (cost,) = make_plan(Path("x"), TABLES[5]).list_cost_tasks()  # times a single process
    assert scheduler.make_command(cost, 4)[1:3] == ["-m", "benchmarks.cost"]
    assert cost.format_command(4).startswith("python -m benchmarks.cost")
    monkeypatch.setattr(scheduler, "list_visible_gpus", lambda: [*"0123"])
    slots = scheduler.Scheduler([], Path("x"), jobs=2, gpus_per_task=2)
    assert [slots.select_gpus(k) for k in (0, 1)] == [["0", "1"], ["2", "3"]]


# A fake sbatch, which checks the dependency of an array, runs each of its tasks, and runs a task
# again if it is requeued. The numbers of the succeeded jobs are recorded.
SBATCH = """
import os, re, subprocess, sys
from pathlib import Path
records = Path(os.environ["RECORDS"])
*options, script = sys.argv[1:]
text = Path(script).read_text()
dependency = re.search("afterok:(\\\\S+)", " ".join(options))
if dependency:
    job = dependency[1]
    assert (records / f"ok-{job}").exists(), f"{script}: {job} has not succeeded"
assert "#SBATCH --requeue" in text and "#SBATCH --signal=B:USR1@120" in text
(array,) = (o.removeprefix("--array=") for o in options if o.startswith("--array="))
job = str(100 + len(list(records.glob("job-*"))))
stage = Path(script).stem
(records / f"job-{job}").write_text(f"{stage} after {dependency[1] if dependency else None}")
ok = True
for index in array.split(","):
    for attempt in range(3):
        environment = os.environ | {
            "SLURM_ARRAY_TASK_ID": index, "SLURM_JOB_ID": f"{job}{index}",
            "SLURM_JOB_NODELIST": "node1", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_CPUS_PER_TASK": "1",
        }
        code = subprocess.run(["bash", script], env=environment, stdout=2).returncode
        requeued = records / f"requeue-{job}{index}"
        if not requeued.exists():
            break
        requeued.unlink()
    if code == 0:
        (records / f"ok-{job}_{index}").touch()
    ok &= code == 0
if ok:
    (records / f"ok-{job}").touch()
print(f"{job};cluster")
"""
SRUN = 'shift\nexec env SLURM_PROCID=0 SLURM_LOCALID=0 "$@"\n'
SCONTROL = '[ "$1" = requeue ] && touch "$RECORDS/requeue-$2" || echo node1\n'
# A fake python, which records the command, and creates the outputs. The first run of train.py is
# stopped with code 75, and resumes when it is requeued.
PYTHON = """
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
with open(Path(os.environ["RECORDS"]) / "commands", "a") as file:
    file.write(json.dumps(words) + "\\n")
get = lambda name: words[words.index(name) + 1]
if words[0] == "train.py":
    run = Path(get("--output-dir")) / get("--exp-name")
    if not run.exists():
        run.mkdir(parents=True)
        sys.exit(75)
    for step in (50, 80, int(get("--max-train-steps"))):
        (run / f"checkpoints/{step:07d}").mkdir(parents=True, exist_ok=True)
elif words[0] == "sample_ddp.py":
    assert Path(get("--ckpt")).exists()
    folder = Path(get("--sample-dir"))
    folder.mkdir(exist_ok=True)
    (folder / (get("--name") + ".npz")).touch()
elif "encode_latents" in words[1]:
    (Path(get("--dest")) / "images").mkdir(parents=True)
    (Path(get("--dest")) / "manifest.json").touch()
elif "evaluate" in words[1]:
    assert Path(words[2]).exists()
    Path(words[2]).with_suffix(".metrics.json").write_text("{}")
"""


def test_slurm_scripts_run_all_commands_in_order(call, tmp_path):
    programs, records = tmp_path / "bin", tmp_path / "records"
    programs.mkdir()
    records.mkdir()
    python = f"#!{sys.executable} -S\n"
    for name, text in (
        ("sbatch", python + SBATCH),
        ("python", python + PYTHON),
        ("srun", "#!/bin/bash\n" + SRUN),
        ("scontrol", "#!/bin/bash\n" + SCONTROL),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "RECORDS": str(records),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    folder = tmp_path / "my jobs"
    paths = ["--data-dir", tmp_path / "data", "--output-dir", tmp_path / "runs"]
    flags = ["--scale", "demo", "--tables", 3, *paths]
    submit = ["bash", folder / "submit.sh"]

    def read_commands() -> list[list[str]]:
        return [json.loads(line) for line in (records / "commands").read_text().splitlines()]

    assert call(paper, *flags, "--slurm", folder)[0] == 0
    # The weights of REPA's encoder are written by a command that the fake python ignores.
    subprocess.run(submit, cwd=ROOT, env=environment, check=True, timeout=120)
    commands = read_commands()
    programs_run = [words[0] if words[0] != "-m" else words[1] for words in commands]
    assert programs_run[:2] == ["preprocessing.encode_latents", "experiments.efficientnet_weights"]
    submissions = [path.read_text() for path in sorted(records.glob("job-*"))]
    assert submissions == ["encode after None", "train after 100"] + [
        line
        for k in range(4)
        for line in (f"sample after 101_{k}", f"evaluate after {102 + 2 * k}")
    ]
    # Each of the four runs is stopped once and requeued. Two checkpoints belong to one run.
    assert programs_run.count("train.py") == 2 * 4
    assert programs_run.count("sample_ddp.py") == programs_run.count("evaluations.evaluate") == 5
    printed = call(paper, *flags, "--print")[1].splitlines()
    expected = {tuple(shlex.split(line)[1:]) for line in printed if line.startswith("python")}
    assert {tuple(words) for words in commands} == expected

    # Finished commands are not submitted again. A missing result is computed again.
    evaluations = sorted((tmp_path / "runs/samples").glob("*.metrics.json"))
    evaluations[0].unlink()
    call(paper, *flags, "--slurm", folder)
    (records / "commands").unlink()
    subprocess.run(submit, cwd=ROOT, env=environment, check=True, timeout=120)
    modules = [words[1] for words in read_commands()]
    assert modules == ["evaluations.evaluate"]


def test_slurm_scripts_run_only_in_the_folder_of_train(call, tmp_path):
    call(paper, "--slurm", tmp_path / "jobs", "--output-dir", tmp_path)
    submit = ["bash", tmp_path / "jobs/submit.sh"]
    done = subprocess.run(submit, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "run this script from the folder of train.py" in done.stderr


def test_slurm_scripts_of_an_earlier_call_are_removed(call, tmp_path):
    for tables, stages in (([3, 5], {*PURPOSES}), ([5], {"cost"})):
        flags = ["--tables", *tables, "--output-dir", tmp_path / "runs"]
        assert call(paper, "--slurm", tmp_path / "jobs", *flags)[0] == 0
        names = {path.stem for path in (tmp_path / "jobs").glob("*.sh")}
        assert names == {*stages, "submit"}
    assert "\n#SBATCH --gpus-per-node=1\n" in (tmp_path / "jobs/cost.sh").read_text()


class InProcess:
    """A fake subprocess.Popen, which runs train.py in this process."""

    pid = 0
    started: ClassVar[list[list[str]]] = []

    def __init__(self, command, **_):
        self.started.append(command)
        AcceleratorState._reset_state(reset_partial_state=True)
        engine.call_command(("train.py", *command[2:]))
        self.returncode = 0

    def poll(self):
        return 0


def test_demo_runs_all_stages_and_resumes(call, cache, tree, tmp_path, monkeypatch):
    """The cache and the weights exist, so the demo trains, samples and evaluates two rows."""
    rows = (
        Row("none", {FID: 33.0}, paper_tables.B2["b2-none"], 100_000),
        Row("aligned", {FID: 28.9}, paper_tables.B2["b2-sra2"], 100_000),
        Row("other", {FID: None}, note="not implemented"),
    )
    monkeypatch.setitem(TABLES, 2, Table(2, "made up", rows))
    monkeypatch.setitem(DEMO_STEPS, 100_000, 2)
    demo = SCALES["demo"]
    small = demo.sample_flags.replace("250", "9").replace("50", "9").replace("10", "2")
    monkeypatch.setitem(SCALES, "demo", replace(demo, sample_flags=small))
    # Replaced only in the scheduler, because other modules also start processes.
    fake_subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": InProcess})
    monkeypatch.setattr(scheduler, "subprocess", fake_subprocess)
    monkeypatch.setattr(scheduler, "get_current_commit", lambda: None)
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0)
    monkeypatch.setattr(InProcess, "started", [])
    flags = ["--scale", "demo", "--tables", 2, "--data-dir", cache, "--output-dir", tmp_path]
    flags += ["--reference", tree, "--run", "--gather"]
    tail = ["--", "--batch-size", 8, "--log-every", 1]

    # The second evaluation is interrupted.
    sampled = []

    def interrupt(command):
        if command[0] == "sample_ddp.py":
            sampled.append(command)
            if len(sampled) == 2:
                raise KeyboardInterrupt
        call_command(command)

    call_command = engine.call_command
    monkeypatch.setattr(engine, "call_command", interrupt)
    code, out = call(paper, *flags, *tail)
    assert code == 130 and len(InProcess.started) == 2, out
    code, out = call(paper, *flags, *tail)
    assert code == 0 and len(InProcess.started) == 2 and len(sampled) == 3, out

    result = results.load_result(tmp_path / "paper.json", "paper")
    assert result["is_evidence"] is False
    none, aligned, other = result["tables"][0]["rows"]
    assert np.isfinite([none["ours"], aligned["ours"]]).all() and other["run"] is None
    assert none["progress"] == aligned["progress"] == 1
    assert (
        "FD-fashion instead of FID" in none["deviations"]
        and aligned["deviations"]
        and none["difference"] is None
    )
    assert result["remaining_gpu_hours"] == 0
    page = (tmp_path / "paper.md").read_text()
    assert "DEMO: NO EVIDENCE" in page and page == format_tables(result)
    assert "(FD-fashion)" in page and page.count("FD-fashion instead of FID") == 1


def test_runs_keep_the_checkpoints_of_tables_that_are_selected_later(tmp_path):
    (planned,) = (run for run in make_plan(tmp_path, TABLES[3]).runs if run.run.name == "xl2-repa")
    settings = planned.cell.parse_settings()
    assert settings.loop.num_steps == 4_000_000 and planned.steps == (4_000_000,)
    steps = {row.steps for row in TABLES[2].rows if planned.run in row.runs}
    assert steps == {100_000, 200_000, 400_000}
    assert all(step % settings.checkpoint.milestone_steps == 0 for step in steps)


def test_evaluated_checkpoints_may_be_deleted(tmp_path, monkeypatch):
    """Of two runs without checkpoints, one is evaluated. Only the other one is trained."""
    rows = TABLES[2].rows[:2]
    plan = make_plan(tmp_path, Table(2, "two rows", rows))
    write_metrics(plan, ("b2-none", 0, 400_000, False), 32.0)
    tasks = []
    monkeypatch.setattr(paper, "run_tasks", lambda added, *_: tasks.extend(added) or {})
    paper.run(plan, 1, 1)
    name = "b2-sra2-seed0"
    names = [task.name for task in tasks]
    assert names == ["encode", name, f"sample-{name}-0400000", f"evaluate-{name}-0400000"]
    assert "train=$(submit --dependency=afterok:$encode --array=1 " in format_submit_script(
        plan, tmp_path
    ).replace('"', "")
    write_metrics(plan, ("b2-sra2", 0, 400_000, False), 28.0)
    tasks.clear()
    paper.run(plan, 1, 1)
    assert tasks == [] and "encode=" not in format_submit_script(plan, tmp_path)


def test_existing_runs_and_samples_must_have_the_same_flags(tmp_path):
    plan = make_plan(tmp_path, TABLES[3])
    planned = plan.runs[0]
    flags = build_args_json(planned.cell.parse_settings()) | {"mixed_precision": "bf16"}
    progress = {"step": 4, "flags": flags}
    checkpoint = planned.folder / "checkpoints/0000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text(
        json.dumps(progress | {"digest": progress_digest(progress)})
    )
    key = ("xl2-sra2", 0, 4_000_000, True)
    write_metrics(plan, key, 1.6, cfg_scale=1.8, guidance_low=0.0, guidance_high=0.7)
    plan.check(8)
    replace(plan, tables=(TABLES[3], TABLES[2])).check(8)
    message = "learning-rate was 0.0001, now 0.001. Choose another --output-dir"
    with pytest.raises(UserError, match=message):
        replace(plan, train_flags=("--learning-rate", "1e-3")).check(8)
    with pytest.raises(UserError, match=r"used --cfg-scale 1.8 --guidance-low 0.0"):
        replace(plan, guidance=(2.0, 0.0, 0.7)).check(8)


def test_result_without_an_entry_is_a_user_error(tmp_path):
    results.save_result(tmp_path / "x.json", "paper", {"is_evidence": True}, [])
    with pytest.raises(UserError, match=r"x.json is damaged.*the entry 'tables' is missing"):
        paper.write_paper_report(tmp_path / "x.json")


def test_figure_of_a_demo_is_stamped(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    texts = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text: texts.append(text))
    for scale in SCALES:
        plan = make_plan(tmp_path, TABLES[3], scale=scale)
        draw_figure(gather_tables(plan, 1, [10.0]), tmp_path / "x.png")
    assert ["NO EVIDENCE" in text for text in texts] == [False, True]


def test_result_of_another_command_is_rejected(tmp_path):
    results.save_result(tmp_path / "x.json", "ablate", {}, [])
    with pytest.raises(UserError, match=r"is not a result of experiments\.paper"):
        paper.write_paper_report(tmp_path / "x.json")


def test_documented_values_equal_the_result():
    page = (ROOT / "docs/paper.md").read_text()
    result = results.load_result(ROOT / "docs/paper-demo.json", "paper")
    rows = [line for line in page.splitlines() if re.match(r"\| .* \| (FID|IS) \|", line)]
    assert len(rows) > 5 and {*rows} <= {*format_tables(result).splitlines()}
