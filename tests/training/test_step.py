"""Tests of the step on the meta device.

Its tensors hold no data, so any host-device synchronization raises an error.
"""

import pytest
import torch

from latents.cache import LatentCache
from models.sit import SiTBlock
from tests.training.steps import OperationCounter, make_settings
from training.alignment import make_cache_info, plan_alignments
from training.config import build_network_config
from training.state import build_state

OPTIONS = {
    "default": "",
    "vanilla": "--align none",
    "accumulated": "--gradient-accumulation-steps 2 --align-t-range 0 0.5 --ema-decay 0.9 0.5",
    "stopped": "--align-stop-step 1 --prediction x --weighting lognormal",
    "muon": "--optimizer muon --lr-schedule cosine --lr-warmup-steps 1",
    "recomputed": "--activation-checkpointing --align-loss smooth_l1 --align-target sample",
}


@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS)
def test_step_never_synchronizes_with_the_device(make_meta_step, flags):
    step, batch = make_meta_step(*flags.split())
    for _ in range(2):
        scalars, is_finite = step(batch)
    assert is_finite.is_meta and all(value.is_meta for value in scalars.values())
    assert len(scalars) == 3 + 3 * len(step.alignments)
    assert step.state.step == 2 and len(step.state.optimizer.state) > 50


@pytest.fixture
def count_operations(make_meta_step, monkeypatch):
    """Return a function that counts the operations of a step outside the blocks."""
    monkeypatch.setattr(SiTBlock, "forward", lambda self, x, c: x)

    def count(flags):
        step, batch = make_meta_step(*flags.split())
        step(batch)
        with OperationCounter() as counter:
            step(batch)
        return counter.counts

    return count


@pytest.mark.parametrize(
    ("flags", "limit"), [("--align none", 250), ("--align sra2", 370), ("--align sra", 370)]
)
def test_number_of_operations_outside_the_blocks(count_operations, flags, limit):
    """Each operation costs the host about 5 us on a GPU, for small and large networks alike."""
    counts = count_operations(flags)
    assert counts.total() < limit, counts.most_common()


SYNCHRONIZATIONS = [
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.nonzero,
    bool,
]


@pytest.mark.parametrize("synchronize", SYNCHRONIZATIONS)
def test_device_sync_is_detected(make_meta_step, monkeypatch, synchronize):
    step, batch = make_meta_step()
    monkeypatch.setattr(
        step.guard, "mark_step", lambda number, losses, grad_norm: synchronize(grad_norm)
    )
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        step(batch)


def test_position_embedding_has_no_gradient_and_no_optimizer_state(make_meta_step):
    step, batch = make_meta_step()
    names_without_gradient = []
    clip = step.accelerator.clip_grad_norm_

    def spy(parameters, norm):
        parameters_by_name = step.model.named_parameters()
        names_without_gradient.extend(
            name for name, parameter in parameters_by_name if parameter.grad is None
        )
        return clip(parameters, norm)

    step.accelerator.clip_grad_norm_ = spy
    step(batch)
    assert names_without_gradient == ["backbone.pos_embed"]
    assert step.model.backbone.pos_embed not in step.state.optimizer.state


def test_gradients_are_all_reduced_once_per_step(make_meta_step):
    step, batch = make_meta_step("--gradient-accumulation-steps", "4")
    step(batch)
    assert make_meta_step.is_reduced == [False, False, False, True]


@pytest.fixture
def single_process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap", [lambda model: model, torch.nn.parallel.DistributedDataParallel], ids=["plain", "DDP"]
)
def test_all_blocks_share_one_compiled_graph(single_process_group, graph_counter, cache, wrap):
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    manifest = LatentCache(cache).manifest
    predictions = []
    for flags in ([], ["--compile"]):
        settings = make_settings(cache, "--model", "SiT-S/2", "--qk-norm", *flags)
        network = build_network_config(settings.model, manifest)
        align = plan_alignments(settings.alignments, network, make_cache_info(manifest))
        state = build_state(network, align, settings, torch.device("cpu"))
        torch.manual_seed(0)
        for block in state.model.backbone.blocks:  # their modulation is zero at initialization
            torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
        predictions.append(wrap(state.model)(x, t, y).prediction)
    # One graph for all twelve blocks; with optimize_ddp, DDP's buckets would split a block in two.
    assert graph_counter.frame_count == 1
    torch.testing.assert_close(predictions[0], predictions[1])
