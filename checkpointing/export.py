"""A run's averaged weights as a folder that stands by itself: safetensors, config, model card, and a form for diffusers.

    python -m checkpointing.export exps/NAME --to DIR

DIR/ema.safetensors and config.json are what sample_ddp.py --ckpt DIR makes the run's own images from. DIR/diffusers holds a
DiTTransformer2DModel and a flow-matching scheduler, written only if its outputs are the network's.
"""

import argparse
import json
import shutil
from pathlib import Path

import safetensors.torch

from checkpointing.model_card import read_metrics, write_card
from checkpointing.pretrained import load, read_own_config, resolve_checkpoint
from checkpointing.storage import CheckpointError, ema_filename
from common import cli
from common.cli import UserError
from common.files import write_file
from models.sit import SiT


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m checkpointing.export", "RUN --to DIR")
    parser.add_argument(
        "run", type=Path, help="a run (exps/NAME: its newest checkpoint) or one checkpoint of it"
    )
    parser.add_argument(
        "--to", type=Path, required=True, help="folder to write: new, empty, or an earlier export's"
    )
    parser.add_argument(
        "--ema-decay",
        type=cli.decay,
        help="which average, of a run that keeps several (default: its first)",
    )
    return parser.parse_args(argv)


def check_destination(to: Path) -> None:
    """Raises UserError unless the folder is new, empty but for hidden files (a clone of a hub's), or an earlier export."""
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to} is not a folder")
    if all(path.name.startswith(".") for path in to.glob("*")):
        return
    try:
        earlier = "exported" in json.loads((to / "config.json").read_text())
    except (OSError, ValueError):
        earlier = False
    if not earlier:
        raise UserError(
            f"--to {to} holds something else than an earlier export: name another folder"
        )


def diffusers_form(model: SiT) -> tuple[dict[str, bytes], float]:
    """The files of it by their names in DIR, and the difference of its outputs; no files where that is above rounding."""
    from checkpointing.diffusers_dit import (
        TOLERANCE,
        difference,
        flow_scheduler,
        to_diffusers,
    )  # seconds to import

    dit = to_diffusers(model)
    apart = difference(model, dit)
    if not apart <= TOLERANCE:  # nor where it is no number
        return {}, apart
    return {
        "diffusers/transformer/config.json": dit.to_json_string().encode(),
        "diffusers/transformer/diffusion_pytorch_model.safetensors": safetensors.torch.save(
            dit.state_dict(), {"format": "pt"}
        ),
        "diffusers/scheduler/scheduler_config.json": flow_scheduler().to_json_string().encode(),
    }, apart


def main() -> None:
    args = parse_args()
    check_destination(args.to)
    try:
        path = resolve_checkpoint(
            args.run
        )  # once: a run that goes on may save another checkpoint meanwhile
        if path.is_file() and path.suffix != ".safetensors":
            raise UserError(f"{path}: only what this repository trained is exported")
        source = load(path, args.ema_decay)
        folder, config = read_own_config(path)
    except CheckpointError as error:
        raise UserError(f"{args.run}: {error}") from None
    run = folder.absolute().parents[1] if folder.absolute().parent.name == "checkpoints" else folder
    try:
        settings = json.loads((run / "args.json").read_text())
    except (OSError, ValueError):
        settings = {}  # a checkpoint without its run: the card says less
    decay, digest = source.identity["ema_decay"], source.identity["ema_sha256"]
    weights = (folder / ema_filename(config, decay)).read_bytes()
    exported = {
        **config,
        "ema_decay": [decay],
        "exported": {"from": source.name, "ema_sha256": digest},
    }
    form, apart = (
        diffusers_form(source.model) if source.prediction == "v" else ({}, None)
    )  # its scheduler wants velocities
    card = write_card(source, config, settings, read_metrics(run, digest), apart if form else None)

    write_file(
        args.to / "config.json", json.dumps(exported, indent=2).encode()
    )  # first: what tells an export, whole or not
    write_file(args.to / "ema.safetensors", weights)
    shutil.rmtree(args.to / "diffusers", ignore_errors=True)
    for name, content in form.items():
        write_file(args.to / name, content)
    write_file(args.to / "README.md", card.encode())
    print(
        f"{args.to}: {source.identity['model']} after {source.identity['step']:,} steps; sample_ddp.py --ckpt {args.to}"
    )
    if form:
        print(
            f"{args.to}/diffusers: the same network for diffusers, to {apart:.0e} of the largest velocity"
        )
    elif apart is None:
        print(
            f"no form for diffusers, whose scheduler takes velocities: this network predicts {source.prediction}"
        )
    else:
        print(
            f"no form for diffusers: there its velocities would differ by {apart:.0e} of the largest"
        )


if __name__ == "__main__":
    cli.run(main)
