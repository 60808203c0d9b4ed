"""Images -> latent cache, in one streaming pass.

    python -m preprocessing.encode_latents --source data/imagenet/train --dest data/imagenet256 --resolution 256

Shards are written one by one, each whole or not at all, and the manifest last. The same command run again does what is
missing. Memory holds one shard, whatever the number of images."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cli
from cli import UserError
from dataset import CacheError, Manifest, read_manifest, write_manifest
from files import write_array, write_file
from models.autoencoder import DEFAULT_VAE, Autoencoder
from preprocessing.images import ImageSource, open_source, read_or_name

CROP = "center"


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m preprocessing.encode_latents", "--source PATH --dest PATH")
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--source", type=Path, required=True, help="images: a folder tree class/image.ext, or an EDM zip with dataset.json")
    add("--dest", type=Path, required=True, help="folder of the cache to make")
    add("--resolution", type=cli.positive, default=256, help="side in pixels; other sizes are cropped as ADM does")
    add("--skip-bad", action="store_true", help="list images that do not decode in DEST/skipped.jsonl and go on")
    add("--limit", type=cli.count, default=0, help="encode the first N images only; 0 is all")

    add = parser.add_argument_group("autoencoder").add_argument
    add("--vae", default=DEFAULT_VAE, help="any diffusers AutoencoderKL: hub id or folder")
    add("--batch-size", type=cli.positive, default=64, help="images a forward pass")
    add("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu", help="where it runs")

    add = parser.add_argument_group("files").add_argument
    add("--shard-size", type=cli.positive, default=8192, help="images a shard")
    # fmt: on
    return parser.parse_args()


def encode_shard(source: ImageSource, numbers: range, vae: Autoencoder, args: argparse.Namespace, bar: tqdm) -> dict:
    """Encodes and writes one shard; returns its manifest entry with the sums that the statistics need."""
    moments, labels, skipped = [], [], []
    for start in range(numbers.start, numbers.stop, args.batch_size):
        images = []
        for i in range(start, min(start + args.batch_size, numbers.stop)):
            name, label = source.entries[i]
            try:
                images.append(read_or_name(source, i, args.resolution, "--source"))
            except UserError as error:
                if not args.skip_bad:
                    raise UserError(f"{error}; mend it or pass --skip-bad") from None
                skipped.append({"file": name, "reason": str(error)})
                continue
            labels.append(label)
        if images:
            moments.append(vae.encode(torch.from_numpy(np.stack(images))).cpu().half())
        bar.update(min(args.batch_size, numbers.stop - start))
    file = f"{numbers.start // args.shard_size:05d}.npy"
    entry = {"file": file, "count": len(labels), "skipped": skipped}
    if labels:
        array = torch.cat(moments).numpy()
        if not np.isfinite(array).all():
            raise UserError(
                f"--vae {args.vae} gave values that float16 cannot hold in shard {file}: is it the right VAE for these images?"
            )
        mean, std = np.split(array.astype(np.float64), 2, axis=1)
        entry["sum"] = mean.sum((0, 2, 3)).tolist()
        entry["sum_of_squares"] = (mean**2 + std**2).sum((0, 2, 3)).tolist()
        entry["latent_shape"] = list(mean.shape[1:])
        entry["sha256"] = {
            "moments": write_array(args.dest / "moments" / file, array),
            "labels": write_array(args.dest / "labels" / file, np.array(labels, np.int64)),
        }
    write_file(args.dest / "partial" / f"{file}.json", json.dumps(entry).encode())
    return entry


def make_manifest(plan: dict, entries: list[dict]) -> Manifest:
    """Joins the shards' entries; mean and std are of z ~ posterior: E[z] = E[mean], E[z^2] = E[mean^2 + std^2]."""
    all_entries, entries = entries, [entry for entry in entries if entry["count"]]
    if not entries:
        raise UserError(f"--source {plan['source']}: not one image could be decoded")
    images = sum(entry["count"] for entry in entries)
    shape = entries[0]["latent_shape"]
    values = images * shape[1] * shape[2]
    mean = np.sum([entry["sum"] for entry in entries], 0) / values
    std = np.sqrt(np.sum([entry["sum_of_squares"] for entry in entries], 0) / values - mean**2)
    return Manifest(
        **{
            key: plan[key]
            for key in ("source", "class_names", "resolution", "crop", "vae", "vae_fingerprint", "scale", "shift")
        },
        count=images,
        num_classes=len(plan["class_names"]),
        latent_shape=shape,
        dtype="float16",
        skipped=sum(len(entry["skipped"]) for entry in all_entries),
        mean=mean.tolist(),
        std=std.tolist(),
        shards=[{key: entry[key] for key in ("file", "count", "sha256")} for entry in entries],
    )


