"""Trains a SiT with flow matching and SRA 2's alignment to the VAE latents (arXiv:2601.17830).

    accelerate launch train.py --data-dir data/imagenet256 --exp-name sit-xl2-sra2 --model SiT-XL/2

Read `train` below: it is the method. Running the same command again continues the run."""

import argparse
import copy
import json
import uuid
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

import cli
from cli import UserError
from dataset import CacheError, LatentCache, Manifest, TrainingStream
from files import write_file
from interpolant import PATHS
from keyed_random import Purpose, normal, uniform
from logbook import Log, every
from loss import ALIGN_LOSSES, training_losses
from models.autoencoder import LatentScale
from models.projector import AlignedSiT, Projector
from models.sit import PRESETS, SiT, SiTConfig, align_block
from models.targets import latent_tokens
from preview import Preview
from train_state import EMA, CheckpointError, TrainState, checkpoints, read_config

# Flags that may change between two starts of one run; every other one is part of what the run is.
FREE_FLAGS = {
    "data_dir", "output_dir", "max_train_steps", "checkpointing_steps", "sampling_steps", "preview_cfg_scale", "log_every",
    "num_workers", "report_to", "gradient_accumulation_steps", "vae", "resolution", "num_classes",
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "train.py", "--exp-name NAME --data-dir PATH")

    # fmt: off
    add = parser.add_argument_group("run").add_argument
    add("--exp-name", required=True, help="name of the run; it lives in OUTPUT_DIR/EXP_NAME")
    add("--output-dir", type=Path, default=Path("exps"), help="where runs live")
    add("--seed", type=cli.seed, default=0, help="of initialisation and of the whole training stream")

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", type=Path, required=True, help="latent cache made by preprocessing.encode_latents")
    add("--resolution", type=cli.positive, help="stop unless the cache has this many pixels a side")
    add("--num-classes", type=cli.positive, help="stop unless the cache has this many classes")
    add("--num-workers", type=cli.count, default=4, help="loader processes for each training process")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=PRESETS, default="SiT-XL/2", metavar="NAME", help="SiT-Ti/2, or SiT- S, B, L, XL with /2, /4, /8")
    add("--path-type", choices=PATHS, default="linear", help="interpolant between data and noise")
    add("--cfg-prob", type=cli.fraction, default=0.1, help="share of labels dropped for classifier-free guidance")

    add = parser.add_argument_group("alignment (SRA 2)").add_argument
    add("--align", choices=("sra2", "none"), default="sra2", help="none is vanilla SiT")
    add("--align-depth", "--encoder-depth", default="auto", metavar="K",
        help="block aligned, counted from 1; auto: the paper's for the model (B 2, L 8, XL 8)")
    add("--align-weight", "--proj-coeff", type=cli.amount, default=1.0, help="lambda of the alignment loss")
    add("--align-loss", choices=ALIGN_LOSSES, default="cosine", help="the paper's best is smooth_l1 with beta 0.05")
    add("--align-beta", type=cli.above_zero, default=0.05, help="where smooth_l1 turns from quadratic to linear")
    add("--align-target", choices=("mean", "sample"), default="mean", help="posterior mean, or the very sample that was noised")
    add("--align-t-range", type=cli.fraction, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
        help="timesteps aligned; 0 is data, 1 is noise")
    add("--projector-layers", type=cli.positive, default=5, help="linear layers of the head")
    add("--projector-width", type=cli.count, default=0, help="hidden width of the head; 0 is twice the model's")

    add = parser.add_argument_group("optimisation").add_argument
    add("--max-train-steps", type=cli.positive, default=400_000, help="optimizer updates")
    add("--batch-size", type=cli.positive, default=256, help="global batch: images of one update, over all processes")
    add("--gradient-accumulation-steps", type=cli.positive, default=1, help="parts a process cuts its share of the batch into")
    add("--learning-rate", type=cli.above_zero, default=1e-4, help="AdamW's, constant")
    add("--adam-beta1", type=cli.decay, default=0.9, help="AdamW")
    add("--adam-beta2", type=cli.decay, default=0.999, help="AdamW")
    add("--adam-weight-decay", type=cli.amount, default=0.0, help="AdamW")
    add("--adam-epsilon", type=cli.above_zero, default=1e-8, help="AdamW")
    add("--max-grad-norm", type=cli.above_zero, default=1.0, help="gradient clipping")
    add("--ema-decay", type=cli.fraction, default=0.9999, help="of the averaged weights, per step")
    add("--mixed-precision", choices=("auto", "no", "fp16", "bf16"), default="auto", help="auto: bf16 on GPUs that have it")
    add("--allow-tf32", action="store_true", help="TF32 for float32 matrix products on GPUs")

    add = parser.add_argument_group("logging").add_argument
    add("--log-every", type=cli.positive, default=100, help="steps between lines of metrics.jsonl")
    add("--checkpointing-steps", type=cli.positive, default=50_000, help="steps between checkpoints; the last step has one too")
    add("--sampling-steps", type=cli.count, default=10_000, help="steps between previews; 0 for none")
    add("--preview-cfg-scale", type=cli.amount, default=1.5, help="guidance of the previews; 1 is none")
    add("--vae", help="autoencoder that decodes previews: hub id or folder (default: the one that made the cache)")
    add("--report-to", choices=("none", "wandb"), default="none", help="metrics.jsonl is always written")
    # fmt: on
    return parser.parse_args(argv)


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    cache: LatentCache,
    state: TrainState,
    log: Log,
    preview: Preview | None,
    config: dict,
) -> None:
    """The method: draw, interpolate, predict, align, step."""
    device, path, parts = accelerator.device, PATHS[args.path_type], args.gradient_accumulation_steps
    scale = LatentScale(cache.manifest.scale, cache.manifest.shift)
    align = {"kind": args.align_loss, "beta": args.align_beta, "t_range": tuple(args.align_t_range)}
    stream = TrainingStream(cache, args.seed, args.batch_size, accelerator.process_index, accelerator.num_processes)
    batches = stream.loader(state.step, args.max_train_steps, args.num_workers, pin_memory=device.type == "cuda")
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    ema = EMA(state.ema, state.model.backbone, args.ema_decay)
    null_class, shape, patch = cache.manifest.num_classes, tuple(cache.manifest.latent_shape), PRESETS[args.model]["patch"]

    for batch in batches:
        number, moments, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        t = uniform(args.seed, Purpose.TIME, number).float()
        noise = normal(args.seed, Purpose.NOISE, number, shape).float()
        posterior_noise = normal(args.seed, Purpose.POSTERIOR, number, shape)
        dropped = uniform(args.seed, Purpose.LABEL_DROP, number) < args.cfg_prob
        labels = torch.where(dropped, null_class, labels)
        latent = scale.sample(moments, posterior_noise.float())
        clean = latent if args.align_target == "sample" else scale.mean(moments)
        whole = (latent, labels, noise, t, latent_tokens(clean, patch))

        for part, (x, y, eps, s, z) in enumerate(zip(*(tensor.chunk(parts) for tensor in whole))):
            with accelerator.no_sync(model) if part < parts - 1 else nullcontext():
                terms = training_losses(model, path, x, y, eps, s, z, **align)
                loss = (terms.velocity + args.align_weight * terms.align).mean()
                accelerator.backward(loss / parts)
            log.add(torch.stack((loss, terms.velocity.mean(), terms.align.mean())).detach() / parts)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        state.step += 1
        log.step(state.step, grad_norm)

        checkpoint_due = every(state.step, args.checkpointing_steps) or state.step == args.max_train_steps
        if checkpoint_due or preview_due(args, state.step):
            with log.pause():
                if checkpoint_due:
                    save(state, log, accelerator, config)
                if preview and preview_due(args, state.step):
                    log.image(preview.draw(state.ema, state.step), state.step)
                accelerator.wait_for_everyone()


