"""Laws that hold for every alignment method and for the options that apply to all of them.

Add a configuration to CONFIGURATIONS for a new method: all tests of this module then apply to it.
"""

import shutil
from collections.abc import Iterable
from functools import cache as cached
from pathlib import Path

import pytest
import torch

import train
from dataset import CachedBatch, TrainingStream
from latents.cache import LatentCache
from models.projector import HEADS
from models.sit import PRESETS
from models.targets import TARGETS
from preprocessing import encode_features
from tests.helpers import call_main, have_equal_weights, read_metrics, train_flags
from tests.training.sharded_steps import (
    check_collectives,
    get_tolerance,
    train_in_processes,
)
from tests.training.steps import OperationCounter, make_settings, make_step
from training.alignment import required_cache_inputs
from training.alignment_config import TARGET_NORMS

SMALL_PRESET = {"depth": 3, "width": 64, "heads": 2, "patch": 2}

MLP = "--projector-width 64"
IMAGES = "--repa-encoder test_vit --encoder-weights {weights} --repa-side 64 --repa-from images"
FEATURES = "--repa-encoder test_vit --repa-from features"
TWO_ENCODERS = (
    "--repa-encoder test_vit,test_vit2 --encoder-weights {weights},{second} --repa-side 64 "
    "--repa-from images"
)
FROZEN = "--selftrans-checkpoint {frozen}"
CONFIGURATIONS = {
    "sra2": f"--align sra2 {MLP}",
    "sra2-conv3": "--align sra2 --projector-type conv --projector-kernel 3 --target-norm zscore",
    "repa": f"--align repa {IMAGES} {MLP}",
    "irepa": f"--align repa {FEATURES} --projector-type conv "
    "--projector-kernel 1 --target-norm zscore --zscore-alpha 0.8",
    "repa with two encoders": f"--align repa {TWO_ENCODERS} {MLP}",
    "haste": f"--align repa {FEATURES} {MLP} --align-stop-step 3",
    "sra": f"--align sra {MLP}",
    "layersync": "--align layersync",
    "selftrans": f"--align selftrans {FROZEN} {MLP}",
    "sra2+repa": f"--align sra2 repa {IMAGES} {MLP}",
    "sra2+layersync": f"--align sra2 layersync --align-weight 1 0.2 {MLP}",
    "all": f"--align sra2 repa sra layersync selftrans {IMAGES} {FROZEN} "
    f"--projector-type mlp conv mlp none mlp --target-norm none zscore none none zscore {MLP} "
    "--align-stop-step 0 0 3 0 0",
}
# Only `make test-long` tests these, because "all" covers their options.
LONG = ("haste", "sra2+repa", "sra2+layersync")
SHORT = tuple(name for name in CONFIGURATIONS if name not in LONG)


def mark_long(names: Iterable) -> list:
    """Return parameters for tests that only `make test-long` runs."""
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


every_configuration = pytest.mark.parametrize("name", [*SHORT, *mark_long(LONG)])


def test_every_method_and_option_has_a_configuration():
    tested = set(" ".join(CONFIGURATIONS.values()).split())
    assert {*TARGETS, *HEADS, *TARGET_NORMS} <= tested
    methods = [list_methods(flags) for flags in CONFIGURATIONS.values()]
    assert {names[0] for names in methods if len(names) == 1} == set(TARGETS)


