"""The losses of alignment methods, computed by the code of their authors.

Each class builds the network and combines the losses as the authors' train.py does.
Shapes: B batch, N tokens, D width.
"""

import contextlib
import io
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.rival_reference import (
    AuthorsMethod,
    Case,
    get_alignment,
    make_dropout_draws,
)
from models.sit import SiT, SiTConfig
from models.target import TrainingInputs
from train import Step
from training.alignment import Alignment, head_specs

# Folder of stored encoder features -> the encoder.
STORED_ENCODERS = {"features/dinov2_b": "dinov2-b", "features/dinov2_s": "dinov2-s"}


def describe_architecture(config: SiTConfig) -> dict[str, int]:
    """Return the arguments that all networks of the authors have in common."""
    return {
        "input_size": config.latent_size,
        "patch_size": config.patch,
        "in_channels": config.channels,
        "hidden_size": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "num_classes": config.num_classes,
    }


def describe_repa_architecture(config: SiTConfig) -> dict[str, int | bool]:
    """Return the arguments that networks derived from REPA's have in common."""
    return {
        **describe_architecture(config),
        "decoder_hidden_size": config.width,
        "use_cfg": True,
        "fused_attn": True,
        "qk_norm": False,
    }


def list_token_widths(alignment: Alignment) -> list[int]:
    """Return the widths of the tokens of REPA's encoders."""
    return [spec["out"] for spec in head_specs(alignment.target.record).values() if spec]


def get_encoder_tokens(case: Case) -> list[Tensor]:
    """Return the stored tokens of REPA's encoders."""
    return [case.inputs.cache_inputs[name].float() for name in case.alignment.target.cache_inputs]


class REPA(AuthorsMethod):
    """REPA (arXiv:2410.06940), with random tensors in place of the encoder's tokens."""

    title = "REPA"
    repository = "repa"
    files = "loss.py models/sit.py"
    flags = "--align repa"
    weight = 0.5

    def load(self) -> None:
        self.networks = self.import_file("models/sit.py")
        self.loss = self.import_file("loss.py").SILoss()

    def build_network(self, network: SiTConfig, alignment: Alignment) -> nn.Module:
        return self.networks.SiT(
            **describe_repa_architecture(network),
            encoder_depth=alignment.config.block,
            z_dims=list_token_widths(alignment),
        )

    def call_loss(self, case: Case) -> tuple[Tensor, Tensor]:
        inputs = case.inputs
        tokens = get_encoder_tokens(case)
        return self.loss(case.network, inputs.latents, {"y": inputs.classes}, zs=tokens)


class REPATwoEncoders(REPA):
    """REPA with two encoders, whose losses are averaged."""

    title = "REPA, two encoders"
    flags = "--align repa --repa-encoder dinov2-b,dinov2-s"
    head_prefixes: ClassVar[dict[str, str]] = {
        "projectors.0.": "heads.repa-0.",
        "projectors.1.": "heads.repa-1.",
    }


IREPA_FLAGS = (
    "--align repa --align-weight 1 --target-norm zscore --zscore-alpha 0.6 --projector-type conv "
    "--projector-kernel"
)


class IREPA(REPA):
    """iREPA (arXiv:2512.10794) with a 3 x 3 convolution, as in its README."""

    title = "iREPA, kernel 3"
    repository = "irepa"
    files = "ldm/loss.py ldm/models/sit.py ldm/projection_loss.py ldm/utils.py"
    kernel = 3
    flags = f"{IREPA_FLAGS} 3"
    weight = 1.0  # proj_coeff in ldm/configs/irepa.yaml
    zscore_alpha = 0.6  # default of --zscore-alpha in ldm/train.py
    head_prefixes: ClassVar[dict[str, str]] = {
        "projectors.0.projection_layer.": "heads.repa.conv.",
    }

    def load(self) -> None:
        projection_loss = self.import_file("ldm/projection_loss.py")
        self.networks = self.import_file("ldm/models/sit.py")
        self.normalization = self.import_file("ldm/utils.py").SpatialNormalization("zscore")
        loss = self.import_file("ldm/loss.py", imports={"projection_loss": projection_loss})
        self.loss = loss.SILoss(proj_coeff=str(self.weight))

    def build_network(self, network: SiTConfig, alignment: Alignment) -> nn.Module:
        return self.networks.SiT(
            **describe_repa_architecture(network),
            encoder_depth=alignment.config.block,
            z_dims=list_token_widths(alignment),
            projection_layer_type="conv",
            proj_kwargs_kernel_size=self.kernel,
        )

    def call_loss(self, case: Case) -> tuple[Tensor, Tensor]:
        inputs = case.inputs
        tokens = [
            self.normalization(tokens, zscore_alpha=self.zscore_alpha)
            for tokens in get_encoder_tokens(case)
        ]
        denoising, projection, _ = self.loss(
            case.network, inputs.latents, {"y": inputs.classes}, zs=tokens
        )
        return denoising, projection / self.weight


