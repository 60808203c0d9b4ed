"""Targets of LayerSync and Self-Transcendence, which are built without a run."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.errors import FieldError
from models.sit import SiT, SiTConfig
from models.target import FrozenNetwork, TrainingInputs
from models.targets import (
    LayerSync,
    LayerSyncSettings,
    SelfTranscendence,
    SelfTranscendenceSettings,
)

NETWORK = SiTConfig(depth=3, width=32, heads=2, patch=2, latent_size=8, num_classes=5)
NULL_CLASS = 5


@pytest.fixture(scope="module")
def frozen() -> SiT:
    """A network whose tokens depend on all blocks, the timestep and the label."""
    torch.manual_seed(0)
    network = SiT(NETWORK).eval().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    for block in network.blocks:
        block.attn.fused_attn = False  # FlopCounterMode ignores fused attention on the CPU
    return network


@pytest.fixture
def inputs() -> TrainingInputs:
    """Four images, two of which have a dropped label."""
    torch.manual_seed(1)
    return TrainingInputs(
        latents=torch.randn(4, 4, 8, 8),
        labels=torch.tensor([0, NULL_CLASS, 2, NULL_CLASS]),
        classes=torch.tensor([0, 1, 2, 3]),
        noise=torch.randn(4, 4, 8, 8),
        t=torch.rand(4),
        posterior_mean=torch.randn(4, 4, 8, 8),
        target_uniform=torch.rand(4),
    )


def make_target(frozen: SiT, **settings) -> SelfTranscendence:
    """Build the target. Its attribute `requests` lists the arguments of `load_network`."""
    requests = []

    def load_network(path, needs_null_class):
        requests.append((path, needs_null_class))
        return FrozenNetwork(copy.deepcopy(frozen), "0" * 64)

    def add_noise(latents, noise, t):
        t = t[:, None, None, None]
        return (1 - t) * latents + t * noise

    context = SimpleNamespace(
        load_network=load_network, add_noise=add_noise, autocast=nullcontext, compile=False
    )
    chosen = SelfTranscendenceSettings(checkpoint="exps/first", **settings)
    record = SelfTranscendence.plan(chosen, NETWORK, cache=None).record
    target = SelfTranscendence(record, chosen, NETWORK, cache=None, context=context)
    target.requests = requests
    return target


def run_two_blocks(frozen: SiT, inputs: TrainingInputs, labels: torch.Tensor) -> torch.Tensor:
    """Return the tokens after the second block, without the functions of the backbone."""
    t = inputs.t[:, None, None, None]
    x_t = (1 - t) * inputs.latents + t * inputs.noise
    condition = frozen.t_embedder(inputs.t) + frozen.y_embedder(labels)
    tokens = frozen.x_embedder(x_t) + frozen.pos_embed
    for block in frozen.blocks[:2]:
        tokens = block(tokens, condition)
    return tokens


@pytest.mark.parametrize("guidance", [0.0, 1.0, 30.0])
def test_self_transcendence_target_is_guided_with_the_class_before_label_dropout(
    frozen, inputs, guidance
):
    tokens = make_target(frozen, guidance=guidance)(inputs, {})
    with_class = run_two_blocks(frozen, inputs, inputs.classes)
    with_null_class = run_two_blocks(frozen, inputs, torch.full((4,), NULL_CLASS))
    expected = with_null_class + guidance * (with_class - with_null_class)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    assert (with_class - with_null_class).abs().max() > 0.01 and tokens.dtype == torch.float32


@pytest.mark.parametrize(("guidance", "batch"), [(1.0, 4), (2.0, 8)])
def test_self_transcendence_needs_one_pass_without_guidance(
    frozen, inputs, monkeypatch, guidance, batch
):
    """The cost is that of PyTorch's counter, and later blocks are not kept in memory."""
    target = make_target(frozen, guidance=guidance)
    assert target.requests == [("exps/first", guidance != 1)]
    assert len(target.frozen_network.blocks) == 2 and target.identity == {"ema_sha256": "0" * 64}
    batches = []
    target.frozen_network.x_embedder.register_forward_hook(lambda _, x, y: batches.append(len(y)))
    with FlopCounterMode(display=False) as counter:
        target(inputs, {})
    assert batches == [batch]
    cost = SelfTranscendence.cost(target.record, NETWORK, cache=None)
    assert counter.get_total_flops() == 4 * cost.flops
    used = dict(target.frozen_network.named_parameters())
    unused = [name for name in used if name.startswith(("pos_embed", "final_layer"))]
    assert cost.parameters == sum(p.numel() for p in used.values()) - sum(
        used[name].numel() for name in unused
    )


def test_self_transcendence_block_is_two_thirds_of_the_depth_and_must_exist():
    settings = SelfTranscendenceSettings(checkpoint="exps/first")
    base = SiTConfig(depth=12, width=32, heads=2, patch=2)
    assert SelfTranscendence.plan(settings, base, None).record["teacher_block"] == 8
    settings = SelfTranscendenceSettings(checkpoint="exps/first", teacher_block=4)
    with pytest.raises(FieldError, match="4: the model has blocks 1 to 3") as raised:
        SelfTranscendence.plan(settings, NETWORK, None)
    assert raised.value.field == "teacher_block"


def test_layersync_target_is_a_block_of_the_student():
    large = SiTConfig(depth=28, width=32, heads=2, patch=2)
    assert LayerSync.plan(LayerSyncSettings(), large, None).record == {"target_block": 16}
    record = {"target_block": 3}
    target = LayerSync(record, LayerSyncSettings(), NETWORK, cache=None, context=None)
    tokens = {2: torch.randn(4, 16, 32), 3: torch.randn(4, 16, 32)}
    assert target.student_blocks == (3,) and target(None, tokens) is tokens[3]
    assert LayerSync.cost(record, NETWORK, None) == (0, 0)
    with pytest.raises(FieldError, match="4: the model has blocks 1 to 3"):
        LayerSync.plan(LayerSyncSettings(target_block=4), NETWORK, None)