def list_methods(flags: str) -> list[str]:
    """Return the methods of a configuration."""
    return flags.split(" --", maxsplit=1)[0].split()[1:]


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """Replace the smallest preset with a network of three blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "SiT-Ti/2", SMALL_PRESET)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory, with_images) -> dict[str, Path]:
    """Return the latent cache with stored features, the encoder weights, and a frozen network."""
    folder = tmp_path_factory.mktemp("all-methods")
    data = shutil.copytree(with_images / "data", folder / "data")
    weights = with_images / "weights.safetensors"
    encoder = ("--encoder", "test_vit", "--encoder-weights", weights, "--side", 64)
    call_main(encode_features, data, *encoder)
    options = ("--max-train-steps", 2, "--learning-rate", 0.01)
    call_main(train, *train_flags(data, folder, "frozen", *options))
    second = with_images / "second.safetensors"
    return {"data": data, "weights": weights, "second": second, "frozen": folder / "frozen"}


@pytest.fixture(scope="module")
def build(files):
    """Return a function that builds the Step of a configuration, with additional flags."""

    def build_step(name, *more):
        options = ("--learning-rate", "1e-3", "--ema-decay", 0.9, *more)
        flags = [*split_flags(name, files), *options]
        return make_step(make_settings(files["data"], *flags), torch.device("cpu"))

    return build_step


def split_flags(name: str, files: dict[str, Path]) -> list[str]:
    """Return the flags of a configuration."""
    flags = CONFIGURATIONS.get(name, f"--align {name}")
    return flags.format(**files).split()


def run_steps(step, files, indices) -> list[dict[str, float]]:
    """Train on these batches of the stream, and return the logged scalars of each step."""
    inputs = required_cache_inputs(step.alignments)
    stream = TrainingStream(LatentCache(files["data"]), 0, 8, inputs=inputs)
    rows = []
    for index in indices:
        scalars, _ = step(stream[index])
        rows.append({key: value.item() for key, value in scalars.items()})
    return rows


def randomize_modulation(*networks) -> None:
    """Let the tokens depend on all blocks; initially, the modulation of each block is zero."""
    for network in networks:
        for block in network.blocks:
            torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)


@every_configuration
def test_resumed_run_equals_an_uninterrupted_one(call, files, tmp_path, name):
    """The metrics, weights, EMA and optimizer states are bit-identical."""
    options = (*split_flags(name, files), "--max-train-steps", 4, "--checkpointing-steps", 2)
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"

    def start(exps: Path) -> str:
        flags = train_flags(files["data"], exps, "run", *options, projector_width=None)
        code, out = call(train, *flags)
        assert code == 0, out
        return out

    start(uninterrupted)
    # The other run was killed after its checkpoint at step 2.
    shutil.copytree(uninterrupted, resumed)
    shutil.rmtree(resumed / "run/checkpoints/0000004")
    assert "resuming from" in start(resumed)
    rows = read_metrics(uninterrupted / "run")
    assert read_metrics(resumed / "run") == rows and len(rows) == 4
    assert have_equal_weights(resumed / "run", uninterrupted / "run", "0000004")


@every_configuration
def test_accumulation_gives_the_same_losses(build, files, name):
    expected = run_steps(build(name), files, range(3))
    rows = run_steps(build(name, "--gradient-accumulation-steps", 2), files, range(3))
    for row, expected_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


@cached
def run_vanilla_steps(build, data):
    """Return the scalars, the network and the operations of steps without alignment."""
    step = build("none", "--max-grad-norm", 0.5)
    with OperationCounter() as counter:
        rows = run_steps(step, {"data": data}, range(2))
    return rows, step.state.model.backbone.state_dict(), counter.counts


@every_configuration
def test_weight_zero_trains_the_vanilla_network_and_computes_nothing(build, files, name):
    """Weights are bit-identical, also if gradients are clipped, and the operations are the same."""
    rows, weights, counts = run_vanilla_steps(build, files["data"])
    step = build(name, "--max-grad-norm", 0.5, *replace_weights(name, 0))
    with OperationCounter() as counter:
        assert run_steps(step, files, range(2)) == rows
    assert min(row["grad_norm"] for row in rows) > 0.5
    assert counter.counts == counts
    actual = step.state.model.backbone.state_dict()
    assert all(torch.equal(actual[key], weights[key]) for key in weights)


def replace_weights(name: str, weight: float) -> list:
    return ["--align-weight", *[weight] * len(list_methods(CONFIGURATIONS[name]))]


@every_configuration
def test_gradients_reach_only_the_head_and_the_blocks_up_to_the_aligned_one(build, files, name):
    """Targets, the EMA, frozen networks and later blocks of the student receive no gradient."""
    step = build(name, "--align-t-range", 0, 1)
    model = step.state.model
    randomize_modulation(model.backbone, *step.state.emas)
    stream = TrainingStream(
        LatentCache(files["data"]), 0, 8, inputs=required_cache_inputs(step.alignments)
    )
    batch = stream[0]
    moments = batch.moments.float().requires_grad_()  # x_t and the targets are computed from them
    inputs = step.sample_inputs(
        CachedBatch(batch.stream_position, moments, batch.labels, batch.inputs)
    )
    total, scalars = step.compute_losses(inputs)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for method, alignment in step.alignments.items():
        gradients = torch.autograd.grad(
            scalars[f"align/{method}"].sum(),
            list(parameters.values()),
            retain_graph=True,
            allow_unused=True,
        )
        reached = {
            name
            for name, gradient in zip(parameters, gradients)
            if gradient is not None and gradient.any()
        }
        blocks = {int(key.split(".")[2]) + 1 for key in reached if ".blocks." in key}
        assert blocks == set(range(1, alignment.config.block + 1)), method
        assert not any("final_layer" in key for key in reached)
        heads = {key.split(".")[1] for key in reached if key.startswith("heads.")}
        with_parameters = {n for n in alignment.head_names if list(model.heads[n].parameters())}
        assert heads == with_parameters
    total.mean().backward()
    targets = [alignment.target for alignment in step.alignments.values()]
    networks = [
        value
        for target in targets
        for value in vars(target).values()
        if isinstance(value, torch.nn.Module)
    ]
    for network in [*step.state.emas, *networks]:
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    trained = [parameter for parameter in parameters.values() if parameter.grad is not None]
    assert len(trained) == len(parameters)


@every_configuration
def test_step_never_synchronizes_with_the_device(make_meta_step, files, name):
    """On the meta device, a synchronization raises an error."""
    step, batch = make_meta_step(*split_flags(name, files), data=files["data"])
    for _ in range(2):
        scalars, is_finite = step(batch)
    assert is_finite.is_meta and all(value.is_meta for value in scalars.values())
    assert len(scalars) == 3 + 3 * len(step.alignments)


# The graphs are the inputs, the block of the student, the losses, the losses after a stop, and the
# block of each network that computes a target.
NUM_GRAPHS = {
    "sra2": 3,
    "sra2-conv3": 3,
    "repa": 4,
    "repa with two encoders": 5,
    "irepa": 3,
    "haste": 4,
    "sra": 4,
    "layersync": 3,
    "selftrans": 4,
    "sra2+repa": 4,
    "sra2+layersync": 3,
    "all": 7,
}


@pytest.mark.parametrize(
    "name", ["all", *mark_long(name for name in CONFIGURATIONS if name != "all")]
)
def test_compiled_step_has_the_same_losses_and_does_not_compile_again(
    build, files, graph_counter, name
):
    """A graph break is an error. The graphs run without a compiler, so the losses are equal."""
    indices = (0, 1, 2, 2**30)  # images far in the stream do not need other code
    expected = run_steps(build(name), files, indices)
    assert run_steps(build(name, "--compile"), files, indices) == expected
    assert graph_counter.frame_count == NUM_GRAPHS[name]


@pytest.mark.long
@every_configuration
def test_compiler_does_not_change_the_losses(build, files, name):
    results = []
    for options in ([], ["--compile"]):
        step = build(name, *options)
        torch.manual_seed(0)
        randomize_modulation(step.state.model.backbone)  # so that no alignment gradient is zero
        results.append(run_steps(step, files, range(4)))
    expected, rows = results
    for row, expected_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("names", [SHORT, *mark_long([LONG])], ids=["short", "long"])
def test_two_processes_have_the_losses_of_one_and_sharding_does_not_change_them(
    files, tmp_path, names
):
    """One pair of processes trains the configurations; the processes compare the weights."""
    options = ("--learning-rate", "1e-3", "--max-grad-norm", "0.5", "--ema-decay", "0.9")
    runs = {
        name: {"flags": [*split_flags(name, files), *options], "modes": ["full"], "num_steps": 3}
        for name in names
    }
    if "sra" in runs:
        runs["sra"]["modes"].append("optimizer+2")
    if "sra2" in runs:
        flags = [*runs["sra2"]["flags"], "--optimizer", "muon"]
        runs["muon"] = {"flags": flags, "modes": ["full"], "num_steps": 3}
    presets = {"SiT-Ti/2": SMALL_PRESET}
    results = train_in_processes(2, tmp_path, files["data"], runs, presets)
    assert results.keys() == runs.keys()
    for name, modes in results.items():
        unsharded = modes.pop("none")["scalars"]
        run = runs[name]
        tolerance = get_tolerance(run)
        step = make_step(make_settings(files["data"], *run["flags"]), torch.device("cpu"))
        expected = run_steps(step, files, range(run["num_steps"]))
        for row, expected_row in zip(unsharded, expected, strict=True):
            losses = {key: value for key, value in row.items() if key != "grad_norm"}
            assert losses == pytest.approx(
                {key: expected_row[key] for key in losses}, abs=10 * tolerance
            )
        assert max(row["grad_norm"] for row in unsharded) > 0.5, "the gradients are never clipped"
        for mode, result in modes.items():
            for row, expected_row in zip(result["scalars"], unsharded, strict=True):
                assert row == pytest.approx(expected_row, rel=tolerance, abs=tolerance), (
                    name,
                    mode,
                )
            if name == "sra":
                check_collectives(mode, result["collectives"], depth=3, teacher_block=2)
