"""Trains a SiT with flow matching and SRA 2's alignment to the VAE latents (arXiv:2601.17830).

    accelerate launch train.py --data-dir data/imagenet256 --exp-name sit-xl2-sra2 --model SiT-XL/2

Read `train` below: it is the method. Running the same command again continues the run."""

import argparse
import copy
import json
import sys
import uuid
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

import cli
from agreement import STOPPED, StopRequest, Votes, ignore_signals, stop_on_signal
from cli import UserError
from dataset import CacheError, LatentCache, TrainingStream
from files import write_file
from flags import check_args, check_cache, check_same_run, make_config, parse_args, precision
from flops import backbone_flops, head_flops, matmul_rate, training_flops
from guard import Guard
from interpolant import PATHS
from keyed_random import Purpose, normal, uniform
from logbook import Log, every
from loss import training_losses
from models.autoencoder import LatentScale
from models.projector import AlignedSiT, Projector
from models.sit import PRESETS, SiT, SiTConfig
from models.targets import latent_tokens
from preview import Preview
from train_state import EMA, CheckpointError, TrainState, Writer, checkpoints, clear_leftovers


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    cache: LatentCache,
    state: TrainState,
    log: Log,
    preview: Preview | None,
    writer: Writer,
    request: StopRequest,
) -> bool:
    """The method: draw, interpolate, predict, align, step. Returns whether the run is finished, not stopped by a signal."""
    device, path, parts = accelerator.device, PATHS[args.path_type], args.gradient_accumulation_steps
    scale = LatentScale(cache.manifest.scale, cache.manifest.shift)
    align = {"kind": args.align_loss, "beta": args.align_beta, "t_range": tuple(args.align_t_range)}
    stream = TrainingStream(cache, args.seed, args.batch_size, accelerator.process_index, accelerator.num_processes)
    batches = stream.loader(state.step, args.max_train_steps, args.num_workers, device.type == "cuda", ignore_signals)
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    ema = EMA(state.ema, state.model.backbone, args.ema_decay)
    votes = Votes(accelerator.num_processes, questions=2)
    null_class, shape, patch = cache.manifest.num_classes, tuple(cache.manifest.latent_shape), PRESETS[args.model]["patch"]

    for batch in log.timed(batches):
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
            log.add(torch.stack((loss, *(term.mean() for term in terms))).detach() / parts)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        good = log.guard.judge(state.step + 1, log.losses(), grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        state.step += 1
        log.step(state.step, grad_norm, good)

        last = state.step == args.max_train_steps
        stop, retry = votes.cast(request.name is not None, writer.failed and every(state.step, args.log_every))
        checkpoint_due = last or stop or retry or every(state.step, args.checkpointing_steps)
        if checkpoint_due or preview_due(args, state.step):
            with log.pause():
                if checkpoint_due:
                    save(state, log, accelerator, writer)
                if preview and preview_due(args, state.step):
                    log.image(preview.draw(state.ema, state.step), state.step)
        for message in writer.take_messages():
            log.say(message)
        if stop:
            break

    writer.wait()
    for message in writer.take_messages():
        log.say(message)
    if writer.failed:
        raise UserError(f"the last checkpoint of {log.folder} could not be saved: free some space and run the command again")
    accelerator.wait_for_everyone()
    return last or not stop


def preview_due(args: argparse.Namespace, step: int) -> bool:
    """Every --sampling-steps, and at the end; never if that is 0."""
    return every(step, args.sampling_steps) or (args.sampling_steps > 0 and step == args.max_train_steps)


def save(state: TrainState, log: Log, accelerator: Accelerator, writer: Writer) -> None:
    """Gathers what a checkpoint must hold from all processes; the first copies it to host memory and hands it to its writer."""
    state.extra = log.unfinished()
    if accelerator.scaler is not None:
        state.extra["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process:
        writer.submit(state)


def summary(
    args: argparse.Namespace, accelerator: Accelerator, cache: LatentCache, model: AlignedSiT, head: dict | None
) -> str:
    """What is about to run, in three lines."""
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    body, extra = backbone_flops(model.backbone.config), head_flops(model.backbone.config, head)
    processes, parts = accelerator.num_processes, args.gradient_accumulation_steps
    local, epochs = args.batch_size // processes // parts, args.max_train_steps * args.batch_size / len(cache)
    alignment = "no alignment"
    if head:
        alignment = f"head on block {args.align_depth}: {millions['head']:.1f}M, {extra / 2e9:.3g} GMAC (+{extra / body:.1%})"
    return (
        f"{args.model}: {millions['backbone']:.1f}M parameters, {body / 2e9:.3g} GMAC an image; {alignment}\n"
        f"global batch {args.batch_size} = {processes} (processes) x {local} (local) x {parts} (accumulated) "
        f"on {accelerator.device.type}, precision {accelerator.mixed_precision}\n"
        f"{len(cache):,} images an epoch, {cache.manifest.num_classes} classes; "
        f"{args.max_train_steps:,} steps are {epochs:.1f} epochs"
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


def main() -> None:
    args = parse_args(__doc__)
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
            weight_decay=args.adam_weight_decay, eps=args.adam_epsilon, fused=True,
        )  # fmt: skip
        state = TrainState(model, copy.deepcopy(model.backbone).eval().requires_grad_(False), optimizer)
        backbone.recompute = args.activation_checkpointing
        if args.compile:
            for block in backbone.blocks:  # after the EMA's copy, which is sampled from with other shapes
                block.compile()
        if accelerator.is_main_process:
            clear_leftovers(folder)
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
    guard = Guard(optimizer, accelerator.mixed_precision == "fp16", state.extra.get("streak", 0))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    flops = training_flops(backbone.config, config["head"])
    utilisation = flops / matmul_rate(accelerator.device, dtype) / accelerator.num_processes
    main_process = accelerator.is_main_process
    log = Log(args, folder, state, accelerator.device, main_process, accelerator.reduce, guard, utilisation, tracker)
    log.say(summary(args, accelerator, cache, model, config["head"]))
    if state.step:
        log.say(f"continuing from {saved[-1]}")
    with stop_on_signal() as request, Writer(folder, config, args.keep_last, args.milestone_steps) as writer:
        finished = train(args, accelerator, cache, state, log, preview, writer, request)
        how = "finished" if finished else f"stopped by {request.name or 'a signal to another process'}"
        log.say(f"{how} at step {state.step:,}")
    log.close()
    accelerator.end_training()
    if not finished:
        sys.exit(STOPPED)


if __name__ == "__main__":
    cli.run(main)