class IREPAKernel1(IREPA):
    """iREPA with a 1 x 1 convolution, which its configuration file selects."""

    title = "iREPA, kernel 1"
    kernel = 1
    flags = f"{IREPA_FLAGS} 1"


class HASTE(REPA):
    """The alignment of features in HASTE (arXiv:2505.16792), without that of attention maps."""

    title = "HASTE, features only"
    repository = "haste"
    flags = "--align repa --align-depth 8"  # loss.py requires at least 8
    latent_size = 32  # the loss requires 256 tokens

    def call_loss(self, case: Case) -> tuple[Tensor, Tensor]:
        inputs = case.inputs
        tokens = get_encoder_tokens(case)
        batch_size, num_tokens, _ = tokens[0].shape
        attention = torch.zeros(1).expand(batch_size, 12, num_tokens, num_tokens)
        # The loss prints an empty line, which is discarded.
        with contextlib.redirect_stdout(io.StringIO()):
            denoising, _, projection = self.loss(
                case.network,
                inputs.latents,
                {"y": inputs.classes},
                zs=[[attention] * 12],
                proj_s=tokens,
            )
        return denoising, projection


class LayerSync(AuthorsMethod):
    """LayerSync (arXiv:2510.12581)."""

    title = "LayerSync"
    repository = "layersync"
    files = (
        "models.py transport/__init__.py transport/path.py transport/transport.py "
        "transport/utils.py"
    )
    flags = "--align layersync"
    weight = 0.2  # --reg-weight in the README
    origin = "sit"
    head_prefixes: ClassVar[dict[str, str]] = {}

    def load(self) -> None:
        self.networks = self.import_file("models.py")
        # The package's solvers, which only sampling uses, import torchdiffeq.
        transport = self.import_file("transport/__init__.py", unavailable=["torchdiffeq"])
        self.transport = transport.create_transport("Linear", "velocity")

    def build_network(self, network: SiTConfig, alignment: Alignment) -> nn.Module:
        return self.networks.SiT(
            **describe_architecture(network),
            encoder_depth=alignment.config.block,
            gt_encoder_depth=alignment.target.record["target_block"],
        )

    def make_draws(self, inputs: TrainingInputs) -> dict[str, list[Tensor]]:
        draws = super().make_draws(inputs)
        # In the authors' code, t = 1 is data.
        return draws | {"rand": [1 - inputs.t, make_dropout_draws(inputs)]}

    def call_loss(self, case: Case) -> tuple[Tensor, Tensor]:
        inputs = case.inputs
        terms = self.transport.training_losses(
            case.network, inputs.latents, {"y": inputs.classes}, loss_type="layer_sync"
        )
        return terms["loss"], terms["reg"]


class SRA(AuthorsMethod):
    """SRA (arXiv:2505.02831) with the smooth L1 loss, which the paper uses."""

    title = "SRA, smooth L1"
    repository = "sra"
    files = "SiT-SRA/loss.py SiT-SRA/models/sit.py"
    flags = "--align sra --align-loss smooth_l1"
    loss_type = "sml1"
    weight = 0.2  # until epoch 149; SiT-SRA/train.py decreases it from then on
    offset = 0.0
    origin = "sra"
    head_prefixes: ClassVar[dict[str, str]] = {
        "ap_head.linear1.": "heads.sra.0.",
        "ap_head.linear2.": "heads.sra.2.",
    }

    def load(self) -> None:
        self.networks = self.import_file("SiT-SRA/models/sit.py")
        self.losses = self.import_file("SiT-SRA/loss.py")

    def build_network(self, network: SiTConfig, alignment: Alignment) -> nn.Module:
        return self.networks.SiT(**describe_repa_architecture(network))

    def find_teacher(self, step: Step) -> SiT | None:
        return step.state.emas[0]

    def make_draws(self, inputs: TrainingInputs) -> dict[str, list[Tensor]]:
        draws = super().make_draws(inputs)
        return draws | {"rand_like": [inputs.target_uniform[:, None, None, None]]}

    def call_loss(self, case: Case) -> tuple[Tensor, Tensor]:
        return self.call_with_criterion(case, self.losses.Simpleloss())

    def call_with_criterion(self, case: Case, criterion: nn.Module) -> tuple[Tensor, Tensor]:
        """Call the authors' loss with a module that compares the tokens of the networks."""
        record = case.alignment.target.record
        loss = self.losses.SRALoss(
            block_out_s=case.alignment.config.block,
            block_out_t=record["teacher_block"],
            t_max=record["t_max"],
            loss_type=self.loss_type,
        )
        loss.criterion = criterion
        return loss(case.network, case.inputs.latents, case.teacher, case.inputs.classes)


