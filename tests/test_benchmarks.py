"""The benchmarks run on a CPU, and the page about speed says what they wrote."""

import json

import pytest

from benchmarks import checkpoint, table, train_step
from tests.helpers import ROOT


def test_train_step_times_vanilla_aligned_and_plain_in_one_run(call, tmp_path):
    flags = ["--model", "SiT-S/8", "--batch-size", "4", "--plain", "--rounds", "3", "--warm-up", "0", "--json"]
    code, out = call(train_step, *flags, tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["results"]) == ["plain", "none", "sra2"] and list(result["ratios"]) == ["sra2/none", "sra2/plain"]
    for figures in result["results"].values():
        assert figures["images_per_s"] * figures["step_s"]["median"] == pytest.approx(4)
        assert 0 < figures["mfu"] < 1.5 and figures["peak_memory_gib"] > 0 and figures["first_step_s"] > 0
    assert 0.05 < result["head_flops_share"] < 0.15 and result["machine"]["torch"]
    assert (tmp_path / "a.json").read_text() in out


def test_train_step_takes_what_training_takes(call, tmp_path):
    flags = "--model SiT-S/8 --batch-size 4 --align none --precision bf16 --activation-checkpointing --rounds 1 --warm-up 0"
    code, out = call(train_step, *flags.split(), "--gradient-accumulation-steps", 2, "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["results"]) == ["none"] and result["precision"] == "bf16" and result["activation_checkpointing"]
    code, out = call(train_step, *flags.split(), "--gradient-accumulation-steps", 3)
    assert code == 2 and "--batch-size 4 (global) is not a multiple" in out


def test_checkpoint_tells_copy_write_and_pause_apart(call, tmp_path):
    code, out = call(checkpoint, "--model", "SiT-Ti/2", "--rounds", 2, "--dest", tmp_path / "d", "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert 30e6 < result["bytes"] < 45e6  # weights and head, their average, two moments of each, in float32
    assert all(figure["median"] > 0 for figure in result["results"].values()) and not list((tmp_path / "d").iterdir())


def test_the_page_about_speed_holds_the_tables_of_the_results():
    page = (ROOT / "docs/performance.md").read_text()
    for text in table.tables().values():
        assert text in page
