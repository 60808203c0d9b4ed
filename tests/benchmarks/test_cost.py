"""Test that alignment costs agree with manual counts and with the FLOP counter of PyTorch."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models.encoder_target
from benchmarks import cost, train_step, variant_steps
from benchmarks.measure import Timings
from benchmarks.table import TABLES
from benchmarks.variants import (
    StepConfig,
    make_plan,
    make_plans,
    select_variant,
    split_variant,
)
from models.encoder import EncoderShape
from tests.helpers import ROOT

RESULTS = [
    path
    for path in (ROOT / "benchmarks/results").glob("*.json")
    if '"benchmark": "cost"' in path.read_text()
]
WIDTH = 768


class StubEncoder(nn.Module):
    """An encoder with one convolution, which converts each patch of 16 pixels to a token."""

    pretrained_flags: ClassVar[list[bool]] = []  # value of `pretrained` for each instance
    fingerprint = "f"

    def __init__(
        self,
        name,
        resolution,
        tokens_side,
        weights=None,
        pretrained=True,
        device="cpu",
        dtype=None,
        side=None,
    ):
        super().__init__()
        self.pretrained_flags.append(pretrained)
        self.patches = nn.Conv2d(3, WIDTH, 16, 16)

    def forward(self, images):
        assert images.dtype == torch.uint8
        return self.patches(images / 255).flatten(2).mT


def count_stub_encoder_cost(name, resolution, side=None):
    """Return the parameters and the FLOPs of StubEncoder."""
    return 3 * 16 * 16 * WIDTH + WIDTH, 2 * (resolution // 16) ** 2 * 3 * 16 * 16 * WIDTH


@pytest.fixture(autouse=True)
def stub_encoder(monkeypatch):
    def describe_encoder(name, resolution, side=None):
        return EncoderShape(WIDTH, resolution)

    monkeypatch.setattr(models.encoder_target, "Encoder", StubEncoder)
    monkeypatch.setattr(models.encoder_target, "describe_encoder", describe_encoder)
    monkeypatch.setattr(models.encoder_target, "encoder_cost", count_stub_encoder_cost)
    # Replace the measurement, which takes a second.
    monkeypatch.setattr(train_step, "measure_matmul_rate", lambda *_, **__: 1e11)
    StubEncoder.pretrained_flags.clear()


def make_config(**settings) -> StepConfig:
    """Return settings with the smallest network and latents of 8 x 8."""
    defaults = {"model": "SiT-Ti/2", "batch_size": 2, "mixed_precision": "no", "latent_size": 8}
    return StepConfig(**defaults | settings)


def make_stub_accelerator(backward=torch.Tensor.backward) -> SimpleNamespace:
    """Return a stub of Accelerator for the CPU."""
    return SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        mixed_precision="no",
        scaler=None,
        autocast=nullcontext,
        no_sync=lambda _: nullcontext(),
        prepare=lambda *parts: parts if len(parts) > 1 else parts[0],
        clip_grad_norm_=nn.utils.clip_grad_norm_,
        backward=backward,
        free_memory=lambda: None,
    )


def test_costs_of_sit_xl_agree_with_manual_counts(call, tmp_path):
    variants = ["none", "sra2", "repa", "sra", "sra2+repa"]
    path = tmp_path / "a.json"
    flags = ["--model", "SiT-XL/2", "--align", *variants, "--no-timing", "--json", path]
    code, out = call(cost, *flags)
    assert code == 0, out
    result = json.loads(path.read_text())
    assert TABLES["cost"].format([result]) in out
    assert list(result["results"]) == variants

    # 256 tokens of width 1152 in 28 blocks; 16 values per patch; 1000 classes and the null class.
    # A block has 18 d x d matrices: 3 for queries, keys and values, 1 for the attention output,
    # 4 + 4 for the MLP, and 6 for the modulation. Each has a bias with the size of its output.
    d, n, depth = 1152, 256, 28
    weights = depth * (18 * d * d + 15 * d) + (2 * d * d + 2 * d)
    weights += (16 * d + d) + (256 * d + d + d * d + d) + 1001 * d + n * d + (16 * d + 16)
    block_macs = n * 12 * d * d + 2 * n * n * d + 6 * d * d
    input_macs = n * 16 * d + 256 * d + d * d
    backbone_macs = depth * block_macs + input_macs + n * 16 * d + 2 * d * d
    assert backbone_macs / 1e9 == pytest.approx(118.6, abs=0.05)

    # The heads have hidden width 2304 (sra2 with five layers, and sra) or 2048 (repa).
    sra2 = d * 2304 + 3 * 2304 * 2304 + 2304 * 16
    repa = d * 2048 + 2048 * 2048 + 2048 * WIDTH
    sra = d * 2304 + 2304 * d
    head_weights = {"none": 0, "sra2": sra2, "repa": repa, "sra": sra, "sra2+repa": sra2 + repa}
    head_biases = {"none": 0, "sra2": 4 * 2304 + 16, "repa": 2 * 2048 + WIDTH, "sra": 2304 + d}
    head_biases["sra2+repa"] = head_biases["sra2"] + head_biases["repa"]
    encoder_macs = 256 * 3 * 256 * WIDTH
    teacher_macs = 20 * block_macs + input_macs
    target_macs = {"repa": encoder_macs, "sra": teacher_macs, "sra2+repa": encoder_macs}

    for variant, costs in result["results"].items():
        external = 3 * 256 * WIDTH + WIDTH if "repa" in variant else 0
        assert costs["parameters"] == {
            "backbone": weights,
            "heads": head_weights[variant] + head_biases[variant],
            "external": external,
        }
        head_macs, targets = n * head_weights[variant], target_macs.get(variant, 0)
        assert costs["forward_flops"] == {
            "backbone": 2 * backbone_macs,
            "heads": 2 * head_macs,
            "targets": 2 * targets,
        }
        assert costs["training_flops"] == 2 * (3 * (backbone_macs + head_macs) + targets)
        more_forward = (head_macs + targets) / backbone_macs
        more_training = (3 * head_macs + targets) / (3 * backbone_macs)
        assert costs["more_forward_flops"] == pytest.approx(more_forward)
        assert costs["more_training_flops"] == pytest.approx(more_training)

    # The paper reports a head of 18M parameters and 4% of the GFLOPs.
    costs = result["results"]["sra2"]
    assert costs["parameters"]["heads"] / 1e6 == pytest.approx(18.6, abs=0.05)
    assert n * sra2 / 1e9 == pytest.approx(4.77, abs=0.005)
    assert costs["more_forward_flops"] == pytest.approx(0.040, abs=5e-4)


def test_costs_of_sit_b_agree_with_manual_counts():
    plan = make_plan(make_config(model="SiT-B/2", latent_size=32), ["sra2+sra"])
    costs = cost.count_costs(plan)
    d, n = 768, 256
    sra2 = d * 1536 + 1536 + 3 * (1536 * 1536 + 1536) + 1536 * 16 + 16
    sra = d * 1536 + 1536 + 1536 * d + d
    assert costs["parameters"]["heads"] == sra2 + sra
    assert sra2 / 1e6 == pytest.approx(8.3, abs=0.05)  # the paper reports 8M
    # The teacher of sra is block 9 of 12.
    block_macs = n * 12 * d * d + 2 * n * n * d + 6 * d * d
    teacher_macs = 9 * block_macs + n * 16 * d + 256 * d + d * d
    assert costs["forward_flops"]["targets"] == 2 * teacher_macs


def test_flops_of_a_step_agree_with_the_counter_of_pytorch():
    variant = "sra2+repa+sra"
    plan = make_plan(make_config(), [variant])
    costs = cost.count_costs(plan)

    def count_flops(backward) -> int:
        steps = variant_steps.build_steps(plan, make_stub_accelerator(backward), [variant])
        step = steps[variant].func
        for block in (*step.model.backbone.blocks, *step.state.emas[0].blocks):
            block.attn.fused_attn = False  # the counter does not support the CPU's fused attention
        with FlopCounterMode(display=False) as counter:
            steps[variant]()
        return counter.get_total_flops()

    assert count_flops(lambda loss: None) == 2 * sum(costs["forward_flops"].values())
    # The formula includes the gradient of the inputs, which the backward pass does not compute.
    total = count_flops(torch.Tensor.backward)
    assert total == pytest.approx(2 * costs["training_flops"], rel=0.02)


def test_variant_trains_only_its_heads_and_does_not_depend_on_other_variants():
    variants = ["sra2", "none", "sra", "sra2+sra"]
    plan = make_plan(make_config(), variants)
    steps = variant_steps.build_steps(plan, make_stub_accelerator(), variants)
    heads = steps["sra2"].func.state.model.heads
    for variant in variants:
        before = {method: head[0].weight.clone() for method, head in heads.items()}
        scalars, _ = steps[variant]()
        trained_methods = {
            method
            for method, head in heads.items()
            if not torch.equal(head[0].weight, before[method])
        }
        methods = split_variant(variant)
        assert trained_methods == set(methods)
        assert {name for name in scalars if name.startswith("align/")} == {
            f"align/{method}" for method in methods
        }
        if variant == variants[0]:
            plan = select_variant(plan, variant)
            single_variant = variant_steps.build_steps(plan, make_stub_accelerator(), [variant])
            expected, _ = single_variant[variant]()
            assert scalars == expected


def test_encoder_applies_to_the_variants_with_an_encoder():
    plans = make_plans(make_config(repa_encoder="test_vit"), ["none", "irepa", "repa"])
    encoders = {
        name: [entry.get("encoder") for entry in plan.align] for name, plan in plans.items()
    }
    assert encoders == {"none": [], "irepa": ["test_vit"], "repa": ["test_vit"]}
    plans = make_plans(make_config(repa_encoder="test_vit"), ["sra2", "irepa"])
    assert [entry["method"] for entry in plans["sra2"].align] == ["sra2"]
    assert plans["irepa"].align[0]["encoder"] == "test_vit"


def test_cost_reports_times_and_counts(call, tmp_path):
    flags = "--model SiT-Ti/2 --latent-size 8 --batch-size 2 --align none sra2+repa sra"
    flags = [*flags.split(), *["--rounds", "2", "--warm-up", "0", "--json"], tmp_path / "a.json"]
    code, out = call(cost, *flags)
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["ratios"]) == ["sra2+repa/none", "sra/none"]
    assert result["encoder_weights"] == "random"
    assert StubEncoder.pretrained_flags == [False]
    assert TABLES["cost"].format([result]) in out
    for costs in result["results"].values():
        rate = costs["images_per_s"]
        assert rate * costs["step_s"]["median"] == pytest.approx(2)
        assert costs["peak_memory_gib"] > 0 and costs["first_step_s"] > 0
        assert costs["matmul_share"] * 1e11 == pytest.approx(rate * costs["training_flops"])
    _, _, baseline, *aligned = TABLES["cost"].format([result]).splitlines()[:5]
    assert baseline.endswith("|  |") and "batch 2" in baseline
    assert not any(row.endswith("|  |") for row in aligned)


def test_peak_memory_excludes_earlier_allocations(monkeypatch):
    def time_interleaved(actions, *_, **__):
        return Timings({}, dict.fromkeys(actions, 8.0))

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(train_step, "time_interleaved", time_interleaved)
    build = partial(dict, none=lambda: None)
    assert train_step.measure_peak_memory(make_stub_accelerator(), build) == {"none": 5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--align", "none+sra2"],
            "none+sra2 must be none, irepa, or distinct methods out of sra2, repa, sra, "
            "layersync, selftrans joined by +",
        ),
        (["--align", "sra2", "sra+sra"], "sra+sra must be none"),
        (
            ["--align", "sra", "--repa-encoder", "dinov2-b"],
            "--repa-encoder (--enc-type) needs --align repa",
        ),
        (["--latent-size", "9"], "--latent-size 9: SiT-XL/2 cannot divide these latents"),
    ],
)
def test_contradictory_flags_cause_one_line_errors(call, flags, message):
    code, out = call(cost, *flags, "--no-timing")
    assert code == 2
    assert message in out and len(out.strip().splitlines()) == 1


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_stored_results_agree_with_current_counts(path, monkeypatch):
    monkeypatch.undo()  # use the real encoder
    result = json.loads(path.read_text())
    config = make_config(model=result["model"], latent_size=result["latent_size"])
    plans = make_plans(config, list(result["results"]))
    assert {variant: plan.align for variant, plan in plans.items()} == result["align"]
    for variant, costs in result["results"].items():
        counts = cost.count_costs(plans[variant])
        assert {key: costs[key] for key in counts} == counts