class TransposedTokens(nn.Module):
    """Calls SRA's criterion with tokens of shape (B, D, N) instead of (B, N, D)."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, student: Tensor, teacher: Tensor, loss_type: str) -> Tensor:
        """Compare tokens."""
        return self.criterion(student.mT, teacher.mT, loss_type=loss_type)


class SRACosine(SRA):
    """SRA with the cosine loss, which its repository recommends, on transposed tokens.

    The authors call F.cosine_similarity without `dim`, so their loss compares the tokens of an
    image channel by channel. With transposed tokens, the same line compares the channels of each
    token, as ours does.
    """

    title = "SRA, cosine"
    flags = "--align sra"
    loss_type = "cos"
    weight = 0.5

    def call_loss(self, case: Case) -> tuple[Tensor, Tensor]:
        return self.call_with_criterion(case, TransposedTokens(self.losses.Simpleloss()))

    def measure_differences(self, case: Case) -> dict[str, float]:
        _, distance = self.replay(super().call_loss, case)
        return {"alignment loss of the authors' line without transposition": distance.item()}


class SelfTranscendence(AuthorsMethod):
    """The second stage of Self-Transcendence (arXiv:2601.07773), for all timesteps."""

    title = "Self-Transcendence, stage 2"
    repository = "selftrans"
    files = "loss.py models/sit_selftrans_model.py"
    flags = "--align selftrans --selftrans-checkpoint . --align-t-range 0 1"
    weight = 0.5
    offset = 0.0
    guidance = 30.0  # --cfg_guide in train_selftrans.sh
    head_prefixes: ClassVar[dict[str, str]] = {"projectors.": "heads.selftrans."}

    def load(self) -> None:
        self.networks = self.import_file("models/sit_selftrans_model.py")
        self.loss = self.import_file("loss.py").selftrans_Loss()

    def build_network(self, network: SiTConfig, alignment: Alignment) -> nn.Module:
        return self.networks.SiT(**describe_repa_architecture(network))

    def find_teacher(self, step: Step) -> SiT | None:
        return get_alignment(step).target.frozen_network  # type: ignore[attr-defined]

    def call_loss(self, case: Case) -> tuple[Tensor, Tensor]:
        return self.call_with_range(case, None)

    def call_with_range(
        self, case: Case, t_range: tuple[float, float] | None
    ) -> tuple[Tensor, Tensor]:
        """Call the authors' loss with a range of timesteps."""
        inputs = case.inputs
        return self.loss(
            case.teacher,
            case.network,
            inputs.latents,
            t_range,
            inputs.classes,
            case.alignment.target.record["teacher_block"],
            case.alignment.config.block,
            self.guidance,
            {"y": inputs.classes},
        )


class SelfTranscendenceInRange(SelfTranscendence):
    """The second stage for the range of timesteps in the authors' script.

    With --t-range, the authors multiply losses of shape (B,) by a mask of shape (B, 1, 1, 1), so
    their loss is the mean of the mask times the mean loss of all samples. Ours is the mean of the
    products of mask and loss over the samples. Here, the mask is applied to the authors' losses
    that are computed without --t-range.
    """

    title = "Self-Transcendence, t range"
    flags = "--align selftrans --selftrans-checkpoint ."
    t_range = (0.4, 0.7)  # --t-range in train_selftrans.sh

    def call_loss(self, case: Case) -> tuple[Tensor, Tensor]:
        denoising, alignment = super().call_loss(case)
        return denoising, self.make_mask(case) * alignment

    def make_mask(self, case: Case) -> Tensor:
        """Return 1 for samples in the range and 0 for others, (B,)."""
        low, high = self.t_range
        return ((case.inputs.t >= low) & (case.inputs.t <= high)).float()

    def measure_differences(self, case: Case) -> dict[str, float]:
        _, masked = self.replay(partial(self.call_with_range, t_range=self.t_range), case)
        _, alignment = self.replay(super().call_loss, case)
        product = self.make_mask(case).mean() * alignment
        return {
            "alignment loss of the authors with --t-range": masked.item(),
            "mean of the mask times mean of the loss": product.item(),
        }


AUTHORS_METHODS: tuple[type[AuthorsMethod], ...] = (
    REPA,
    REPATwoEncoders,
    HASTE,
    IREPA,
    IREPAKernel1,
    LayerSync,
    SRA,
    SRACosine,
    SelfTranscendence,
    SelfTranscendenceInRange,
)
