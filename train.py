"""Train a SiT with flow matching and SRA 2's alignment to the VAE latents (arXiv:2601.17830).

    accelerate launch train.py --data-dir data/imagenet256 --exp-name sit-xl2-sra2 --model SiT-XL/2

`Step` below is the method. Running the same command again resumes the run.
"""

import json
import sys
from contextlib import ExitStack, nullcontext

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from common import cli
from common.cli import UserError
from common.config import format_flags
from common.files import write_file
from common.keyed_random import Purpose, normal, uniform
from dataset import CachedBatch, TrainingStream
from interpolant import INTERPOLANTS, draw_times, interpolate, regression_target
from latents.manifest import CacheError, Manifest
from loss import denoising_loss
from models.autoencoder import LatentScale
from models.targets import TrainingInputs
from training.alignment import Alignment, AlignmentTerms, required_cache_inputs
from training.config import (
    ObjectiveConfig,
    OptimizerConfig,
    Settings,
    check_batch_size,
    parse_settings,
    resolve_device,
    resolve_num_steps,
)
from training.config_files import build_args_json, check_same_run
from training.guard import NonFiniteGuard
from training.log import RunLog, is_due
from training.preemption import (
    COLLECTIVE_TIMEOUT,
    EXIT_STOPPED,
    FlagReducer,
    StopRequest,
    ignore_signals,
    stop_on_signal,
)
from training.schedule import EMASchedule
from training.setup import (
    Run,
    build_run_or_exit,
    load_cache_into_ram,
    open_cache,
    open_log,
    read_position,
    summary,
)
from training.state import EMA, CheckpointWriter, TrainState
from training.trackers import resolve_trackers


class ScalarMean:
    """Mean of named scalars over micro-batches, on the device."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.names: list[str] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add the scalars of a micro-batch: one tensor per name, averaged over its elements."""
        self.names = list(scalars)
        self.rows.append(torch.stack([value.detach().mean() for value in scalars.values()]))

    def mean(self) -> dict[str, Tensor]:
        """Return the means over the micro-batches."""
        return dict(zip(self.names, torch.stack(self.rows).mean(0)))


