"""Export the EMA of a run to a folder with safetensors, config, model card and diffusers files.

    python -m checkpointing.export exps/NAME --to DIR

`sample_ddp.py --ckpt DIR` reads DIR/ema.safetensors and DIR/config.json, and generates the same
images as with the run. DIR/diffusers contains a DiTTransformer2DModel and a flow-matching
scheduler. This folder is written only if the DiTTransformer2DModel has the same outputs as the
network.
"""

import argparse
import json
import shutil
from pathlib import Path

import safetensors.torch

from checkpointing.model_card import format_card, read_metrics
from checkpointing.pretrained import load, read_native_config, resolve_checkpoint
from checkpointing.storage import CheckpointError, ema_filename
from common import cli
from common.cli import UserError
from common.files import read_json_if_valid, write_file
from models.sit import SiT


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse `argv`, by default the command line."""
    parser = cli.Parser(__doc__, "python -m checkpointing.export", "RUN --to DIR")
    parser.add_argument(
        "run",
        type=Path,
        help="run exps/NAME, whose newest checkpoint is exported, or one checkpoint",
    )
    parser.add_argument(
        "--to",
        type=Path,
        required=True,
        help="destination folder: new, empty, or an earlier export, which is overwritten",
    )
    parser.add_argument(
        "--ema-decay",
        type=cli.decay,
        help="decay of the EMA to export (default: first decay of the run)",
    )
    return parser.parse_args(argv)


def check_destination(folder: Path) -> None:
    """Raise UserError unless the folder is new, empty or an earlier export.

    A folder with only hidden files, such as a new clone of a hub repository, counts as empty.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to {folder} is not a folder: choose another path")
    if all(path.name.startswith(".") for path in folder.glob("*")):
        return
    if "exported" not in read_json_if_valid(folder / "config.json"):
        raise UserError(
            f"--to {folder} contains files that are not part of an export: choose another folder"
        )


def make_diffusers_files(model: SiT, prediction: str) -> tuple[dict[str, bytes], float | None]:
    """Convert a network to the format of diffusers, and compare the outputs.

    Networks with QK normalization are not converted, because diffusers' DiT has none. Networks that
    do not predict velocities are not converted, because the scheduler requires velocities.

    Returns:
        The contents of the files, keyed by path in DIR, and the largest difference of the outputs,
        relative to the largest velocity. If the network was not converted, there are no files and
        the difference is None. If the outputs differ, there are no files.
    """
    if prediction != "v" or model.config.qk_norm:
        return {}, None
    # Importing diffusers takes seconds.
    from checkpointing.diffusers_dit import (
        TOLERANCE,
        make_scheduler,
        relative_difference,
        to_diffusers,
    )

    dit = to_diffusers(model)
    difference = relative_difference(model, dit)
    if not difference <= TOLERANCE:  # also true if the difference is NaN
        return {}, difference
    weights = safetensors.torch.save(dit.state_dict(), {"format": "pt"})
    contents = {
        "diffusers/transformer/config.json": dit.to_json_string().encode(),
        "diffusers/transformer/diffusion_pytorch_model.safetensors": weights,
        "diffusers/scheduler/scheduler_config.json": make_scheduler().to_json_string().encode(),
    }
    return contents, difference


def read_run_settings(checkpoint: Path) -> tuple[Path, dict]:
    """Return the folder of the run and the contents of args.json ({} if the file is unreadable)."""
    run = checkpoint
    if checkpoint.absolute().parent.name == "checkpoints":
        run = checkpoint.absolute().parents[1]
    return run, read_json_if_valid(run / "args.json")


def main() -> None:
    """Export the run that the command line specifies."""
    args = parse_args()
    check_destination(args.to)

    # Load the network. Resolve the path only once, because the run may save a new checkpoint.
    try:
        path = resolve_checkpoint(args.run)
        if path.is_file() and path.suffix != ".safetensors":
            raise UserError(f"{path}: only checkpoints of this repository can be exported")
        source = load(path, args.ema_decay)
        folder, config = read_native_config(path)
    except CheckpointError as error:
        raise UserError(f"{args.run}: {error}") from None
    run, settings = read_run_settings(folder)

    # Prepare all files.
    identity = source.identity
    decay = identity["ema_decay"]
    weights = (folder / ema_filename(config, decay)).read_bytes()
    exported = {
        **config,
        "ema_decay": [decay],
        "exported": {"from": source.name, "ema_sha256": identity["ema_sha256"]},
    }
    contents, difference = make_diffusers_files(source.model, source.prediction)
    metrics = read_metrics(run, identity["ema_sha256"])
    card_difference = difference if contents else None
    card = format_card(source, config, settings, metrics, card_difference)

    # Write config.json first, so that an interrupted export is still recognized as an export.
    write_file(args.to / "config.json", json.dumps(exported, indent=2).encode())
    write_file(args.to / "ema.safetensors", weights)
    shutil.rmtree(args.to / "diffusers", ignore_errors=True)
    for name, content in contents.items():
        write_file(args.to / name, content)
    write_file(args.to / "README.md", card.encode())

    print(
        f"{args.to}: {identity['model']} after {identity['step']:,} steps; sample with "
        f"sample_ddp.py --ckpt {args.to}"
    )
    if source.model.config.qk_norm:
        print(
            "no diffusers version: DiTTransformer2DModel has no QK normalization (--qk-norm), with "
            "which this network was trained"
        )
    elif difference is None:
        print(
            "no diffusers version: its scheduler needs velocities, but this network predicts "
            f"{source.prediction}"
        )
    elif contents:
        print(
            f"{args.to}/diffusers: the same network for diffusers; velocities differ by at most "
            f"{difference:.0e}, relative to the largest velocity"
        )
    else:
        print(
            f"no diffusers version: velocities would differ by {difference:.0e}, relative to the "
            "largest velocity"
        )


if __name__ == "__main__":
    cli.run(main)
