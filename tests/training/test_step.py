"""The step as it runs on a GPU: on the meta device, whose tensors have no values, so that asking for one is an error."""

import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import train
from latents.cache import LatentCache
from training import alignment
from training.config import check_args, make_config, parse_args
from training.guard import NonFiniteGuard

META = torch.device("meta")


@pytest.fixture
def make_step(cache, monkeypatch):
    """make_step(*flags) -> a Step on the meta device, and a batch in host memory; make_step.synced: of each backward, whether
    the processes' gradients are summed in it."""
    monkeypatch.setattr(
        sys.modules["torch.optim.optimizer"],
        "_get_fused_kernels_supported_devices",
        lambda: ["meta"],
    )
    monkeypatch.setattr(
        torch, "autocast", lambda device_type, **_: nullcontext()
    )  # there is none on this device

    unsynced, synced = [], []

    @contextmanager
    def no_sync(model):
        unsynced.append(model)
        yield
        unsynced.pop()

    def make(*flags):
        args = parse_args(
            "",
            [
                "--exp-name",
                "x",
                "--data-dir",
                str(cache),
                "--model",
                "SiT-Ti/2",
                "--batch-size",
                "8",
                *flags,
            ],
        )
        check_args(args, 1)
        held = LatentCache(cache)
        data = alignment.data_of(held.manifest)
        config = make_config(args, held.manifest, data)
        state = train.build(args, config, META)
        targets = alignment.load(args, config, data, state.emas[0], META, nullcontext)
        accelerator = SimpleNamespace(
            device=META,
            prepare=lambda *parts: parts,
            no_sync=no_sync,
            clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
            backward=lambda loss: (synced.append(not unsynced), loss.backward()),
        )
        step = train.Step(
            args,
            accelerator,
            held.manifest,
            state,
            targets,
            NonFiniteGuard(state.optimizer, fp16=False),
        )
        batch = (
            torch.arange(8),
            torch.zeros(8, 8, 8, 8, dtype=torch.float16),
            torch.zeros(8, dtype=torch.int64),
        )
        return step, batch

    make.synced = synced
    return make


OPTIONS = {
    "default": [],
    "vanilla": ["--align", "none"],
    "accumulated": [
        "--gradient-accumulation-steps",
        "2",
        "--align-t-range",
        "0",
        "0.5",
        "--ema-decay",
        "0.9",
        "0.5",
    ],
    "stopped": ["--align-stop-step", "1", "--prediction", "x", "--weighting", "lognormal"],
    "teacher": [
        "--align",
        "sra2",
        "sra",
        "--align-loss",
        "cosine",
        "l2",
        "--gradient-accumulation-steps",
        "2",
    ],
    "recomputed": [
        "--activation-checkpointing",
        "--align-loss",
        "smooth_l1",
        "--align-target",
        "sample",
    ],
}


@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS)
def test_nothing_in_a_step_waits_for_the_device(make_step, flags):
    step, batch = make_step(*flags)
    for _ in range(2):
        terms, good = step(batch)
    assert terms.is_meta and good.is_meta and terms.shape == (3 + 3 * len(step.targets),)
    assert step.state.step == 2 and len(step.state.optimizer.state) > 50


@pytest.mark.parametrize(
    "ask", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, bool]
)
def test_that_this_would_be_noticed(make_step, monkeypatch, ask):
    step, batch = make_step()
    monkeypatch.setattr(step.guard, "judge", lambda number, denoising, align, norm: ask(norm))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        step(batch)


def test_the_frozen_position_has_no_gradient_and_no_optimizer_state(make_step):
    step, batch = make_step()
    without, clip = [], step.accelerator.clip_grad_norm_

    def spy(parameters, norm):
        without.extend(
            name for name, parameter in step.model.named_parameters() if parameter.grad is None
        )
        return clip(parameters, norm)

    step.accelerator.clip_grad_norm_ = spy
    step(batch)
    assert without == ["backbone.pos_embed"]
    assert step.model.backbone.pos_embed not in step.state.optimizer.state


def test_gradients_are_summed_over_processes_once_a_step(make_step):
    step, batch = make_step("--gradient-accumulation-steps", "4")
    step(batch)
    assert make_step.synced == [False, False, False, True]


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap", [lambda model: model, torch.nn.parallel.DistributedDataParallel], ids=["alone", "DDP"]
)
def test_all_blocks_are_one_compiled_graph(one_process_group, monkeypatch, cache, wrap):
    counter = CompileCounter()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module: compile_module(module, backend=counter, fullgraph=True),
    )
    torch._dynamo.reset()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    outputs = []
    for flags in ([], ["--compile"]):
        args = parse_args(
            "", ["--exp-name", "x", "--data-dir", str(cache), "--model", "SiT-S/2", *flags]
        )
        check_args(args, 1)
        held = LatentCache(cache)
        config = make_config(args, held.manifest)
        model = train.build(args, config, torch.device("cpu")).model
        torch.manual_seed(0)
        for block in model.backbone.blocks:  # they start at zero
            torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
        outputs.append(wrap(model)(x, t, y))
    assert counter.frame_count == 1  # for twelve blocks; DDP's buckets would make two of each
    torch.testing.assert_close(outputs[0], outputs[1])