def preview_due(args: argparse.Namespace, step: int) -> bool:
    """Every --sampling-steps, and at the end; never if that is 0."""
    return every(step, args.sampling_steps) or (args.sampling_steps > 0 and step == args.max_train_steps)


def save(state: TrainState, log: Log, accelerator: Accelerator, config: dict) -> None:
    """Gathers what a checkpoint must hold from all processes; the first writes it."""
    state.extra = log.unfinished()
    if accelerator.scaler is not None:
        state.extra["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process:
        log.say(f"saved {state.save(log.folder, config | {'step': state.step})}")


def check_args(args: argparse.Namespace, processes: int) -> None:
    """Mistakes that can be seen before anything is read. Raises UserError."""
    share = args.batch_size // processes
    if args.batch_size % processes or share % args.gradient_accumulation_steps:
        raise UserError(
            f"--batch-size {args.batch_size} (global) is not a multiple of {processes} (processes) x "
            f"--gradient-accumulation-steps {args.gradient_accumulation_steps}"
        )
    if args.align_depth == "auto":
        args.align_depth = align_block(args.model)
    depth = PRESETS[args.model]["depth"]
    if not (str(args.align_depth).isdigit() and 1 <= int(args.align_depth) <= depth):
        raise UserError(f"--align-depth {args.align_depth}: {args.model} has blocks 1 to {depth}")
    args.align_depth = int(args.align_depth)
    args.projector_width = args.projector_width or 2 * PRESETS[args.model]["width"]
    if args.align_t_range[0] > args.align_t_range[1]:
        raise UserError(f"--align-t-range {args.align_t_range[0]} {args.align_t_range[1]}: LO lies above HI")
    if not args.exp_name or "/" in args.exp_name or args.exp_name.startswith("."):
        raise UserError(f"--exp-name '{args.exp_name}' must be a plain folder name; the folder above it is --output-dir")


def check_cache(args: argparse.Namespace, cache: LatentCache) -> None:
    """The cache against what was asked for. Raises UserError."""
    manifest, patch = cache.manifest, PRESETS[args.model]["patch"]
    if args.resolution and args.resolution != manifest.resolution:
        raise UserError(f"--resolution {args.resolution}: {args.data_dir} holds images of {manifest.resolution} pixels")
    if args.num_classes and args.num_classes != manifest.num_classes:
        raise UserError(f"--num-classes {args.num_classes}: {args.data_dir} has {manifest.num_classes}")
    if manifest.latent_shape[1] != manifest.latent_shape[2] or manifest.latent_shape[1] % patch:
        raise UserError(
            f"--model {args.model} cannot cut the latents of {args.data_dir} {manifest.latent_shape} into patches of {patch}"
        )


def make_config(args: argparse.Namespace, manifest: Manifest) -> dict:
    """config.json: the network, what its latents are, and how it was trained."""
    channels, side, _ = manifest.latent_shape
    model = SiTConfig(**PRESETS[args.model], latent_size=side, channels=channels, num_classes=manifest.num_classes)
    data = ("source", "count", "resolution", "class_names", "vae", "vae_fingerprint", "scale", "shift", "latent_shape", "mean")
    head = None
    if args.align != "none":
        out = model.patch**2 * channels
        head = {"width": model.width, "out": out, "layers": args.projector_layers, "hidden": args.projector_width}
    return {
        "model_name": args.model, "model": asdict(model), "head": head, "align_depth": args.align_depth,
        "path_type": args.path_type, "prediction": "v", "cfg_prob": args.cfg_prob,
        "batch_size": args.batch_size, "ema_decay": args.ema_decay,
        "data": {key: getattr(manifest, key) for key in data},
    }  # fmt: skip


def check_same_run(args: argparse.Namespace, folder: Path, config: dict) -> dict:
    """The flags as args.json keeps them. Raises UserError listing what differs from those, or the cache, of a run begun."""
    now = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    now["align_t_range"] = list(args.align_t_range)
    path = folder / "args.json"
    if path.exists():
        then = json.loads(path.read_text())
        changed = [key for key in now if key not in FREE_FLAGS and then.get(key) != now[key]]
        if changed:
            what = "; ".join(f"--{key.replace('_', '-')} was {then.get(key)}, is {now[key]}" for key in changed)
            raise UserError(
                f"{folder} was started with other flags: {what}. Choose another --exp-name, or go back to those flags"
            )
    saved = checkpoints(folder)
    if saved:
        then = read_config(saved[-1])["data"]
        changed = [key for key in then if key not in ("source", "vae") and then[key] != config["data"][key]]
        if changed:
            raise UserError(
                f"--data-dir {args.data_dir} is not the cache that {folder} was started on: {', '.join(changed)} differ"
            )
    return now


def summary(args: argparse.Namespace, accelerator: Accelerator, cache: LatentCache, state: TrainState) -> str:
    """What is about to run, in one line."""
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in state.model.named_children()}
    share = args.batch_size // accelerator.num_processes // args.gradient_accumulation_steps
    head = f" + head {millions['head']:.1f}M on block {args.align_depth}" if "head" in millions else ", no alignment"
    return (
        f"{args.model} {millions['backbone']:.1f}M{head}; {len(cache):,} images, {cache.manifest.num_classes} classes; "
        f"global batch {args.batch_size} = {accelerator.num_processes} (processes) x {share} (local)"
        f" x {args.gradient_accumulation_steps} (accumulated); "
        f"{accelerator.device.type}, mixed precision {accelerator.mixed_precision}; "
        f"{args.max_train_steps:,} steps = {args.max_train_steps * args.batch_size / len(cache):.1f} epochs"
    )


