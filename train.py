"""Trains a SiT with flow matching and SRA 2's alignment to the VAE latents (arXiv:2601.17830).

    accelerate launch train.py --data-dir data/imagenet256 --exp-name sit-xl2-sra2 --model SiT-XL/2

Read `Step` below: it is the method. Running the same command again continues the run.
"""

import argparse
import copy
import json
import sys
import uuid
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from checkpointing.storage import CheckpointError, lock_run, read_config, verify_checkpoint
from common import cli
from common.cli import UserError
from common.files import write_file
from common.keyed_random import Purpose, normal, uniform
from dataset import CachedBatch, TrainingStream
from interpolant import INTERPOLANTS, draw_times
from latents.cache import CacheError, LatentCache, Manifest
from loss import Alignment, training_losses
from models.autoencoder import LatentScale
from models.flops import backbone_flops
from models.projector import AlignedSiT, Projector
from models.sit import SiT, SiTConfig
from models.targets import Batch, Data, Target
from training import alignment
from training.config import (
    check_args,
    check_cache,
    check_same_data,
    check_same_run,
    make_config,
    parse_args,
    precision,
)
from training.evaluation import Evaluator
from training.guard import NonFiniteGuard
from training.log import Log, every
from training.preemption import (
    EXIT_STOPPED,
    PATIENCE,
    FlagReducer,
    StopRequest,
    ignore_signals,
    stop_on_signal,
)
from training.preview import Preview, load_vae
from training.schedule import Monitor, where
from training.state import EMA, TrainState, Writer
from training.throughput import matmul_rate, training_flops


