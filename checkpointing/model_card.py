"""Format the README.md of an export: network, training, evaluation and usage."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpointing.pretrained import PretrainedModel
from common.cli import format_value
from models.autoencoder import is_hub_id
from models.targets import TARGETS

MAX_LISTED_CLASSES = 20
# Keys of an alignment entry in config.json that only some methods have.
METHOD_KEYS = (
    "target",
    "normalize",
    "encoder",
    "teacher_block",
    "t_max",
    "target_block",
    "guidance",
    "target_norm",
    "zscore_alpha",
)
# Keys of a sampling record that describe the network. The table of the card contains their values.
NETWORK_KEYS = {
    "checkpoint",
    "ema_sha256",
    "model",
    "step",
    "images_seen",
    "ema_decay",
    "path_type",
    "prediction",
    "vae",
    "vae_fingerprint",
}
PREDICTION_NAMES = {"v": "velocity", "x": "data", "eps": "noise"}


def read_metrics(run: Path, ema_sha256: str) -> list[dict]:
    """Read the evaluations of an EMA from the metrics.json files in a run and its subfolders.

    Evaluations of other weights and files with other contents are skipped.

    Args:
        run: Folder of the run.
        ema_sha256: Hash that identifies the EMA.

    Returns:
        The contents of the files, ordered by path.
    """
    results = []
    for path in sorted(run.rglob("*metrics.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            result = json.loads(path.read_text())
            if result["sampling"]["ema_sha256"] == ema_sha256:
                results.append(result)
    return results


def format_card(
    source: PretrainedModel,
    config: dict,
    settings: dict,
    metrics: list[dict],
    difference: float | None,
) -> str:
    """Return the model card in Markdown.

    Args:
        source: The exported network.
        config: The config.json of the network.
        settings: The args.json of the run, or {} if the file is missing.
        metrics: Evaluations of the network, from `read_metrics`.
        difference: Relative difference between the outputs of the network and of the diffusers
            version, or None if there is no diffusers version.
    """
    title = f"{source.name}: {source.identity['model']}"
    if methods := [TARGETS[entry["method"]].title for entry in config.get("align", [])]:
        title += f" with {' and '.join(methods)}"
    rows = _table_rows(source, config, settings)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    vae_origin = "it is downloaded from the hub"
    if not is_hub_id(source.vae):
        vae_origin = f"copy the folder `{Path(source.vae).name}` from the training machine"
    library = ""
    diffusers_section = (
        "There is no version for diffusers, because the network does not predict velocities, has "
        "QK normalization, or would compute other outputs in diffusers."
    )
    if difference is not None:
        library = "library_name: diffusers\n"
        diffusers_section = _diffusers_example(source, config["data"], difference)
    return f"""---
{library}tags:
- class-conditional-image-generation
- sit
- flow-matching
- sra2
---

# {title}

| | |
|---|---|
{table}

## Sampling

Run in the root of the repository that trained the network:

```
torchrun --nproc_per_node 1 sample_ddp.py --ckpt FOLDER
```

The VAE is not part of this folder: {vae_origin}, or choose one with `--vae`.

