"""Builds the three files of assets/fashion-mnist from Fashion-MNIST's four IDX files. Nobody needs to run this to use them.

    apt-get install dataset-fashion-mnist
    python -m assets.build_fashion_mnist

Writes, in this order, what is missing: images.zip, classifier.safetensors, vae/, and figures.json with what was measured.
Remove a file to have it made again. About an hour on two CPU cores; the same machine and thread count give the same files.
"""

import argparse
import gzip
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

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


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """IDX files ('train' or 't10k') -> images (n, 32, 32) uint8, 28x28 padded with two black pixels a side; labels (n,)."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2))), np.frombuffer(
        labels, np.uint8, offset=8
    ).astype(np.int64)


def write_zip(
    path: Path, images: np.ndarray, labels: np.ndarray, packing: int = zipfile.ZIP_LZMA
) -> None:
    """RGB PNGs and dataset.json, in EDM's layout. The PNGs are stored plain and the zip's LZMA packs them: a fifth smaller
    than deflated PNGs, since deflate is poor at three equal channels. Of a file that is not shipped ZIP_STORED is faster.
    """
    entries = []
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", packing) as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(
                zipfile.ZipInfo(name), data, packing
            )  # ZipInfo: a fixed date, so a fixed file

        for i, (pixels, label) in enumerate(zip(tqdm(images, desc="images.zip"), labels)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).convert("RGB").save(buffer, "PNG", compress_level=0)
            entries.append([f"{label}/{i:05d}.png", int(label)])
            add(entries[-1][0], buffer.getvalue())
        add("dataset.json", json.dumps({"labels": entries, "class_names": CLASS_NAMES}).encode())
    partial.rename(path)


def batches(images: Tensor, labels: Tensor, batch_size: int, epochs: int, seed: int):
    """Yields (progress in [0, 1), (B, 3, 32, 32) in [0, 255], labels), each image mirrored with probability 1/2."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // batch_size
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            index = order[step * batch_size : (step + 1) * batch_size]
            flip = torch.rand(batch_size, generator=generator) < 0.5
            x = images[index]
            x = torch.where(flip[:, None, None], x.flip(-1), x)
            yield (
                (epoch + step / steps) / epochs,
                x[:, None].expand(-1, 3, -1, -1).float(),
                labels[index],
            )


