"""Build the files in assets/fashion-mnist from the four IDX files of Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python -m assets.build_fashion_mnist

The repository contains the resulting files, so running this script is not necessary. It writes
images.zip, classifier.safetensors and vae/ if they are missing, and writes measurements to
figures.json. To rebuild a file, remove it first. The script takes about an hour on two CPU cores.
On the same machine with the same number of threads, it always writes the same bytes.
"""

import argparse
import gzip
import io
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from common.progress import ProgressBar
from evaluations.fashion import GarmentClassifier, load_classifier

CLASS_NAMES = [
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
]
DEST = Path(__file__).resolve().parent / "fashion-mnist"


class Batch(NamedTuple):
    """A batch of training images with labels.

    Attributes:
        progress: The completed fraction of training, in [0, 1).
        images: (B, 3, 32, 32) in [0, 255].
        labels: (B,).
    """

    progress: float
    images: Tensor
    labels: Tensor


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the IDX files of a split.

    Args:
        folder: The folder that contains the files.
        split: "train" or "t10k".

    Returns:
        The images (n, 32, 32) uint8, which are 28x28 pixels padded by two black pixels on each
        side, and the labels (n,) int64.
    """
    image_bytes = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    label_bytes = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(image_bytes, np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(label_bytes, np.uint8, offset=8).astype(np.int64)
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels


def write_zip(
    path: Path, images: np.ndarray, labels: np.ndarray, compression: int = zipfile.ZIP_LZMA
) -> None:
    """Write RGB PNGs and a dataset.json to a zip archive in the layout of EDM.

    The PNGs are not compressed. Deflate, the compression of PNGs, is inefficient for identical
    channels. LZMA compression of the archive gives a file that is 20% smaller.

    Args:
        path: The archive to write.
        images: Greyscale images, (n, h, w) uint8.
        labels: Class indices, (n,).
        compression: The compression of the archive; zipfile.ZIP_STORED is faster.
    """
    rows = []
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", compression) as archive:

        def add(name: str, data: bytes) -> None:
            # ZipInfo has a fixed date, which makes the archive reproducible.
            archive.writestr(zipfile.ZipInfo(name), data, compression)

        for i, (pixels, label) in enumerate(zip(ProgressBar(images, desc="images.zip"), labels)):
            name = f"{label}/{i:05d}.png"
            buffer = io.BytesIO()
            Image.fromarray(pixels).convert("RGB").save(buffer, "PNG", compress_level=0)
            add(name, buffer.getvalue())
            rows.append([name, int(label)])
        add("dataset.json", json.dumps({"labels": rows, "class_names": CLASS_NAMES}).encode())
    partial.rename(path)


def iter_batches(
    images: Tensor, labels: Tensor, batch_size: int, epochs: int, seed: int
) -> Iterator[Batch]:
    """Yield shuffled batches of images, each flipped horizontally with probability 1/2."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // batch_size
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            index = order[step * batch_size : (step + 1) * batch_size]
            is_flipped = torch.rand(batch_size, generator=generator) < 0.5
            x = images[index]
            x = torch.where(is_flipped[:, None, None], x.flip(-1), x)
            rgb = x[:, None].expand(-1, 3, -1, -1).float()
            yield Batch((epoch + step / steps) / epochs, rgb, labels[index])


def compute_learning_rate(progress: float, peak: float, warm_up: float = 0.05) -> float:
    """Return a learning rate with linear warm-up to `peak` and cosine decay to zero."""
    if progress < warm_up:
        return peak * progress / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def train_classifier(images: Tensor, labels: Tensor, epochs: int, seed: int) -> GarmentClassifier:
    """Train a classifier with AdamW, label smoothing of 0.1 and random shifts of up to 2 pixels."""
    torch.manual_seed(seed)
    model = GarmentClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, weight_decay=0.02)
    batch_size = 128
    bar = ProgressBar(
        iter_batches(images, labels, batch_size, epochs, seed),
        desc="classifier",
        total=epochs * (len(images) // batch_size),
    )
    for batch in bar:
        optimizer.param_groups[0]["lr"] = compute_learning_rate(batch.progress, 4e-3)
        dy, dx = torch.randint(-2, 3, (2,)).tolist()
        logits = model(batch.images.roll((dy, dx), (2, 3))).scores
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def train_vae(
    images: Tensor, labels: Tensor, epochs: int, seed: int, kl_weight: float = 5e-3
) -> Any:
    """Train an AutoencoderKL with Adam.

    The loss is the squared error summed over pixels, plus kl_weight times the KL divergence. After
    training, scaling_factor is set to 1 / (standard deviation of the training latents).
    """
    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=0, betas=(0.9, 0.99))
    batch_size = 64
    bar = ProgressBar(
        iter_batches(images, labels, batch_size, epochs, seed),
        desc="vae",
        total=epochs * (len(images) // batch_size),
    )
    mean_error = None
    for batch in bar:
        optimizer.param_groups[0]["lr"] = compute_learning_rate(batch.progress, 2e-3)
        x = batch.images / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).square().sum((1, 2, 3))
        loss = (error + kl_weight * posterior.kl()).mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        mse = error.mean().item() / x[0].numel()
        mean_error = mse if mean_error is None else 0.99 * mean_error + 0.01 * mse
        bar.set_postfix(psnr=f"{compute_psnr(mean_error):.2f}", refresh=False)

    vae.eval()
    with torch.no_grad():
        latents = [
            vae.encode(batch.images / 127.5 - 1).latent_dist.sample()
            for batch in iter_batches(images, labels, 500, 1, seed)
        ]
    std = torch.cat(latents).std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    return vae


