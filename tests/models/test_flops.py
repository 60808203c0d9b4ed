import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.flops import backbone_flops, head_flops
from models.projector import AlignedSiT, Projector
from models.sit import PRESETS, SiT, SiTConfig
from training.throughput import matmul_rate, training_flops

SMALL = SiTConfig(depth=3, width=64, heads=2, patch=2, latent_size=8, num_classes=5)
HEAD = {"width": 64, "out": 16, "layers": 3, "hidden": 128}
SRA2 = {"method": "sra2", "head": HEAD}


def test_flops_match_the_counter_of_pytorch():
    """Training agrees within 2%: the first layers need no gradient of their inputs."""
    torch.manual_seed(0)
    model = AlignedSiT(SiT(SMALL), {"sra2": Projector(**HEAD)}, {"sra2": 2})
    for block in model.backbone.blocks:
        block.attn.fused_attn = False  # the counter ignores fused attention on the CPU
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    with FlopCounterMode(display=False) as forward:
        model(x, t, y)
    assert forward.get_total_flops() == 2 * (backbone_flops(SMALL) + head_flops(SMALL, HEAD))
    with FlopCounterMode(display=False) as both:
        velocity, tokens, _ = model(x, t, y)
        (velocity.sum() + tokens["sra2"].sum()).backward()
    assert both.get_total_flops() == pytest.approx(2 * training_flops(SMALL, [SRA2]), rel=0.02)
    with FlopCounterMode(display=False) as teacher:
        model.backbone.features(x, t, y, (2,))
    sra = {"method": "sra", "teacher_block": 2, "head": None}
    teacher_flops = training_flops(SMALL, [sra]) - training_flops(SMALL, [])
    assert teacher.get_total_flops() == 2 * teacher_flops


def test_flops_of_backbones_and_heads_match_the_paper():
    """SiT-XL/2 has 118.6 GMAC and a head of 4.0%; SiT-B/2 has 23 GMAC and a head of 9.2%."""
    for name, gmacs, share in (("SiT-XL/2", 118.6, 0.040), ("SiT-B/2", 23.0, 0.092)):
        config = SiTConfig(**PRESETS[name])
        head = {"width": config.width, "out": 16, "layers": 5, "hidden": 2 * config.width}
        assert backbone_flops(config) / 2e9 == pytest.approx(gmacs, abs=0.06)
        assert head_flops(config, head) / backbone_flops(config) == pytest.approx(share, abs=0.0006)
    assert head_flops(SMALL, None) == 0


def test_matmul_rate_is_plausible():
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32, seconds=0.05) < 1e14
