"""benchmarks/cost.py against counts done by hand, and against PyTorch's counter on train.py's own step."""

import json
from argparse import Namespace
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models.targets
from benchmarks import cost, table, train_step
from tests.helpers import ROOT

RESULTS = [
    path
    for path in (ROOT / "benchmarks/results").glob("*.json")
    if '"benchmark": "cost"' in path.read_text()
]
WIDTH = 768


class Stub(nn.Module):
    """In the encoder's place: one convolution, a token for each patch of 16 pixels."""

    made: ClassVar[list[bool]] = []  # whether it was to have the weights of others
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
        self.made.append(pretrained)
        self.patches = nn.Conv2d(3, WIDTH, 16, 16)

    def forward(self, images):
        assert images.dtype == torch.uint8
        return self.patches(images / 255).flatten(2).mT


def stub_cost(name, resolution, side=None):
    return 3 * 16 * 16 * WIDTH + WIDTH, 2 * (resolution // 16) ** 2 * 3 * 16 * 16 * WIDTH


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    monkeypatch.setattr(models.targets, "Encoder", Stub)
    monkeypatch.setattr(
        models.targets, "describe_encoder", lambda name, resolution, side=None: (WIDTH, resolution)
    )
    monkeypatch.setattr(models.targets, "encoder_cost", stub_cost)
    monkeypatch.setattr(train_step, "matmul_rate", lambda *_, **__: 1e11)  # which takes a second
    Stub.made.clear()


def tiny(**other) -> Namespace:
    """Flags of the smallest network on latents of 8 x 8."""
    given = {
        "model": "SiT-Ti/2",
        "batch_size": 2,
        "precision": "no",
        "compile": False,
        "activation_checkpointing": False,
    }
    given |= {
        "allow_tf32": False,
        "gradient_accumulation_steps": 1,
        "latent_size": 8,
        "repa_encoder": None,
    }
    return Namespace(**given | other)


def host(backward=lambda loss: loss.backward()) -> SimpleNamespace:
    """In the Accelerator's place, on the CPU."""
    return SimpleNamespace(
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


def test_sit_xl_by_hand(call, tmp_path):
    """256 tokens of width 1152 through 28 blocks, a head of 2304 (sra2, sra) or 2048 (repa); 16 numbers a patch."""
    ways = ["none", "sra2", "repa", "sra", "sra2+repa"]
    code, out = call(
        cost, "--model", "SiT-XL/2", "--align", *ways, "--no-timing", "--json", tmp_path / "a.json"
    )
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert table.cost_table([result]) in out and list(result["results"]) == ways
    of, d, n = result["results"], 1152, 256
    # queries, keys, values 3, their output 1, the MLP 4 + 4, modulation 6: 18 d x d, and as many biases but 3 x d
    weights = 28 * (18 * d * d + 15 * d) + (2 * d * d + 2 * d)
    weights += (16 * d + d) + (256 * d + d + d * d + d) + 1001 * d + n * d + (16 * d + 16)
    block = n * 12 * d * d + 2 * n * n * d + 6 * d * d
    begin = n * 16 * d + 256 * d + d * d
    macs = 28 * block + begin + n * 16 * d + 2 * d * d
    assert macs / 1e9 == pytest.approx(118.6, abs=0.05)
    sra2 = d * 2304 + 3 * 2304 * 2304 + 2304 * 16  # four hidden layers
    repa, sra = d * 2048 + 2048 * 2048 + 2048 * 768, d * 2304 + 2304 * d
    heads = {"none": 0, "sra2": sra2, "repa": repa, "sra": sra, "sra2+repa": sra2 + repa}
    biases = {"none": 0, "sra2": 4 * 2304 + 16, "repa": 2 * 2048 + 768, "sra": 2304 + d}
    biases["sra2+repa"] = biases["sra2"] + biases["repa"]
    outside = {
        "none": 0,
        "sra2": 0,
        "repa": 256 * 3 * 256 * 768,
        "sra": 20 * block + begin,
        "sra2+repa": 256 * 3 * 256 * 768,
    }
    for name, figures in of.items():
        external = 3 * 256 * 768 + 768 if "repa" in name else 0
        assert figures["parameters"] == {
            "backbone": weights,
            "heads": heads[name] + biases[name],
            "external": external,
        }
        parts = {"backbone": 2 * macs, "heads": 2 * n * heads[name], "targets": 2 * outside[name]}
        assert figures["forward_flops"] == parts
        assert figures["training_flops"] == 3 * (2 * macs + 2 * n * heads[name]) + 2 * outside[name]
        assert figures["more_forward_flops"] == pytest.approx(
            (n * heads[name] + outside[name]) / macs
        )
        assert figures["more_training_flops"] == pytest.approx(
            (3 * n * heads[name] + outside[name]) / (3 * macs)
        )
    # the paper's head: 18M parameters, 4% of the GFLOPs
    assert of["sra2"]["parameters"]["heads"] / 1e6 == pytest.approx(18.6, abs=0.05)
    assert n * sra2 / 1e9 == pytest.approx(4.77, abs=0.005) and of["sra2"][
        "more_forward_flops"
    ] == pytest.approx(0.040, abs=5e-4)


def test_sit_b_by_hand():
    """The paper's head of 8M parameters; sra's teacher is block 9 of 12."""
    planned, d, n = (
        train_step.make_plan(tiny(model="SiT-B/2", latent_size=32), ["sra2+sra"]),
        768,
        256,
    )
    figures = cost.count_costs(planned, "sra2+sra")
    sra2, sra = (
        d * 1536 + 1536 + 3 * (1536 * 1536 + 1536) + 1536 * 16 + 16,
        d * 1536 + 1536 + 1536 * d + d,
    )
    assert figures["parameters"]["heads"] == sra2 + sra and sra2 / 1e6 == pytest.approx(
        8.3, abs=0.05
    )
    block = n * 12 * d * d + 2 * n * n * d + 6 * d * d
    assert figures["forward_flops"]["targets"] == 2 * (9 * block + n * 16 * d + 256 * d + d * d)


def test_a_step_does_what_was_counted():
    """train.py's own, with every method, by PyTorch's counter: forward alone to the last product; with its backward up to what
    that leaves out, as no gradient is asked of what comes in."""
    name, rel = "sra2+repa+sra", {"forward": 0.0, "both": 0.02}
    figures = cost.count_costs(train_step.make_plan(tiny(), [name]), name)
    expected = {
        "forward": sum(figures["forward_flops"].values()),
        "both": figures["training_flops"],
    }
    for what, backward in (("forward", lambda loss: None), ("both", lambda loss: loss.backward())):
        action = train_step.build_steps(tiny(), host(backward), [name])[name]
        step = action.func
        for block in (*step.model.backbone.blocks, *step.state.emas[0].blocks):
            block.attn.fused_attn = False  # the counter does not know the CPU's fused attention
        with FlopCounterMode(display=False) as counter:
            action()
        assert counter.get_total_flops() == pytest.approx(2 * expected[what], rel=rel[what])


def test_a_way_trains_its_own_heads_and_no_others():
    """And is the step that it would be alone: what the others hold beside it changes nothing."""
    ways = ["sra2", "none", "sra", "sra2+sra"]
    actions = train_step.build_steps(tiny(), host(), ways)
    heads = actions["sra2"].func.state.model.heads
    for name in ways:
        before = {method: head[0].weight.clone() for method, head in heads.items()}
        terms, _ = actions[name]()
        moved = {
            method
            for method, head in heads.items()
            if not torch.equal(head[0].weight, before[method])
        }
        assert moved == {*train_step.alignment_methods(name)} and len(terms) == 3 + 3 * len(moved)
        if name == ways[0]:
            alone, _ = train_step.build_steps(tiny(), host(), [name])[name]()
            assert torch.equal(terms, alone)


def test_steps_are_timed_beside_the_counts(call, tmp_path):
    flags = "--model SiT-Ti/2 --latent-size 8 --batch-size 2 --align none sra2+repa sra --rounds 2 --warm-up 0"
    code, out = call(cost, *flags.split(), "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert (
        list(result["ratios"]) == ["sra2+repa/none", "sra/none"]
        and result["encoder_weights"] == "random"
    )
    assert Stub.made == [False] and table.cost_table([result]) in out
    for figures in result["results"].values():
        assert figures["images_per_s"] * figures["step_s"]["median"] == pytest.approx(2)
        assert figures["mfu"] * 1e11 == pytest.approx(
            figures["images_per_s"] * figures["training_flops"]
        )
    rows = table.cost_rows(result)
    assert (
        len(rows) == 3
        and rows[0].endswith("|  |")
        and "batch 2" in rows[1]
        and not rows[1].endswith("|  |")
    )


def test_peak_memory_is_what_comes_on_top_of_what_is_held(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(
        train_step, "time_in_turn", lambda actions, *_, **__: ({}, dict.fromkeys(actions, 8.0))
    )
    assert train_step.measure_peak_memory(tiny(), host(), "none") == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--align", "none+sra2"],
            "none+sra2 is neither none nor some of sra2, repa, sra joined by +",
        ),
        (["--align", "sra2", "sra+sra"], "sra+sra is neither"),
        (["--align", "sra", "--repa-encoder", "dinov2-b"], "--repa-encoder goes with --align repa"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_line(call, flags, message):
    code, out = call(cost, *flags, "--no-timing")
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_the_results_are_what_is_counted_now(path, monkeypatch):
    monkeypatch.undo()  # the encoder itself
    result = json.loads(path.read_text())
    planned = train_step.make_plan(
        tiny(model=result["model"], latent_size=result["latent_size"]), list(result["results"])
    )
    assert planned.config["align"] == result["align"]
    for name, figures in result["results"].items():
        now = cost.count_costs(planned, name)
        assert {key: figures[key] for key in now} == now