class Step:
    """The method: draw, interpolate, predict, align, step. Nothing in here waits for the device."""

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        manifest: Manifest,
        state: TrainState,
        targets: dict[str, Target],
        guard: NonFiniteGuard,
    ):
        self.args, self.accelerator, self.state, self.targets, self.guard = (
            args,
            accelerator,
            state,
            targets,
            guard,
        )
        self.model, self.optimizer = accelerator.prepare(state.model, state.optimizer)
        self.emas = [
            EMA(ema, state.model.backbone, decay) for ema, decay in zip(state.emas, args.ema_decay)
        ]
        self.scale, self.path = (
            LatentScale(manifest.scale, manifest.shift),
            INTERPOLANTS[args.path_type],
        )
        self.null_class, self.shape = manifest.num_classes, tuple(manifest.latent_shape)
        how = zip(args.align_loss, args.align_beta, args.align_t_range)
        self.align = {name: Alignment(*each) for name, each in zip(targets, how)}
        self.weight, self.stop = (
            dict(zip(targets, args.align_weight)),
            dict(zip(targets, args.align_stop_step)),
        )

    def __call__(self, batch: CachedBatch) -> tuple[Tensor, Tensor]:
        """One update. This process's share of a global batch: numbers (b,), moments (b, 2C, h, w), labels (b,), what targets
        ask for besides -> Log.names of it, and whether the step was good, 1 or 0, both on the device.
        """
        args, accelerator, parts = (
            self.args,
            self.accelerator,
            self.args.gradient_accumulation_steps,
        )
        batch = batch.to(accelerator.device)
        number, moments, labels = batch.stream_position, batch.moments, batch.labels
        extra = batch.inputs.values()
        u = uniform(args.seed, Purpose.TIMESTEP, number)
        t = draw_times(self.path, args.prediction, args.weighting, u).float()
        noise = normal(args.seed, Purpose.NOISE, number, self.shape).float()
        posterior_noise = normal(args.seed, Purpose.POSTERIOR, number, self.shape)
        dropped = uniform(args.seed, Purpose.LABEL_DROP, number) < args.cfg_prob
        labels = torch.where(dropped, self.null_class, labels)
        latent = self.scale.sample(moments, posterior_noise.float())
        own = uniform(args.seed, Purpose.TARGET, number).float()
        whole = Batch(latent, labels, noise, t, self.scale.mean(moments), own, *extra)
        active = [name for name, last in self.stop.items() if not last or self.state.step < last]
        model = partial(self.model, idle=[name for name in self.targets if name not in active])

        means = []
        for i, part in enumerate(whole.chunk(parts)):
            with torch.no_grad():
                targets = {name: self.targets[name](part) for name in active}
            with accelerator.no_sync(self.model) if i < parts - 1 else nullcontext():
                x, y, eps, s, *_ = part
                terms = training_losses(
                    model, self.path, args.prediction, x, y, eps, s, targets, self.align
                )
                aligned = sum(
                    self.weight[name] * terms.align[name] for name in active if self.weight[name]
                )
                loss = (terms.denoising + aligned).mean()
                accelerator.backward(loss / parts)
            gauges = (
                term[name]
                for name in self.targets
                for term in (terms.align, terms.cosine, terms.token_norm)
            )
            means.append(
                torch.stack([value.detach().mean() for value in (loss, terms.denoising, *gauges)])
            )
        losses = torch.stack(means).mean(0)
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        trained = [align for align, name in zip(losses[2::3], self.targets) if self.weight[name]]
        good = self.guard.judge(
            self.state.step + 1, losses[1], sum(trained, torch.zeros_like(losses[0])), grad_norm
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas:
            ema.update()
        self.state.step += 1
        return torch.cat((losses, grad_norm.reshape(1))), good


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    cache: LatentCache,
    state: TrainState,
    log: Log,
    targets: dict[str, Target],
    extra: str | None,
    monitor: Monitor,
    writer: Writer,
    request: StopRequest,
) -> bool:
    """Steps, and what is due after each. Returns whether the run is finished, not stopped by a signal."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    inputs = [extra] if extra else []
    stream = TrainingStream(cache, args.seed, args.batch_size, rank, processes, inputs)
    pin_memory = accelerator.device.type == "cuda"
    batches = stream.make_loader(
        state.step, args.max_train_steps, args.num_workers, pin_memory, ignore_signals
    )
    step = Step(args, accelerator, cache.manifest, state, targets, log.guard)
    votes = FlagReducer(accelerator.num_processes, questions=2)

    def look() -> bool:
        return monitor.look(state, accelerator.gather, lambda: request.name is not None)

    stop = not look()  # what a run that was stopped left undone

    for batch in () if stop else log.timed(batches):
        terms, good = step(batch)
        log.step(state.step, terms, good)
        stop, retry = votes.cast(
            request.name is not None, bool(writer.problem) and every(state.step, args.log_every)
        )
        last = state.step == args.max_train_steps
        save_due = last or stop or retry or every(state.step, args.checkpointing_steps)
        if save_due:
            save(state, log, accelerator, writer)
        if not stop and not look():
            stop = True
            if not save_due:
                save(state, log, accelerator, writer)
        for message in writer.take_messages():
            log.say(message)
        if stop:
            break

    writer.wait()
    for message in writer.take_messages():
        log.say(message)
    if writer.problem:
        raise UserError(
            f"the last checkpoint of {log.folder} could not be saved ({writer.problem}): mend that and run again"
        )
    return not stop


def save(state: TrainState, log: Log, accelerator: Accelerator, writer: Writer) -> None:
    """Gathers what a checkpoint must hold from all processes; the first copies it to host memory and hands it to its writer."""
    state.extra = log.unfinished()
    if accelerator.scaler is not None:
        state.extra["scaler"] = accelerator.scaler.state_dict()
    with log.pause():
        if accelerator.is_main_process:
            writer.submit(state)


def summary(
    args: argparse.Namespace,
    accelerator: Accelerator,
    cache: LatentCache,
    model: AlignedSiT,
    align: list[dict],
    data: Data,
) -> str:
    """What is about to run, in four lines and one more for each further method."""
    size, body = (
        sum(p.numel() for p in model.backbone.parameters()),
        backbone_flops(model.backbone.config),
    )
    processes, parts = accelerator.num_processes, args.gradient_accumulation_steps
    local, epochs = (
        args.batch_size // processes // parts,
        args.max_train_steps * args.batch_size / len(cache),
    )
    methods = "\n".join(alignment.describe(entry, model, data) for entry in align) or "no alignment"
    return (
        f"{args.model}: {size / 1e6:.1f}M parameters, {body / 1e9:.4g} GFLOPs ({body / 2e9:.4g} GMAC) forward\n"
        f"{methods}\n"
        f"global batch {args.batch_size} = {processes} (processes) x {local} (local) x {parts} (accumulated) "
        f"on {accelerator.device.type}, precision {accelerator.mixed_precision}; "
        f"{args.prediction} on the {args.path_type} path, times {args.weighting}\n"
        f"{len(cache):,} images an epoch, {cache.manifest.num_classes} classes; "
        f"{args.max_train_steps:,} steps are {epochs:.1f} epochs"
    )


class Wandb:
    """Weights & Biases, taken up again where it stopped."""

    def __init__(self, args: argparse.Namespace, folder: Path, config: dict):
        import wandb

        self.wandb = wandb
        name = (
            folder / "wandb_id"
        )  # the run's own, so that another run of the same name is another run there too
        if not name.exists():
            write_file(name, uuid.uuid4().hex[:8].encode())
        try:
            self.run = wandb.init(
                project="sra2",
                name=args.exp_name,
                id=name.read_text(),
                dir=folder,
                resume="allow",
                config=config,
            )
        except Exception as error:  # no key, no network
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"--report-to wandb cannot start ({reason}): run 'wandb login', or set WANDB_MODE=offline"
            ) from None

    def log(self, row: dict, step: int) -> None:
        """One line of numbers."""
        self.run.log(row, step=step)

    def image(self, path: Path, step: int) -> None:
        """One picture, of one average."""
        self.run.log(
            {f"samples{path.stem.lstrip('0123456789')}": self.wandb.Image(str(path))}, step=step
        )

    def finish(self) -> None:
        """Waits until everything is sent."""
        self.run.finish()


def build(args: argparse.Namespace, config: dict, device: torch.device) -> TrainState:
    """Networks and optimizer at step 0."""
    torch.manual_seed(args.seed)
    backbone = SiT(
        SiTConfig(**config["model"])
    )  # before the head, so that it starts the same with and without one
    heads = {entry["method"]: Projector(**entry["head"]) for entry in config["align"]}
    model = AlignedSiT(
        backbone, heads, {entry["method"]: entry["block"] for entry in config["align"]}
    ).to(device)
    for entry in config["align"]:
        heads[entry["method"]].requires_grad_(
            entry["weight"] > 0
        )  # or the norm that clips would be summed in another order
    emas = [copy.deepcopy(model.backbone).eval().requires_grad_(False) for _ in args.ema_decay]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )
    backbone.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        torch._dynamo.config.optimize_ddp = (
            False  # or DDP's buckets cut a block's graph; each block reduces on its own anyway
        )
        for block in backbone.blocks:  # not the averages', which are sampled from with other shapes
            block.compile()
    return TrainState(model, emas, optimizer)


def run(
    args: argparse.Namespace, accelerator: Accelerator, request: StopRequest, held: ExitStack
) -> bool:
    """Everything between the command line and the exit code; `held` keeps the run's lock. Returns whether it is finished."""
    device, main_process = accelerator.device, accelerator.is_main_process
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        accelerator.mixed_precision, torch.float32
    )
    folder, rank, processes = (
        args.output_dir / args.exp_name,
        accelerator.process_index,
        accelerator.num_processes,
    )
    check_args(args, processes)
    try:
        cache = LatentCache(*args.data_dir)
    except CacheError as error:
        raise UserError(f"--data-dir: {error}") from None
    check_cache(args, cache)
    flags = check_same_run(args, folder)
    # what the first process sees, since on a network disk others may see it later
    saved, start, measured, owed = broadcast_object_list(
        [*where(args, folder)] if main_process else 4 * [None]
    )
    if start >= args.max_train_steps and not owed:
        accelerator.print(
            f"{folder} has finished its {start:,} steps; raise --max-train-steps to go on"
        )
        return True
    if saved:
        alignment.settle(args, saved[-1])
    data = alignment.data_of(cache.manifest, cache.read_feature_metadata())
    config = make_config(args, cache.manifest, data)

    vae = preview = evaluator = mistake = None
    try:  # no process waits for another in here, and some mistakes only one of them can make
        if (args.sampling_steps and main_process) or args.eval_every:
            vae = load_vae(args.vae or cache.manifest.vae, cache.manifest, device)
        if args.sampling_steps and main_process:
            preview = Preview(args, cache.manifest, folder, vae)
        if args.eval_every:
            evaluator = Evaluator(args, cache.manifest, vae, dtype, rank, processes)
        if main_process:
            held.enter_context(lock_run(folder, saved))
        state = build(args, config, device)
        targets = alignment.load(args, config, data, state.emas[0], device, accelerator.autocast)
        extra = alignment.extra(targets)
        if extra:
            cache.require_folder(extra)
        if saved:
            progress = verify_checkpoint(saved[-1])
            check_same_data(args, folder, read_config(saved[-1]), config)
            state.load(saved[-1], progress)
            if accelerator.scaler is not None and "scaler" in state.extra:
                accelerator.scaler.load_state_dict(state.extra["scaler"])
    except (UserError, CheckpointError, CacheError) as error:
        mistake = UserError(str(error))
    if any(gather_object([mistake is not None])):
        raise mistake or SystemExit(2)  # another process says what it is
    if args.cache_in_ram:
        try:
            cache.load_into_ram(rank, lambda value: gather_object([value]))
        except CacheError as error:
            raise UserError(str(error)) from None

    if main_process:
        write_file(folder / "args.json", json.dumps(flags, indent=2).encode())
    tracker = (
        Wandb(args, folder, config | flags) if args.report_to == "wandb" and main_process else None
    )
    guard = NonFiniteGuard(
        state.optimizer, accelerator.mixed_precision == "fp16", *state.extra.get("bad_in_a_row", ())
    )
    flops = training_flops(SiTConfig(**config["model"]), config["align"], data)
    utilisation = flops / matmul_rate(device, dtype) / processes
    log = Log(
        args, folder, state, device, main_process, accelerator.reduce, guard, utilisation, tracker
    )
    log.say(summary(args, accelerator, cache, state.model, config["align"], data))
    if saved:
        log.say(f"continuing from {saved[-1]}")
    monitor = Monitor(args, log, preview, evaluator, start, measured)
    try:
        with Writer(folder, config, args.keep_last, args.milestone_steps) as writer:
            finished = train(
                args, accelerator, cache, state, log, targets, extra, monitor, writer, request
            )
    except CacheError as error:  # of a loader process: the last line is what went wrong
        raise UserError(
            str(error).strip().splitlines()[-1].removeprefix("latent_cache.CacheError: ")
        ) from None
    how = "finished" if finished else f"stopped by {request.name or 'a signal to another process'}"
    log.say(f"{how} at step {state.step:,}")
    log.close()
    return finished


def main() -> None:
    args = parse_args(__doc__)
    args.mixed_precision = precision(args.mixed_precision)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.mixed_precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    with stop_on_signal() as request, ExitStack() as held:
        finished = run(args, accelerator, request, held)
        accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one leaves with a code
        accelerator.end_training()
        if not finished:
            sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    cli.run(main)
