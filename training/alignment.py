"""Plan, load and apply the alignment methods of a run."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from common.cli import UserError, format_value
from common.config import to_plain
from interpolant import INTERPOLANTS, interpolate
from latents.manifest import Manifest
from loss import alignment_loss, cosine_distance, standardize_tokens
from models.aligned_sit import AlignedOutput, AlignedSiT
from models.autoencoder import LatentScale
from models.errors import FieldError
from models.flops import backbone_flops, head_flops
from models.projector import HEADS, make_head
from models.sit import SiT, SiTConfig
from models.target import CacheInfo, FrozenNetwork, RunContext, Target, TrainingInputs
from models.targets import TARGETS
from training.alignment_config import AlignmentConfig, method_flags

T = TypeVar("T")

# Fields of AlignmentConfig that are recorded in the "align" entries of config.json.
RECORDED_FIELDS = ("method", "block", "weight", "loss", "beta", "t_range", "stop_step")
# Fields that are recorded only if the target is standardized, because older versions lack them.
NORM_FIELDS = ("target_norm", "zscore_alpha")


class AlignmentTerms(NamedTuple):
    """Loss and diagnostics of one alignment method for each sample."""

    loss: Tensor  # (B,), zero outside the timestep range
    cosine: Tensor  # (B,), cosine similarity of projected and target tokens; no gradient
    token_norm: Tensor  # (B,), mean norm of the aligned block's tokens; no gradient

    @classmethod
    def zeros_like(cls, loss: Tensor) -> "AlignmentTerms":
        """Return the terms of a method that is not active."""
        return cls(*(torch.zeros_like(loss) for _ in cls._fields))


@dataclass
class Alignment:
    """One alignment method of a run: its settings, its target and its loss.

    Args:
        config: Settings of the method.
        target: The target.
        head_names: Names of the method's heads in the `AlignedSiT`.
    """

    config: AlignmentConfig
    target: Target
    head_names: list[str]

    def is_active(self, step: int) -> bool:
        """Return whether the method is still applied after `step` completed updates."""
        return not self.config.stop_step or step < self.config.stop_step

    @torch.no_grad()
    def compute_targets(
        self, inputs: TrainingInputs, student_tokens: dict[int, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the target tokens by head; the output of the head is compared with them.

        Args:
            inputs: A micro-batch.
            student_tokens: Tokens of the student's blocks; required if the target uses them.
        """
        target = self.target(inputs, student_tokens or {})
        targets = target if isinstance(target, dict) else {"": target}
        if self.config.target_norm == "zscore":
            targets = {
                name: standardize_tokens(tokens, self.config.zscore_alpha)
                for name, tokens in targets.items()
            }
        return _name_heads(self.config.method, targets)

    def compute_terms(
        self, output: AlignedOutput, targets: dict[str, Tensor], t: Tensor
    ) -> AlignmentTerms:
        """Compare projected tokens with targets; with several targets, average over them.

        Args:
            output: Output of the network.
            targets: Target tokens from `compute_targets`.
            t: Timesteps (B,).
        """
        config = self.config
        losses = []
        cosines = []
        for head, target in targets.items():
            projected = output.projected[head]
            losses.append(
                alignment_loss(projected, target, t, config.loss, config.beta, config.t_range)
            )
            cosines.append(1 - cosine_distance(projected.detach(), target))
        token_norm = output.token_norm[self.head_names[0]]  # all heads read the same block
        return AlignmentTerms(torch.stack(losses).mean(0), torch.stack(cosines).mean(0), token_norm)


def make_cache_info(manifest: Manifest, features: dict[str, dict] | None = None) -> CacheInfo:
    """Return the properties of a cache that methods may depend on.

    Args:
        manifest: Manifest of the cache.
        features: Encoder features that the cache stores: folder -> contents of features.json.
    """
    return CacheInfo(
        manifest.resolution,
        LatentScale(manifest.scale, manifest.shift),
        manifest.mean,
        manifest.std,
        manifest.images,
        features or {},
    )


