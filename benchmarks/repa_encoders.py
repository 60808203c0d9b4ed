r"""Compare the tokens of REPA's encoders with those of REPA's own code.

    python -m benchmarks.repa_encoders --repa-repository ../REPA --dino-repository ../dino \
        --dinov2-repository ../dinov2 --json encoders.json

For each encoder, random weights are written to a file in the format in which the authors of the
encoder publish their weights. REPA's functions `load_encoders` and `preprocess_raw_image` read this
file and prepare the images; models/encoder.py reads the same file as --encoder-weights does. Both
encode the same images of 256 pixels in float32 on the CPU. The command fails if two tokens differ
by more than 1e-5 of the largest value of a token.

REPA's repository contains the networks of MoCo v3, MAE and I-JEPA, and the blocks of CLIP. The
networks of DINO and DINOv2 come from clones of their repositories; without the flag, these encoders
are omitted. REPA's file models/dinov1.py is not published; DINO's `get_intermediate_layers` is used
instead.

The networks have the original sizes, except that --depth limits the number of blocks. The command
also checks that both programs request the same number of blocks. Without --depth, the largest
network needs 12 GB of memory.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.authors_code import load_module
from benchmarks.measure import describe_machine, make_parser, write_result
from benchmarks.repa import load_train_functions
from common import cli
from common.cli import UserError
from models.encoder import Encoder
from models.repa_encoders import MISNAMED_PARAMETERS, REPA_ENCODERS

RESOLUTION = 256
NUM_IMAGES = 2
TOLERANCE = 1e-5
# Repositories with networks: name in the flags -> repository on GitHub.
REPOSITORIES = {
    "repa": "sihyun-yu/REPA",
    "dino": "facebookresearch/dino",
    "dinov2": "facebookresearch/dinov2",
}
# Name of the encoder -> file that REPA reads, and repository with the network.
FILES = {
    "mocov3-vit-s": ("mocov3_vits.pth", "repa"),
    "mocov3-vit-b": ("mocov3_vitb.pth", "repa"),
    "mocov3-vit-l": ("mocov3_vitl.pth", "repa"),
    "clip-vit-L": ("ViT-L-14.pt", "repa"),
    "mae-vit-l": ("mae_vitl.pth", "repa"),
    "jepa-vit-h": ("ijepa_vith.pth", "repa"),
    "dinov1-vit-b": ("dinov1_vitb.pth", "dino"),
    "dinov2-vit-b": ("dinov2_vitb.pth", "dinov2"),
    "dinov2reg-vit-b": ("dinov2reg_vitb.pth", "dinov2"),
}
CLIP_DEPTH = 24  # number of blocks in OpenAI's file
FIXED = ("pos_embed",)  # fixed parameters of networks whose position embedding is not learned


class ClipImageNetwork(nn.Module):
    """The attributes of CLIP's image network that REPA's UpdatedVisionTransformer reads."""

    def __init__(self, parts: ModuleType, depth: int):
        super().__init__()
        width = 1024
        patch_size = 14
        num_tokens = (224 // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(num_tokens, width))
        self.ln_pre = parts.LayerNorm(width)
        self.transformer = parts.Transformer(width, depth, width // 64)
        self.ln_post = parts.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, 768))


class DepthLimit:
    """Limits the number of blocks of vision transformers, and records the requested number.

    Args:
        depth: Largest number of blocks.
    """

    def __init__(self, depth: int):
        self.depth = depth
        self.requested: set[int] = set()

    def patch(self, network_class: type[nn.Module]) -> AbstractContextManager:
        """Return a context in which networks of a class are built with at most `depth` blocks."""
        original = network_class.__init__

        def build(network: nn.Module, *args: Any, depth: int, **kwargs: Any) -> None:
            self.requested.add(depth)
            original(network, *args, depth=min(depth, self.depth), **kwargs)

        return patch.object(network_class, "__init__", build)


def randomize(state: dict[str, Tensor], fixed: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Add random numbers to weights, because initial biases and norms would not affect tokens."""
    randomized = {}
    for key, value in state.items():
        scale = 0.1 if value.ndim == 1 else 0.02
        randomized[key] = value if key in fixed else value + scale * torch.randn_like(value)
    return randomized


