"""Sample, decode and evaluate batches on the threads of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.cli import UserError, print_warning
from common.compile_cache import CompileCache
from common.progress import ProgressBar
from evaluations.features import FeatureNetwork, to_numpy
from models.autoencoder import Autoencoder
from models.sit import SiT
from sampling.recipe import Recipe
from sampling.store import SampleStore, StoredBatches


class WorkerCancelledError(Exception):
    """A batch was cancelled, because another batch failed or the user pressed Ctrl-C."""


@dataclass(frozen=True, eq=False)
class Worker:
    """Samples and stores batches.

    Several threads may call a worker at the same time, each with a different batch.

    Args:
        model: The network, on the device of the VAE.
        vae: The VAE that decodes the latents.
        recipe: Settings of the sampler.
        dtype: Dtype of the network's matrix products.
        store: Store of the batches.
        stored_batches: Indices of the batches that are already stored.
        networks: Networks that compute features of the images, by name.
    """

    model: SiT
    vae: Autoencoder
    recipe: Recipe
    dtype: torch.dtype
    store: SampleStore
    stored_batches: StoredBatches
    networks: dict[str, FeatureNetwork]
    _cancelled: threading.Event = field(default_factory=threading.Event, init=False)
    _thread_local: threading.local = field(default_factory=threading.local, init=False)

    @property
    def device(self) -> torch.device:
        """Return the device of the network and the VAE."""
        return self.vae.vae.device

    def cancel(self) -> None:
        """Make running calls raise `WorkerCancelledError` before the next network evaluation."""
        self._cancelled.set()

    def check_cancelled(self) -> None:
        """Raise `WorkerCancelledError` if `cancel` has been called."""
        if self._cancelled.is_set():
            raise WorkerCancelledError

    def __call__(self, batch: int) -> None:
        """Compute and store the missing images, features and PNG files of a batch."""
        self.check_cancelled()
        is_new = batch not in self.stored_batches.images
        features = {}
        with self._select_stream():
            if is_new:
                images = self._sample(batch)
            else:
                pixels = torch.from_numpy(self.store.read_pixels(batch))
                images = pixels.permute(0, 3, 1, 2).to(self.device)
            if batch not in self.stored_batches.features:
                # The last digits of the features depend on the memory format.
                images = images.contiguous()
                for name, network in self.networks.items():
                    features[name] = network(images).map(to_numpy)
            stored_images = to_numpy(images)
        self.store.write_batch(batch, stored_images, features, is_new)

    def _sample(self, batch: int) -> Tensor:
        """Sample the images of a batch, (B, 3, H, W) uint8.

        The last batch is padded with the images of the next indices, so that every batch has the
        same size and runs the same kernels.
        """
        size = self.store.batch_size
        indices = torch.arange(batch * size, (batch + 1) * size, device=self.device)
        try:
            latents = self.recipe.sample_latents(
                self.model, indices, self.dtype, self.check_cancelled
            )
        except FloatingPointError:
            raise UserError(
                f"--ckpt {self.store.record['checkpoint']}: the latents of batch {batch} are not "
                "finite; choose another checkpoint"
            ) from None
        return self.vae.decode(latents)

    def _select_stream(self) -> AbstractContextManager:
        """Select a CUDA stream per thread, so that one thread samples while another one decodes."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._thread_local, "stream"):
            torch.cuda.set_device(self.device)
            self._thread_local.stream = torch.cuda.Stream()
            # Wait for the copy of the weights to the device, which uses the default stream.
            self._thread_local.stream.wait_stream(torch.cuda.default_stream())
        return torch.cuda.stream(self._thread_local.stream)


def run_batches(
    worker: Worker,
    batches: list[int],
    num_threads: int,
    is_compiled: bool,
    bar: ProgressBar,
    images_per_batch: int,
    compile_cache: CompileCache | None = None,
) -> None:
    """Sample and store the batches of this process.

    Args:
        worker: The worker that samples and stores each batch.
        batches: Indices of the batches to process.
        num_threads: Number of batches that are processed at once.
        is_compiled: Whether the network is compiled. If True, the first batch runs alone, so that
            the network is compiled only once.
        bar: Progress bar over the images of all processes.
        images_per_batch: Number of images by which the bar advances after each batch.
        compile_cache: The compiled graphs, which are saved after the first batch.
    """
    groups = [batches[:1], batches[1:]] if is_compiled else [batches]
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for group in groups:
                for future in as_completed([pool.submit(worker, batch) for batch in group]):
                    future.result()
                    bar.update(min(images_per_batch, bar.total - bar.n))  # the last batch is padded
                if compile_cache and group is groups[0]:
                    print_warning(compile_cache.save())
        except BaseException:
            worker.cancel()
            pool.shutdown(cancel_futures=True)
            raise
