"""Plan the commands for the paper's tables: encode, train, sample and evaluate."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from checkpointing.storage import CheckpointError
from common.cli import UserError
from evaluations.runs import read_json
from experiments.cells import Cell
from experiments.paper_scales import DEMO_MODEL, DEMO_STEPS, SCALES, Scale
from experiments.paper_tables import DEFAULT_GUIDANCE, TABLES, Row, Table, TrainingRun
from experiments.study_data import ENCODER_INPUT_SIZE, REPA_ENCODER
from experiments.tasks import Task
from models.sit import PRESETS
from training.resume import build_args_json, describe_changed_flags


@dataclass(frozen=True)
class PlannedRun:
    """A training run with one seed.

    Attributes:
        run: The run of the paper.
        cell: The run of train.py.
        steps: Numbers of steps of the checkpoints that are sampled, in ascending order.
        folder: Folder of the run.
        train: The training task.
    """

    run: TrainingRun
    cell: Cell
    steps: tuple[int, ...]
    folder: Path
    train: Task


@dataclass(frozen=True)
class Evaluation:
    """The samples of a checkpoint and their metrics.

    Attributes:
        run: The training run.
        step: Number of steps of the checkpoint.
        is_guided: Whether the samples use guidance.
        sample: The task that samples.
        evaluate: The task that computes the metrics.
        metrics_path: The metrics.json that `evaluate` writes.
    """

    run: PlannedRun
    step: int
    is_guided: bool
    sample: Task
    evaluate: Task
    metrics_path: Path


@dataclass(frozen=True)
class PaperPlan:
    """The commands for the tables.

    Attributes:
        scale: A key of `SCALES`.
        tables: The tables.
        seeds: The seeds; every run is executed with every seed.
        data_dir: The latent cache.
        output_dir: Folder of the runs, the samples and the results.
        images: Images to encode (default: those of the scale).
        reference: Reference of the metrics (default: that of the scale).
        guidance: Scale, lower end and upper end of guidance.
        train_flags: Additional flags of train.py for all runs.
    """

    scale: str
    tables: tuple[Table, ...]
    seeds: tuple[int, ...]
    data_dir: Path
    output_dir: Path
    images: Path | None = None
    reference: Path | None = None
    guidance: tuple[float, float, float] = DEFAULT_GUIDANCE
    train_flags: tuple[str, ...] = ()

    @property
    def settings(self) -> Scale:
        """The settings of the scale."""
        return SCALES[self.scale]

    @property
    def is_demo(self) -> bool:
        """Whether the scale is the demo, whose results are not evidence."""
        return self.scale == "demo"

    @property
    def cost_path(self) -> Path:
        """The file of benchmarks.cost for Table 5. The record of the task has another name."""
        return self.output_dir / "table-5.json"

    def scale_steps(self, steps: int) -> int:
        """Convert a number of steps of the paper to the number of steps at this scale."""
        return DEMO_STEPS[steps] if self.is_demo else steps

    def scale_run(self, run: TrainingRun) -> list[str]:
        """Return the flags of train.py for the model and the method of a run."""
        if not self.is_demo:
            return ["--model", run.model, *run.flags.split()]

        def scale_blocks(match: re.Match) -> str:
            ratio = PRESETS[DEMO_MODEL]["depth"] / PRESETS[run.model]["depth"]
            blocks = [str(max(1, round(int(block) * ratio))) for block in match[1].split()]
            return " ".join(["--align-depth", *blocks])

        flags = re.sub(r"--align-depth((?: \d+)+)", scale_blocks, run.flags)
        words = ["--model", DEMO_MODEL, *flags.split()]
        if uses_repa(run):
            words += ["--repa-encoder", REPA_ENCODER, "--repa-side", str(ENCODER_INPUT_SIZE)]
            words += ["--encoder-weights", str(self.encoder_weights), "--projector-width", "256"]
        return words

    @property
    def encoder_weights(self) -> Path:
        """The weights of REPA's encoder in the demo."""
        return self.data_dir.with_name(f"{REPA_ENCODER}.safetensors")

    @property
    def rows(self) -> list[tuple[Table, Row]]:
        """The rows that are run, with their tables."""
        return [(table, row) for table in self.tables for row in table.rows if row.run]

    @cached_property
    def runs(self) -> list[PlannedRun]:
        """The training runs, with all seeds. A run that several rows share occurs once."""
        steps_by_run: dict[TrainingRun, set[int]] = {}
        for _, row in self.rows:
            for run in row.runs:
                steps_by_run.setdefault(run, set()).add(self.scale_steps(row.steps))
        return [
            self.plan_run(run, seed, tuple(sorted(steps)))
            for seed in self.seeds
            for run, steps in steps_by_run.items()
        ]

    def plan_run(self, run: TrainingRun, seed: int, steps: tuple[int, ...]) -> PlannedRun:
        """Return a training run that keeps the checkpoints after the given numbers of steps.

        The run also keeps the checkpoints for the tables that are not selected, because a later
        call may select them.
        """
        later_steps = [
            self.scale_steps(row.steps)
            for table in TABLES.values()
            for row in table.rows
            if run in row.runs
        ]
        milestone = math.gcd(*steps, *later_steps)
        flags = ["--data-dir", str(self.data_dir), *self.scale_run(run)]
        flags += ["--batch-size", str(self.settings.batch_size)]
        flags += ["--max-train-steps", str(steps[-1]), "--milestone-steps", str(milestone)]
        flags += self.settings.train_flags.split()
        cell = Cell(run.name, seed, (*flags, *self.train_flags))
        folder = self.output_dir / cell.run_name
        inputs = [self.data_dir / "manifest.json"]
        if uses_repa(run):
            inputs.append(self.data_dir / "images")
            if self.is_demo:
                inputs.append(self.encoder_weights)
        outputs = tuple(make_checkpoint_path(folder, step) for step in steps)
        train = cell.make_task(self.output_dir, tuple(inputs), outputs)
        return PlannedRun(run, cell, steps, folder, train)

    @cached_property
    def evaluations(self) -> dict[tuple[str, int, int, bool], Evaluation]:
        """The evaluations by name of the run, seed, number of steps, and use of guidance."""
        runs = {(planned.run.name, planned.cell.seed): planned for planned in self.runs}
        evaluations = {}
        for seed in self.seeds:
            for table, row in self.rows:
                for run in row.runs:
                    step = self.scale_steps(row.steps)
                    key = (run.name, seed, step, table.is_guided)
                    if key not in evaluations:
                        planned = runs[run.name, seed]
                        evaluations[key] = self.plan_evaluation(planned, step, table.is_guided)
        return evaluations

    def find_evaluation(self, run: TrainingRun, row: Row, seed: int, is_guided: bool) -> Evaluation:
        """Return the evaluation of a run at the checkpoint of a row."""
        return self.evaluations[run.name, seed, self.scale_steps(row.steps), is_guided]

    def plan_evaluation(self, run: PlannedRun, step: int, is_guided: bool) -> Evaluation:
        """Return the evaluation of a checkpoint."""
        checkpoint = make_checkpoint_path(run.folder, step)
        name = f"{run.cell.run_name}-{step:07d}{'-guided' if is_guided else ''}"
        folder = self.output_dir / "samples"
        npz = folder / f"{name}.npz"
        metrics_path = npz.with_suffix(".metrics.json")
        sample = ["sample_ddp.py", "--ckpt", str(checkpoint), *self.settings.sample_flags.split()]
        if is_guided:
            scale, low, high = self.guidance
            sample += ["--cfg-scale", f"{scale:g}"]
            sample += ["--guidance-low", f"{low:g}", "--guidance-high", f"{high:g}"]
        sample += ["--sample-dir", str(folder), "--name", name]
        evaluate = ["-m", "evaluations.evaluate", str(npz)]
        evaluate += ["--reference", str(self.reference or self.settings.reference)]
        evaluate += self.settings.evaluate_flags.split()
        return Evaluation(
            run,
            step,
            is_guided,
            Task(f"sample-{name}", tuple(sample), (checkpoint,), (npz,)),
            Task(f"evaluate-{name}", tuple(evaluate), (npz,), (metrics_path,)),
            metrics_path,
        )

    def list_encode_tasks(self) -> list[Task]:
        """Return the tasks that create the latent cache and, in the demo, REPA's encoder."""
        needs_images = any(uses_repa(planned.run) for planned in self.runs)
        images = str(self.images or self.settings.images)
        command = ["-m", "preprocessing.encode_latents", "--source", images]
        command += ["--dest", str(self.data_dir), *self.settings.encode_flags.split()]
        outputs = [self.data_dir / "manifest.json"]
        if needs_images:
            command.append("--keep-images")
            outputs.append(self.data_dir / "images")
        tasks = [Task("encode", tuple(command), outputs=tuple(outputs))] if self.runs else []
        if needs_images and self.is_demo:
            weights = self.encoder_weights
            convert = ("-m", "experiments.efficientnet_weights", "--out", str(weights))
            tasks.append(Task("encoder", convert, outputs=(weights,), is_distributed=False))
        return tasks

    def list_cost_tasks(self) -> list[Task]:
        """Return the task that times the training step for Table 5, if the table is selected."""
        if all(table.number != 5 for table in self.tables):
            return []
        command = ["-m", "benchmarks.cost", "--align", "none", "sra2"]
        command += [*self.settings.cost_flags.split(), "--json", str(self.cost_path)]
        return [Task("cost", tuple(command), outputs=(self.cost_path,), is_distributed=False)]

    @property
    def stages(self) -> dict[str, list[Task]]:
        """All tasks by stage, in an order in which they can be executed."""
        return {
            "encode": self.list_encode_tasks(),
            "train": [planned.train for planned in self.runs],
            "sample": [evaluation.sample for evaluation in self.evaluations.values()],
            "evaluate": [evaluation.evaluate for evaluation in self.evaluations.values()],
            "cost": self.list_cost_tasks(),
        }

    def needs_training(self, run: PlannedRun) -> bool:
        """Return whether checkpoints are missing that have not been sampled or evaluated yet.

        Checkpoints may be deleted after their evaluation.
        """
        return not run.train.is_finished(self.output_dir) and any(
            not evaluation.sample.is_finished(self.output_dir)
            and not evaluation.evaluate.is_finished(self.output_dir)
            for evaluation in self.evaluations.values()
            if evaluation.run is run
        )

    def check(self, gpus: int) -> None:
        """Check the flags of all runs, and compare them with those of existing runs and samples.

        Args:
            gpus: Number of GPUs of a run.

        Raises:
            UserError: If train.py would reject the flags of a run on this number of GPUs, or if the
                output directory contains a run or guided samples with other flags.
        """
        for planned in self.runs:
            flags = build_args_json(planned.cell.parse_settings(gpus))
            # The run has recorded the choice of its machine, which may not be this one.
            flags = {name: value for name, value in flags.items() if value != "auto"}
            changes = ""
            with suppress(CheckpointError):  # train.py reports a damaged checkpoint
                changes = describe_changed_flags(flags, planned.folder)
            if changes:
                raise UserError(
                    f"{planned.folder} was started with other flags: {changes}. Choose another "
                    "--output-dir, or pass the flags it was started with"
                )
        for evaluation in self.evaluations.values():
            if evaluation.is_guided:
                self.check_guidance(evaluation.metrics_path)

    def check_guidance(self, path: Path) -> None:
        """Raise UserError if the metrics in a file are those of samples with other guidance."""
        sampling = read_json(path).get("sampling") or {}
        names = ("cfg_scale", "guidance_low", "guidance_high")
        used = tuple(sampling.get(name) for name in names)
        passed = tuple(float(f"{value:g}") for value in self.guidance)  # as in `plan_evaluation`
        if sampling and used != passed:
            flags = " ".join(
                f"--{name.replace('_', '-')} {value}" for name, value in zip(names, used)
            )
            raise UserError(
                f"the samples of {path} used {flags}; pass these flags, or choose another "
                "--output-dir"
            )

    def print_commands(self, gpus: int) -> None:
        """Print all commands in an order in which they can be executed."""
        for task in self.list_encode_tasks():
            print(f"# {task.name}\n{task.format_command(gpus)}\n")
        self.print_run_commands(gpus)
        for task in self.list_cost_tasks():
            print(f"# {task.name}\n{task.format_command(gpus)}")

    def print_run_commands(self, gpus: int) -> None:
        """Print the commands that train, sample and evaluate."""
        for planned in self.runs:
            lines = [f"# {planned.run.name}, seed {planned.cell.seed}"]
            tasks = [planned.train]
            for evaluation in self.evaluations.values():
                if evaluation.run is planned:
                    tasks += [evaluation.sample, evaluation.evaluate]
            lines += [task.format_command(gpus) for task in tasks]
            print(*lines, "", sep="\n")


def uses_repa(run: TrainingRun) -> bool:
    """Return whether a run needs images and an image encoder."""
    return "repa" in run.flags


def make_checkpoint_path(run: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return run / f"checkpoints/{step:07d}"
