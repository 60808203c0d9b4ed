"""The image encoders that REPA supports, and the files in which their authors publish the weights.

REPA's names are keys of `REPA_ENCODERS`. timm reads most of these files. This module converts the
other two kinds: the checkpoints of MoCo v3, and OpenAI's TorchScript archives of CLIP. No code in a
file of weights is executed: timm reads files with `weights_only`, and a TorchScript archive, whose
program is loaded but not run, is accepted only for CLIP.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Letter of the size in REPA's names and in the names of DINOv2's files -> size in timm's names.
_DINOV2_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}


@dataclass(frozen=True)
class RepaEncoder:
    """An encoder of REPA and its published file of weights."""

    timm_name: str
    file: str  # name of the published file of weights
    project: str  # URL of the repository that links the file
    has_final_norm: bool = True  # whether REPA applies the final layer norm to the tokens
    in_timm: bool = True  # whether timm downloads these weights
    arguments: dict[str, Any] = field(default_factory=dict)  # arguments of timm's network
    # Entries of timm's `pretrained_cfg` to replace.
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    # Function that reads the file as a state dict for timm to convert. By default, timm reads the
    # file.
    read: Callable[[Path], dict[str, Tensor]] | None = None

    @property
    def source(self) -> str:
        """The published file and where to find it."""
        return f"{self.file} ({self.project})"

    @property
    def differs_from_timm(self) -> bool:
        """Whether the tokens differ from those of the timm network with the name `timm_name`."""
        return not (self.has_final_norm and self.in_timm)


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def read_clip(path: Path) -> dict[str, Tensor]:
    """Return the weights of the image network in OpenAI's archive of CLIP."""
    if not is_torchscript(path):
        return _read_with_timm(path)
    state = torch.jit.load(path, map_location="cpu").state_dict()
    return {key: value for key, value in state.items() if key.startswith("visual.")}


# Wrong name of a parameter in the published ViT-L checkpoint of MoCo v3 -> correct name.
MISNAMED_PARAMETERS = {
    "blocks.13.norm13.": "blocks.13.norm1.",
    "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
    "blocks.14.norm14.": "blocks.14.norm2.",
    "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
}


def read_mocov3(path: Path) -> dict[str, Tensor]:
    """Return the weights of the base encoder in a checkpoint of MoCo v3, without its head.

    Like REPA, this selects the base encoder and not its moving average (`momentum_encoder`). The
    weights include the fixed position embedding. Other files are returned as timm reads them.
    """
    state = _read_with_timm(path)
    prefix = "base_encoder."
    encoder = {}
    for key, value in state.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        for published, correct in MISNAMED_PARAMETERS.items():
            name = name.replace(published, correct)
        if not name.startswith(("head.", "fc.")):
            encoder[name] = value
    return encoder or state


def _read_with_timm(path: Path) -> dict[str, Any]:
    """Return the state dict of a file, without the prefix of DistributedDataParallel."""
    import timm

    return timm.models.load_state_dict(str(path))


def _make_dinov2(size: str, suffix: str = "") -> RepaEncoder:
    return RepaEncoder(
        f"vit_{_DINOV2_SIZES[size]}_patch14{suffix}_dinov2.lvd142m",
        f"dinov2_vit{size}14{suffix}_pretrain.pth",
        "https://github.com/facebookresearch/dinov2",
    )


def _make_mocov3(size: str, file: str, project: str, num_heads: int) -> RepaEncoder:
    return RepaEncoder(
        f"vit_{size}_patch16_224",
        file,
        project,
        in_timm=False,
        arguments={"num_heads": num_heads},
        pretrained_cfg={"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        read=read_mocov3,
    )


_MOCO = "https://github.com/facebookresearch/moco-v3"
_RCG = "https://github.com/LTH14/rcg"
REPA_ENCODERS: dict[str, RepaEncoder] = {
    **{f"dinov2-vit-{size}": _make_dinov2(size) for size in _DINOV2_SIZES},
    **{f"dinov2reg-vit-{size}": _make_dinov2(size, "_reg4") for size in _DINOV2_SIZES},
    "dinov1-vit-b": RepaEncoder(
        "vit_base_patch16_224.dino",
        "dino_vitbase16_pretrain.pth",
        "https://github.com/facebookresearch/dino",
    ),
    # The small network of MoCo v3 has more heads than other networks of this size.
    "mocov3-vit-s": _make_mocov3("small", "vit-s-300ep.pth.tar", _MOCO, num_heads=12),
    "mocov3-vit-b": _make_mocov3("base", "vit-b-300ep.pth.tar", _MOCO, num_heads=12),
    "mocov3-vit-l": _make_mocov3("large", "vitl.pth.tar", _RCG, num_heads=16),
    "clip-vit-L": RepaEncoder(
        "vit_large_patch14_clip_quickgelu_224.openai",
        "ViT-L-14.pt",
        "https://github.com/openai/CLIP",
        has_final_norm=False,
        read=read_clip,
    ),
    "mae-vit-l": RepaEncoder(
        "vit_large_patch16_224.mae",
        "mae_pretrain_vit_large.pth",
        "https://github.com/facebookresearch/mae",
        has_final_norm=False,
    ),
    "jepa-vit-h": RepaEncoder(
        "vit_huge_patch14_gap_224.in1k_ijepa",
        "IN1K-vit.h.14-300e.pth.tar",
        "https://github.com/facebookresearch/ijepa",
    ),
}
ENCODER_ALIASES = {
    f"dinov2-{size}": REPA_ENCODERS[f"dinov2-vit-{size}"].timm_name for size in _DINOV2_SIZES
}
