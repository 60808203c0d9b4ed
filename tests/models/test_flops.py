"""Compare counted FLOPs with PyTorch and with the paper."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.aligned_sit import AlignedSiT
from models.autoencoder import LatentScale
from models.flops import backbone_flops, head_flops
from models.projector import make_head
from models.sit import PRESETS, SiT, SiTConfig
from models.target import CacheInfo
from training.throughput import mean_training_flops, measure_matmul_rate, training_flops

SMALL = SiTConfig(depth=3, width=64, heads=2, patch=2, latent_size=8, num_classes=5)
HEAD = {"width": 64, "out": 16, "layers": 3, "hidden": 128}
CACHE = CacheInfo(32, LatentScale(1.0, 0.0), [], [])
SRA2 = {"method": "sra2", "weight": 0.5, "head": HEAD}
CONV_HEADS = [
    {"kind": "conv", "width": 64, "out": 16, "kernel_size": 1},
    {"kind": "conv", "width": 64, "out": 48, "kernel_size": 3},
]


@pytest.mark.parametrize("head", [HEAD, *CONV_HEADS])
def test_flops_match_the_flop_counter_of_pytorch(head):
    """Training FLOPs agree within 2%, because the first layers need no input gradients."""
    torch.manual_seed(0)
    model = AlignedSiT(SiT(SMALL), {"sra2": make_head(head)}, {"sra2": 2})
    for block in model.backbone.blocks:
        block.attn.fused_attn = False  # the counter ignores fused attention on the CPU
    x = torch.randn(2, 4, 8, 8)
    t = torch.rand(2)
    y = torch.tensor([0, 1])
    with FlopCounterMode(display=False) as forward:
        model(x, t, y)
    assert forward.get_total_flops() == 2 * (backbone_flops(SMALL) + head_flops(SMALL, head))
    with FlopCounterMode(display=False) as forward_and_backward:
        output = model(x, t, y)
        (output.prediction.sum() + output.projected["sra2"].sum()).backward()
    expected = 2 * training_flops(SMALL, [SRA2 | {"head": head}], CACHE)
    assert forward_and_backward.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_flops_of_the_teacher_match_the_flop_counter_of_pytorch():
    backbone = SiT(SMALL)
    for block in backbone.blocks:
        block.attn.fused_attn = False  # the counter ignores fused attention on the CPU
    x = torch.randn(2, 4, 8, 8)
    t = torch.rand(2)
    y = torch.tensor([0, 1])
    with FlopCounterMode(display=False) as teacher:
        backbone.compute_block_tokens(x, t, y, (2,))
    sra = {"method": "sra", "weight": 0.5, "teacher_block": 2, "head": None}
    teacher_flops = training_flops(SMALL, [sra], CACHE) - training_flops(SMALL, [], CACHE)
    assert teacher.get_total_flops() == 2 * teacher_flops
    sra["weight"] = 0
    assert training_flops(SMALL, [sra, SRA2], CACHE) == training_flops(SMALL, [SRA2], CACHE)


def test_stopped_methods_count_until_their_stop_step():
    stopped = SRA2 | {"stop_step": 12}
    endless = SRA2 | {"stop_step": 0}
    with_method = training_flops(SMALL, [endless], CACHE)
    without = training_flops(SMALL, [], CACHE)
    for start, expected in (
        (0, with_method),
        (10, (2 * with_method + 3 * without) / 5),
        (12, without),
        (20, without),
    ):
        end = start + 5
        flops = mean_training_flops(SMALL, [stopped], CACHE, start, end)
        assert flops == pytest.approx(expected), start
        assert mean_training_flops(SMALL, [endless], CACHE, start, end) == with_method


def test_flops_of_backbones_and_heads_match_the_paper():
    """The head adds 4.0% to the 118.6 GMAC of SiT-XL/2, and 9.2% to the 23 GMAC of SiT-B/2."""
    for name, gmacs, head_fraction in (("SiT-XL/2", 118.6, 0.040), ("SiT-B/2", 23.0, 0.092)):
        config = SiTConfig(**PRESETS[name])
        head = {"width": config.width, "out": 16, "layers": 5, "hidden": 2 * config.width}
        assert backbone_flops(config) / 2e9 == pytest.approx(gmacs, abs=0.06)
        assert head_flops(config, head) / backbone_flops(config) == pytest.approx(
            head_fraction, abs=0.0006
        )
    assert head_flops(SMALL, None) == 0


def test_flops_of_the_large_presets_match_a_manual_count():
    """A block has 12 d x d matrices per token, 6 per image, and two products of the attention."""
    for name, depth, d in (("SiT-1B/2", 24, 1536), ("SiT-3B/2", 34, 2176)):
        n = 256
        blocks = depth * (n * 12 * d * d + 2 * n * n * d + 6 * d * d)
        rest = 2 * n * 16 * d + (256 + d) * d + 2 * d * d
        assert backbone_flops(SiTConfig(**PRESETS[name])) == 2 * (blocks + rest)


def test_matmul_rate_is_plausible():
    assert 1e8 < measure_matmul_rate(torch.device("cpu"), torch.float32, seconds=0.05) < 1e14
