"""Tables 1, 2, 3 and 5 of the SRA 2 paper (arXiv:2601.17830) as data.

The values are those that the paper reports, and were not measured with this code. A value that is
not known is None. A row without a run is only quoted: this repository does not contain its method.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from experiments.ablation_grid import BASELINE, PAPER_AXES, PAPER_VANILLA_FID, build_grid

SOURCE = "arXiv:2601.17830"
BATCH_SIZE = 256
IMAGES_PER_EPOCH = 1_281_167  # ImageNet; 5,005 steps of 256 images

# The settings of the paper's FIDs. It does not state which fine-tuned SD-VAE it uses.
NUM_SAMPLES = 50_000
SOLVER = "euler-maruyama"
NUM_STEPS = 250
EMA_DECAY = 0.9999
REFERENCE_SHA256 = "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"  # ADM's
SD_VAES = ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema")

# The guidance of Table 3. The paper uses a guidance interval, but its scale and ends are not known.
PAPER_GUIDANCE: tuple[float | None, float | None, float | None] = (None, None, None)
# The values of SRA's generate script, as scale, lower end and upper end.
DEFAULT_GUIDANCE = (1.8, 0.0, 0.7)
DEFAULT_GUIDANCE_SOURCE = "SRA's generate script"

FID = "FID"
SFID = "sFID"
SCORE = "inception_score"


@dataclass(frozen=True)
class TrainingRun:
    """A training run of the paper, which several rows may share.

    Attributes:
        name: Name of the run, such as xl2-sra2.
        model: Preset of models/sit.py.
        flags: Flags of train.py, without the model, the data and the schedule.
    """

    name: str
    model: str
    flags: str


@dataclass(frozen=True)
class Row:
    """A row of a table of FIDs: a checkpoint of a run, and the paper's values.

    Attributes:
        label: Label of the row.
        numbers: The paper's value of each metric, or None if it is not known.
        run: The training run, or None if the row is only quoted.
        steps: Number of training steps of the checkpoint.
        minus: Run whose values at the same step are subtracted, or None.
        note: Remark about the values.
    """

    label: str
    numbers: dict[str, float | None]
    run: TrainingRun | None = None
    steps: int = 0
    minus: TrainingRun | None = None
    note: str = ""

    @property
    def runs(self) -> list[TrainingRun]:
        """The training runs that the row needs."""
        return [run for run in (self.run, self.minus) if run]


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        number: Number of the table.
        title: Title.
        rows: The rows.
        is_guided: Whether the samples use classifier-free guidance.
    """

    number: int
    title: str
    rows: tuple[Row, ...] = ()
    is_guided: bool = False


def name_run(model: str, name: str) -> str:
    """Return the name of a run, such as xl2-sra2 for SiT-XL/2."""
    return f"{model.removeprefix('SiT-').replace('/', '').lower()}-{name}"


def list_table_1(
    model: str = "SiT-B/2", steps: int = 400_000, axes: Iterable[str] = PAPER_AXES
) -> Table:
    """Return the ablations. A run that several axes share occurs once."""
    flags, panels = build_grid([*axes], model, steps, demo=False)
    runs = {name: TrainingRun(name_run(model, name), model, flags[name]) for name in flags}
    values = [(panel["title"], value) for panel in panels for value in panel["values"]]
    best_values = [(title, value) for title, value in values if value["usual"]]
    _, best = best_values[0]
    note = ", ".join(f"{title} {value['label']}" for title, value in best_values)
    rows = [
        Row("vanilla SiT", {FID: PAPER_VANILLA_FID}, runs[BASELINE], steps),
        Row("best values", {FID: best["paper"]}, runs[best["run"]], steps, note=note),
    ]
    for title, value in values:
        if not value["usual"]:
            numbers = {FID: value["paper"]}
            note = ""
            if value["run"] == "depth-3":
                numbers[SFID] = 6.07
                note = "the FID is not known; the sFID is the lowest of all blocks"
            elif value["run"] == "t-range-0.5-1":
                note = "the FID is not known; it is higher than that of [0, 1]"
            label = f"{title}: {value['label']}"
            rows.append(Row(label, numbers, runs[value["run"]], steps, note=note))
    return Table(1, f"Ablations, {model}, no guidance", tuple(rows))


