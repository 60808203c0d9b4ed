"""Damage files of this repository at random, and check that all damage is detected.

    python -m tests.fuzz.damage --count 200 --seed 0

A cache, a run with a checkpoint and an .npz file of samples are copied, and one file of the copy is
damaged. Reading it must end with a one-line error, or with the same contents as before. Damage that
only `preprocessing.verify` can find, such as another value in a shard, must be found by it.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from checkpointing import pretrained
from checkpointing.storage import verify_checkpoint
from common.cli import UserError
from common.metrics_log import read_rows
from evaluations.image_batches import NpzImages
from latents.cache import LatentCache
from latents.manifest import read_manifest
from preprocessing.verify import find_all_faults
from tests.helpers import ROOT

V1 = ROOT / "tests/data/v1"


def damage(rng: random.Random, path: Path) -> str:
    """Damage a file, and return a description of the damage."""
    data = bytearray(path.read_bytes())
    position = rng.randrange(len(data))
    size = rng.randint(1, 64)
    kind = rng.choice(
        ["truncate", "empty", "flip", "zeros", "insert", "remove", "append", "delete"]
    )
    if kind == "truncate":
        del data[position:]
    elif kind == "empty":
        data.clear()
    elif kind == "flip":
        data[position] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[position : position + size] = bytes(len(data[position : position + size]))
    elif kind == "insert":
        data[position:position] = rng.randbytes(size)
    elif kind == "remove":
        del data[position : position + size]
    elif kind == "append":
        data += rng.randbytes(size)
    path.write_bytes(data)
    if kind == "delete":
        path.unlink()
    return f"{kind} at byte {position:,}"


def read_cache(root: Path) -> Any:
    """Return the contents of a cache, after `verify` found no fault."""
    cache = LatentCache(root)
    indices = np.arange(len(cache))
    moments, labels = cache.gather(indices, indices % 2 == 0)
    images = cache.read_input("images", indices, None)
    faults = find_all_faults(root, read_manifest(root))
    if faults:
        raise UserError(f"verify: {len(faults)} damaged shards")
    return [moments, labels, images]


def read_run(run: Path) -> Any:
    """Return the contents of a checkpoint, after its hashes were compared."""
    (checkpoint,) = (run / "checkpoints").iterdir()
    verify_checkpoint(checkpoint)
    source = pretrained.load(run)
    return [value.numpy() for value in source.model.state_dict().values()]


def read_log(run: Path) -> Any:
    """Return the lines of metrics.jsonl."""
    return [np.array(json.dumps(row)) for row in read_rows(run)]


def read_samples(path: Path) -> Any:
    """Return the images and labels of an .npz file."""
    images = NpzImages(path, "samples")
    images.verify()
    return [images.read_rows(0, images.count), images.read_labels()]


def make_targets(root: Path) -> list[tuple[Path, Callable[[Path], Any], list[Path]]]:
    """Return for each kind of data its path, the function that reads it, and its files."""
    shutil.copytree(V1 / "cache", root / "cache")
    shutil.copytree(V1 / "run", root / "run")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
    for name, save in (("plain", np.savez), ("compressed", np.savez_compressed)):
        save(root / f"{name}.npz", images, rng.integers(0, 10, 12))
    checkpoint = root / "run/checkpoints/0000003"
    targets = [
        (root / "cache", read_cache, [p for p in (root / "cache").rglob("*") if p.is_file()]),
        (root / "run", read_run, list(checkpoint.iterdir())),
        (root / "run", read_log, [root / "run/metrics.jsonl"]),
    ]
    npz_files = [root / "plain.npz", root / "compressed.npz"]
    return targets + [(path, read_samples, [path]) for path in npz_files]


def are_equal(actual: list, expected: list) -> bool:
    """Return whether two lists of arrays are equal."""
    return len(actual) == len(expected) and all(map(np.array_equal, actual, expected))


def try_case(seed: int, root: Path) -> tuple[str, str]:
    """Damage one file. Return a description and the problem, which is "" if there is none."""
    rng = random.Random(seed)
    path, read, files = rng.choice(make_targets(root))
    expected = read(path)
    file = rng.choice(sorted(files))
    description = f"{file.relative_to(root)}: {damage(rng, file)}"
    try:
        actual = read(path)
    except UserError as error:
        return description, "" if "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:
        return description, f"{type(error).__name__}: {error}"
    if are_equal(actual, expected):
        return description, ""
    # Lines of metrics.jsonl have no checksum, so a changed digit cannot be detected. No line may be
    # lost, except the last one, which may be incomplete.
    if read is read_log and len(actual) >= len(expected) - 1:
        return description, ""
    return description, "the contents have changed without an error"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first damage")
    args = parser.parse_args()
    problems: Counter[str] = Counter()
    for seed in tqdm(range(args.seed, args.seed + args.count), unit="file"):
        with tempfile.TemporaryDirectory() as folder:
            description, problem = try_case(seed, Path(folder))
        if problem:
            problems[problem.split(":")[0]] += 1
            tqdm.write(f"seed {seed}, {description}: {problem}")
    print(f"{args.count} damaged files, {problems.total()} problems")
    sys.exit(int(bool(problems)))


if __name__ == "__main__":
    main()