class Step:
    """One optimizer update: flow matching plus alignment (arXiv:2601.17830, eq. 3-5).

    Never waits for the device.

    Args:
        accelerator: Wraps network and optimizer, reduces gradients.
        state: Network, EMAs, optimizer, step.
        manifest: Manifest of the latent cache.
        alignments: The alignment methods by name.
        guard: Skips updates that are not finite.
        objective: The denoising objective.
        optimizer: Clipping and EMA decays.
        seed: Seed of all training randomness.
        accumulation: Number of micro-batches per process.
    """

    def __init__(  # noqa: PLR0913 (the objects that an update touches)
        self,
        accelerator: Accelerator,
        state: TrainState,
        manifest: Manifest,
        alignments: dict[str, Alignment],
        guard: NonFiniteGuard,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        seed: int = 0,
        accumulation: int = 1,
    ):
        self.accelerator = accelerator
        self.state = state
        self.alignments = alignments
        self.guard = guard
        self.objective = objective
        self.max_grad_norm = optimizer.max_grad_norm
        self.seed = seed
        self.accumulation = accumulation
        self.model, self.optimizer = accelerator.prepare(state.model, state.optimizer)
        self.emas = [
            EMA(ema, state.model.backbone, decay)
            for ema, decay in zip(state.emas, optimizer.ema_decay)
        ]
        self.path = INTERPOLANTS[objective.path_type]
        self.scale = LatentScale(manifest.scale, manifest.shift)
        self.null_class = manifest.num_classes
        self.latent_shape = tuple(manifest.latent_shape)

    def __call__(self, batch: CachedBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Train on this process's share of a global batch.

        Returns:
            The scalars of this process, and 1 if the update was finite, else 0; on the device.
        """
        batch = batch.to(self.accelerator.device)

        # Noise, timesteps, posterior sample, dropped labels: functions of (seed, position) alone.
        inputs = self.draw(batch)

        # Forward and backward, one micro-batch at a time. Gradients are reduced with the last one.
        scalar_mean = ScalarMean()
        for i, micro in enumerate(inputs.split(self.accumulation)):
            is_last = i == self.accumulation - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                total, scalars = self.losses(micro)
                self.accelerator.backward(total.mean() / self.accumulation)
            scalar_mean.add({"loss": total, **scalars})
        means = scalar_mean.mean()

        # Clip, skip the update if anything is not finite, update the weights and their averages.
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        is_finite = self.guard.mark_step(self.state.step + 1, self.guarded(means, grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas:
            ema.update()
        self.state.step += 1
        return {**means, "grad_norm": grad_norm}, is_finite

    def draw(self, batch: CachedBatch) -> TrainingInputs:
        """Draw everything random about a batch, and normalise its latents."""
        seed, position = self.seed, batch.stream_position
        objective = self.objective
        u = uniform(seed, Purpose.TIMESTEP, position)
        posterior_noise = normal(seed, Purpose.POSTERIOR, position, self.latent_shape).float()
        is_dropped = uniform(seed, Purpose.LABEL_DROP, position) < objective.cfg_prob
        return TrainingInputs(
            latents=self.scale.sample(batch.moments, posterior_noise),
            labels=torch.where(is_dropped, self.null_class, batch.labels),
            noise=normal(seed, Purpose.NOISE, position, self.latent_shape).float(),
            t=draw_times(self.path, objective.prediction, objective.weighting, u).float(),
            posterior_mean=self.scale.mean(batch.moments),
            target_uniform=uniform(seed, Purpose.TARGET, position).float(),
            cache_inputs=batch.inputs,
        )

    def losses(self, inputs: TrainingInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss per sample (B,), and its parts and gauges, (B,) each, by name."""
        # L_denoising: the network predicts the velocity (or x, or eps) from the noisy latents.
        x_t, velocity = interpolate(self.path, inputs.latents, inputs.noise, inputs.t)
        active = [a for a in self.alignments.values() if a.is_active(self.state.step)]
        idle = [a for a in self.alignments.values() if a not in active]
        output = self.model(
            x_t,
            inputs.t,
            inputs.labels,
            idle=[head for alignment in idle for head in alignment.heads.values()],
            student_blocks=[b for alignment in active for b in alignment.target.student_blocks],
        )
        target = regression_target(
            self.objective.prediction, inputs.latents, inputs.noise, velocity
        )
        denoising = denoising_loss(output.prediction, target)

        # L_align: the projected tokens of one block, compared with each method's target.
        scalars = {"denoising": denoising}
        weighted = []
        for name, alignment in self.alignments.items():
            if alignment in active:
                terms = alignment.terms(output, inputs)
            else:
                terms = AlignmentTerms(*[torch.zeros_like(denoising)] * 3)
            if alignment in active and alignment.config.weight:
                weighted.append(alignment.config.weight * terms.loss)
            scalars[f"align/{name}"] = terms.loss
            scalars[f"cosine/{name}"] = terms.cosine
            scalars[f"token_norm/{name}"] = terms.token_norm
        return denoising + sum(weighted), scalars

    def guarded(self, means: dict[str, Tensor], grad_norm: Tensor) -> dict[str, Tensor]:
        """Return the scalars that must be finite: losses with a weight, and the gradient norm."""
        trained = [name for name, a in self.alignments.items() if a.config.weight]
        losses = {"denoising": means["denoising"]}
        losses |= {f"align/{name}": means[f"align/{name}"] for name in trained}
        return {**losses, "grad_norm": grad_norm}


def train(
    settings: Settings,
    accelerator: Accelerator,
    run: Run,
    log: RunLog,
    schedule: EMASchedule,
    writer: CheckpointWriter,
    request: StopRequest,
) -> bool:
    """Run the training loop with logging, checkpoints, previews and evaluations.

    Returns:
        False if a signal stopped the run early.
    """
    state, loop = run.state, settings.loop
    stream = TrainingStream(
        run.cache,
        settings.run.seed,
        loop.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        required_cache_inputs(run.alignments),
    )
    batches = stream.read_batches(
        state.step,
        loop.num_steps,
        settings.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init=ignore_signals,
    )
    step = Step(
        accelerator,
        state,
        run.cache.manifest,
        run.alignments,
        log.guard,
        settings.objective,
        settings.optimizer,
        settings.run.seed,
        loop.gradient_accumulation_steps,
    )
    flags = FlagReducer(accelerator.num_processes, num_flags=2)

    def is_stopped() -> bool:
        return request.name is not None

    # A preview or evaluation that was interrupted comes first.
    if not schedule.run_due(state, accelerator.gather, is_stopped):
        return False

    for batch in log.throughput.time_batches(batches):
        scalars, is_finite = step(batch)
        log.step(state.step, scalars, is_finite)

        # All processes agree on stopping, and on retrying a save that failed.
        should_retry = bool(writer.problem) and is_due(state.step, settings.log.log_every)
        stop, retry = flags.reduce(is_stopped(), should_retry)

        is_last = state.step == loop.num_steps
        save_due = is_due(state.step, settings.checkpoint.checkpointing_steps)
        saved = is_last or stop or retry or save_due
        if saved:
            save(state, log, accelerator, writer)
        if not stop and not schedule.run_due(state, accelerator.gather, is_stopped):
            stop = True
            if not saved:
                save(state, log, accelerator, writer)
        for message in writer.take_messages():
            log.info(message)
        if stop:
            return False
    return True


def save(
    state: TrainState, log: RunLog, accelerator: Accelerator, writer: CheckpointWriter
) -> None:
    """Collect what a checkpoint holds from all processes; the first hands it to the writer."""
    state.progress = log.state_dict()
    if accelerator.scaler is not None:
        state.progress["scaler"] = accelerator.scaler.state_dict()
    with log.throughput.pause():
        if accelerator.is_main_process:
            writer.submit(state)


def run_training(
    settings: Settings, accelerator: Accelerator, request: StopRequest, resources: ExitStack
) -> bool:
    """Set up the run, or resume it, and train.

    Args:
        settings: Settings of the run.
        accelerator: The accelerator.
        request: Set by stop signals.
        resources: Holds the lock of the run folder.

    Returns:
        False if a signal stopped the run early.
    """
    check_batch_size(settings.loop, accelerator.num_processes)
    cache = open_cache(settings)
    settings = settings._replace(loop=resolve_num_steps(settings.loop, len(cache)))
    flags = build_args_json(settings)
    if settings.print_config:
        accelerator.print(format_flags(flags))
        return True
    folder = settings.run.folder
    check_same_run(flags, folder)
    position = read_position(settings, accelerator)
    if position.step >= settings.loop.num_steps and not position.has_pending_work:
        accelerator.print(
            f"{folder} has completed its {position.step:,} steps; raise --max-train-steps to train "
            "further"
        )
        return True
    run = build_run_or_exit(settings, accelerator, cache, position, resources)
    if settings.data.cache_in_ram:
        load_cache_into_ram(cache, accelerator)
    if accelerator.is_main_process:
        write_file(folder / "args.json", json.dumps(flags, indent=2).encode())

    log = open_log(settings, accelerator, run)
    log.info(summary(settings, accelerator, run))
    if position.checkpoints:
        log.info(f"resuming from {position.checkpoints[-1]}")
    schedule = EMASchedule(
        log,
        settings.optimizer.ema_decay,
        settings.loop.num_steps,
        run.preview,
        run.evaluator,
        settings.preview.every,
        settings.evaluation.every,
    )
    schedule.restore(position)
    keep = settings.checkpoint
    try:
        with CheckpointWriter(folder, run.config, keep.keep_last, keep.milestone_steps) as writer:
            finished = train(settings, accelerator, run, log, schedule, writer, request)
    except CacheError as error:
        raise UserError(str(error)) from None
    for message in writer.take_messages():
        log.info(message)
    if writer.problem:
        raise UserError(
            f"the last checkpoint of {folder} could not be saved ({writer.problem}): fix the "
            "problem and rerun the same command"
        )
    result = "finished"
    if not finished:
        result = f"stopped by {request.name or 'a signal to another process'}"
    log.info(f"{result} at step {run.state.step:,}")
    log.close()
    return finished


def main() -> None:
    """Parse the command line and run the training."""
    settings = resolve_device(parse_settings(description=__doc__))
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=settings.device.mixed_precision,
        log_with=resolve_trackers(settings.log.report_to) or None,
        project_dir=settings.run.folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
        ],
    )
    torch.backends.cuda.matmul.allow_tf32 = settings.device.allow_tf32
    torch.backends.cudnn.allow_tf32 = settings.device.allow_tf32
    with stop_on_signal() as request, ExitStack() as resources:
        finished = run_training(settings, accelerator, request, resources)
        # A launcher ends all processes as soon as one exits with a non-zero code.
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if not finished:
            sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    cli.run(main)
