"""Samples images from a checkpoint into ADM's .npz, on one process or many.

    torchrun --nproc_per_node 8 sample_ddp.py --ckpt exps/sit-xl2-sra2 --num-fid-samples 50000

An image depends on the checkpoint, these flags and its index alone, not on how many processes or what came before. Each
batch is a file of its own until all are there, so an interrupted run goes on where it stopped."""

import argparse
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cli
from checkpoint import CheckpointError, ema_name, find_checkpoint, load_weights, read_config
from cli import UserError
from files import sha256, write_array, write_file
from grid import labelled_grid, save_png
from models.autoencoder import Autoencoder
from models.sit import SiT, SiTConfig
from sampling import LABELS, Recipe
from world import World


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "sample_ddp.py", "--ckpt PATH")
    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", type=Path, required=True, help="a run (exps/NAME: its newest checkpoint) or one checkpoint of it")
    add("--ema-decay", type=cli.decay, help="which average, of a run that keeps several (default: its first)")
    add("--vae", help="hub id or folder of the decoder (default: the one that made the training latents)")
    add("--allow-tf32", action="store_true", help="TF32 for float32 matrix products on GPUs")

    add = parser.add_argument_group("what to sample").add_argument
    add("--num-fid-samples", type=cli.positive, default=50_000, help="images")
    add("--labels", choices=LABELS, default="random", help="classes drawn uniformly, or as many of each")
    add("--global-seed", type=cli.seed, default=0, help="with an image's index, decides its noise and its class")

    add = parser.add_argument_group("sampler").add_argument
    add("--mode", choices=("sde", "ode"), default="sde", help="Euler-Maruyama, or the probability-flow ODE by Euler")
    add("--heun", action="store_true", help="ODE by Heun's method instead of Euler's")
    add("--num-steps", type=cli.positive, default=250, help="steps from noise to data")
    add("--cfg-scale", type=cli.amount, default=1.0, help="classifier-free guidance; 1 is none")
    add("--guidance-low", type=cli.fraction, default=0.0, help="guide only for t at or above this (0 is data)")
    add("--guidance-high", type=cli.fraction, default=1.0, help="guide only for t at or below this (1 is noise)")

    add = parser.add_argument_group("work and files").add_argument
    add("--per-proc-batch-size", type=cli.positive, default=32, help="images a process makes at once")
    add("--sample-dir", type=Path, default=Path("samples"), help="where NAME.npz, NAME.json and NAME.png go")
    add("--name", help="name of the files (default: made of the run, the step and the sampler's flags)")
    # fmt: on
    return parser.parse_args(argv)


def describe(args: argparse.Namespace, checkpoint: Path, config: dict, vae: Autoencoder, recipe: Recipe) -> dict:
    """All that decides what the images are: NAME.json, and what evaluation copies into metrics.json."""
    decay = config["ema_decay"][0] if args.ema_decay is None else args.ema_decay
    return {
        "checkpoint": str(checkpoint), "ema_sha256": sha256(checkpoint / ema_name(config, args.ema_decay)),
        "model": config["model_name"], "step": config["step"], "images_seen": config["step"] * config["batch_size"],
        "ema_decay": decay, "path_type": recipe.path_type, "mode": recipe.mode,
        "solver": recipe.solver, "num_steps": recipe.num_steps, "cfg_scale": recipe.cfg_scale,
        "guidance_low": recipe.guidance_low, "guidance_high": recipe.guidance_high,
        "labels": recipe.labels, "global_seed": recipe.seed, "count": args.num_fid_samples,
        "per_proc_batch_size": args.per_proc_batch_size, "vae": vae.name, "vae_fingerprint": vae.fingerprint(),
        "allow_tf32": args.allow_tf32, "class_names": config["data"]["class_names"],
    }  # fmt: skip


