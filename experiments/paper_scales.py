"""Define the scales at which experiments/paper.py runs: their data, and the flags of all commands.

`imagenet` uses the settings of the paper. `demo` runs the same stages on the bundled images in
minutes, with these rules:

- Every model is replaced by SiT-Ti/2, and an aligned block keeps its relative depth.
- The numbers of steps are replaced by those in `DEMO_STEPS`, at most 100.
- REPA uses a small encoder, whose weights come with a Python package.
- 250 samples are drawn with 10 steps, and compared in the features of the bundled classifier.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.paper_tables import (
    BATCH_SIZE,
    COST_MODEL,
    FID,
    IMAGES_PER_EPOCH,
    NUM_SAMPLES,
    NUM_STEPS,
    SCORE,
    SD_VAES,
    SFID,
)
from experiments.study_data import BUNDLED_IMAGES, BUNDLED_VAE

DEMO_MODEL = "SiT-Ti/2"
DEMO_STEPS = {
    100_000: 10,
    200_000: 20,
    400_000: 30,
    1_000_000: 50,
    4_000_000: 80,
    7_000_000: 100,
}


@dataclass(frozen=True)
class Scale:
    """The data and the settings of a scale.

    Attributes:
        images: Images to encode.
        encode_flags: Flags of preprocessing.encode_latents.
        images_per_epoch: Number of training images.
        batch_size: Global batch size.
        train_flags: Further flags of train.py for all runs.
        sample_flags: Flags of sample_ddp.py.
        evaluate_flags: Flags of evaluations.evaluate.
        reference: The reference of the metrics.
        metrics: Key in metrics.json of the value that is compared with each metric of the paper, or
            None if the metric is not measured.
        fid_levels: FIDs for which the number of epochs is reported.
        cost_flags: Flags of benchmarks.cost.
    """

    images: Path
    encode_flags: str
    images_per_epoch: int
    batch_size: int
    train_flags: str
    sample_flags: str
    evaluate_flags: str
    reference: Path
    metrics: dict[str, str | None]
    fid_levels: tuple[float, ...]
    cost_flags: str


SCALES = {
    "imagenet": Scale(
        images=Path("data/imagenet/train"),
        encode_flags=f"--resolution 256 --vae {SD_VAES[0]}",
        images_per_epoch=IMAGES_PER_EPOCH,
        batch_size=BATCH_SIZE,
        train_flags="--checkpointing-steps 50000 --keep-last 2",
        sample_flags=f"--num-fid-samples {NUM_SAMPLES} --mode sde --num-steps {NUM_STEPS}",
        evaluate_flags="",
        reference=Path("VIRTUAL_imagenet256_labeled.npz"),
        metrics={FID: FID, SFID: SFID, SCORE: SCORE},
        fid_levels=(30.0, 20.0, 10.0, 8.3),
        cost_flags=f"--model {COST_MODEL} --batch-size {BATCH_SIZE} --precision bf16 --compile",
    ),
    "demo": Scale(
        images=BUNDLED_IMAGES,
        encode_flags=f"--resolution 32 --vae {BUNDLED_VAE}",
        images_per_epoch=10_000,
        batch_size=32,
        train_flags="--checkpointing-steps 10 --keep-last 1 --learning-rate 1e-3 --ema-decay 0.9 "
        "--sampling-steps 0 --num-workers 0 --log-every 10",
        sample_flags="--num-fid-samples 250 --mode sde --num-steps 10 --per-proc-batch-size 50",
        evaluate_flags="--features fashion",
        reference=BUNDLED_IMAGES,
        metrics={FID: "FD-fashion", SFID: None, SCORE: None},
        fid_levels=(15.0, 10.0, 8.7),
        cost_flags=f"--model {DEMO_MODEL} --latent-size 8 --batch-size 8 --rounds 5",
    ),
}
