"""Base class of the comparisons with the code of the authors of an alignment method.

A subclass loads a network and a loss from a clone of a repository. The network gets random weights,
which are copied to our training step, and the gradients of its loss get the names of our
parameters. Shapes: B batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.authors_code import load_module, replay_random_numbers
from checkpointing.official import convert_state_dict
from models.sit import SiT, SiTConfig
from models.target import TrainingInputs
from train import Step
from training.alignment import Alignment


class Repository(NamedTuple):
    """A repository of authors."""

    url: str
    commit: str  # commit whose interfaces the comparison uses


# Name in the flags -> repository.
REPOSITORIES = {
    "repa": Repository(
        "https://github.com/sihyun-yu/REPA", "67f714503e3892f993844aab088ffc5791c92613"
    ),
    "irepa": Repository(
        "https://github.com/End2End-Diffusion/iREPA", "99ad4ac234efe8de52ce157120f72856e836d09f"
    ),
    "haste": Repository(
        "https://github.com/NUS-HPC-AI-Lab/HASTE", "eb7b1f1f0210abc5e533685ce1b386588be503bd"
    ),
    "layersync": Repository(
        "https://github.com/vita-epfl/LayerSync", "4001d6df0b1fd1e642e6a0849a71270f8ad8b0d3"
    ),
    "sra": Repository(
        "https://github.com/vvvvvjdy/SRA", "1723f85069408f6df7d11db35549575c97bfa5b2"
    ),
    "selftrans": Repository(
        "https://github.com/csslc/Self-Transcendence", "42fde5d80a8bd1cca2020818b6e6176c5369fdb1"
    ),
}


class Losses(NamedTuple):
    """Losses of a batch, averaged over its samples."""

    denoising: Tensor
    alignment: Tensor  # without its weight
    total: Tensor


class Reference(NamedTuple):
    """Results of an independent computation."""

    losses: Losses
    gradients: dict[str, Tensor]  # gradients of the total loss, by the name of our parameter
    measurements: dict[str, float]  # see AuthorsMethod.measure_differences


class Case(NamedTuple):
    """The objects from which a loss of the authors is computed."""

    network: nn.Module  # the authors' network, in training mode
    teacher: nn.Module  # a network of the same architecture, in evaluation mode
    inputs: TrainingInputs  # inputs of our training step
    alignment: Alignment  # method of our training step, with the numbers of the blocks


def randomize(network: nn.Module, seed: int) -> None:
    """Set all trained parameters to random values, so that no block is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values * fan_in**-0.5)