def check_plan(args: argparse.Namespace, plan: dict) -> None:
    """Refuses to mix two encodings in one folder; records this one. Before a first shard is done there is nothing to mix, and
    what is done holds no bad images, so --skip-bad may come later."""
    path = args.dest / "partial" / "plan.json"
    if path.exists() and list(path.parent.glob("*.npy.json")):
        old = json.loads(path.read_text())
        changed = [key for key in plan if old.get(key) != plan[key]]
        if changed:
            what = ", ".join(f"{key} was {old.get(key)}, is {plan[key]}" for key in changed)
            raise UserError(
                f"--dest {args.dest} holds an unfinished encoding with other settings; finish it or remove it ({what})"
            )
    else:
        write_file(path, json.dumps(plan).encode())


def already_done(args: argparse.Namespace, plan: dict) -> bool:
    """Whether DEST is the whole cache of this plan. Raises UserError if it is the cache of another."""
    try:
        manifest = read_manifest(args.dest)
    except CacheError:
        return False
    made = {**asdict(manifest), "images": manifest.count + manifest.skipped}
    changed = "; ".join(f"{key} was {made[key]}, is {plan[key]}" for key in plan if key in made and made[key] != plan[key])
    if changed:
        raise UserError(f"--dest {args.dest} holds a cache made otherwise ({changed}); choose another folder or remove it")
    print(f"{args.dest} is complete: {manifest.count:,} images")
    return True


def main() -> None:
    args = parse_args()
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default is True for convolutions; the moments are fp32's
    source = open_source(args.source)
    try:
        vae = Autoencoder(args.vae, args.device)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    if args.resolution % vae.factor:
        raise UserError(f"--resolution {args.resolution} is no multiple of {vae.factor}, the factor of --vae {args.vae}")
    total = min(args.limit, len(source.entries)) if args.limit else len(source.entries)
    plan = {
        "source": str(args.source), "images": total, "class_names": source.class_names,
        "resolution": args.resolution, "crop": CROP, "vae": args.vae, "vae_fingerprint": vae.fingerprint(),
        "scale": vae.scale.scale, "shift": vae.scale.shift,
        "shard_size": args.shard_size, "batch_size": args.batch_size,
    }  # fmt: skip
    if already_done(args, plan):
        return
    check_plan(args, plan)

    entries = []
    with tqdm(total=total, unit="img", desc=f"encoding {args.source.name}", smoothing=0.05) as bar:
        for start in range(0, total, args.shard_size):
            numbers = range(start, min(start + args.shard_size, total))
            record = args.dest / "partial" / f"{start // args.shard_size:05d}.npy.json"
            if record.exists():
                entries.append(json.loads(record.read_text()))
                bar.update(len(numbers))
                bar.unpause()
            else:
                entries.append(encode_shard(source, numbers, vae, args, bar))
    manifest = make_manifest(plan, entries)
    skipped = [row for entry in entries for row in entry["skipped"]]
    if skipped:
        write_file(args.dest / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in skipped).encode())
        print(f"skipped {len(skipped)} images that do not decode: {args.dest / 'skipped.jsonl'}")
    write_manifest(args.dest, manifest)
    for file in (args.dest / "partial").iterdir():
        file.unlink()
    (args.dest / "partial").rmdir()
    latent_std = ", ".join(f"{std * manifest.scale:.2f}" for std in manifest.std)
    shape = "x".join(map(str, manifest.latent_shape))
    print(
        f"{args.dest}: {manifest.count:,} images, {manifest.num_classes} classes, latents {shape}, std per channel {latent_std}"
    )


if __name__ == "__main__":
    cli.run(main)
