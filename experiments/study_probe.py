"""How well the class is told from a run's blocks at its end: experiments/features.py's linear probe, at one noise level."""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from checkpointing import pretrained
from common.files import write_file
from evaluations.runs import read_json
from experiments.feature_study import judge, pooled, read
from latents.cache import LatentCache

TIME, IMAGES, SEED = 0.5, 5000, 0  # one half of the images trains the probe, the other is counted


def known(run: Path) -> dict | None:
    """What was measured before."""
    return read_json(run / "probe.json") or None


def probe(run: Path, cache: LatentCache) -> dict:
    """{"t", "images", "accuracy": {block: share}} of the newest average; kept in RUN/probe.json, and measured once."""
    if found := known(run):
        return found
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = pretrained.load(run)
    model, data = source.model.to(device), read(cache, min(IMAGES, len(cache)), SEED)
    blocks = [round(model.config.depth * k / 4) for k in (1, 2, 3, 4)]
    with tqdm(total=len(data.index), unit="img", desc=f"probe {run.name}", leave=False) as bar:
        spaces = pooled(model, data, source.path_type, TIME, blocks, 250, bar)
        accuracy = {
            str(k): judge(space, data, cache.manifest.num_classes, None)["accuracy"]
            for k, space in spaces.items()
        }
    found = {"t": TIME, "images": len(data.index), "accuracy": accuracy}
    write_file(run / "probe.json", json.dumps(found).encode())
    return found