def plan_alignments(
    alignments: tuple[AlignmentConfig, ...], network: SiTConfig, cache: CacheInfo
) -> list[dict]:
    """Return the "align" list of config.json, with one entry per method.

    Raises:
        UserError: A setting does not fit the network or the cache.
    """
    entries = []
    for config in alignments:
        if config.target_norm == "zscore" and network.grid_size == 1:
            raise UserError(
                "--target-norm zscore needs several tokens per image, but the patch of this model "
                "is the whole latent: remove the flag, or choose a --model with smaller patches"
            )
        with _convert_field_errors(config.method):
            plan = TARGETS[config.method].plan(config.settings, network, cache)
        norm_fields = NORM_FIELDS if config.target_norm != "none" else ()
        recorded = (*RECORDED_FIELDS, *norm_fields)
        entry: dict[str, Any] = {key: to_plain(getattr(config, key)) for key in recorded}
        if isinstance(plan.token_dim, dict):
            entry["heads"] = {
                name: _head_spec(config, network.width, token_dim)
                for name, token_dim in plan.token_dim.items()
            }
        else:
            entry["head"] = _head_spec(config, network.width, plan.token_dim)
        entries.append(entry | (plan.record or {}))
    return entries


def _head_spec(config: AlignmentConfig, width: int, output_dim: int) -> dict | None:
    """Return the entry of a head in config.json; None if there is no head.

    Raises:
        UserError: The target requires a head.
    """
    kind = config.projector_type
    if kind == "none":
        if output_dim != width:
            raise UserError(
                f"--projector-type none: the target tokens of {config.method} have {output_dim} "
                f"channels and those of the blocks {width}; choose another head"
            )
        return None
    values = {
        "layers": config.projector_layers,
        "hidden": config.projector_width,
        "kernel_size": config.projector_kernel,
    }
    options = {name: values[name] for name in HEADS[kind].options}
    spec = {"width": width, "out": output_dim, **options}
    return spec if kind == "mlp" else {"kind": kind, **spec}


def head_specs(entry: dict) -> dict[str, dict | None]:
    """Return the head specifications of a method, keyed by head name."""
    heads = entry["heads"] if "heads" in entry else {"": entry["head"]}
    return _name_heads(entry["method"], heads)


def _name_heads(method: str, values: dict[str, T]) -> dict[str, T]:
    """Replace each target name by the name of its head; a single target is named ""."""
    return {f"{method}-{name}" if name else method: value for name, value in values.items()}


def build_aligned_network(backbone: SiT, entries: list[dict]) -> AlignedSiT:
    """Wrap a backbone with the heads that the "align" list of config.json describes."""
    heads: dict[str, nn.Module] = {}
    blocks = {}
    for entry in entries:
        for name, spec in head_specs(entry).items():
            heads[name] = make_head(spec)
            blocks[name] = entry["block"]
            # A head with weight 0 must not change the summation order of the clipping norm.
            heads[name].requires_grad_(entry["weight"] > 0)
    return AlignedSiT(backbone, heads, blocks)


def restore_settings(
    alignments: tuple[AlignmentConfig, ...], stored: list[dict]
) -> tuple[AlignmentConfig, ...]:
    """Return the settings of a resumed run. Unset values are replaced with the recorded values.

    Args:
        alignments: Settings from the current flags.
        stored: The "align" list in the checkpoint's config.json.

    Raises:
        UserError: A setting is invalid.
    """
    entries = {entry["method"]: entry for entry in stored}
    restored = []
    for config in alignments:
        if config.method in entries:
            target = TARGETS[config.method]
            with _convert_field_errors(config.method):
                values = target.restore(config.settings, entries[config.method])
            config = replace(config, settings=values)
        restored.append(config)
    return tuple(restored)


