"""The README.md of an export: what the network is, how it was trained, how to sample from it, and what was measured."""

import json
from pathlib import Path

from checkpointing.pretrained import PretrainedModel
from models.targets import TARGETS

MOST_NAMED = 20  # classes
OWN = (
    "target",
    "normalize",
    "encoder",
    "teacher_block",
    "t_max",
)  # what methods of alignment say of themselves
SCALARS = (str, int, float)
# of a record of sampling, what the card says of the network
SAID = {
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
PREDICTED = {"v": "velocity", "x": "data", "eps": "noise"}


def read_metrics(run: Path, digest: str) -> list[dict]:
    """Every metrics.json in a run's folder whose samples are of the weights with this sha256, in the order of their paths."""
    found = []
    for path in sorted(run.rglob("*metrics.json")):
        try:
            result = json.loads(path.read_text())
            if result["sampling"]["ema_sha256"] == digest:
                found.append(result)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of other weights, of other code, or half written
    return found


def write_card(
    source: PretrainedModel, config: dict, args: dict, metrics: list[dict], difference: float | None
) -> str:
    """Markdown. `config` is config.json; `args` is the run's args.json, or empty; `difference` is that of the diffusers form,
    None if there is none.
    """
    data, identity = config["data"], source.identity
    header = ["---", *(["library_name: diffusers"] if difference is not None else [])]
    header += [
        "tags:",
        "- class-conditional-image-generation",
        "- sit",
        "- flow-matching",
        "- sra2",
        "---",
    ]
    vae = f"`{source.vae}` (fingerprint `{source.vae_fingerprint[:16]}`)"
    c, h, w = data["latent_shape"]
    rows = {
        "Network": f"{identity['model']}, {sum(p.numel() for p in source.model.parameters()) / 1e6:.1f}M parameters, "
        f"{PREDICTED[source.prediction]} on the {source.path_type} path",
        "Data": f"{Path(data['source']).name}, {data['count']:,} images of {data['resolution']} pixels, "
        f"{len(source.class_names)} classes",
        "Latents": f"{c} x {h} x {w}, of {vae}, (moment - {_numbers(data['shift'])}) * {_numbers(data['scale'])}",
        "Trained for": f"{identity['step']:,} steps of {config['batch_size']} images: {identity['images_seen']:,} images seen",
        "Alignment": _alignment(config),
        "Averaged": f"decay {identity['ema_decay']} a step",
        "Labels dropped": f"{config['cfg_prob']:g} (the null class is {source.model.config.num_classes})",
    }
    if args:
        rows["Optimiser"] = (
            f"AdamW, learning rate {args['learning_rate']:g}, gradient norm up to {args['max_grad_norm']:g}, "
        )
        rows["Optimiser"] += f"mixed precision {args['mixed_precision']}, seed {args['seed']}"
    if len(source.class_names) <= MOST_NAMED:
        rows["Classes"] = ", ".join(f"{k} {name}" for k, name in enumerate(source.class_names))
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    sampling = [
        "## Sampling",
        "",
        "With the code that trained it, from its root:",
        "",
        "```",
        "torchrun --nproc_per_node 1 sample_ddp.py --ckpt FOLDER",
        "```",
        "",
        f"The VAE is not in this folder: {_where(source.vae)}, or given with `--vae`.",
    ]
    sampling += ["", *_with_diffusers(source, data, difference)]
    methods = " and ".join(TARGETS[entry["method"]].title for entry in align(config))
    title = f"# {source.name}: {identity['model']}" + f" with {methods}" * bool(methods)
    return (
        "\n".join([*header, "", title, "", *table, "", *sampling, "", *_measured(metrics)]) + "\n"
    )


def _numbers(value: float | list[float]) -> str:
    return (
        f"{value:g}"
        if not isinstance(value, list)
        else f"({', '.join(f'{each:g}' for each in value)})"
    )


def _factor(value: float | list[float]) -> str:
    """As code: a number, or one for each channel."""
    return repr(value) if not isinstance(value, list) else f"torch.tensor({value})[:, None, None]"


def _where(vae: str) -> str:
    """Where somebody else has it from."""
    local = Path(vae).exists() or vae.startswith((".", "/")) or vae.count("/") != 1
    return (
        f"it was the folder `{Path(vae).name}` on the machine of training, to be copied"
        if local
        else "fetched by its name above"
    )


def align(config: dict) -> list[dict]:
    """The methods of alignment that a run was trained with."""
    return config.get("align", [])


def _alignment(config: dict) -> str:
    texts = []
    for entry in align(config):
        low, high = entry["t_range"]
        text = f"{TARGETS[entry['method']].title} ({TARGETS[entry['method']].paper}) on block {entry['block']}"
        text += f", {entry['head']['layers']} layers in the head, loss {entry['loss']}, weight {entry['weight']:g}"
        text += f", {low:g} <= t <= {high:g}" + f", in the first {entry['stop_step']:,} steps" * (
            entry["stop_step"] > 0
        )
        texts.append(
            text + "".join(f", {key.replace('_', ' ')} {entry[key]}" for key in OWN if key in entry)
        )
    return "; ".join(texts) or "none"


def _with_diffusers(source: PretrainedModel, data: dict, difference: float | None) -> list[str]:
    if difference is None:
        return [
            "There is no form of it for diffusers: what came out of it there was not the same, or is no velocity."
        ]
    config = source.model.config
    classes = list(range(min(4, config.num_classes)))
    return f"""With diffusers' own classes, by Euler steps of the ODE (velocities differ by {difference:.0e} of the largest):

```python
import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

here = "."  # this folder, or its id on the hub
model = DiTTransformer2DModel.from_pretrained(here, subfolder="diffusers/transformer")
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(here, subfolder="diffusers/scheduler")
vae = AutoencoderKL.from_pretrained("{source.vae}")

labels, guidance, steps = torch.tensor({classes}), 1.5, 50
nulls = torch.full_like(labels, {config.num_classes})
x = torch.randn(len(labels), {config.channels}, {config.latent_size}, {config.latent_size})
scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
with torch.no_grad():
    for t in scheduler.timesteps:
        times = t.expand(2 * len(x))
        v, v_null = model(torch.cat((x, x)), times, torch.cat((labels, nulls))).sample.chunk(2)
        x = scheduler.step(v_null + guidance * (v - v_null), t, x).prev_sample
    images = vae.decode(x / {_factor(data["scale"])} + {_factor(data["shift"])}).sample  # (B, 3, H, W) in [-1, 1]
pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
```""".splitlines()


def _measured(metrics: list[dict]) -> list[str]:
    """A line an evaluation: its numbers, then everything it says of itself that the card has not said above."""
    if not metrics:
        return []
    lines = ["## Measured", ""]
    for result in metrics:
        numbers = [
            f"{key} {value:.4g}"
            for key, value in result["metrics"].items()
            if isinstance(value, int | float)
        ]
        said = {
            **{
                f"sampling {key}": value
                for key, value in result["sampling"].items()
                if key not in SAID
            },
            **result,
        }
        known = [
            f"{key.replace('_', ' ')} {_short(key, value)}"
            for key, value in said.items()
            if isinstance(value, SCALARS)
        ]
        lines.append(f"- **{', '.join(numbers)}**: {'; '.join(known)}")
    return lines


def _short(key: str, value: str | float | bool) -> str:
    """Hashes cut, paths without the folders of the machine that they were on."""
    if key.endswith("sha256"):
        return str(value)[:16]
    return Path(value).name if isinstance(value, str) else f"{value}"
