"""Run the sampling of sample_ddp.py, or parts of it, within a benchmark."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Action
from checkpointing.pretrained import PretrainedModel
from common.machine import count_available_cores
from common.progress import ProgressBar
from evaluations.suite import EvaluationConfig
from models.autoencoder import Autoencoder
from models.sit import PRESETS, SiT, SiTConfig
from sample_ddp import (
    CheckpointConfig,
    OutputConfig,
    PrecisionConfig,
    SamplingConfig,
    build_record,
    convert_field_errors,
    make_recipe,
    prepare_model,
    set_precision_and_threads,
)
from sampling.recipe import SamplerConfig
from sampling.store import SampleStore
from sampling.worker import Worker, run_batches


def make_config(
    sampler: SamplerConfig, num_images: int, batch_size: int, precision: PrecisionConfig
) -> SamplingConfig:
    """Return settings of sample_ddp.py for a network in memory.

    Raises:
        UserError: If the settings of the sampler contradict each other.
    """
    with convert_field_errors(SamplerConfig):
        sampler.validate()
    output = OutputConfig(num_fid_samples=num_images, per_proc_batch_size=batch_size)
    return SamplingConfig(CheckpointConfig(Path()), sampler, precision, output, EvaluationConfig())


def make_random_source(model_name: str, vae: Autoencoder, resolution: int) -> PretrainedModel:
    """Return a network with random weights for the classes of ImageNet.

    Parameters that are normally initialized to zero also have random values, because zeros may
    affect the speed.
    """
    torch.manual_seed(0)
    config = SiTConfig(
        **PRESETS[model_name],
        qk_norm=False,
        latent_size=resolution // vae.downsampling_factor,
        channels=vae.channels,
    )
    model = SiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return PretrainedModel(
        model=model,
        path_type="linear",
        prediction="v",
        vae=vae.name,
        vae_fingerprint=None,
        class_names=[str(k) for k in range(config.num_classes)],
        name="random",
        identity={
            "checkpoint": "random weights",
            "ema_sha256": "",
            "model": model_name,
            "step": None,
        },
    )


class Sampler:
    """Runs the sampling of sample_ddp.py for a network in memory, or only the network or the VAE.

    Args:
        config: Settings of sample_ddp.py.
        source: The network.
        vae: The VAE, on the device that samples.
    """

    def __init__(self, config: SamplingConfig, source: PretrainedModel, vae: Autoencoder):
        self.config = config
        self.vae = vae
        self.device = vae.vae.device
        self.model = prepare_model(copy.deepcopy(source.model), config.precision, self.device)
        self.recipe = make_recipe(config, source)
        self.record = build_record(config, source, vae, self.recipe, self.device)
        self.num_threads = 2 if self.device.type == "cuda" else count_available_cores()

    def __call__(self, folder: Path) -> Path:
        """Sample into a folder, as sample_ddp.py does, and return the path of samples.npz."""
        precision = self.config.precision
        set_precision_and_threads(precision, self.device)
        store = SampleStore(folder, "samples", self.record, {})
        num_classes = self.model.config.num_classes
        labels = self.recipe.compute_labels(torch.arange(store.count), num_classes).numpy()
        store.choose_grid_images(labels)
        with ExitStack() as resources, ProgressBar(total=store.count, disable=True) as bar:
            stored_batches = store.claim(resources)
            worker = Worker(
                self.model, self.vae, self.recipe, precision.dtype, store, stored_batches, {}
            )
            pending = store.find_pending_batches(stored_batches)
            run_batches(worker, pending, self.num_threads, precision.compile, bar, store.batch_size)
            store.finalize(labels)
            store.remove_parts_folder()
        return store.npz_path

    @torch.no_grad()
    def evaluate_network(self) -> None:
        """Run as many evaluations of the network as the sampler runs for one batch."""
        dtype = self.config.precision.dtype
        x = self.draw_latents()
        if self.recipe.cfg_scale > 1:  # guidance doubles the batch
            x = torch.cat((x, x))
        t = torch.full((len(x),), 0.5, device=self.device)
        labels = torch.arange(len(x), device=self.device) % self.model.config.num_classes
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            for _ in range(self.recipe.num_steps):
                self.model(x, t, labels)

    def decode(self) -> None:
        """Decode one batch of random latents."""
        self.vae.decode(self.draw_latents())

    def run_alone(self, part: Action) -> None:
        """Run a part of the sampling for all batches, on as many threads as sampling uses."""
        set_precision_and_threads(self.config.precision, self.device)
        output = self.config.output
        num_batches = -(-output.num_fid_samples // output.per_proc_batch_size)
        with ThreadPoolExecutor(self.num_threads) as pool:
            for future in [pool.submit(part) for _ in range(num_batches)]:
                future.result()

    def draw_latents(self) -> Tensor:
        """Draw random latents for one batch, (B, C, h, w)."""
        config = self.model.config
        shape = (config.channels, config.latent_size, config.latent_size)
        return torch.randn(self.config.output.per_proc_batch_size, *shape, device=self.device)
