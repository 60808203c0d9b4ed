"""Flags of the train.py of REPA, SRA and SiT (docs/coming-from-repa.md)."""

from common.foreign_flags import FUSED_ATTENTION, TIME_CUTOFFS, ForeignFlags, UnusedFlag

_CHECKPOINT = (
    "not available: training cannot start from a .pt file. A run of this repository continues from "
    "its newest checkpoint when the same command is rerun; remove the flag"
)

FOREIGN_FLAGS = ForeignFlags(
    unused=(
        UnusedFlag(
            "--legacy",
            "in REPA it drops labels twice; here, labels are dropped once, with probability "
            "--cfg-prob (0.19 drops as many as REPA's --legacy with 0.1)",
            is_switch=True,
        ),
        FUSED_ATTENTION,
    ),
    replacements={
        # SRA
        "--data-dir-train": "pass the latent cache as --data-dir",
        "--resume-ckpt": _CHECKPOINT,
        "--sample-steps": "pass --sampling-steps, the number of steps between previews",
        "--checkpoint-steps": "pass --checkpointing-steps",
        "--checkpoint-epochs": "pass --checkpointing-steps, the steps between checkpoints",
        "--loss-type": "pass --align-loss: cosine (cos), smooth_l1 (sml1), l1 or l2",
        "--block-out-s": "pass --align sra and --align-depth, the student's block",
        "--block-out-t": "pass --align sra and --sra-teacher-block, the teacher's block",
        "--t-max": "pass --align sra and --sra-t-max",
        # SiT
        "--data-path": "encode the images with preprocessing.encode_latents, and pass the latent "
        "cache as --data-dir",
        "--results-dir": "pass --output-dir, and the name of the run as --exp-name",
        "--image-size": "pass --resolution, or remove the flag: the cache determines the size",
        "--global-batch-size": "pass --batch-size, which is the global batch size",
        "--global-seed": "pass --seed",
        "--ckpt-every": "pass --checkpointing-steps",
        "--sample-every": "pass --sampling-steps, the number of steps between previews",
        "--cfg-scale": "pass --preview-cfg-scale, the guidance scale of previews",
        "--wandb": "pass --report-to wandb",
        "--ckpt": _CHECKPOINT,
        "--loss-weight": "not available: the squared error is not weighted; remove the flag",
        **TIME_CUTOFFS,
    },
)
