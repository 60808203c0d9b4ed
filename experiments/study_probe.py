"""Measure the accuracy with which a linear probe predicts the class from the blocks of a run.

The probe is the same as in experiments/features.py, at a single noise level.
"""

import json
from pathlib import Path

import torch

from checkpointing import pretrained
from common.files import write_file
from common.progress import ProgressBar
from evaluations.runs import read_json
from experiments.feature_study import draw_images, evaluate_features, pool_tokens
from latents.cache import LatentCache

TIME = 0.5
NUM_IMAGES = 5000  # one half trains the probe, the other half is held out
SEED = 0
BATCH_SIZE = 250


def read_probe(run: Path) -> dict | None:
    """Return the result that `probe_run` has stored for a run, or None if there is none."""
    return read_json(run / "probe.json") or None


def probe_run(run: Path, cache: LatentCache) -> None:
    """Probe the EMA in the newest checkpoint of a run, unless RUN/probe.json exists.

    The file contains {"t": time, "images": number of images, "accuracy": {block: accuracy}}.
    """
    if read_probe(run):
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = pretrained.load(run)
    model = source.model.to(device)
    images = draw_images(cache, min(NUM_IMAGES, len(cache)), SEED)
    blocks = [round(model.config.depth * quarter / 4) for quarter in (1, 2, 3, 4)]
    num_images = len(images.image_index)
    with ProgressBar(total=num_images, unit="img", desc=f"probe {run.name}", leave=False) as bar:
        x_t = images.add_noise(source.path_type, TIME)
        features = pool_tokens(model, x_t, TIME, blocks, BATCH_SIZE, bar)
        accuracy = {
            str(block): evaluate_features(values, images, cache.manifest.num_classes)["accuracy"]
            for block, values in features.items()
        }
    result = {"t": TIME, "images": num_images, "accuracy": accuracy}
    write_file(run / "probe.json", json.dumps(result).encode())
