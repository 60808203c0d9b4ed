"""Metrics of the averaged models while they train: sampling and evaluation over all processes, images never leave the device.
And, with --eval-latents, the denoising loss on images held out.

What it reports is what sample_ddp.py and evaluations.evaluate report for the same checkpoint, flags and batch size, as far as
--mixed-precision and --allow-tf32 let it: those two commands work in float32.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from common.cli import UserError
from common.files import sha256
from evaluations.compare import compute_metrics
from evaluations.extractors import collect_features, load_extractor
from evaluations.features import Features
from evaluations.metrics import MANIFOLD_NEIGHBOURS
from evaluations.reference_features import ReferenceFile, load_reference_features
from latents.cache import Manifest
from models.autoencoder import Autoencoder
from models.sit import SiT
from sampling.recipe import Recipe
from training.held_out import HeldOut


class Stopped(Exception):
    """A signal came while samples were drawn."""


class Evaluator:
    """Draws --eval-samples from a model and compares them with --eval-reference, read once at the start."""

    def __init__(
        self,
        args: argparse.Namespace,
        manifest: Manifest,
        vae: Autoencoder,
        dtype: torch.dtype,
        rank: int,
        processes: int,
    ):
        """dtype: of the network's products while it samples. Raises UserError."""
        steps, scale = args.eval_num_steps, args.eval_cfg_scale
        self.recipe = Recipe(
            args.eval_mode,
            args.eval_heun,
            num_steps=steps,
            cfg_scale=scale,
            path_type=args.path_type,
            prediction=args.prediction,
        )
        self.recipe.validate("--eval-")
        if args.eval_samples <= MANIFOLD_NEIGHBOURS:
            raise UserError(
                f"--eval-samples {args.eval_samples} is too few: precision and recall need {MANIFOLD_NEIGHBOURS + 1} or more"
            )
        if args.eval_reference is None:
            raise UserError(
                "--eval-every needs --eval-reference: ADM's .npz, or images (a folder tree class/image.ext or a zip)"
            )
        self.vae, self.dtype, self.rank, self.processes = vae, dtype, rank, processes
        self.count, self.size, self.features = (
            args.eval_samples,
            args.eval_batch_size,
            args.eval_features,
        )
        self.device, side = vae.vae.device, manifest.resolution
        self.network = load_extractor(
            self.features,
            args.inception_weights,
            (side, side),
            self.device,
            str(args.data_dir[0]),
            "--eval-features",
        )
        self.held_out = None
        if args.eval_latents:
            self.held_out = HeldOut(args.eval_latents, self.count)
            self.held_out.check(manifest)
        self.reference = None
        if rank == 0:
            if not args.eval_reference.exists():
                raise UserError(f"--eval-reference {args.eval_reference} does not exist")
            digest = sha256(args.eval_reference)
            self.reference = load_reference_features(
                ReferenceFile(args.eval_reference, digest, side, "--eval-reference"),
                {self.features: self.network},
                self.size,
                self.device,
            )[self.features]
            self.identity = {
                "samples": self.count,
                "features": self.features,
                "reference": str(args.eval_reference),
                "reference_sha256": digest,
                "path_type": args.path_type,
                "prediction": args.prediction,
                "solver": self.recipe.solver,
                "num_steps": self.recipe.num_steps,
                "cfg_scale": self.recipe.cfg_scale,
                "labels": self.recipe.labels,
                "seed": self.recipe.seed,
                "batch_size": self.size,
                "dtype": str(dtype).removeprefix("torch."),
                "allow_tf32": args.allow_tf32,
            }
            if self.held_out:
                self.identity["held_out"] = self.held_out.identity

    @torch.no_grad()
    def measure(
        self, model: SiT, gather_all: Callable[[Tensor], Tensor], stopped: Callable[[], bool]
    ) -> dict[str, float | None] | None:
        """The numbers, on the first process; None on the others. gather_all stacks a tensor of every process in their order.
        Raises Stopped, on every process at once, when `stopped` says so on any.
        """

        def look() -> None:
            if gather_all(torch.tensor([int(stopped())], device=self.device)).any():
                raise Stopped

        loss = {}
        if self.held_out:
            how = self.recipe.path_type, self.recipe.prediction, self.dtype, self.size
            loss = self.held_out.measure(model, *how, self.rank, self.processes, gather_all, look)
        batches = self._batches(model, gather_all, look)
        if self.reference is None:
            for _ in batches:
                pass
            return None
        features = collect_features(batches, self.count)
        labels = self.recipe.compute_labels(
            torch.arange(self.count), model.config.num_classes
        ).numpy()
        return compute_metrics(features, labels, self.reference, self.features, self.device) | loss

    def _batches(
        self, model: SiT, gather_all: Callable, look: Callable[[], None]
    ) -> Iterator[Features[Tensor]]:
        """Features of one batch of each process, in the order of the images; the last is padded with those that follow."""
        step = self.size * self.processes
        with tqdm(
            total=self.count, unit="img", desc="evaluating", leave=False, disable=self.rank > 0
        ) as bar:
            for first in range(0, self.count, step):
                begin = first + self.rank * self.size
                index = torch.arange(begin, begin + self.size, device=self.device)
                images = self.vae.decode(self.recipe.sample_latents(model, index, self.dtype))
                yield self.network(images).map(gather_all)
                bar.update(min(step, self.count - first))
                look()