SMOOTH_L1 = "--align-loss smooth_l1 --align-beta 0.05"
B2 = {row.run.name: row.run for row in list_table_1().rows if row.run}
L2_NONE = TrainingRun("l2-none", "SiT-L/2", "--align none")
L2_SRA2 = TrainingRun("l2-sra2", "SiT-L/2", f"--align sra2 --align-depth 8 {SMOOTH_L1}")
XL2_NONE = TrainingRun("xl2-none", "SiT-XL/2", "--align none")
XL2_SRA2 = TrainingRun("xl2-sra2", "SiT-XL/2", f"--align sra2 --align-depth 8 {SMOOTH_L1}")
XL2_SRA = TrainingRun("xl2-sra", "SiT-XL/2", "--align sra --align-depth 8")
XL2_REPA = TrainingRun("xl2-repa", "SiT-XL/2", "--align repa --align-depth 8")
XL2_BOTH = TrainingRun(
    "xl2-sra2-repa",
    "SiT-XL/2",
    "--align sra2 repa --align-depth 8 8 --align-loss smooth_l1 cosine --align-beta 0.05",
)

UNKNOWN_MODEL = "the model of the paper's difference is not known; run with SiT-XL/2"
NO_VA_VAE = "VA-VAE is not available as an AutoencoderKL of diffusers"

TABLE_2 = Table(
    2,
    "Convergence, no guidance",
    (
        Row("SiT-B/2", {FID: 33.0}, B2["b2-none"], 400_000),
        Row("SiT-B/2 + SRA 2", {FID: 28.9}, B2["b2-sra2"], 400_000),
        Row("SiT-L/2", {FID: 18.8}, L2_NONE, 400_000),
        Row("SiT-L/2 + SRA 2", {FID: 14.3}, L2_SRA2, 400_000),
        Row("SiT-XL/2", {FID: 8.3}, XL2_NONE, 7_000_000),
        Row("SiT-XL/2 + SRA 2", {FID: 8.2}, XL2_SRA2, 1_000_000),
        Row("SiT-XL/2 + SRA 2", {FID: 6.6}, XL2_SRA2, 4_000_000),
        *(
            Row("REPA + SRA 2, minus REPA", {FID: value}, XL2_BOTH, steps, XL2_REPA, UNKNOWN_MODEL)
            for steps, value in ((100_000, -3.1), (200_000, -1.9), (400_000, -1.1))
        ),
        Row("VA-VAE", {FID: 4.9}, steps=400_000, note=NO_VA_VAE),
        Row("VA-VAE + SRA 2", {FID: 4.4}, steps=400_000, note=NO_VA_VAE),
    ),
)

TABLE_3 = Table(
    3,
    "SiT-XL/2 with guidance",
    (
        Row("SiT, 1400 epochs", {FID: 2.06, SCORE: 270.3}, XL2_NONE, 7_000_000),
        Row("SRA, 800 epochs", {FID: 1.58, SCORE: 305.7}, XL2_SRA, 4_000_000),
        Row("REPA, 800 epochs", {FID: 1.42, SCORE: 311.4}, XL2_REPA, 4_000_000),
        Row(
            "REG, 800 epochs",
            {FID: 1.36, SCORE: 299.4},
            steps=4_000_000,
            note="the method is not implemented here",
        ),
        Row("SRA 2, 200 epochs", {FID: 1.98, SCORE: 284.5}, XL2_SRA2, 1_000_000),
        Row("SRA 2, 800 epochs", {FID: 1.52, SCORE: 316.2}, XL2_SRA2, 4_000_000),
    ),
    is_guided=True,
)

TABLES = {1: list_table_1(), 2: TABLE_2, 3: TABLE_3, 5: Table(5, "Cost of SRA 2, SiT-XL/2")}


@dataclass(frozen=True)
class CostRow:
    """A row of Table 5.

    Attributes:
        label: Label of the row.
        quantity: Name of the quantity, for the JSON file.
        paper: The paper's value, or None if it is not known.
        spec: Format of the values.
        note: Remark about the values.
    """

    label: str
    quantity: str
    paper: float | None
    spec: str
    note: str = ""


COST_MODEL = "SiT-XL/2"
COST_ROWS = (
    CostRow("parameters of the head, millions", "head_parameters", 18, ".1f"),
    CostRow("parameters of external networks, millions", "external_parameters", 0, ".1f"),
    CostRow("increase of the forward FLOPs", "more_forward_flops", 0.04, ".1%"),
    CostRow(
        "increase of the forward latency",
        "more_forward_latency",
        0.06,
        ".1%",
        "not measured: benchmarks.cost times the training step",
    ),
    CostRow(
        "training speed relative to SiT",
        "relative_speed",
        7.2 / 8.1,
        ".3f",
        "the paper's speeds are 7.2 and 8.1 in a unit that is not known",
    ),
)
