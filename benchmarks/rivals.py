r"""Compare the losses and gradients of the alignment methods with the code of their authors.

    python -m benchmarks.rivals --repa-repository REPA --irepa-repository iREPA \
        --haste-repository HASTE --layersync-repository LayerSync --sra-repository SRA \
        --selftrans-repository Self-Transcendence --json rivals.json

Pass clones of the repositories in docs/rivals.md; methods whose repository is not passed are
omitted. The authors of SRA 2 have not released code, so its formulas are evaluated with loops
(benchmarks/rival_formula.py).

For each method, the authors' network and the step of train.py get the same random weights, latents,
noise, timesteps, labels, dropped labels and encoder tokens. The command compares the denoising
loss, the alignment loss, the total loss, and the gradient of the total loss with respect to every
parameter of the backbone and the head. It fails if a difference exceeds 1e-5. The networks have the
depth and the blocks of SiT-B/2, but a smaller width, and run on the CPU in float32.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.authors_code import describe_files
from benchmarks.measure import describe_machine, make_parser, write_result
from benchmarks.rival_formula import FORMULAS, SRA2
from benchmarks.rival_methods import AUTHORS_METHODS, STORED_ENCODERS
from benchmarks.rival_reference import (
    REPOSITORIES,
    AuthorsMethod,
    Losses,
    get_alignment,
    read_gradients,
)
from benchmarks.run_steps import Plan, build_step
from benchmarks.table import TABLES
from benchmarks.table_rows import list_differences
from benchmarks.variants import make_synthetic_manifest
from common import cli
from common.cli import UserError
from models.encoder import canonical_name, describe_encoder
from models.sit import SiTConfig
from models.target import TrainingInputs
from train import Step
from training.alignment import make_cache_info, plan_alignments
from training.config import build_network_config, parse_settings

MODEL = "SiT-B/2"
TOLERANCE = 1e-5
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Size:
    """Size of the compared networks and of the batch."""

    width: int = 96
    latent_size: int = 16
    batch_size: int = 4


def build_our_step(flags: list[str], size: Size) -> Step:
    """Build the training step of train.py for a small network with the blocks of SiT-B/2."""
    common_flags = ["--exp-name", "rivals", "--data-dir", ".", "--model", MODEL]
    # The default width of SRA's head is twice the width of the network.
    if "sra" in flags:
        common_flags += ["--projector-width", str(2 * size.width)]
    settings = parse_settings([*common_flags, "--batch-size", str(size.batch_size), *flags])
    manifest = make_synthetic_manifest(size.latent_size)
    network = replace(build_network_config(settings.model, manifest), width=size.width)
    features = {
        folder.removeprefix("features/"): describe_features(encoder, network, manifest.resolution)
        for folder, encoder in STORED_ENCODERS.items()
    }
    cache_info = make_cache_info(manifest, features)
    align = plan_alignments(settings.alignments, network, cache_info)
    plan = Plan(settings, manifest, cache_info, network, align)
    return build_step(plan, Accelerator(cpu=True, mixed_precision="no"))


# The result is cached, because each call takes a fraction of a second.
describe_stored_encoder = cache(describe_encoder)


def describe_features(encoder: str, network: SiTConfig, resolution: int) -> dict:
    """Return the contents of features.json for the stored tokens of an encoder."""
    return {
        "encoder": canonical_name(encoder),
        "side": describe_stored_encoder(encoder, resolution).side,
        "tokens_side": network.grid_size,
        "fingerprint": "random",
    }


def make_inputs(network: SiTConfig, size: Size) -> TrainingInputs:
    """Return random inputs of a step, with timesteps in the whole interval [0, 1]."""
    torch.manual_seed(0)
    shape = (size.batch_size, network.channels, network.latent_size, network.latent_size)
    latents = torch.randn(shape)
    classes = torch.randint(network.num_classes, (size.batch_size,))
    labels = classes.clone()
    labels[::3] = network.num_classes  # dropped labels
    encoder_tokens = {}
    for folder, encoder in STORED_ENCODERS.items():
        width = describe_stored_encoder(encoder, PIXELS_PER_LATENT * size.latent_size).width
        tokens = torch.randn(size.batch_size, network.grid_size**2, width) + 0.5
        encoder_tokens[folder] = tokens.half()
    return TrainingInputs(
        latents=latents,
        labels=labels,
        classes=classes,
        noise=torch.randn(shape),
        t=(torch.arange(size.batch_size) + 0.5) / size.batch_size,
        posterior_mean=latents + 0.1 * torch.randn(shape),
        target_uniform=torch.rand(size.batch_size),
        cache_inputs=encoder_tokens,
    )


def compute_ours(step: Step, inputs: TrainingInputs) -> tuple[Losses, dict[str, Tensor]]:
    """Run the forward and backward pass of a training step."""
    total, scalars = step.compute_losses(inputs)
    total.mean().backward()
    alignment = scalars[f"align/{get_alignment(step).config.method}"]
    losses = Losses(scalars["denoising"].mean(), alignment.mean(), total.mean())
    return losses, read_gradients(step.state.model)


def compare(method: AuthorsMethod | SRA2, size: Size) -> dict:
    """Compare a method with its reference, and return an entry of the JSON file."""
    if method.latent_size:
        size = replace(size, latent_size=method.latent_size)
    flags = method.flags.split()
    step = build_our_step(flags, size)
    inputs = make_inputs(step.state.model.backbone.config, size)
    reference = method.compute_reference(step, inputs)
    losses, gradients = compute_ours(step, inputs)
    alignment = get_alignment(step)
    return {
        "flags": flags,
        "latent_size": size.latent_size,
        "block": alignment.config.block,
        "weight": alignment.config.weight,
        "losses": compare_losses(losses, reference.losses, method.offset, method.weight),
        "gradient": compare_gradients(gradients, reference.gradients),
        "measured_differences": reference.measurements,
    }


def compare_losses(
    ours: Losses, reference: Losses, offset: float, weight: float
) -> dict[str, dict[str, float]]:
    """Compare losses.

    Args:
        ours: Losses of our step.
        reference: Losses of the authors' code.
        offset: Known difference of the alignment losses.
        weight: Weight of the alignment loss in the authors' code.
    """
    offsets = (0.0, offset, weight * offset)
    comparison = {}
    for name, our_loss, authors_loss, expected in zip(Losses._fields, ours, reference, offsets):
        our_value = our_loss.item()
        authors_value = authors_loss.item()
        difference = abs(our_value - authors_value - expected)
        comparison[name] = {
            "authors": authors_value,
            "ours": our_value,
            "expected_offset": expected,
            "difference": difference / max(1.0, abs(authors_value)),
        }
    return comparison


def compare_gradients(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict:
    """Compare gradients by the norm of their difference, relative to the norm of the reference.

    Raises:
        UserError: A parameter exists in only one of the networks.
    """
    if ours.keys() != reference.keys():
        names = ", ".join(sorted(ours.keys() ^ reference.keys()))
        raise UserError(
            f"only one of the networks has the parameters {names}; in the clone, check out the "
            "commit that --help states"
        )
    differences = {}
    for name, gradient in reference.items():
        scale = gradient.norm().clamp(min=torch.finfo(torch.float32).tiny)
        differences[name] = ((ours[name] - gradient).norm() / scale).item()
    largest = max(differences, key=differences.__getitem__)
    total_difference = torch.stack([(ours[k] - reference[k]).norm() for k in reference]).norm()
    total_norm = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
    return {
        "parameters": len(differences),
        "norm": total_norm.item(),
        "difference": (total_difference / total_norm).item(),
        "largest_difference": differences[largest],
        "parameter_with_largest_difference": largest,
    }


def compare_all(repositories: dict[str, Path], size: Size) -> dict[str, dict]:
    """Compare all methods whose repository is given, and the formulas.

    Args:
        repositories: Clones by the name of the repository.
        size: Size of the networks.
    """
    results = {formula.title: compare(formula(), size) for formula in FORMULAS}
    for method_class in AUTHORS_METHODS:
        if method_class.repository in repositories:
            root = repositories[method_class.repository]
            method = method_class(root)
            results[method.title] = {
                **REPOSITORIES[method.repository]._asdict(),
                **describe_files(root, method.files.split()),
                **compare(method, size),
            }
    return results


def main() -> None:
    """Run the comparison."""
    parser = make_parser(__doc__, "rivals")
    for name, repository in REPOSITORIES.items():
        parser.add_argument(
            f"--{name}-repository",
            type=Path,
            metavar="DIR",
            help=f"clone of {repository.url} (commit {repository.commit[:7]})",
        )
    args = parser.parse_args()
    size = Size()
    paths = {name: getattr(args, f"{name}_repository") for name in REPOSITORIES}
    results = compare_all({name: path for name, path in paths.items() if path}, size)
    result = {
        "benchmark": args.benchmark,
        "machine": describe_machine(torch.device("cpu")) | {"timm": timm.__version__},
        "model": MODEL,
        "width": size.width,
        "batch_size": size.batch_size,
        "tolerance": TOLERANCE,
        "results": results,
    }
    write_result(result, args.json)
    print(f"\n{TABLES['rivals'].format([result])}")
    failed = [title for title, entry in results.items() if max(list_differences(entry)) > TOLERANCE]
    if failed:
        raise UserError(
            f"{', '.join(failed)}: a loss or gradient differs from the reference by more than "
            f"{TOLERANCE}; the lines above contain the differences"
        )


if __name__ == "__main__":
    cli.run(main)
