"""Train a SiT with flow matching and SRA 2's alignment to the VAE latents (arXiv:2601.17830).

    accelerate launch train.py --data-dir data/imagenet256 --exp-name sit-xl2-sra2 --model SiT-XL/2

The class `Step` implements the method. Running the same command again resumes the run.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext

from common import cli  # first, because it completes the environment of the other libraries

# isort: split
import torch
from accelerate import Accelerator
from torch import Tensor

from common.cli import EXIT_STOPPED, UserError, print_warning
from common.machine import describe_busy_cores
from common.tf32 import set_tf32
from common.watchdog import record_step, waiting_for_processes
from dataset import CachedBatch, TrainingStream
from interpolant import INTERPOLANTS, interpolate, regression_target
from latents.manifest import Manifest
from loss import denoising_loss
from models.aligned_sit import AlignedOutput
from models.target import TrainingInputs
from training.accelerator import create_accelerator
from training.alignment import Alignment, AlignmentTerms, required_cache_inputs
from training.checkpoints import CheckpointWriter
from training.config import (
    ObjectiveConfig,
    OptimizerConfig,
    Settings,
    parse_settings,
    resolve_device,
)
from training.coordination import wait_for_all
from training.guard import NonFiniteGuard
from training.hang_detector import ending_with_the_others
from training.inputs import InputSampler
from training.joint_work import gather_on_first
from training.log import is_due
from training.optimizer import build_schedule
from training.preemption import (
    FlagReducer,
    StopRequest,
    ignore_signals,
    stop_on_signal,
)
from training.profiling import StepProfiler
from training.schedule import LearningRateSchedule
from training.setup import Run, prepare_run
from training.sharding import gather_tensor, wrap_sharded, wrap_with_ddp
from training.state import EMA, TrainState
from training.stop_file import agree_on_stop_file, watching_stop_file


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


def combine_losses(
    alignments: dict[str, Alignment],
    output: AlignedOutput,
    target: Tensor,
    alignment_targets: dict[str, dict[str, Tensor]],
    t: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute L = L_denoising + sum of weight * L_align.

    Args:
        alignments: The alignment methods, by name.
        output: Output of the network.
        target: Regression target of the prediction, (B, C, H, W).
        alignment_targets: Target tokens by head, for each active method.
        t: Timesteps, (B,).

    Returns:
        The total loss (B,), and the logged terms by name, (B,) each.
    """
    denoising = denoising_loss(output.prediction, target)
    total = denoising
    scalars = {"denoising": denoising}
    for name, alignment in alignments.items():
        terms = AlignmentTerms.zeros_like(denoising)
        if name in alignment_targets:
            # Compare the projected tokens of the method's block with its target.
            terms = alignment.compute_terms(output, alignment_targets[name], t)
            total = total + alignment.config.weight * terms.loss
        scalars[f"align/{name}"] = terms.loss
        scalars[f"cosine/{name}"] = terms.cosine
        scalars[f"token_norm/{name}"] = terms.token_norm
    return total, scalars