def make_script(state: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """Return a TorchScript module with this state dict."""
    root = nn.Module()
    for key, value in state.items():
        *folders, name = key.split(".")
        module = root
        for folder in folders:
            if folder not in dict(module.named_children()):
                module.add_module(folder, nn.Module())
            module = module.get_submodule(folder)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return torch.jit.script(root)


class RepaCode:
    """REPA's code, with the networks that it loads from other repositories.

    Args:
        clones: Clones by the name of the repository. That of REPA is required.
    """

    def __init__(self, clones: dict[str, Path]):
        flag = "--repa-repository"
        models = clones["repa"] / "models"
        clip = SimpleNamespace(load=self._load_clip)
        self.mocov3 = load_module(models / "mocov3_vit.py", flag)
        self.mae = load_module(models / "mae_vit.py", flag)
        self.jepa = load_module(models / "jepa.py", flag)
        self.clip = load_module(models / "clip_vit.py", flag, imports={"clip": clip})
        self.modules = {
            "clip": clip,
            "models.mae_vit": self.mae,
            "models.jepa": self.jepa,
            "models.clip_vit": self.clip,
            "models.dinov1": SimpleNamespace(vit_base=self.make_dino),
        }
        imports = {"models": SimpleNamespace(mocov3_vit=self.mocov3)}
        utils = load_module(clones["repa"] / "utils.py", flag, imports=imports)
        self.load_encoders = utils.load_encoders
        self.preprocess = load_train_functions(clones["repa"]).preprocess_raw_image

        self.dino: Any = None
        if "dino" in clones:
            imports = {"utils": SimpleNamespace(trunc_normal_=nn.init.trunc_normal_)}
            path = clones["dino"] / "vision_transformer.py"
            self.dino = load_module(path, "--dino-repository", imports=imports)
        self.dinov2: Any = None
        if "dinov2" in clones:
            with patch.object(sys, "path", [str(clones["dinov2"]), *sys.path]):
                self.dinov2 = importlib.import_module("dinov2.hub.backbones")

    def _load_clip(self, name: str, device: str) -> tuple[SimpleNamespace, None]:
        """Return the image network of a TorchScript archive in float32, as OpenAI's package."""
        archive = torch.jit.load(f"ckpts/{name.replace('/', '-')}.pt", map_location=device)
        network = ClipImageNetwork(self.clip, depth=CLIP_DEPTH)
        network.load_state_dict(
            {
                key.removeprefix("visual."): value.float()
                for key, value in archive.state_dict().items()
                if key.startswith("visual.")
            }
        )
        return SimpleNamespace(visual=network), None

    def limit_depth(self, limit: DepthLimit) -> ExitStack:
        """Return a context in which all networks are built with a limited number of blocks."""
        from timm.models.vision_transformer import VisionTransformer

        classes = [VisionTransformer, self.jepa.VisionTransformer, ClipImageNetwork]
        if self.dino:
            classes.append(self.dino.VisionTransformer)
        if self.dinov2:
            name = "dinov2.models.vision_transformer"
            classes.append(importlib.import_module(name).DinoVisionTransformer)
        stack = ExitStack()
        for network_class in classes:
            stack.enter_context(limit.patch(network_class))
        return stack

    def make_dino(self, side: int = RESOLUTION) -> nn.Module:
        """Return the network of DINO, whose output are the patch tokens after the final norm."""
        network = self.dino.vit_base(img_size=[side])
        network.forward = lambda x: network.get_intermediate_layers(x)[0][:, 1:]
        return network

    def make_dinov2(self, name: str) -> nn.Module:
        """Return a network of DINOv2 with random weights."""
        return getattr(self.dinov2, name)(pretrained=False)

    def make_file(self, name: str) -> Any:
        """Return random weights in the format of the published file of an encoder."""
        if name.startswith("mocov3"):
            size = {"s": "small", "b": "base", "l": "large"}[name[-1]]
            network = getattr(self.mocov3, f"vit_{size}")()
            network.patch_embed.img_size = (224, 224)  # that of the published weights
            network.build_2d_sincos_position_embedding()
            state = randomize(network.state_dict(), FIXED)
            if name == "mocov3-vit-l":
                state = {_use_published_name(key): value for key, value in state.items()}
            branches = {f"module.base_encoder.{key}": value for key, value in state.items()}
            branches |= {
                f"module.momentum_encoder.{key}": -branches[f"module.base_encoder.{key}"]
                for key in state
                if key.startswith("norm.")
            }
            branches["module.base_encoder.head.0.weight"] = torch.randn(4096, 768)
            branches["module.predictor.0.weight"] = torch.randn(4096, 256)
            return {"epoch": 300, "arch": f"vit_{size}", "state_dict": branches, "optimizer": {}}
        if name == "clip-vit-L":
            state = randomize(ClipImageNetwork(self.clip, depth=CLIP_DEPTH).state_dict())
            image = {f"visual.{key}": value.half() for key, value in state.items()}
            return make_script(image | {"text_projection": torch.randn(768, 768).half()})
        if name == "mae-vit-l":
            return {"model": randomize(self.mae.vit_large_patch16().state_dict())}
        if name == "jepa-vit-h":
            network = self.jepa.vit_huge(img_size=[224, 224], patch_size=14)
            state = randomize(network.state_dict(), FIXED)
            encoder = {f"module.{key}": value for key, value in state.items()}
            predictor = {"module.mask_token": torch.randn(1, 1, 384)}
            return {"encoder": encoder, "predictor": predictor, "epoch": 300, "opt": {}}
        if name == "dinov1-vit-b":
            return randomize(self.make_dino(side=224).state_dict())
        registers = "_reg" if "reg" in name else ""
        return randomize(self.make_dinov2(f"dinov2_vitb14{registers}").state_dict())

    @torch.no_grad()
    def encode(self, name: str, folder: Path, images: Tensor) -> Tensor:
        """Return the tokens of images (B, 3, R, R) uint8, with REPA's code.

        Args:
            name: REPA's name of the encoder.
            folder: Contains the folder `ckpts` of files.
            images: Images, (B, 3, R, R) uint8.
        """

        def load_from_hub(repository: str, network_name: str) -> nn.Module:
            network = self.make_dinov2(network_name)
            network.load_state_dict(torch.load(Path("ckpts", FILES[name][0])))
            return network

        with ExitStack() as stack:
            stack.enter_context(patch.dict(sys.modules, self.modules))
            stack.enter_context(patch.object(torch.hub, "load", load_from_hub))
            stack.enter_context(working_directory(folder))
            [encoder], [encoder_type], _ = self.load_encoders(name, "cpu", RESOLUTION)
        encoder.eval()
        tokens = encoder.forward_features(self.preprocess(images, encoder_type))
        # Select the patch tokens in the same way as the training loop of REPA.
        if "mocov3" in encoder_type:
            tokens = tokens[:, 1:]
        if "dinov2" in encoder_type:
            tokens = tokens["x_norm_patchtokens"]
        return tokens


def _use_published_name(key: str) -> str:
    """Return the wrong name that a parameter has in the published ViT-L checkpoint of MoCo v3."""
    for published, correct in MISNAMED_PARAMETERS.items():
        key = key.replace(correct, published)
    return key


@contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Change the working directory, because REPA's code reads ./ckpts."""
    previous = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(previous)


def compare_encoder(code: RepaCode, name: str, images: Tensor, depth: int) -> dict:
    """Write a file of random weights, and compare the tokens of both programs.

    Args:
        code: REPA's code.
        name: REPA's name of the encoder.
        images: Images, (B, 3, R, R) uint8.
        depth: Largest number of blocks.

    Returns:
        The numbers of blocks, the number of tokens and their dimension, and the largest difference
        relative to the largest value.
    """
    limit = DepthLimit(depth)
    with tempfile.TemporaryDirectory() as folder, code.limit_depth(limit):
        path = Path(folder, "ckpts", FILES[name][0])
        path.parent.mkdir()
        content = code.make_file(name)
        if isinstance(content, torch.jit.ScriptModule):
            content.save(str(path))
        else:
            torch.save(content, path)
        del content
        expected = code.encode(name, Path(folder), images)
        tokens_side = int(expected.shape[1] ** 0.5)
        tokens = Encoder(name, RESOLUTION, tokens_side, path)(images)
    if len(limit.requested) != 1:
        raise UserError(
            f"{name}: REPA's code and models/encoder.py request different numbers of blocks, "
            f"{sorted(limit.requested)}; use the published files of REPA"
        )
    difference = (tokens - expected).abs().max() / expected.abs().max()
    return {
        "file": REPA_ENCODERS[name].file,
        "blocks": min(depth, *limit.requested),
        "original_blocks": min(limit.requested),
        "tokens": list(tokens.shape[1:]),
        "relative_difference": float(difference),
    }


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, "repa_encoders")
    for name, repository in REPOSITORIES.items():
        parser.add_argument(
            f"--{name}-repository",
            type=Path,
            required=name == "repa",
            metavar="DIR",
            help=f"clone of github.com/{repository}",
        )
    parser.add_argument(
        "--encoders",
        nargs="+",
        choices=tuple(FILES),
        metavar="NAME",
        help=f"encoders to compare, out of {', '.join(FILES)} (default: those whose networks are "
        "in the clones)",
    )
    parser.add_argument(
        "--depth",
        type=cli.positive_int,
        default=1000,
        help="largest number of blocks (default: all blocks)",
    )
    return parser.parse_args()


def main() -> None:
    """Run the comparison."""
    args = parse_args()
    paths = {name: getattr(args, f"{name}_repository") for name in REPOSITORIES}
    clones = {name: path for name, path in paths.items() if path}
    names = args.encoders or [name for name, (_, source) in FILES.items() if source in clones]
    for name in names:
        _, source = FILES[name]
        if source not in clones:
            raise UserError(f"--encoders {name} needs --{source}-repository: pass both flags")
    torch.manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8)
    code = RepaCode(clones)
    encoders = {name: compare_encoder(code, name, images, args.depth) for name in names}
    result = {
        "benchmark": args.benchmark,
        "tolerance": TOLERANCE,
        "encoders": encoders,
        "machine": describe_machine(torch.device("cpu")),
    }
    write_result(result, args.json)
    different = [
        name for name, row in encoders.items() if not row["relative_difference"] <= TOLERANCE
    ]
    if different:
        raise UserError(f"the tokens of {', '.join(different)} differ by more than {TOLERANCE:g}")


if __name__ == "__main__":
    cli.run(main)
