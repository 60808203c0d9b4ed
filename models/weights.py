"""Load timm networks by name, and hash weights.

timm is imported inside functions, because the import takes a second and `--help` needs only names.
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
from models.repa_encoders import ENCODER_ALIASES, REPA_ENCODERS, is_torchscript, read_clip

TimmNetwork: TypeAlias = Any  # timm adds attributes and methods that nn.Module does not declare


def timm_name(name: str, suggestions: Iterable[str] = ()) -> str:
    """Return the timm model name of an encoder.

    Args:
        name: A key of ENCODER_ALIASES or REPA_ENCODERS, or a timm model name.
        suggestions: Further names that the error for an unknown name may suggest.

    Raises:
        FieldError: If timm has no such model.
    """
    import timm

    if name in REPA_ENCODERS:
        full_name = REPA_ENCODERS[name].timm_name
    else:
        full_name = ENCODER_ALIASES.get(name, name)
    architecture, _, tag = full_name.partition(".")
    is_known = timm.is_model(architecture) and (not tag or timm.is_model_pretrained(full_name))
    if is_known:
        return full_name
    known = [*ENCODER_ALIASES, *REPA_ENCODERS, *suggestions, *timm.list_models()]
    if tag:
        known += timm.list_models(f"{architecture}.*", pretrained=True)
    similar = difflib.get_close_matches(name, known) or [*ENCODER_ALIASES, *suggestions]
    raise FieldError("encoder", f"{name} is not a timm model; similar names: {', '.join(similar)}")


def create_network(
    name: str, pretrained: bool = False, overlay: dict[str, Any] | None = None
) -> TimmNetwork:
    """Create a timm network without the classifier.

    Args:
        name: Encoder name as in `timm_name`.
        pretrained: Whether to load pretrained weights instead of random weights.
        overlay: Entries of timm's `pretrained_cfg` to replace, such as the file of weights.
    """
    import timm

    encoder = REPA_ENCODERS.get(name)
    arguments = encoder.arguments if encoder else {}
    pretrained_cfg = (encoder.pretrained_cfg if encoder else {}) | (overlay or {})
    return timm.create_model(
        timm_name(name),
        pretrained=pretrained,
        num_classes=0,
        pretrained_cfg_overlay=pretrained_cfg or None,
        **arguments,
    )


def load_network(name: str, weights: Path | None = None, pretrained: bool = True) -> TimmNetwork:
    """Load a timm network without the classifier, frozen and in eval mode.

    Args:
        name: Encoder name as in `timm_name`.
        weights: File with weights in timm's format, or the published file of an encoder of REPA.
            By default, timm downloads the weights.
        pretrained: Whether to load pretrained weights instead of random weights.

    Raises:
        FieldError: If the name is unknown or the weights cannot be loaded.
    """
    architecture = timm_name(name)
    encoder = REPA_ENCODERS.get(name)
    if weights:
        _check_file(weights, name)
    elif pretrained and encoder and not encoder.in_timm:
        raise FieldError(
            "encoder",
            f"{name} cannot be downloaded by timm: download {encoder.source}, then pass its path "
            "as --encoder-weights",
        )
    try:
        overlay: dict[str, Any] = {}
        if weights and encoder and encoder.read:
            overlay["state_dict"] = encoder.read(weights)
        elif weights:
            overlay["file"] = str(weights)
        with _require_all_weights(), _silence_hub_retries():
            network = create_network(name, pretrained, overlay)
    except Exception as error:  # raised by the hub client, safetensors, torch or timm
        if weights:
            if problem := describe_lfs_pointer(weights):
                raise FieldError("weights", problem) from None
            reason = " ".join(str(error).split())[:160]
            hint = f"; {name} is published as {encoder.source}" if encoder else ""
            raise FieldError(
                "weights", f"{weights} does not fit {architecture} ({reason}){hint}"
            ) from None
        raise FieldError(
            "encoder",
            f"{name}: timm cannot load {architecture} ({format_exception(error)}): with "
            f"network access, {_describe_download(name)} as --encoder-weights",
        ) from None
    network.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    return network.eval().requires_grad_(False)


def _check_file(weights: Path, name: str) -> None:
    """Raise FieldError unless the file exists and has a format that the encoder may read."""
    if not weights.exists():
        raise FieldError("weights", f"{weights} does not exist")
    encoder = REPA_ENCODERS.get(name)
    if is_torchscript(weights) and not (encoder and encoder.read is read_clip):
        raise FieldError(
            "weights",
            f"{weights} is a TorchScript archive, which only the encoder clip-vit-L reads; pass a "
            f"file of weights for {name}",
        )


def _describe_download(name: str) -> str:
    """Return the instruction to download the weights of a network, for an error message."""
    import timm

    config = timm.get_pretrained_cfg(timm_name(name))
    hub_id = config and config.hf_hub_id
    encoder = REPA_ENCODERS.get(name)
    if encoder and not hub_id:
        return f"download {encoder.source}, then pass its path"
    hub_id = hub_id or timm_name(name)
    if "/" not in hub_id:
        hub_id = f"timm/{hub_id}"
    return f"run 'hf download {hub_id} model.safetensors', then pass the path that it prints"


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