def write_npz(path: Path, parts: list[Path], labels: np.ndarray, count: int) -> None:
    """ADM's file, streamed: arr_0 (count, H, W, 3) uint8 in the order of the index, arr_1 (count,) int64 the classes."""
    partial = path.with_name(f".{path.name}.partial")
    shape = (count, *np.load(parts[0], mmap_mode="r").shape[1:])
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for k, part in enumerate(parts):
                    images = np.load(part)
                    file.write(images[: count - k * len(images)].tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.save(file, labels)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def draw_grid(path: Path, parts: list[Path], labels: np.ndarray, what: dict, rows: int = 10, columns: int = 10) -> None:
    """The first images of each class, a class a row; of more than ten classes, ten spread over all that occur."""
    size = what["per_proc_batch_size"]
    present = np.unique(labels)
    chosen = present[np.linspace(0, len(present) - 1, min(rows, len(present))).round().astype(int)]
    pictures = []
    for k in chosen:
        numbers = np.flatnonzero(labels == k)[:columns]
        images = np.stack([np.load(parts[i // size], mmap_mode="r")[i % size] for i in numbers])
        pictures.append((what["class_names"][k], images))
    title = f"{what['model']} · step {what['step']:,} · {what['solver']} {what['num_steps']} · seed {what['global_seed']}"
    if what["cfg_scale"] > 1:
        title += f" · guidance {what['cfg_scale']:g}"
    save_png(labelled_grid(pictures, title), path)


def claim(parts: Path, npz: Path, what: dict) -> bool:
    """Whether NAME is finished already. Records what is being sampled; raises UserError if NAME is something else's."""
    done = npz.exists() and npz.with_suffix(".json").exists()
    record = npz.with_suffix(".json") if done else parts / "sampling.json"
    if not done and not list(parts.glob("*.npy")):  # nothing is made yet that could be mixed with
        write_file(record, json.dumps(what, indent=2).encode())
        return False
    old = json.loads(record.read_text()) if record.exists() else {}
    changed = "; ".join(f"{key} was {old.get(key)}, is {what[key]}" for key in what if old.get(key) != what[key])
    if changed:
        raise UserError(f"{npz if done else parts} was sampled otherwise: {changed}. Remove it or give another --name")
    return done


def main() -> None:
    args = parse_args()
    recipe = Recipe(
        args.mode,
        args.heun,
        args.num_steps,
        args.cfg_scale,
        args.guidance_low,
        args.guidance_high,
        args.labels,
        args.global_seed,
    )
    recipe.check()
    world = World()
    rank, processes = world.rank, world.processes
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32

    try:
        checkpoint = world.first(lambda: find_checkpoint(args.ckpt))  # a run that goes on may save another one meanwhile
        config = read_config(checkpoint)
        recipe = recipe._replace(path_type=config["path_type"])
        model = SiT(SiTConfig(**config["model"])).eval().requires_grad_(False)
        load_weights(model, checkpoint / ema_name(config, args.ema_decay))
        vae = Autoencoder(args.vae or config["data"]["vae"], device)
    except (CheckpointError, FileNotFoundError) as error:
        raise UserError(f"--ckpt {args.ckpt}: {error}" if isinstance(error, CheckpointError) else str(error)) from None
    what = describe(args, checkpoint, config, vae, recipe)
    if what["vae_fingerprint"] != config["data"]["vae_fingerprint"]:
        raise UserError(
            f"--vae {vae.name} is not the one that made the training latents ({config['data']['vae']}): its weights differ"
        )
    model.to(device)

    guidance = f"-cfg{args.cfg_scale:g}" if args.cfg_scale > 1 else ""
    if guidance and (args.guidance_low, args.guidance_high) != (0, 1):
        guidance += f"-from{args.guidance_low:g}-to{args.guidance_high:g}"
    run = checkpoint.parent.parent.name
    average = f"-ema{what['ema_decay']}" if what["ema_decay"] != config["ema_decay"][0] else ""
    name = args.name or f"{run}-{checkpoint.name}{average}-{recipe.solver}{args.num_steps}{guidance}-seed{args.global_seed}"
    parts, npz = args.sample_dir / f"{name}.parts", args.sample_dir / f"{name}.npz"
    if claim(parts, npz, what):
        if rank == 0:
            shutil.rmtree(parts, ignore_errors=True)
            print(f"{npz} is complete: {args.num_fid_samples:,} images")
        world.close()
        return

    size = args.per_proc_batch_size
    files = [parts / f"{k:06d}.npy" for k in range(-(-args.num_fid_samples // size))]
    mine = [k for k in range(rank, len(files), processes) if not files[k].exists()]
    with tqdm(total=len(mine) * size * processes, unit="img", desc="sampling", disable=rank > 0, smoothing=0.05) as bar:
        for k in mine:  # the last batch is padded with the indices that follow: every batch runs the same kernels
            index = torch.arange(k * size, (k + 1) * size, device=device)
            write_array(files[k], vae.decode(recipe.latents(model, index)).cpu().numpy())
            bar.update(size * processes)
    world.barrier()
    if rank == 0:
        labels = recipe.classes(torch.arange(args.num_fid_samples), model.config.num_classes).numpy()
        write_npz(npz, files, labels, args.num_fid_samples)
        draw_grid(npz.with_suffix(".png"), files, labels, what)
        write_file(npz.with_suffix(".json"), json.dumps(what, indent=2).encode())
        shutil.rmtree(parts)
        print(f"{npz}: {args.num_fid_samples:,} images; look at {npz.with_suffix('.png')}")
    world.close()


if __name__ == "__main__":
    cli.run(main)
