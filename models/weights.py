"""Load timm networks by name, and hash weights.

timm is imported inside functions, because this takes a second and `--help` needs only names.
"""

import difflib
import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from common.lfs import describe_lfs_pointer
from models.errors import FieldError

TimmNetwork: TypeAlias = Any  # timm adds attributes and methods that nn.Module does not declare

_DINOV2_SIZES = ("small", "base", "large", "giant")
ENCODER_ALIASES = {
    f"dinov2-{size[0]}": f"vit_{size}_patch14_dinov2.lvd142m" for size in _DINOV2_SIZES
}
# REPA's encoder names -> timm names of the weights that REPA downloads.
REPA_ENCODERS = {
    **{f"dinov2-vit-{size[0]}": f"vit_{size}_patch14_dinov2.lvd142m" for size in _DINOV2_SIZES},
    **{
        f"dinov2reg-vit-{size[0]}": f"vit_{size}_patch14_reg4_dinov2.lvd142m"
        for size in _DINOV2_SIZES
    },
    "dinov1-vit-b": "vit_base_patch16_224.dino",
    "clip-vit-L": "vit_large_patch14_clip_quickgelu_224.openai",
    "mae-vit-l": "vit_large_patch16_224.mae",
    "jepa-vit-h": "vit_huge_patch14_gap_224.in1k_ijepa",
}


def timm_name(name: str, suggestions: Iterable[str] = ()) -> str:
    """Return the timm model name of an encoder.

    Args:
        name: A key of ENCODER_ALIASES or REPA_ENCODERS, or a timm model name.
        suggestions: Further names that the error for an unknown name may suggest.

    Raises:
        FieldError: If timm has no such model.
    """
    import timm

    if name.startswith("mocov3-"):
        raise FieldError(
            "encoder",
            f"{name}: timm has no MoCo v3 weights; choose one of {', '.join(REPA_ENCODERS)}",
        )
    full_name = ENCODER_ALIASES.get(name) or REPA_ENCODERS.get(name) or name
    architecture, _, tag = full_name.partition(".")
    is_known = timm.is_model(architecture) and (not tag or timm.is_model_pretrained(full_name))
    if is_known:
        return full_name
    known = [*ENCODER_ALIASES, *REPA_ENCODERS, *suggestions, *timm.list_models()]
    if tag:
        known += timm.list_models(f"{architecture}.*", pretrained=True)
    similar = difflib.get_close_matches(name, known) or [*ENCODER_ALIASES, *suggestions]
    raise FieldError("encoder", f"{name} is not a timm model; similar names: {', '.join(similar)}")


def load_network(name: str, weights: Path | None = None, pretrained: bool = True) -> TimmNetwork:
    """Load a timm network without the classifier, frozen and in eval mode.

    Args:
        name: Encoder name as in `timm_name`.
        weights: File with weights in timm's format. By default, timm downloads the weights.
        pretrained: Whether to load pretrained weights instead of random weights.

    Raises:
        FieldError: If the name is unknown or the weights cannot be loaded.
    """
    import timm

    architecture = timm_name(name)
    if weights and not weights.exists():
        raise FieldError("weights", f"{weights} does not exist")
    overlay = {"file": str(weights)} if weights else None
    try:
        with _require_all_weights(), _silence_hub_retries():
            network = timm.create_model(
                architecture, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay
            )
    except Exception as error:  # raised by the hub client, safetensors, torch or timm
        if weights:
            if problem := describe_lfs_pointer(weights):
                raise FieldError("weights", problem) from None
            reason = " ".join(str(error).split())[:160]
            raise FieldError(
                "weights", f"{weights} does not fit {architecture} ({reason})"
            ) from None
        config = timm.get_pretrained_cfg(architecture)
        hub_id = (config and config.hf_hub_id) or architecture
        if "/" not in hub_id:
            hub_id = f"timm/{hub_id}"
        raise FieldError(
            "encoder",
            f"{name}: timm cannot load {architecture} ({format_exception(error)}): with "
            f"network access, run 'hf download {hub_id} model.safetensors', then pass the path "
            "that it prints as the weights file",
        ) from None
    return network.eval().requires_grad_(False)


@contextmanager
def _silence_hub_retries() -> Iterator[None]:
    """Suppress the hub client's messages about retries, because the final error is reported."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _require_all_weights() -> Iterator[None]:
    """Raise ValueError on exit if a network was loaded in this context without all weights.

    timm loads files with `strict=False` if the network has no classifier, and leaves missing
    weights at their random values. Load hooks on the submodules collect the missing keys.
    """
    missing: list[str] = []
    hooks = ExitStack()

    def collect_missing_keys(module: nn.Module, keys: Any) -> None:
        missing.extend(keys.missing_keys)

    def add_load_hook(parent: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if submodule is not None:
            hook = submodule.register_load_state_dict_post_hook(collect_missing_keys)
            hooks.enter_context(hook)

    with hooks:
        hooks.enter_context(register_module_module_registration_hook(add_load_hook))
        yield
    if missing:
        raise ValueError(f"the file belongs to another network: {missing[0]} is missing")


def weights_fingerprint(network: nn.Module, settings: str = "") -> str:
    """Return the sha256 of `settings` and all weights (names, shapes, float32 values)."""
    digest = hashlib.sha256(settings.encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().float().numpy())
    return digest.hexdigest()


def format_exception(error: Exception) -> str:
    """Return the class of an exception and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
