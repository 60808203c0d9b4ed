"""Where samples are while they are made, and what they end as. Batches are numbered; each is a file of its own until all are
there, so that any number of processes, on any number of machines, can make them in any order and be killed at any time.

    NAME.parts/sampling.json         what is being made
    NAME.parts/000012.npy            images of batch 12: (B, H, W, 3) uint8
    NAME.parts/000012.safetensors    what networks said of them, if they are evaluated: NETWORK/COLUMN (B, ...) float32
    NAME.npz  NAME.json  NAME.png    the end: ADM's arr_0 and arr_1, what they are, a picture
    NAME/000345.png                  each image, if asked for
"""

import glob
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from common.cli import UserError
from common.files import lock, write_array, write_file, write_npz
from common.image_grid import draw_labelled_grid, save_png
from evaluations.features import Features
from evaluations.image_batches import NpzFile, NpzImages

FREE = ("count", "machine")  # of sampling.json: they may differ when samples are continued
SAID_BY = {
    "checkpoint": "ema_sha256",
    "vae": "vae_fingerprint",
    "labels": "labels_sha256",
}  # these too, if the hash is one
PATIENCE = 120  # seconds that a network disk may take to show one machine what another wrote


class StoredBatches(NamedTuple):
    """Which batches have what."""

    images: set[int]
    features: set[int]
    pictures: set[int]