class Step:
    """One optimizer update: flow matching plus alignment (arXiv:2601.17830, eq. 3-5).

    An update does not synchronize the host with the device.

    Args:
        accelerator: Wraps the network and the optimizer, and reduces gradients.
        state: Network, EMAs, optimizer, step.
        sample_inputs: Draws the random inputs of a batch.
        alignments: The alignment methods, by name.
        guard: Skips updates with non-finite losses or gradients.
        schedule: The learning rate of each update.
        objective: The denoising objective.
        optimizer_config: Limit of the gradient norm, and EMA decays.
        accumulation: Number of micro-batches per process.
        compile: Whether to compile the losses.
    """

    def __init__(  # noqa: PLR0913 (an update needs all of these objects)
        self,
        accelerator: Accelerator,
        state: TrainState,
        sample_inputs: InputSampler,
        alignments: dict[str, Alignment],
        guard: NonFiniteGuard,
        schedule: LearningRateSchedule,
        objective: ObjectiveConfig,
        optimizer_config: OptimizerConfig,
        accumulation: int = 1,
        compile: bool = False,
    ):
        self.accelerator = accelerator
        self.state = state
        self.sample_inputs = sample_inputs
        self.alignments = alignments
        self.guard = guard
        self.schedule = schedule
        self.objective = objective
        self.interpolant = INTERPOLANTS[objective.path_type]
        self.max_grad_norm = optimizer_config.max_grad_norm
        self.accumulation = accumulation
        self.combine_losses = combine_losses
        if compile:
            self.combine_losses = torch.compile(combine_losses, dynamic=False)
        wrap = wrap_sharded if state.sharding else wrap_with_ddp
        with waiting_for_processes("the other processes to compare their networks"):
            self.model, self.optimizer = wrap(accelerator, state.model, state.optimizer)
        self.emas = [
            EMA(ema, state.model.backbone, decay)
            for ema, decay in zip(state.emas, optimizer_config.ema_decay)
        ]

    def __call__(self, batch: CachedBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Train on this process's share of a global batch.

        Returns:
            The scalars of this process, and 1 if the update was finite, else 0. Both are tensors
            on the device.
        """
        batch = batch.to(self.accelerator.device)

        # Draw noise, timesteps, posterior samples and dropped labels, which depend only on the
        # seed and the position in the stream.
        inputs = self.sample_inputs(batch)

        # Run forward and backward for each micro-batch, and reduce the gradients in the last one.
        scalar_mean = ScalarMean()
        for i, micro_batch in enumerate(inputs.split(self.accumulation)):
            is_last = i == self.accumulation - 1
            with nullcontext() if is_last else self.accumulate_gradients():
                total, scalars = self.compute_losses(micro_batch)
                with self.reduce_gradients(is_last):
                    self.accelerator.backward(total.mean() / self.accumulation)
            scalar_mean.add({"loss": total, **scalars})
        means = scalar_mean.mean()

        # Clip the gradients, skip the update if any value is not finite, and update the weights
        # and the EMAs.
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        grad_norm = gather_tensor(grad_norm)
        loss_names = ["denoising", *(f"align/{name}" for name in self.alignments)]
        losses = {name: means[name] for name in loss_names}
        is_finite = self.guard.mark_step(self.state.step + 1, losses, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.compute(self.state.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas:
            ema.update()
        self.state.step += 1
        return {**means, "grad_norm": grad_norm}, is_finite

    def reduce_gradients(self, is_last: bool) -> AbstractContextManager:
        """Return the context of a backward pass. The last one of a step reduces the gradients."""
        if not is_last or self.accelerator.num_processes == 1:
            return nullcontext()
        return waiting_for_processes("the gradients of the other processes")

    def accumulate_gradients(self) -> AbstractContextManager:
        """Return the context of a micro-batch whose gradients are not reduced."""
        if self.state.sharding:
            return self.state.sharding.no_sync(self.model)
        return self.accelerator.no_sync(self.model)

    def compute_losses(self, inputs: TrainingInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss per sample (B,), and the logged terms by name."""
        # L_denoising: predict the velocity (or x, or eps) from the noisy latents.
        x_t, velocity = interpolate(self.interpolant, inputs.latents, inputs.noise, inputs.t)
        active = {
            name: alignment
            for name, alignment in self.alignments.items()
            if alignment.is_active(self.state.step)
        }
        # Compute the targets that do not need student tokens before the forward pass, so that the
        # student's activations are not in memory at the same time.
        targets = {
            name: alignment.compute_targets(inputs)
            for name, alignment in active.items()
            if not alignment.target.student_blocks
        }
        output = self.model(
            x_t,
            inputs.t,
            inputs.labels,
            active_heads=[name for a in active.values() for name in a.head_names],
            student_blocks=[k for a in active.values() for k in a.target.student_blocks],
        )
        for name, alignment in active.items():
            if alignment.target.student_blocks:
                targets[name] = alignment.compute_targets(inputs, output.student_tokens)
        prediction = self.objective.prediction
        target = regression_target(prediction, inputs.latents, inputs.noise, velocity)
        return self.combine_losses(self.alignments, output, target, targets, inputs.t)


def make_step(
    settings: Settings,
    accelerator: Accelerator,
    state: TrainState,
    manifest: Manifest,
    alignments: dict[str, Alignment],
    guard: NonFiniteGuard,
) -> Step:
    """Build the step of a run from its settings and the manifest of its latent cache."""
    device = settings.device
    sample_inputs = InputSampler(
        settings.run.seed, settings.objective, manifest, accelerator.device, device.compile
    )
    return Step(
        accelerator,
        state,
        sample_inputs,
        alignments,
        guard,
        build_schedule(settings.optimizer, settings.loop, manifest.count),
        settings.objective,
        settings.optimizer,
        settings.loop.gradient_accumulation_steps,
        device.compile,
    )


def train(
    run: Run,
    step: Step,
    batches: Iterator[CachedBatch],
    writer: CheckpointWriter,
    request: StopRequest,
    save_every: int,
    profiler: StepProfiler,
) -> bool:
    """Run the training loop with logging, checkpoints, previews and evaluations.

    Args:
        run: The objects of the run.
        step: Performs one optimizer update.
        batches: This process's shares of the global batches.
        writer: Writes checkpoints.
        request: Set by stop signals and by a STOP file.
        save_every: Steps between checkpoints.
        profiler: Profiles some of the steps.

    Returns:
        False if a signal or a STOP file stopped the run early.
    """
    accelerator, state, log = step.accelerator, run.state, run.log
    flags = FlagReducer(accelerator.num_processes, num_flags=2)

    def stop_requested() -> bool:
        return request.name is not None

    # Complete previews and evaluations that were interrupted when the run stopped.
    if not run.monitors.run_due(state, gather_on_first, stop_requested):
        return False

    run.first_step.start()
    for batch in log.throughput.time_batches(batches):
        record_step(state.step + 1)
        with waiting_for_step(accelerator.num_processes):
            scalars, is_finite = step(batch)
            run.first_step.advance()
        log.record_step(state.step, scalars, is_finite)
        profiler.advance()

        # All processes agree on stopping, and on retrying a save that failed.
        should_retry = bool(writer.problem) and is_due(state.step, log.log_every)
        stop, retry = flags.reduce(stop_requested(), should_retry)

        # Save, then run previews and evaluations; save as well if a signal interrupts them.
        is_last = state.step == run.num_steps
        should_save = stop or retry or is_last or is_due(state.step, save_every)
        if should_save:
            save(run, accelerator, writer)
        if not stop and not run.monitors.run_due(state, gather_on_first, stop_requested):
            stop = True
            if not should_save:
                save(run, accelerator, writer)
        for message in writer.take_messages():
            log.info(message)
        if stop:
            return False
    return True


def waiting_for_step(num_processes: int) -> AbstractContextManager:
    """Return the context of a step, in which the processes wait for each other."""
    if num_processes == 1:
        return nullcontext()
    return waiting_for_processes("all processes to run the step")


def save(run: Run, accelerator: Accelerator, writer: CheckpointWriter) -> None:
    """Collect the contents of a checkpoint from all processes and start writing it."""
    state = run.state
    state.progress = run.log.collect_progress() | run.monitors.collect_progress()
    state.progress["flags"] = run.flags
    if accelerator.scaler is not None:
        state.progress["scaler"] = accelerator.scaler.state_dict()
    with run.log.throughput.pause("save"):
        if state.sharding or accelerator.is_main_process:
            writer.submit(state)
        wait_for_all("the first process to copy the checkpoint to host memory")


def run_training(
    settings: Settings, accelerator: Accelerator, request: StopRequest, resources: ExitStack
) -> bool:
    """Set up the run, or resume it, and train.

    Args:
        settings: Settings of the run.
        accelerator: The accelerator.
        request: Set by stop signals and by a STOP file.
        resources: Holds the lock of the run folder.

    Returns:
        False if a signal or a STOP file stopped the run early.
    """
    run = prepare_run(settings, accelerator, resources)
    if run is None:
        return True
    state, log, folder = run.state, run.log, settings.run.folder
    step = make_step(settings, accelerator, state, run.cache.manifest, run.alignments, run.guard)
    stream = TrainingStream(
        run.cache,
        settings.run.seed,
        settings.loop.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        required_cache_inputs(run.alignments),
    )
    # The update that ends step n trains on batch n - 1.
    run.guard.explain = lambda step_number: stream.describe_non_finite_moments(step_number - 1)
    batches = stream.read_batches(
        state.step,
        run.num_steps,
        settings.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init=ignore_signals,
    )

    checkpoint_config = settings.checkpoint
    with (
        watching_stop_file(folder, request, accelerator.is_main_process),
        closing(batches),
        CheckpointWriter(
            folder,
            run.config,
            checkpoint_config.keep_last,
            checkpoint_config.milestone_steps,
            state.sharding,
        ) as writer,
        StepProfiler(
            settings.log.profile if accelerator.is_main_process else 0,
            folder,
            accelerator.device,
            log.info,
        ) as profiler,
    ):
        is_finished = train(
            run, step, batches, writer, request, checkpoint_config.checkpointing_steps, profiler
        )
        if not is_finished:
            agree_on_stop_file(folder, request)
    run.first_step.save()
    for message in writer.take_messages():
        log.info(message)
    if writer.problem:
        if not accelerator.is_main_process:
            raise SystemExit(2)
        raise UserError(
            f"the last checkpoint of {folder} could not be saved ({writer.problem}): fix the "
            "problem and rerun the same command"
        )
    result = "finished"
    if not is_finished:
        result = f"stopped by {request.name or 'a signal to another process'}"
    log.info(f"{result} at step {state.step:,}; pauses: {log.throughput.describe_pauses()}")
    log.close()
    return is_finished


def main() -> None:
    """Parse the command line and run the training."""
    settings = resolve_device(parse_settings(description=__doc__))
    accelerator = create_accelerator(settings)
    set_tf32(settings.device.allow_tf32)
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        print_warning(describe_busy_cores())
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    with stop_on_signal() as request, ExitStack() as resources:
        with ending_with_the_others(settings.device, rank, num_processes):
            is_finished = run_training(settings, accelerator, request, resources)
        accelerator.end_training()
        # A STOP file asks for the end of the run, so the exit code must not make a launcher
        # restart it.
        if not is_finished and not request.is_final:
            sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    cli.run(main)
