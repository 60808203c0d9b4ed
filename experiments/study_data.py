"""What a convergence study trains on and is measured against: two latent caches, an encoder's features, the VAE's floor.

`laptop`: of the embedded 10,000 garments every tenth is held out, the others train. `gpu`: Fashion-MNIST's own 60,000 training
images, and the embedded ones, its test images, are held out. Samples are compared with the embedded 10,000 in both.
"""

import json
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from assets.build_fashion_mnist import CLASS_NAMES, read_split, write_zip
from common.cli import UserError
from common.files import sha256, write_file
from evaluations.compare import compute_metrics
from evaluations.extractors import collect_features, load_extractor
from evaluations.reference_features import ReferenceFile, load_reference_features
from evaluations.runs import read_json
from latents.cache import LatentCache
from models.autoencoder import Autoencoder, LatentScale
from training.preemption import EXIT_STOPPED

IMAGES, VAE = Path("assets/fashion-mnist/images.zip"), Path("assets/fashion-mnist/vae")
ENCODER, SIDE = (
    "tf_efficientnet_lite0",
    128,
)  # repa's, and the pixels it sees: a grid of 4 x 4 tokens
IDX = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")


def split(whole: Path, train: Path, held_out: Path, every: int = 10) -> None:
    """An EDM zip as two, plainly stored: of every `every` images the first is held out."""
    with zipfile.ZipFile(whole) as archive:
        entries = json.loads(archive.read("dataset.json"))["labels"]
        for path, chosen in (
            (held_out, entries[::every]),
            (train, [e for i, e in enumerate(entries) if i % every]),
        ):
            partial = path.with_suffix(".partial")
            with zipfile.ZipFile(partial, "w") as out:
                for name, _ in chosen:
                    out.writestr(zipfile.ZipInfo(name), archive.read(name))
                out.writestr(
                    "dataset.json", json.dumps({"labels": chosen, "class_names": CLASS_NAMES})
                )
            partial.rename(path)


def images_of(scale: str, folder: Path, given: Path | None) -> tuple[Path, Path]:
    """Zips of what trains and of what is held out. Raises UserError."""
    train = folder / "train.zip"
    if scale == "laptop":
        held_out = folder / "held-out.zip"
        if not train.exists():
            split(IMAGES, train, held_out)
        return train, held_out
    if not train.exists():
        missing = [name for name in IDX if not (given / name).exists()]
        if missing:
            raise UserError(
                f"--images {given}: {' and '.join(missing)} of Fashion-MNIST are missing: apt-get install "
                "dataset-fashion-mnist, or fetch them from github.com/zalandoresearch/fashion-mnist (data/fashion), and name "
                "their folder"
            )
        write_zip(train, *read_split(given, "train"), zipfile.ZIP_STORED)
    return train, IMAGES


def call(*words: object) -> None:
    """One of this project's commands, shown as it is run. Raises UserError where it fails."""
    told = shlex.join(["python", "-m", *map(str, words)])
    print(told, flush=True)
    code = subprocess.run([sys.executable, "-m", *map(str, words)]).returncode
    if code in (EXIT_STOPPED, 130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code:
        raise UserError(f"could not prepare the data: {told} ended with exit code {code}")


def prepare(scale: str, folder: Path, images: Path | None, encoder_weights: Path | None) -> None:
    """Makes what is not there yet: FOLDER/train with images and an encoder's features, FOLDER/held-out. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / "ready.json"
    if ready.exists():
        made = read_json(ready).get("scale")
        if made != scale:
            raise UserError(f"--data-dir {folder} was made for --scale {made}: name another")
        return
    train, held_out = images_of(scale, folder, images)
    encode = ("preprocessing.encode_latents", "--resolution", 32, "--vae", VAE)
    call(*encode, "--source", train, "--dest", folder / "train", "--keep-images")
    call(*encode, "--source", held_out, "--dest", folder / "held-out")
    weights = encoder_weights or folder / "lite0.safetensors"
    if not weights.exists():
        call("experiments.efficientnet_weights", "--out", weights)
    features = (
        "preprocessing.encode_features",
        folder / "train",
        "--encoder",
        ENCODER,
        "--encoder-weights",
        weights,
    )
    call(*features, "--side", SIDE)
    write_file(ready, json.dumps({"scale": scale}).encode())


@torch.no_grad()
def floor(folder: Path, count: int, size: int = 250) -> dict[str, float | None]:
    """The metrics of `count` training images as the VAE gives them back: what a network could reach that drew like these."""
    path = folder / f"floor-{count}.json"
    if path.exists():
        return json.loads(path.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache, vae = LatentCache(folder / "train"), Autoencoder(str(VAE), device)
    scale = LatentScale(cache.manifest.scale, cache.manifest.shift)
    network = load_extractor("fashion", None, (32, 32), device, str(folder), "--features")
    index = torch.arange(count) * len(cache) // count

    def batches():
        for part in index.split(size):
            latents = scale.mean(cache.gather(part.numpy())[0].to(device))
            yield network(vae.decode(latents))

    reference = load_reference_features(
        ReferenceFile(IMAGES, sha256(IMAGES), 32, "--eval-reference"),
        {"fashion": network},
        size,
        device,
    )["fashion"]
    labels = cache.labels[index.numpy()].astype("int64")
    numbers = compute_metrics(
        collect_features(batches(), count), labels, reference, "fashion", device
    )
    write_file(path, json.dumps(numbers).encode())
    return numbers