def compute_psnr(mse: float) -> float:
    """Return the PSNR in dB for images in [-1, 1]."""
    return 10 * math.log10(4 / mse)


@torch.no_grad()
def measure(
    images: Tensor, labels: Tensor, vae: Any, classifier: GarmentClassifier
) -> dict[str, Any]:
    """Return the numbers in README.md, measured on images that were not used for training."""
    num_correct = 0
    num_correct_after_vae = 0
    error_parts = []
    latent_parts = []
    for grey, y in zip(images.split(500), labels.split(500)):
        x = grey[:, None].expand(-1, 3, -1, -1).float()
        posterior = vae.encode(x / 127.5 - 1).latent_dist
        decoded = (vae.decode(posterior.mean).sample * 127.5 + 127.5).round().clamp(0, 255)
        error_parts.append(((decoded - x) / 127.5).square().mean((1, 2, 3)))
        latent_parts.append(posterior.sample() * vae.config.scaling_factor)
        num_correct += (classifier(x).scores.argmax(1) == y).sum().item()
        num_correct_after_vae += (classifier(decoded).scores.argmax(1) == y).sum().item()
    error = torch.cat(error_parts)
    latents = torch.cat(latent_parts)
    return {
        "images": len(images),
        "classifier_accuracy": num_correct / len(images),
        "classifier_accuracy_on_reconstructions": num_correct_after_vae / len(images),
        "vae_psnr_db_of_mean_error": compute_psnr(error.mean().item()),
        "vae_psnr_db_mean_over_images": (10 * torch.log10(4 / error)).mean().item(),
        "vae_scaling_factor": vae.config.scaling_factor,
        "latent_mean_per_channel": latents.mean((0, 2, 3)).tolist(),
        "latent_std_per_channel": latents.std((0, 2, 3)).tolist(),
        "latent_std": latents.std().item(),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder that contains the IDX files (.gz)",
    )
    parser.add_argument(
        "--dest",
        type=Path,
        default=DEST,
        help="folder for the resulting files (default: assets/fashion-mnist)",
    )
    parser.add_argument(
        "--vae-epochs",
        type=int,
        default=8,
        help="epochs of VAE training on the 60,000 training images (default: 8)",
    )
    parser.add_argument(
        "--classifier-epochs",
        type=int,
        default=10,
        help="epochs of classifier training on the same images (default: 10)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of initialization, image order and noise (default: 0)",
    )
    args = parser.parse_args()
    if not (args.source / "train-images-idx3-ubyte.gz").exists():
        parser.error(
            f"--source {args.source} contains no IDX files; install the Debian "
            "package dataset-fashion-mnist, or pass the folder that contains the files"
        )
    args.dest.mkdir(parents=True, exist_ok=True)
    train_images, train_labels = map(torch.from_numpy, read_split(args.source, "train"))
    test_images, test_labels = read_split(args.source, "t10k")

    # Build the files that are missing.
    zip_path = args.dest / "images.zip"
    if not zip_path.exists():
        write_zip(zip_path, test_images, test_labels)
    classifier_path = args.dest / "classifier.safetensors"
    if not classifier_path.exists():
        model = train_classifier(train_images, train_labels, args.classifier_epochs, args.seed)
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file(state, classifier_path)
    vae_path = args.dest / "vae"
    if not (vae_path / "config.json").exists():
        vae = train_vae(train_images, train_labels, args.vae_epochs, args.seed)
        vae.half().save_pretrained(vae_path)

    # Evaluate the stored models.
    vae = AutoencoderKL.from_pretrained(vae_path).float()
    classifier = load_classifier(classifier_path)
    torch.manual_seed(args.seed)
    images = torch.from_numpy(test_images)
    labels = torch.from_numpy(test_labels)
    measurements = measure(images, labels, vae, classifier)
    text = json.dumps(measurements, indent=2)
    (args.dest / "figures.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
