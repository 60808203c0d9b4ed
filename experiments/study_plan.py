"""Define the methods and scales of a convergence study, and the flags of its runs.

The aligned block of each method is chosen by tuning runs, whose seeds the study does not use.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from string import Formatter
from typing import NamedTuple

from common.cli import UserError, print_warning
from experiments.cells import Cell
from experiments.results import collect_final_values, load_result
from experiments.study_data import BUNDLED_IMAGES, REPA_ENCODER
from models.sit import PRESETS


class Method(NamedTuple):
    """A method of the comparison.

    Attributes:
        label: The name in tables and figures.
        flags: The flags of train.py. A key of `METHODS` in braces is replaced by the block that
            --tune has chosen for that method. Other names in braces are keys of
            `StudyPlan.make_fields`.
    """

    label: str
    flags: str

    @property
    def tuned_methods(self) -> set[str]:
        """The methods whose blocks the flags contain. A tuned method names only itself."""
        return {field for _, field, _, _ in Formatter().parse(self.flags) if field in METHODS}


BASELINE = "vanilla"
METHODS = {
    BASELINE: Method("vanilla SiT", "--align none"),
    "sra2-cosine": Method("SRA 2, cosine", "--align sra2 --align-depth {sra2-cosine}"),
    "sra2-smooth_l1": Method(
        "SRA 2, smooth L1", "--align sra2 --align-loss smooth_l1 --align-depth {sra2-smooth_l1}"
    ),
    "sra": Method("SRA", "--align sra --align-depth {sra}"),
    "repa": Method("REPA", "--align repa --align-depth {repa} {encoder} {head_width}"),
    "repa-stop": Method(
        "REPA, first half",
        "--align repa --align-depth {repa} {encoder} {head_width} {stop_at_half}",
    ),
    "sra2+repa": Method(
        "SRA 2 and REPA",
        "--align sra2 repa --align-depth {sra2-cosine} {repa} {encoder} {head_width}",
    ),
    "layersync": Method(
        "LayerSync", "--align layersync --align-depth {layersync} {layersync_target}"
    ),
    "irepa": Method(
        "iREPA",
        "--align repa --align-depth {irepa} --align-weight 1 --projector-type conv "
        "--target-norm zscore {encoder}",
    ),
    "selftrans": Method(
        "Self-Transcendence",
        "--align selftrans --align-depth {selftrans} {head_width} {frozen_network} {guidance}",
    ),
}
# The frozen network of Self-Transcendence, which is trained before the other runs.
FIRST_STAGE = "selftrans-stage1"
FIRST_STAGE_SEED = 100
# Scale of the guidance of its tokens for small images, and scales that --tune compares with it. The
# authors use 30 for SiT-B/2.
GUIDANCE = 5
OTHER_GUIDANCES = (1, 2, 30)


@dataclass(frozen=True)
class Scale:
    """The size of a study, with default values of its flags.

    Attributes:
        model: A preset of models/sit.py.
        flags: Further flags of train.py for all runs.
        log_every: Steps between log lines.
        blocks: Blocks that --tune tries.
        steps: Training steps per run.
        evaluations: Evaluations per run, evenly spaced; the last evaluation follows the last step.
        seeds: Seeds of the study.
        tune_seeds: Seeds of --tune.
        tune_steps: Training steps per run of --tune.
        jobs_per_gpu: Simultaneous runs per GPU; None means one run per CPU core.
        timing_rounds: Timed rounds of the training step.
        timing_steps: Steps per timed round.
        saves_once: Whether runs save only a final checkpoint, because a run takes only a minute and
            a checkpoint takes half a gigabyte.
        budget_flags: Further flags of the runs of a study with a time budget.
    """

    model: str
    flags: str
    log_every: int
    blocks: tuple[int, ...] = ()
    steps: int = 600
    evaluations: int = 4
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    tune_seeds: tuple[int, ...] = (0,)
    tune_steps: int = 600
    jobs_per_gpu: int | None = None
    timing_rounds: int = 10
    timing_steps: int = 1
    saves_once: bool = False
    budget_flags: tuple[str, ...] = ()


SMALL_IMAGES_FLAGS = (
    "--eval-features fashion --eval-mode ode --eval-heun --eval-samples 5000 --sampling-steps 0 "
    f"--keep-last 1 --eval-reference {BUNDLED_IMAGES}"
)
SCALES = {
    "laptop": Scale(
        model="SiT-Ti/2",
        flags="--batch-size 64 --learning-rate 1e-3 --ema-decay 0.99 --num-workers 0 "
        f"--eval-num-steps 6 --eval-batch-size 100 {SMALL_IMAGES_FLAGS}",
        log_every=20,
        blocks=(2, 3, 4),
        tune_steps=400,
    ),
    "gpu": Scale(
        model="SiT-S/2",
        flags="--batch-size 256 --learning-rate 5e-4 --ema-decay 0.995 --num-workers 1 "
        f"--eval-num-steps 6 --eval-batch-size 500 {SMALL_IMAGES_FLAGS}",
        log_every=50,
        blocks=(2, 4, 6),
        jobs_per_gpu=15,
        timing_steps=20,
        saves_once=True,
        budget_flags=("--compile",),
    ),
    "imagenet": Scale(
        model="SiT-B/2",
        flags="--batch-size 256 --keep-last 1 --eval-samples 50000 --eval-batch-size 128 "
        "--eval-reference VIRTUAL_imagenet256_labeled.npz",
        log_every=100,
        steps=400_000,
        evaluations=8,
        seeds=(0, 1, 2, 3, 4),
    ),
}


@dataclass(frozen=True)
class StudyPlan:
    """The settings that determine the runs of a study.

    Attributes:
        scale: A key of `SCALES`.
        model: A preset of models/sit.py.
        methods: Keys of `METHODS`.
        seeds: The seeds; every method runs with every seed.
        steps: Training steps per run.
        evaluations: Evaluations per run.
        data_dir: Parent folder of the caches; for ImageNet, the cache of the training images.
        train_flags: Additional flags from the user, which are passed to all runs.
        output_dir: Parent folder of the runs.
    """

    scale: str
    model: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    evaluations: int
    data_dir: Path
    train_flags: tuple[str, ...] = ()
    output_dir: Path = Path("exps")

    @property
    def first_stage(self) -> Path:
        """The run whose network is frozen in Self-Transcendence."""
        return self.output_dir / f"{FIRST_STAGE}-{self.steps}-seed{FIRST_STAGE_SEED}"

    def make_first_stage_cells(self, blocks: dict[str, int]) -> list[Cell]:
        """Return the run that must precede the others: SRA 2, aligned in the first half.

        The list is empty if no method needs the run. The length of the run is part of the name,
        because runs of --tune are shorter than those of the study.
        """
        if "selftrans" not in self.methods:
            return []
        flags = [*self.make_shared_flags(), *self.make_method_flags("sra2-cosine", blocks)]
        flags += ["--align-stop-step", str(self.steps // 2)]
        return [Cell(f"{FIRST_STAGE}-{self.steps}", FIRST_STAGE_SEED, tuple(flags))]

    def find_inputs(self, cell: Cell) -> tuple[Path, ...]:
        """Return the checkpoint that a run needs from `make_first_stage_cells`, if any."""
        if "--selftrans-checkpoint" not in cell.flags:
            return ()
        return (self.first_stage / f"checkpoints/{self.steps:07d}",)

    @property
    def train_cache(self) -> Path:
        """The cache of the training images."""
        return self.data_dir if self.scale == "imagenet" else self.data_dir / "train"

    @property
    def held_out_cache(self) -> Path:
        """The cache of the held-out images."""
        if self.scale == "imagenet":
            return self.data_dir.with_name(f"{self.data_dir.name}-val")
        return self.data_dir / "held-out"

    def make_shared_flags(self) -> list[str]:
        """Return the flags that all runs share."""
        scale = SCALES[self.scale]
        eval_every = math.ceil(self.steps / self.evaluations)
        save_every = self.steps if scale.saves_once else eval_every
        flags = ["--data-dir", self.train_cache, "--eval-latents", self.held_out_cache]
        flags += ["--model", self.model, "--max-train-steps", self.steps]
        flags += ["--eval-every", eval_every, "--checkpointing-steps", save_every]
        flags += [*scale.flags.split(), "--log-every", min(self.steps, scale.log_every)]
        flags += self.train_flags
        return [str(flag) for flag in flags]

    def make_method_flags(self, name: str, blocks: dict[str, int]) -> list[str]:
        """Return the flags of a method, with the given aligned blocks.

        Methods that `blocks` does not contain align the default block of train.py.
        """
        fields = dict.fromkeys(METHODS, "auto") | blocks
        return METHODS[name].flags.format(**fields, **self.make_fields(blocks)).split()

    def make_fields(self, blocks: dict[str, int]) -> dict[str, str]:
        """Return the flags that depend on the scale, by the name in braces in `Method.flags`."""
        fields = {
            "encoder": "",
            "head_width": "",
            "layersync_target": "",
            "guidance": "",
            "stop_at_half": f"--align-stop-step {self.steps // 2}",  # HASTE's stop
            "frozen_network": f"--selftrans-checkpoint {self.first_stage}",
        }
        if self.scale != "imagenet":
            # The heads of REPA and Self-Transcendence have width 2048, which is too wide for a
            # small network. Use the same width as the head of SRA 2 instead.
            fields["encoder"] = f"--repa-encoder {REPA_ENCODER}"
            fields["head_width"] = f"--projector-width {2 * PRESETS[self.model]['width']}"
            fields["guidance"] = f"--selftrans-guidance {GUIDANCE}"
        if "layersync" in blocks:
            # The distance of the two blocks is two sevenths of the depth, as for SiT-XL.
            depth = PRESETS[self.model]["depth"]
            target_block = blocks["layersync"] + round(2 * depth / 7)
            fields["layersync_target"] = f"--layersync-target-block {target_block}"
        return fields

    def make_study_cells(self, blocks: dict[str, int]) -> list[Cell]:
        """Return the runs of the study."""
        shared = self.make_shared_flags()
        return [
            Cell(name, seed, (*shared, *self.make_method_flags(name, blocks)))
            for seed in self.seeds
            for name in self.methods
        ]

    def make_tuning_cells(self) -> list[Cell]:
        """Return the runs of --tune.

        Each tuned method is run with each block of the scale, and Self-Transcendence with several
        scales of the guidance and the middle block.
        """
        shared = self.make_shared_flags()
        tuned = [name for name in self.methods if METHODS[name].tuned_methods == {name}]
        cells = [
            Cell(
                f"{name}-block{block}",
                seed,
                (*shared, *self.make_method_flags(name, {name: block})),
            )
            for seed in self.seeds
            for name in tuned
            for block in SCALES[self.scale].blocks
        ]
        if "selftrans" in tuned:
            cells += self.make_guidance_cells()
        return cells

    def make_guidance_cells(self) -> list[Cell]:
        """Return the runs of --tune that compare scales of the guidance, with the middle block."""
        blocks = SCALES[self.scale].blocks
        middle_block = {"selftrans": blocks[len(blocks) // 2]}
        flags = [*self.make_shared_flags(), *self.make_method_flags("selftrans", middle_block)]
        return [
            Cell(
                f"selftrans-guidance{guidance}",
                seed,
                (*flags, "--selftrans-guidance", str(guidance)),
            )
            for seed in self.seeds
            for guidance in OTHER_GUIDANCES
        ]


def read_blocks(plan: StudyPlan, path: Path) -> dict[str, int]:
    """Return the aligned block of each method from a result of --tune.

    Methods that were not tuned align the default block of train.py, and a message names them. For
    ImageNet, the file is not read, because all blocks are the defaults, as in the papers.

    Args:
        plan: The study that uses the blocks.
        path: The file that --knobs names.

    Raises:
        UserError: If the file belongs to another study, or was tuned with a seed of the study.
    """
    if plan.scale == "imagenet":
        return {}
    result = load_result(path, "convergence-knobs")
    for key, value in (("scale", plan.scale), ("model", plan.model)):
        if result[key] != value:
            raise UserError(
                f"--knobs {path} belongs to --{key} {result[key]}; run --tune with --{key} {value}"
            )
    blocks = result["knobs"]
    needed = set().union(*(METHODS[name].tuned_methods for name in plan.methods))
    missing = sorted(needed - {*blocks})
    if missing:
        print_warning(
            f"--knobs {path} has no block for {' '.join(missing)}: they align the default block of "
            f"train.py; run --tune --methods {' '.join(missing)} to choose one"
        )
    reused = sorted({*plan.seeds} & {run["seed"] for run in result["runs"]})
    if reused:
        raise UserError(
            f"--seeds {' '.join(map(str, reused))}: --knobs {path} was tuned with these seeds; "
            "pass other seeds"
        )
    return blocks


def choose_blocks(runs: list[dict], metric: str) -> dict[str, int]:
    """Return the block of each method with the lowest final metric, averaged over seeds.

    Runs whose names do not end in a block are ignored.
    """
    means: dict[str, dict[int, float]] = {}
    for run_name, by_seed in collect_final_values(runs, metric).items():
        name, separator, block = run_name.rpartition("-block")
        if separator:
            means.setdefault(name, {})[int(block)] = fmean(by_seed.values())
    return {
        name: min(sorted(by_block), key=by_block.__getitem__) for name, by_block in means.items()
    }