class SampleStore:
    """The samples NAME in a folder."""

    def __init__(
        self,
        folder: Path,
        name: str,
        what: dict,
        networks: dict[str, str],
        keep_images: bool = True,
        png: bool = False,
    ):
        """what: sampling.json. networks: whose features are kept, and the sha256 of their weights. keep_images: False leaves
        no .npz behind.
        """
        self.parts, self.npz_path, self.pictures = (
            folder / f"{name}.parts",
            folder / f"{name}.npz",
            folder / name,
        )
        self.record, self.png_grid, self.metrics = (
            folder / f"{name}.{end}" for end in ("json", "png", "metrics.json")
        )
        self.what, self.size, self.count = what, what["per_proc_batch_size"], what["count"]
        self.networks, self.keep_images, self.png = networks, keep_images, png
        self.finished: NpzImages | None = None  # what an earlier call finished, as far as it goes
        self.batches = range(-(-self.count // self.size))
        self.drawn: list[int] = []  # numbers of the images in the picture

    def claim(self, held: ExitStack) -> StoredBatches:
        """By the first process: says what is there, and records what is being made, until `held` closes. Raises UserError if
        NAME is something else's, or another process is at it.
        """
        try:
            held.enter_context(lock(self.parts / ".lock"))
        except BlockingIOError:
            raise UserError(
                f"{self.parts} is being sampled by another process: wait for it, or give another --name"
            ) from None
        held.callback(self._tidy)
        self._refuse_others()
        record = json.dumps(self.what, indent=2).encode()
        for folder in (self.parts, self.pictures) if self.png else (self.parts,):
            write_file(folder / "sampling.json", record)
        for leftover in self.npz_path.parent.glob(
            f".{glob.escape(self.npz_path.name)}.*.partial"
        ):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        images = {int(path.stem) for path in self.parts.glob("[0-9]*.npy")}
        images |= {
            k for k in self.batches if self.finished and self._span(k)[1] <= self.finished.count
        }
        features = {
            int(path.stem)
            for path in self.parts.glob("[0-9]*.safetensors")
            if self._has_features(path)
        }
        pngs = self._pngs() if self.png else set()
        pictures = {
            k for k in self.batches if not self.png or pngs.issuperset(range(*self._span(k)))
        }
        return StoredBatches(images, features, pictures)

    def open(self) -> None:
        """What an earlier call finished, on every process."""
        if self.npz_path.exists():
            self.finished = NpzFile(self.npz_path, "--name").open_images()

    def complete(self) -> bool:
        """Whether the .npz holds all images."""
        return self.finished is not None and self.finished.count == self.count

    def _tidy(self) -> None:
        """Leaves no parts behind that hold nothing."""
        if not any(self.parts.glob("[0-9]*")):
            self.remove_parts()

    def _refuse_others(self) -> None:
        """Raises UserError unless all there is under NAME is of the same call, but for fewer images."""
        old, whole = read_record(self.record), self.npz_path.with_suffix(".*")
        if (
            self.npz_path.exists()
            or self.metrics.exists()
            or (self.record.exists() and "ema_sha256" not in old)
        ):
            self._same(self.record, whole)
        if any(self.parts.glob("[0-9]*")):
            self._same(self.parts / "sampling.json", self.parts)
        pngs = self._pngs() if self.png else set()
        if pngs:
            self._same(self.pictures / "sampling.json", self.pictures)
        self.open()
        have = max(self.finished.count if self.finished else 0, *(i + 1 for i in pngs), 0)
        if have > self.count:
            raise UserError(
                f"{whole} holds {have:,} images already, and --num-fid-samples asks for {self.count:,}: give another --name"
            )
        if not self.keep_images and self.npz_path.exists():
            raise UserError(
                f"--no-npz: {self.npz_path} is there already: leave the flag out, or give another --name"
            )
        if not self.keep_images and self.metrics.exists() and old.get("count") != self.count:
            raise UserError(
                f"{self.metrics} is of {old.get('count')} images, which were not kept: give another --name"
            )

    def _pngs(self) -> set[int]:
        """The numbers of the images that are pictures already."""
        return {int(path.stem) for path in self.pictures.glob("*.png") if path.stem.isdecimal()}

    def pending_batches(self, done: StoredBatches) -> list[int]:
        """The batches that lack something. Without images kept, features are all that a batch leaves."""
        images = done.images if self.keep_images else done.images | done.features
        every = set(self.batches)
        lacking = every - images | every - done.pictures
        return sorted(lacking | (every - done.features) if self.networks else lacking)

    def images(self, k: int) -> np.ndarray:
        """The images of a batch that has them: (B, H, W, 3)."""
        start, stop = self._span(k)
        if self.finished and stop <= self.finished.count:
            return np.array(self.finished.read_rows(start, stop))
        return np.load(self._part(k, "npy"))

    def write(
        self, k: int, images: np.ndarray, features: dict[str, Features[np.ndarray]], fresh: bool
    ) -> None:
        """A batch: images (B, H, W, 3), the last padded beyond the end, and the outputs of networks. fresh: not stored yet."""
        start, stop = self._span(k)
        if fresh and self.keep_images:
            write_array(self._part(k, "npy"), images)
        elif not self.keep_images:
            for i in set(self.drawn) & set(range(start, stop)):
                write_array(self.parts / f"drawn-{i:06d}.npy", images[i - start])
        if self.png:
            self.pictures.mkdir(parents=True, exist_ok=True)
            for i, image in zip(range(start, stop), images):
                save_png(Image.fromarray(image), self.pictures / f"{i:06d}.png")
        if features:  # last: without images it is what says that the batch is done
            tensors = {
                f"{name}/{column}": part
                for name, row in features.items()
                for column, part in row.present().items()
            }
            whole = {key: np.ascontiguousarray(part) for key, part in tensors.items()}
            write_file(
                self._part(k, "safetensors"), save(whole, {"networks": json.dumps(self.networks)})
            )

    def finalize(self, labels: np.ndarray) -> None:
        """By the first process, when no batch lacks anything: NAME.json, NAME.npz, NAME.png."""
        write_file(
            self.record, json.dumps(self.what, indent=2).encode()
        )  # an .npz never stands without it
        if self.keep_images and (self.finished is None or self.finished.count < self.count):
            blocks = self._blocks()
            first = next(blocks)
            write_npz(
                self.npz_path,
                itertools.chain([first], blocks),
                (self.count, *first.shape[1:]),
                arr_1=labels,
            )
            self.open()
        self._draw(labels)

    def all_features(self) -> dict[str, Features]:
        """By the first process: what each network said of all images."""
        columns: dict[str, list[np.ndarray]] = {}
        for k in self.batches:
            start, stop = self._span(k)
            for key, part in load_file(self._arrived(self._part(k, "safetensors"))).items():
                columns.setdefault(key, []).append(part[: stop - start])
        whole = {key: np.concatenate(columns.pop(key)) for key in list(columns)}
        rows: dict[str, dict[str, np.ndarray]] = {}
        for key, array in whole.items():
            name, _, column = key.rpartition("/")
            rows.setdefault(name, {})[column] = array
        return {name: Features(**rows[name]) for name in self.networks}

    def remove_parts(self) -> None:
        """Removes the parts."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def choose_grid_images(self, labels: np.ndarray, rows: int = 10, columns: int = 10) -> None:
        """Which images are drawn: the first of each class; of more than ten classes, ten spread over all that occur."""
        present = np.unique(labels)
        chosen = present[
            np.linspace(0, len(present) - 1, min(rows, len(present))).round().astype(int)
        ]
        self.drawn = [int(i) for k in chosen for i in np.flatnonzero(labels == k)[:columns]]

    def _draw(self, labels: np.ndarray) -> None:
        rows: dict[int, list[np.ndarray]] = {}
        for i in self.drawn:
            place = self.parts / f"drawn-{i:06d}.npy"
            if self.keep_images:
                rows.setdefault(int(labels[i]), []).append(self.finished.read_rows(i, i + 1)[0])
            elif place.exists():  # not, where an interrupted call was to make fewer
                rows.setdefault(int(labels[i]), []).append(np.load(place))
        if not rows:
            return
        what = self.what
        steps = "" if what["solver"] == "dopri5" else f" {what['num_steps']}"
        when = "" if what["step"] is None else f" · step {what['step']:,}"
        title = f"{what['model']}{when} · {what['solver']}{steps} · seed {what['global_seed']}"
        if what["cfg_scale"] > 1:
            title += f" · guidance {what['cfg_scale']:g}"
            if (what["guidance_low"], what["guidance_high"]) != (0, 1):
                title += f" for {what['guidance_low']:g} ≤ t ≤ {what['guidance_high']:g}"
        named = [(what["class_names"][k], np.stack(images)) for k, images in rows.items()]
        save_png(draw_labelled_grid(named, title), self.png_grid)

    def _blocks(self) -> Iterator[np.ndarray]:
        """All images in order, a batch at a time."""
        for k in self.batches:
            start, stop = self._span(k)
            if not (self.finished and stop <= self.finished.count):
                self._arrived(self._part(k, "npy"))
            yield self.images(k)[: stop - start]

    def _span(self, k: int) -> tuple[int, int]:
        """The numbers of a batch's images, without those beyond the end."""
        return k * self.size, min((k + 1) * self.size, self.count)

    def _part(self, k: int, suffix: str) -> Path:
        return self.parts / f"{k:06d}.{suffix}"

    def _has_features(self, path: Path) -> bool:
        """Whether a batch's features are of these networks, and of all its images: an .npz gives a last batch unpadded."""
        start, stop = self._span(int(path.stem))
        try:
            with safe_open(path, "numpy") as file:
                made = json.loads(file.metadata()["networks"])
                rows = min(file.get_slice(key).get_shape()[0] for key in file.keys())  # noqa: SIM118  it is no dict
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return False
        return self.networks.items() <= made.items() and rows >= stop - start

    def _arrived(self, path: Path) -> Path:
        """The file, which another machine may have written a moment ago. Raises UserError if it does not show."""
        for _ in range(PATIENCE):
            if path.exists():
                return path
            list(path.parent.iterdir())  # makes a network disk look again
            time.sleep(1)
        raise UserError(
            f"{path} is missing: --sample-dir must be on a disk that all machines share"
        ) from None

    def _same(self, record: Path, owner: Path) -> None:
        """Raises UserError unless the record, of what `owner` is, says the same as this call."""
        old, new = read_record(record), json.loads(json.dumps(self.what))
        known = {
            key
            for key, digest in SAID_BY.items()
            if new.get(digest) and old.get(digest) == new[digest]
        }
        keys = [
            key
            for key in {**new, **old}
            if key not in known.union(FREE) and old.get(key) != new.get(key)
        ]
        if keys:
            changed = "; ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys)
            raise UserError(
                f"{owner} was sampled otherwise: {changed}. Remove it or give another --name"
            )


def read_record(path: Path) -> dict:
    """A sampling.json; {} where there is none, or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
