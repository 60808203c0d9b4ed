"""Compute metrics of the EMA during training, with samples from all processes.

For the same checkpoint, flags and batch size, the metrics equal those of sample_ddp.py and
evaluations.evaluate, except for rounding differences if --mixed-precision or --allow-tf32 differ.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.cli import UserError
from common.config import get_flag_of_field
from common.files import sha256
from common.progress import ProgressBar
from evaluations.compare import compute_metrics
from evaluations.extractors import collect_features, load_extractor
from evaluations.features import Features
from evaluations.metrics import MANIFOLD_NEIGHBOURS
from evaluations.reference_features import (
    ReferenceFeatures,
    ReferenceFile,
    load_reference_features,
)
from latents.manifest import Manifest
from models.autoencoder import Autoencoder
from models.errors import FieldError
from models.labels import TrainedLabels
from models.sit import SiT
from sampling.recipe import Recipe
from training.config import ObjectiveConfig, PeriodicEvaluationConfig
from training.held_out import HeldOutLoss
from training.joint_work import exchange_status

# Fields of the recipe that identify an evaluation.
RECIPE_KEYS = ("path_type", "prediction", "solver", "num_steps", "cfg_scale", "labels", "seed")


@dataclass
class Evaluator:
    """Compares samples of a network with a reference, and measures its loss on held-out images.

    Args:
        config: Settings of the evaluation.
        objective: The denoising objective that the network is trained on.
        vae: Decodes the samples.
        manifest: Manifest of the training cache.
        trained_labels: Labels that the network is trained on.
        dtype: Autocast dtype of the network while it samples.
        rank: Rank of this process; the first process loads the reference.
        num_processes: Number of processes.

    Raises:
        UserError: A setting is wrong, or the reference or a network cannot be loaded.
    """

    config: PeriodicEvaluationConfig
    objective: ObjectiveConfig
    vae: Autoencoder
    manifest: Manifest
    trained_labels: TrainedLabels
    dtype: torch.dtype
    rank: int
    num_processes: int

    def __post_init__(self) -> None:
        config = self.config
        _check_config(config)
        self.device = self.vae.vae.device
        recipe = Recipe(
            mode=config.mode,
            heun=config.heun,
            num_steps=config.num_steps,
            cfg_scale=config.cfg_scale,
            path_type=self.objective.path_type,
            prediction=self.objective.prediction,
        )
        try:
            recipe.validate()
            self.recipe = recipe.for_trained_labels(self.trained_labels)
        except FieldError as error:
            flag = get_flag_of_field(PeriodicEvaluationConfig, error.field)
            raise UserError(f"{flag} {error.reason}") from None
        size = self.manifest.resolution
        self.network = load_extractor(
            config.features,
            config.inception_weights,
            (size, size),
            self.device,
            "the training cache",
            "--eval-features",
        )
        self.held_out = None
        if config.latents:
            self.held_out = HeldOutLoss(config.latents, config.samples)
            self.held_out.check_compatible(self.manifest)
        self.reference: ReferenceFeatures | None = None
        self.identity: dict = {}
        if self.rank == 0:
            self._load_reference()

    def _load_reference(self) -> None:
        config = self.config
        assert config.reference is not None
        if not config.reference.exists():
            raise UserError(f"--eval-reference {config.reference} does not exist")
        digest = sha256(config.reference)
        self.reference = load_reference_features(
            ReferenceFile(config.reference, digest, self.manifest.resolution, "--eval-reference"),
            {config.features: self.network},
            config.batch_size,
            self.device,
        )[config.features]
        self.identity = {
            "samples": config.samples,
            "features": config.features,
            "reference": str(config.reference),
            "reference_sha256": digest,
            **{key: getattr(self.recipe, key) for key in RECIPE_KEYS},
            **self.recipe.describe_label_classes(),
            "batch_size": config.batch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        }
        if self.held_out:
            self.identity["held_out"] = self.held_out.identity

    @torch.no_grad()
    def measure(
        self, model: SiT, gather: Callable[[Tensor], Tensor], is_stopped: Callable[[], bool]
    ) -> dict[str, float | None] | None:
        """Compute the metrics of a network. All processes must call this.

        Args:
            model: The network.
            gather: Concatenates a tensor of every process on the first one, in the order of the
                ranks.
            is_stopped: Returns whether a stop signal arrived on this process.

        Returns:
            The metrics on the first process, None on the others.

        Raises:
            Stopped: A stop signal arrived on any process; raised on all of them.
            JointWorkError: The evaluation failed on another process.
        """

        def check_status() -> None:
            exchange_status(is_stopped=is_stopped())

        held_out_loss = {}
        if self.held_out:
            held_out_loss = self.held_out.measure(
                model,
                self.recipe,
                self.dtype,
                self.config.batch_size,
                (self.rank, self.num_processes),
                gather,
                check_status,
            )
        batches = self._feature_batches(model, gather, check_status)
        if self.reference is None:
            for _ in batches:  # this process computes features for the first one
                pass
            return None
        features = collect_features(batches, self.config.samples)
        index = torch.arange(self.config.samples)
        labels = self.recipe.compute_labels(index, model.config.num_classes).numpy()
        name = self.config.features
        metrics = compute_metrics(features, labels, self.reference, name, self.device)
        return metrics | held_out_loss

    def try_out(self, model: SiT, gather: Callable[[Tensor], Tensor]) -> None:
        """Evaluate one batch per process with few steps and discard the metrics, to detect errors.

        All processes must call this.
        """
        batch_size = self.config.batch_size * self.num_processes
        num_samples = min(self.config.samples, max(batch_size, MANIFOLD_NEIGHBOURS + 1))
        trial = copy.copy(self)
        trial.config = replace(self.config, samples=num_samples)
        trial.recipe = replace(self.recipe, num_steps=min(self.recipe.num_steps, 2))
        if self.config.latents:
            trial.held_out = HeldOutLoss(self.config.latents, num_samples)
        trial.measure(model, gather, lambda: False)

    def _feature_batches(
        self, model: SiT, gather: Callable[[Tensor], Tensor], check_status: Callable[[], None]
    ) -> Iterator[Features]:
        """Yield the features of one batch per process, in the order of the images.

        All processes call `check_status` before they gather the features of a batch. The last batch
        is padded with the images that would follow.
        """
        batch_size = self.config.batch_size
        num_samples = self.config.samples
        step = batch_size * self.num_processes
        with ProgressBar(
            total=num_samples, unit="img", desc="evaluating", leave=False, disable=self.rank > 0
        ) as bar:
            for first in range(0, num_samples, step):
                begin = first + self.rank * batch_size
                index = torch.arange(begin, begin + batch_size, device=self.device)
                images = self.vae.decode(self.recipe.sample_latents(model, index, self.dtype))
                features = self.network(images)
                check_status()
                yield features.map(gather)
                bar.update(min(step, num_samples - first))


def _check_config(config: PeriodicEvaluationConfig) -> None:
    if config.samples <= MANIFOLD_NEIGHBOURS:
        raise UserError(
            f"--eval-samples {config.samples} is too few: precision and recall need at least "
            f"{MANIFOLD_NEIGHBOURS + 1}"
        )
    if config.reference is None:
        raise UserError(
            "--eval-every needs --eval-reference: pass ADM's .npz, or images (a folder, zip, "
            "tar or parquet files)"
        )
