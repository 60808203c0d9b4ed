"""Flags of the dataset_tools.py of REPA and SRA (docs/coming-from-repa.md)."""

from common.foreign_flags import ForeignFlags

FOREIGN_FLAGS = ForeignFlags(
    unused=(),
    replacements={
        "convert": "not needed: one command crops and encodes the images; pass --source and --dest",
        "encode": "not needed: one command crops and encodes the images; pass --source and --dest",
        "--transform": "not needed: --crop center is center-crop-dhariwal, the crop of ADM; remove "
        "the flag",
        "--model-url": "pass --vae",
        "--max-images": "pass --limit",
    },
)
