"""Base class of the comparisons with the code of the authors of an alignment method.

A subclass loads a network and a loss from a clone of a repository. The network gets random weights,
which are copied to our training step, and the gradients of its loss get the names of our
parameters.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.authors_code import load_module
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
    measurements: dict[str, float]  # measured values of known differences


class Case(NamedTuple):
    """The objects that a loss of the authors depends on."""

    network: nn.Module  # the authors' network, in training mode
    teacher: nn.Module  # a network of the same architecture, in evaluation mode
    inputs: TrainingInputs  # those of our step
    alignment: Alignment  # the method in our step, which determines the blocks


def randomize(network: nn.Module, seed: int) -> None:
    """Give all trained parameters random values, so that no block is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values * fan_in**-0.5)


def get_alignment(step: Step) -> Alignment:
    """Return the only alignment method of a step."""
    (alignment,) = step.alignments.values()
    return alignment


class AuthorsMethod(ABC):
    """A method in the code of its authors.

    Args:
        root: A clone of the repository.
    """

    title: ClassVar[str]
    repository: ClassVar[str]  # a key of REPOSITORIES
    files: ClassVar[tuple[str, ...]]  # files of the repository that are executed
    flags: ClassVar[tuple[str, ...]]  # flags of train.py here
    weight: ClassVar[float]  # default of the authors' flag
    offset: ClassVar[float] = 1.0  # our alignment loss minus that of the authors
    origin: ClassVar[str] = "repa"  # see checkpointing.official
    # Prefixes of the names of the head's parameters: theirs -> ours.
    head_prefixes: ClassVar[dict[str, str]] = {"projectors.0.": "heads.repa."}
    differences: ClassVar[tuple[str, ...]] = ()  # known differences
    latent_size: ClassVar[int | None] = None  # if the loss depends on it

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
    def compute_losses(self, case: Case) -> Losses:
        """Compute the authors' losses."""

    def find_teacher(self, step: Step) -> SiT | None:
        """Return the network in our step that receives the weights of the teacher."""
        return None

    def measure_differences(self, case: Case) -> dict[str, float]:
        """Measure the known differences."""
        return {}

    def import_file(self, path: str, **options: Any) -> Any:
        """Load one file of the repository."""
        return load_module(self.root / path, self.flag, **options)

    def compute_reference(self, step: Step, inputs: TrainingInputs) -> Reference:
        """Copy random weights to our step, and compute the authors' losses and gradients."""
        network, teacher = self.build_networks(step)
        self.copy_weights(network, teacher, step)
        case = Case(network, teacher, inputs, get_alignment(step))
        losses = self.compute_losses(case)
        losses.total.backward()
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        with torch.no_grad():
            measurements = self.measure_differences(case)
        # The conversion of the weights is orthogonal, so it also converts the gradients.
        return Reference(losses, self.convert(gradients, step), measurements)

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
        converted = {}
        backbone = {}
        for name, tensor in tensors.items():
            for prefix, our_prefix in self.head_prefixes.items():
                if name.startswith(prefix):
                    converted[our_prefix + name.removeprefix(prefix)] = tensor
                    break
            else:
                backbone[name] = tensor
        config = step.state.model.backbone.config
        backbone = convert_state_dict(backbone, config, self.origin)
        return converted | {f"backbone.{name}": tensor for name, tensor in backbone.items()}