def make_run_context(
    ema: SiT,
    path_type: str,
    autocast: Callable[[], AbstractContextManager],
    load_network: Callable[[Path, bool], FrozenNetwork],
    compile: bool = False,
) -> RunContext:
    """Return the parts of a run that a target may use.

    Args:
        ema: The first EMA of the run, on the training device.
        path_type: Name of the interpolant.
        autocast: Context manager of the run's mixed precision.
        load_network: Loads a frozen network (see `RunContext`).
        compile: Whether targets compile their networks.
    """
    path = INTERPOLANTS[path_type]

    def add_noise(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(path, latents, noise, t)[0]

    if compile and not isinstance(ema, FSDPModule):  # a sharded EMA has compiled blocks
        ema = copy_with_compiled_blocks(ema)
    return RunContext(ema.pos_embed.device, ema, add_noise, autocast, compile, load_network)


def copy_with_compiled_blocks(network: SiT) -> SiT:
    """Return a network with compiled blocks that shares all tensors with `network`.

    The blocks of the EMA itself are not compiled, because previews and evaluations use other batch
    sizes.
    """
    tensors = (*network.parameters(), *network.buffers())
    compiled = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    compiled.compile_blocks()
    return compiled


def load_alignments(
    alignments: tuple[AlignmentConfig, ...],
    entries: list[dict],
    cache: CacheInfo,
    context: RunContext,
) -> dict[str, Alignment]:
    """Load the target of each method and add its identity to the method's entry.

    Methods with weight 0 are not returned, so that nothing is computed for them.

    Args:
        alignments: Settings of the methods.
        entries: The "align" list of config.json, from `plan_alignments`.
        cache: Properties of the latent cache.
        context: Parts of the run that the targets may use.

    Raises:
        UserError: A network or file that a setting names cannot be loaded.
    """
    network = context.ema.config
    loaded_alignments = {}
    for config, entry in zip(alignments, entries, strict=True):
        with _convert_field_errors(config.method):
            target = TARGETS[config.method](entry, config.settings, network, cache, context)
        if config.block in target.student_blocks:
            raise UserError(
                f"--align-depth {config.block}: --align {config.method} uses this block as its "
                "target; choose another block"
            )
        entry |= target.identity
        if config.weight:
            loaded_alignments[config.method] = Alignment(config, target, list(head_specs(entry)))
    return loaded_alignments


def required_cache_inputs(alignments: dict[str, Alignment]) -> list[str]:
    """Return the inputs that the methods read from the cache besides latents and labels."""
    return sorted({name for a in alignments.values() for name in a.target.cache_inputs})


def describe_alignment(entry: dict, model: AlignedSiT, cache: CacheInfo) -> str:
    """Return one line about a method: its settings and its cost relative to the backbone.

    Args:
        entry: The method's entry in config.json.
        model: The network.
        cache: Properties of the latent cache.
    """
    config = model.backbone.config
    line = f"{entry['method']}: {_describe_settings(entry)}"
    if not entry["weight"]:
        return f"{line}; not computed"
    flops = backbone_flops(config)
    specs = head_specs(entry)
    num_head_parameters = sum(p.numel() for name in specs for p in model.heads[name].parameters())
    if num_head_parameters:
        size_ratio = num_head_parameters / sum(p.numel() for p in model.backbone.parameters())
        flop_ratio = sum(head_flops(config, spec) for spec in specs.values()) / flops
        line += (
            f"; head: {format_count(num_head_parameters)} parameters (+{size_ratio:.1%}), "
            f"+{flop_ratio:.1%} FLOPs forward and backward"
        )
    else:
        line += "; no head"
    cost = TARGETS[entry["method"]].cost(entry, config, cache)
    if cost.flops:
        line += (
            f"; target: {format_count(cost.parameters)} parameters, "
            f"+{cost.flops / flops:.1%} FLOPs forward"
        )
    return line


def _describe_settings(entry: dict) -> str:
    """Describe the settings of a method in config.json: target, block, loss and weight."""
    method_settings = "".join(
        f"{key.replace('_', ' ')} {format_value(value)}, "
        for key, value in entry.items()
        if key not in (*RECORDED_FIELDS, "head", "heads", "fingerprint", "ema_sha256")
    )
    weight = f"weight {entry['weight']:g}"
    if entry["stop_step"]:
        weight += f" until step {entry['stop_step']:,}"
    if entry["t_range"] != [0, 1]:
        low, high = entry["t_range"]
        weight += f" for t from {low:g} to {high:g}"
    return f"{method_settings}block {entry['block']}, {entry['loss']}, {weight}"


def format_count(num_parameters: int) -> str:
    """Format a number of parameters in millions, or in thousands if below 100,000."""
    if 0 < num_parameters < 100_000:
        return f"{num_parameters / 1e3:.0f}K"
    return f"{num_parameters / 1e6:.1f}M"


@contextmanager
def _convert_field_errors(method: str) -> Iterator[None]:
    """Turn a FieldError about a setting of the method into a UserError that names its flag."""
    try:
        yield
    except FieldError as error:
        flag = f"--align {method}"
        if error.field != "method":
            flag = method_flags(method, error.field)[0]
        raise UserError(f"{flag} {error.reason}") from None