def one_cycle(progress: float, peak: float, warm_up: float = 0.05) -> float:
    """Linear warm-up to `peak`, then a cosine to zero."""
    if progress < warm_up:
        return peak * progress / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def train_classifier(images: Tensor, labels: Tensor, epochs: int, seed: int) -> GarmentClassifier:
    """Cross-entropy with label smoothing 0.1 and shifts of up to two pixels, Adam."""
    torch.manual_seed(seed)
    model = GarmentClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, weight_decay=0.02)
    batch_size = 128
    bar = tqdm(
        batches(images, labels, batch_size, epochs, seed),
        desc="classifier",
        total=epochs * (len(images) // batch_size),
    )
    for progress, x, y in bar:
        optimizer.param_groups[0]["lr"] = one_cycle(progress, 4e-3)
        dy, dx = torch.randint(-2, 3, (2,)).tolist()
        logits = model(x.roll((dy, dx), (2, 3))).scores
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def train_vae(
    images: Tensor, labels: Tensor, epochs: int, seed: int, kl_weight: float = 5e-3
) -> AutoencoderKL:
    """Squared error summed over pixels plus kl_weight x KL, Adam; then scaling_factor = 1 / std of the training latents."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
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
    bar = tqdm(
        batches(images, labels, batch_size, epochs, seed),
        desc="vae",
        total=epochs * (len(images) // batch_size),
    )
    mean_error = None
    for progress, x, _ in bar:
        optimizer.param_groups[0]["lr"] = one_cycle(progress, 2e-3)
        x = x / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).square().sum((1, 2, 3))
        loss = (error + kl_weight * posterior.kl()).mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        mse = error.mean().item() / x[0].numel()
        mean_error = mse if mean_error is None else 0.99 * mean_error + 0.01 * mse
        bar.set_postfix(psnr=f"{psnr(mean_error):.2f}", refresh=False)
    vae.eval()
    with torch.no_grad():
        std = torch.cat(
            [
                vae.encode(x / 127.5 - 1).latent_dist.sample()
                for _, x, _ in batches(images, labels, 500, 1, seed)
            ]
        ).std()
    vae.register_to_config(scaling_factor=round(1 / std.item(), 5))
    return vae


def psnr(mse: float) -> float:
    """Decibels for images in [-1, 1], whose peak-to-peak is 2."""
    return 10 * math.log10(4 / mse)


@torch.no_grad()
def measure(
    images: Tensor, labels: Tensor, vae: AutoencoderKL, classifier: GarmentClassifier
) -> dict:
    """What README states, on images that neither network was trained on."""
    right, right_after_vae, error, latents = 0, 0, [], []
    for x, y in zip(images.split(500), labels.split(500)):
        x = x[:, None].expand(-1, 3, -1, -1).float()
        posterior = vae.encode(x / 127.5 - 1).latent_dist
        rounded = (vae.decode(posterior.mean).sample * 127.5 + 127.5).round().clamp(0, 255)
        error.append(((rounded - x) / 127.5).square().mean((1, 2, 3)))
        latents.append(posterior.sample() * vae.config.scaling_factor)
        right += (classifier(x).scores.argmax(1) == y).sum().item()
        right_after_vae += (classifier(rounded).scores.argmax(1) == y).sum().item()
    latents, error = torch.cat(latents), torch.cat(error)
    return {
        "images": len(images),
        "classifier_accuracy": right / len(images),
        "classifier_accuracy_on_reconstructions": right_after_vae / len(images),
        "vae_psnr_db_of_mean_error": psnr(error.mean().item()),
        "vae_psnr_db_mean_over_images": (10 * torch.log10(4 / error)).mean().item(),
        "vae_scaling_factor": vae.config.scaling_factor,
        "latent_mean_per_channel": latents.mean((0, 2, 3)).tolist(),
        "latent_std_per_channel": latents.std((0, 2, 3)).tolist(),
        "latent_std": latents.std().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the IDX .gz files",
    )
    parser.add_argument(
        "--dest",
        type=Path,
        default=DEST,
        help="where the files go (default: this folder's fashion-mnist)",
    )
    parser.add_argument(
        "--vae-epochs",
        type=int,
        default=8,
        help="passes over the 60,000 training images (default: 8)",
    )
    parser.add_argument("--classifier-epochs", type=int, default=10, help="likewise (default: 10)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of initialisation, order and noise (default: 0)"
    )
    args = parser.parse_args()
    if not (args.source / "train-images-idx3-ubyte.gz").exists():
        parser.error(
            f"--source {args.source} holds no IDX files; install Debian's dataset-fashion-mnist or name their folder"
        )
    args.dest.mkdir(parents=True, exist_ok=True)
    train_images, train_labels = map(torch.from_numpy, read_split(args.source, "train"))
    test_images, test_labels = read_split(args.source, "t10k")

    if not (args.dest / "images.zip").exists():
        write_zip(args.dest / "images.zip", test_images, test_labels)
    if not (args.dest / "classifier.safetensors").exists():
        model = train_classifier(train_images, train_labels, args.classifier_epochs, args.seed)
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file(state, args.dest / "classifier.safetensors")
    if not (args.dest / "vae" / "config.json").exists():
        train_vae(train_images, train_labels, args.vae_epochs, args.seed).half().save_pretrained(
            args.dest / "vae"
        )
    vae = AutoencoderKL.from_pretrained(args.dest / "vae").float()
    classifier = load_classifier(args.dest / "classifier.safetensors")
    torch.manual_seed(args.seed)
    figures = measure(torch.from_numpy(test_images), torch.from_numpy(test_labels), vae, classifier)
    (args.dest / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