def read_gradients(network: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all trained parameters by name, with zeros for unused parameters."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def make_dropout_draws(inputs: TrainingInputs) -> Tensor:
    """Return the random numbers with which the authors' networks drop the same labels as ours."""
    return (inputs.labels == inputs.classes).float()


def get_alignment(step: Step) -> Alignment:
    """Return the only alignment method of a step."""
    (alignment,) = step.alignments.values()
    return alignment


class AuthorsMethod(ABC):
    """An alignment method, computed by the code of its authors.

    Args:
        root: A clone of the repository.
    """

    title: ClassVar[str]
    repository: ClassVar[str]  # a key of REPOSITORIES
    files: ClassVar[str]  # files of the repository that are executed, separated by spaces
    flags: ClassVar[str]  # flags of train.py here
    weight: ClassVar[float]  # default weight of the alignment loss in the authors' code
    offset: ClassVar[float] = 1.0  # our alignment loss minus that of the authors
    origin: ClassVar[str] = "repa"  # see checkpointing.official
    # Prefixes of the names of the head's parameters: theirs -> ours.
    head_prefixes: ClassVar[dict[str, str]] = {"projectors.0.": "heads.repa."}
    latent_size: ClassVar[int | None] = None  # size that the loss requires, if any

    def __init__(self, root: Path):
        self.root = root
        self.flag = f"--{self.repository}-repository"
        self.load()

    @abstractmethod
    def load(self) -> None:
        """Load the modules of the repository."""

    @abstractmethod
    def build_network(self, network: SiTConfig, alignment: Alignment) -> nn.Module:
        """Build the authors' network."""

    @abstractmethod
    def call_loss(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return the authors' denoising loss and alignment loss, of each sample or averaged."""

    def make_draws(self, inputs: TrainingInputs) -> dict[str, list[Tensor]]:
        """Return the random numbers that the loss draws, by the name of torch's function."""
        timesteps = inputs.t[:, None, None, None]  # most losses draw the shape (B, 1, 1, 1)
        return {"rand": [timesteps, make_dropout_draws(inputs)], "randn_like": [inputs.noise]}

    def find_teacher(self, step: Step) -> SiT | None:
        """Return the network in our step that receives the weights of the teacher."""
        return None

    def measure_differences(self, case: Case) -> dict[str, float]:
        """Return losses of the released code in which the comparison fixes errors, by name."""
        return {}

    def import_file(self, path: str, **options: Any) -> Any:
        """Load one file of the repository."""
        return load_module(self.root / path, self.flag, **options)

    def compute_reference(self, step: Step, inputs: TrainingInputs) -> Reference:
        """Copy random weights to our step, and compute the authors' losses and gradients."""
        network, teacher = self.build_networks(step)
        self.copy_weights(network, teacher, step)
        case = Case(network, teacher, inputs, get_alignment(step))
        denoising, alignment = self.replay(self.call_loss, case)
        losses = Losses(denoising, alignment, denoising + self.weight * alignment)
        losses.total.backward()
        with torch.no_grad():
            measurements = self.measure_differences(case)
        # The conversion of the weights is orthogonal, so it also converts the gradients.
        return Reference(losses, self.convert(read_gradients(network), step), measurements)

    def replay(
        self, call_loss: Callable[[Case], tuple[Tensor, Tensor]], case: Case
    ) -> tuple[Tensor, Tensor]:
        """Call a loss with the random numbers of our step, and average over the samples."""
        with replay_random_numbers(**self.make_draws(case.inputs)):
            denoising, alignment = call_loss(case)
        return denoising.mean(), alignment.mean()

    def build_networks(self, step: Step) -> tuple[nn.Module, nn.Module]:
        """Build the authors' network and a teacher, with different random weights."""
        config = step.state.model.backbone.config
        network = self.build_network(config, get_alignment(step))
        teacher = self.build_network(config, get_alignment(step))
        randomize(network, seed=1)
        randomize(teacher, seed=2)
        teacher.eval().requires_grad_(False)
        return network, teacher

    def copy_weights(self, network: nn.Module, teacher: nn.Module, step: Step) -> None:
        """Copy the weights of the authors' networks to our step.

        The position embeddings are not copied, because each network computes them.
        """
        model = step.state.model
        weights = self.convert(network.state_dict(), step)
        weights["backbone.pos_embed"] = model.backbone.pos_embed
        model.load_state_dict(weights)
        our_teacher = self.find_teacher(step)
        if our_teacher is not None:
            weights = self.convert(teacher.state_dict(), step)
            weights["backbone.pos_embed"] = our_teacher.pos_embed
            names = our_teacher.state_dict().keys()
            our_teacher.load_state_dict({name: weights[f"backbone.{name}"] for name in names})

    def convert(self, tensors: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """Rename tensors of the authors' network to the names of an `AlignedSiT`."""
        heads = {}
        backbone = dict(tensors)
        for prefix, our_prefix in self.head_prefixes.items():
            for name in tensors:
                if name.startswith(prefix):
                    heads[our_prefix + name.removeprefix(prefix)] = backbone.pop(name)
        config = step.state.model.backbone.config
        backbone = convert_state_dict(backbone, config, self.origin)
        return heads | {f"backbone.{name}": tensor for name, tensor in backbone.items()}