{diffusers_section}
{_evaluation_section(metrics)}
"""


def _table_rows(source: PretrainedModel, config: dict, settings: dict) -> dict[str, str]:
    """Return the rows of the table that describes the network and its training."""
    data = config["data"]
    identity = source.identity
    num_parameters = sum(parameter.numel() for parameter in source.model.parameters())
    vae = f"`{source.vae}` (fingerprint `{data['vae_fingerprint'][:16]}`)"
    channels, height, width = data["latent_shape"]
    architecture = identity["model"]
    if source.model.config.qk_norm:
        architecture += " with QK normalization"
    rows = {
        "Network": f"{architecture}, {num_parameters / 1e6:.1f}M parameters, predicts "
        f"{PREDICTION_NAMES[source.prediction]} on the {source.path_type} path",
        "Data": f"{Path(data['source']).name}, {data['count']:,} images of {data['resolution']} "
        f"pixels, {len(source.class_names)} classes",
        "Latents": f"{channels} x {height} x {width}, from {vae}, "
        f"(moment - {_format_numbers(data['shift'])}) * {_format_numbers(data['scale'])}",
        "Training": f"{identity['step']:,} steps of {config['batch_size']} images: "
        f"{identity['images_seen']:,} images seen",
        "Alignment": "; ".join(map(_describe_method, config.get("align", []))) or "none",
        "EMA": f"decay {identity['ema_decay']} per step",
        "Label dropout": f"{config['cfg_prob']:g} (the null class is "
        f"{source.model.config.num_classes})",
    }
    if settings:
        rows["Optimizer"] = (
            f"{_describe_optimizer(settings)}, gradient norm clipped to "
            f"{settings['max_grad_norm']:g}, mixed precision {settings['mixed_precision']}, "
            f"seed {settings['seed']}"
        )
    if len(source.class_names) <= MAX_LISTED_CLASSES:
        rows["Classes"] = ", ".join(f"{k} {name}" for k, name in enumerate(source.class_names))
    return rows


def _describe_head(spec: dict | None) -> str:
    """Describe the head of an entry in config.json."""
    if spec is None:
        return "no head"
    if spec.get("kind") == "conv":
        return f"a convolution of kernel size {spec['kernel_size']} as the head"
    return f"{spec['layers']} layers in the head"


def _describe_optimizer(settings: dict) -> str:
    """Describe the optimizer and the learning rate that the flags of a run set.

    Runs of older versions have no flags for the optimizer and the schedule.
    """
    name = "AdamW"
    if settings.get("optimizer") == "muon":
        name = "Muon for weight matrices of the blocks, AdamW for other parameters"
    parts = [name, f"learning rate {settings['learning_rate']:g}"]
    if settings.get("lr_warmup_steps"):
        parts.append(f"warm-up of {settings['lr_warmup_steps']:,} steps")
    schedule = settings.get("lr_schedule", "constant")
    if schedule != "constant":
        parts.append(f"{schedule} decay to {settings['lr_min_factor']:g} times this rate")
    return ", ".join(parts)


def _describe_method(entry: dict) -> str:
    """Describe the alignment method of an entry in config.json."""
    target = TARGETS[entry["method"]]
    low, high = entry["t_range"]
    heads = list(entry["heads"].values()) if "heads" in entry else [entry["head"]]
    parts = [
        f"{target.title} ({target.paper}) on block {entry['block']}",
        _describe_head(heads[0]),
        f"loss {entry['loss']}",
        f"weight {entry['weight']:g}",
        f"{low:g} <= t <= {high:g}",
    ]
    if entry["stop_step"] > 0:
        parts.append(f"in the first {entry['stop_step']:,} steps")
    parts += [
        f"{key.replace('_', ' ')} {format_value(entry[key])}" for key in METHOD_KEYS if key in entry
    ]
    return ", ".join(parts)


def _format_numbers(value: float | Sequence[float]) -> str:
    """Format a number, or one number per channel."""
    if isinstance(value, Sequence):
        return f"({', '.join(f'{number:g}' for number in value)})"
    return f"{value:g}"


def _format_code(value: float | Sequence[float]) -> str:
    """Return Python code for a number, or for a tensor with one number per channel."""
    if isinstance(value, Sequence):
        return f"torch.tensor({list(value)})[:, None, None]"
    return repr(value)


def _diffusers_example(source: PretrainedModel, data: dict, difference: float) -> str:
    """Return a section with code that samples from the diffusers version of the network."""
    config = source.model.config
    classes = source.trained_labels.list_classes(config.num_classes)[:4]
    guidance = 1.5 if source.trained_labels.has_null_class else 1
    scale = _format_code(data["scale"])
    shift = _format_code(data["shift"])
    return f"""The following code samples with the classes of diffusers, using Euler steps.
Velocities differ from those of the repository by at most {difference:.0e}, relative to the
largest velocity.

```python
import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

folder = "."  # path of this folder, or its hub id
model = DiTTransformer2DModel.from_pretrained(folder, subfolder="diffusers/transformer")
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="diffusers/scheduler")
vae = AutoencoderKL.from_pretrained("{source.vae}")

labels, guidance, steps = torch.tensor({classes}), {guidance}, 50
nulls = torch.full_like(labels, {config.num_classes})
x = torch.randn(len(labels), {config.channels}, {config.latent_size}, {config.latent_size})
scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
with torch.no_grad():
    for t in scheduler.timesteps:
        times = t.expand(2 * len(x))
        v, v_null = model(torch.cat((x, x)), times, torch.cat((labels, nulls))).sample.chunk(2)
        x = scheduler.step(v_null + guidance * (v - v_null), t, x).prev_sample
    images = vae.decode(x / {scale} + {shift}).sample  # (B, 3, H, W) in [-1, 1]
pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
pixels = pixels.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
```"""


def _evaluation_section(metrics: list[dict]) -> str:
    """Return a section with one line per evaluation: metrics, sampling and evaluation settings."""
    if not metrics:
        return ""
    lines = ["\n## Evaluation\n"]
    for result in metrics:
        numbers = ", ".join(
            f"{key} {value:.4g}"
            for key, value in result["metrics"].items()
            if isinstance(value, int | float)
        )
        sampling = {
            f"sampling {key}": value
            for key, value in result["sampling"].items()
            if key not in NETWORK_KEYS
        }
        details = "; ".join(
            f"{key.replace('_', ' ')} {_shorten(key, value)}"
            for key, value in {**sampling, **result}.items()
            if isinstance(value, str | int | float)
        )
        lines.append(f"- **{numbers}**: {details}")
    return "\n".join(lines)


def _shorten(key: str, value: Any) -> str:
    """Shorten a hash to 16 digits, and a path to the part that does not depend on the machine."""
    if key.endswith("sha256"):
        return str(value)[:16]
    return Path(value).name if isinstance(value, str) else str(value)