class Wandb:
    """Weights & Biases, taken up again where it stopped."""

    def __init__(self, args: argparse.Namespace, folder: Path, config: dict):
        import wandb

        self.wandb = wandb
        name = folder / "wandb_id"  # the run's own, so that another run of the same name is another run there too
        if not name.exists():
            write_file(name, uuid.uuid4().hex[:8].encode())
        self.run = wandb.init(
            project="sra2", name=args.exp_name, id=name.read_text(), dir=folder, resume="allow", config=config
        )

    def log(self, row: dict, step: int) -> None:
        """One line of numbers."""
        self.run.log(row, step=step)

    def image(self, path: Path, step: int) -> None:
        """One picture."""
        self.run.log({"samples": self.wandb.Image(str(path))}, step=step)

    def finish(self) -> None:
        """Waits until everything is sent."""
        self.run.finish()


def precision(flag: str) -> str:
    """What `auto` stands for here."""
    if flag == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16 needs a GPU; there is none here, use no or bf16")
    if flag != "auto":
        return flag
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision(args.mixed_precision),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # the others wait while one saves and draws
        ],
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    folder = args.output_dir / args.exp_name
    try:
        check_args(args, accelerator.num_processes)
        cache = LatentCache(args.data_dir)
        check_cache(args, cache)
        config = make_config(args, cache.manifest)
        flags = check_same_run(args, folder, config)
        preview = None
        if args.sampling_steps and accelerator.is_main_process:
            preview = Preview(args, cache.manifest, folder, accelerator.device)

        torch.manual_seed(args.seed)
        backbone = SiT(SiTConfig(**config["model"]))
        head = Projector(**config["head"]) if config["head"] else None
        model = AlignedSiT(backbone, head, args.align_depth).to(accelerator.device)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay, eps=args.adam_epsilon, fused=accelerator.device.type == "cuda",
        )  # fmt: skip
        state = TrainState(model, copy.deepcopy(model.backbone).eval().requires_grad_(False), optimizer)
        saved = checkpoints(folder)
        if saved:
            state.load(saved[-1])
            if accelerator.scaler is not None and "scaler" in state.extra:
                accelerator.scaler.load_state_dict(state.extra["scaler"])
    except (CacheError, CheckpointError) as error:
        raise UserError(str(error)) from None

    if accelerator.is_main_process:
        write_file(folder / "args.json", json.dumps(flags, indent=2).encode())
    if preview and state.step and preview_due(args, state.step) and not preview.path(state.step).exists():
        print(f"drew {preview.draw(state.ema, state.step)}")  # it was stopped between the checkpoint and its picture
    if state.step >= args.max_train_steps:
        accelerator.print(f"{folder} has finished its {state.step:,} steps; raise --max-train-steps to go on")
        accelerator.end_training()
        return
    tracker = Wandb(args, folder, config | flags) if args.report_to == "wandb" and accelerator.is_main_process else None
    log = Log(args, folder, state, accelerator.device, accelerator.is_main_process, accelerator.reduce, tracker)
    log.say(summary(args, accelerator, cache, state))
    if state.step:
        log.say(f"continuing from {saved[-1]}")
    train(args, accelerator, cache, state, log, preview, config)
    log.close()
    accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
