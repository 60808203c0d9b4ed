"""The losses of alignment methods, computed by the code of their authors.

Each class builds the network and combines the losses as the authors' train.py does.
Shapes: B batch, N tokens, D width.
"""

import contextlib
import io
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.authors_code import replay_random_numbers
from benchmarks.rival_reference import AuthorsMethod, Case, Losses, get_alignment
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


def make_dropout_draws(inputs: TrainingInputs) -> Tensor:
    """Return the random numbers with which the authors' networks drop the same labels as ours."""
    return (inputs.labels == inputs.classes).float()


def make_draws(inputs: TrainingInputs) -> dict[str, list[Tensor]]:
    """Return the random numbers that most losses draw, by the name of torch's function.

    The timesteps have shape (B, 1, 1, 1).
    """
    timesteps = inputs.t[:, None, None, None]
    return {"rand": [timesteps, make_dropout_draws(inputs)], "randn_like": [inputs.noise]}


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
    files: ClassVar[tuple[str, ...]] = ("loss.py", "models/sit.py")
    flags: ClassVar[tuple[str, ...]] = ("--align", "repa")
    weight = 0.5
    differences: ClassVar[tuple[str, ...]] = (
        "The authors' loss is the negative cosine similarity; ours is larger by one.",
        "For every model, the default of the authors' --encoder-depth is 8; ours is 4 for B.",
    )

    def load(self) -> None:
        self.networks = self.import_file("models/sit.py")
        self.loss = self.import_file("loss.py").SILoss()

    def build_network(self, network: SiTConfig, alignment: Alignment) -> nn.Module:
        return self.networks.SiT(
            **describe_repa_architecture(network),
            encoder_depth=alignment.config.block,
            z_dims=list_token_widths(alignment),
        )

    def compute_losses(self, case: Case) -> Losses:
        inputs = case.inputs
        draws = make_draws(inputs)
        tokens = get_encoder_tokens(case)
        with replay_random_numbers(**draws):
            denoising, projection = self.loss(
                case.network, inputs.latents, {"y": inputs.classes}, zs=tokens
            )
        denoising, projection = denoising.mean(), projection.mean()
        return Losses(denoising, projection, denoising + projection * self.weight)


class REPATwoEncoders(REPA):
    """REPA with two encoders, whose losses are averaged."""

    title = "REPA, two encoders"
    flags: ClassVar[tuple[str, ...]] = ("--align", "repa", "--repa-encoder", "dinov2-b,dinov2-s")
    head_prefixes: ClassVar[dict[str, str]] = {
        "projectors.0.": "heads.repa-0.",
        "projectors.1.": "heads.repa-1.",
    }


def make_irepa_flags(kernel: int) -> tuple[str, ...]:
    """Return the flags of train.py for iREPA with a kernel size."""
    head = f"--projector-type conv --projector-kernel {kernel}"
    target = "--target-norm zscore --zscore-alpha 0.6"
    return tuple(f"--align repa --align-weight 1 {head} {target}".split())


class IREPA(REPA):
    """iREPA (arXiv:2512.10794) with a 3 x 3 convolution, as in its README."""

    title = "iREPA, kernel 3"
    repository = "irepa"
    files = (
        "ldm/loss.py",
        "ldm/models/sit.py",
        "ldm/projection_loss.py",
        "ldm/utils.py",
    )
    kernel = 3
    flags: ClassVar[tuple[str, ...]] = make_irepa_flags(kernel)
    weight = 1.0  # proj_coeff in ldm/configs/irepa.yaml
    zscore_alpha = 0.6  # default of --zscore-alpha in ldm/train.py
    head_prefixes: ClassVar[dict[str, str]] = {
        "projectors.0.projection_layer.": "heads.repa.conv.",
    }
    differences = (
        "The authors' loss is the negative cosine similarity; ours is larger by one.",
        "ldm/configs/irepa.yaml does not set the kernel size, whose default in ldm/train.py is 1; "
        "the README and jit/main_jit.py have 3, and so has ours.",
    )

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

    def compute_losses(self, case: Case) -> Losses:
        inputs = case.inputs
        draws = make_draws(inputs)
        tokens = [
            self.normalization(tokens, zscore_alpha=self.zscore_alpha)
            for tokens in get_encoder_tokens(case)
        ]
        with replay_random_numbers(**draws):
            denoising, projection, _ = self.loss(
                case.network, inputs.latents, {"y": inputs.classes}, zs=tokens
            )
        denoising = denoising.mean()
        return Losses(denoising, projection / self.weight, denoising + projection)


class IREPAKernel1(IREPA):
    """iREPA with a 1 x 1 convolution, which its configuration file selects."""

    title = "iREPA, kernel 1"
    kernel = 1
    flags = make_irepa_flags(kernel)


class HASTE(REPA):
    """The alignment of features in HASTE (arXiv:2505.16792), without that of attention maps."""

    title = "HASTE, features only"
    repository = "haste"
    flags = ("--align", "repa", "--align-depth", "8")
    latent_size = 32  # the loss requires 256 tokens
    differences = (
        "The authors' loss is the negative cosine similarity; ours is larger by one.",
        "HASTE's second loss, the distillation of attention maps, is not part of the comparison, "
        "because it does not exist here.",
        "loss.py reads the attention maps of blocks 5 to 8, so an --encoder-depth below 8 raises "
        "an IndexError.",
    )

    def compute_losses(self, case: Case) -> Losses:
        inputs = case.inputs
        draws = make_draws(inputs)
        tokens = get_encoder_tokens(case)
        batch_size, num_tokens, _ = tokens[0].shape
        attention = torch.zeros(1).expand(batch_size, 12, num_tokens, num_tokens)
        # The loss prints an empty line, which is discarded.
        with replay_random_numbers(**draws), contextlib.redirect_stdout(io.StringIO()):
            denoising, _, projection = self.loss(
                case.network,
                inputs.latents,
                {"y": inputs.classes},
                zs=[[attention] * 12],
                proj_s=tokens,
            )
        denoising, projection = denoising.mean(), projection.mean()
        return Losses(denoising, projection, denoising + projection * self.weight)


class LayerSync(AuthorsMethod):
    """LayerSync (arXiv:2510.12581)."""

    title = "LayerSync"
    repository = "layersync"
    files = (
        "models.py",
        "transport/__init__.py",
        "transport/path.py",
        "transport/transport.py",
        "transport/utils.py",
    )
    flags = ("--align", "layersync")
    weight = 0.2  # --reg-weight in the README
    origin = "sit"
    head_prefixes: ClassVar[dict[str, str]] = {}
    differences = (
        "The authors' loss is the negative cosine similarity; ours is larger by one.",
        "In the authors' code, t = 1 is data and the velocity has the opposite sign, as in SiT; "
        "the weights are converted.",
        "The authors' train.py does not clip gradients, and flips images at random.",
    )

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

    def compute_losses(self, case: Case) -> Losses:
        inputs = case.inputs
        draws = {"rand": [1 - inputs.t, make_dropout_draws(inputs)], "randn_like": [inputs.noise]}
        with replay_random_numbers(**draws):
            terms = self.transport.training_losses(
                case.network, inputs.latents, {"y": inputs.classes}, loss_type="layer_sync"
            )
        denoising, regularization = terms["loss"].mean(), terms["reg"].mean()
        return Losses(denoising, regularization, denoising + self.weight * regularization)


class SRA(AuthorsMethod):
    """SRA (arXiv:2505.02831) with the smooth L1 loss, which the paper uses."""

    title = "SRA, smooth L1"
    repository = "sra"
    files = ("SiT-SRA/loss.py", "SiT-SRA/models/sit.py")
    flags: ClassVar[tuple[str, ...]] = ("--align", "sra", "--align-loss", "smooth_l1")
    loss_type = "sml1"
    weight = 0.2  # until epoch 149; SiT-SRA/train.py decreases it from then on
    offset = 0.0
    origin = "sra"
    head_prefixes: ClassVar[dict[str, str]] = {
        "ap_head.linear1.": "heads.sra.0.",
        "ap_head.linear2.": "heads.sra.2.",
    }
    differences: ClassVar[tuple[str, ...]] = (
        "The default blocks of SiT-SRA/train.py are 4 and 8 for every model; here they are 3 and "
        "9 for B.",
    )

    def load(self) -> None:
        self.networks = self.import_file("SiT-SRA/models/sit.py")
        self.losses = self.import_file("SiT-SRA/loss.py")

    def build_network(self, network: SiTConfig, alignment: Alignment) -> nn.Module:
        return self.networks.SiT(**describe_repa_architecture(network))

    def find_teacher(self, step: Step) -> SiT | None:
        return step.state.emas[0]

    def compute_losses(self, case: Case) -> Losses:
        denoising, distance = self.call_loss(case, self.make_criterion())
        denoising, distance = denoising.mean(), distance.mean()
        return Losses(denoising, distance, denoising + distance * self.weight)

    def make_criterion(self) -> nn.Module:
        """Return the module that compares the tokens of the student and the teacher."""
        return self.losses.Simpleloss()

    def call_loss(self, case: Case, criterion: nn.Module) -> tuple[Tensor, Tensor]:
        """Call the authors' loss with a criterion."""
        record = case.alignment.target.record
        loss = self.losses.SRALoss(
            block_out_s=case.alignment.config.block,
            block_out_t=record["teacher_block"],
            t_max=record["t_max"],
            loss_type=self.loss_type,
        )
        loss.criterion = criterion
        inputs = case.inputs
        draws = make_draws(inputs)
        draws["rand_like"] = [inputs.target_uniform[:, None, None, None]]
        with replay_random_numbers(**draws):
            return loss(case.network, inputs.latents, case.teacher, inputs.classes)


class TransposedTokens(nn.Module):
    """Calls SRA's criterion with tokens of shape (B, D, N) instead of (B, N, D)."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, student: Tensor, teacher: Tensor, loss_type: str) -> Tensor:
        """Compare tokens."""
        return self.criterion(student.mT, teacher.mT, loss_type=loss_type)


class SRACosine(SRA):
    """SRA with the cosine loss, which its repository recommends, on transposed tokens."""

    title = "SRA, cosine"
    flags = ("--align", "sra")
    loss_type = "cos"
    weight = 0.5
    differences = (
        "The authors call F.cosine_similarity without dim, so their loss compares the tokens of an "
        "image channel by channel; with transposed tokens, as in this comparison, the same line "
        "compares the channels of each token, as ours does.",
        *SRA.differences,
    )

    def make_criterion(self) -> nn.Module:
        return TransposedTokens(super().make_criterion())

    def measure_differences(self, case: Case) -> dict[str, float]:
        criterion = super().make_criterion()
        _, distance = self.call_loss(case, criterion)
        return {"alignment loss of the authors' line without transposition": distance.mean().item()}


class SelfTranscendence(AuthorsMethod):
    """The second stage of Self-Transcendence (arXiv:2601.07773), for all timesteps."""

    title = "Self-Transcendence, stage 2"
    repository = "selftrans"
    files = ("loss.py", "models/sit_selftrans_model.py")
    flags: ClassVar[tuple[str, ...]] = (
        *("--align", "selftrans", "--selftrans-checkpoint", "."),
        *("--align-t-range", "0", "1"),
    )
    weight = 0.5
    offset = 0.0
    guidance = 30.0  # --cfg_guide in train_selftrans.sh
    head_prefixes: ClassVar[dict[str, str]] = {"projectors.": "heads.selftrans."}
    differences: ClassVar[tuple[str, ...]] = (
        "train_selftrans.py creates selftrans_t2i_Loss, which it does not import; the comparison "
        "uses selftrans_Loss, which it imports.",
        "The authors' teacher has the raw weights of a checkpoint; ours has the EMA.",
        "The authors' flag --qk-norm, which normalizes queries and keys, is on by default; it is "
        "off in the comparison.",
        "The authors' --stop-epoch, a number of steps, ends the alignment after 100,000 steps by "
        "default; ours has no stop by default.",
        "The authors' first stage (train_vaeloss.py) predicts the velocity from block 2 with a "
        "head; the README describes an alignment to clean VAE features.",
    )

    def load(self) -> None:
        self.networks = self.import_file("models/sit_selftrans_model.py")
        self.loss = self.import_file("loss.py").selftrans_Loss()

    def build_network(self, network: SiTConfig, alignment: Alignment) -> nn.Module:
        return self.networks.SiT(**describe_repa_architecture(network))

    def find_teacher(self, step: Step) -> SiT | None:
        return get_alignment(step).target.frozen_network  # type: ignore[attr-defined]  # of this method

    def compute_losses(self, case: Case) -> Losses:
        denoising, alignment = self.call_loss(case, None)
        denoising, alignment = denoising.mean(), alignment.mean()
        return Losses(denoising, alignment, denoising + self.weight * alignment)

    def call_loss(self, case: Case, t_range: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
        """Call the authors' loss with a range of timesteps."""
        inputs = case.inputs
        draws = make_draws(inputs)
        with replay_random_numbers(**draws):
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

    The mask of the range is applied to the authors' losses of the samples here.
    """

    title = "Self-Transcendence, t range"
    flags: ClassVar[tuple[str, ...]] = ("--align", "selftrans", "--selftrans-checkpoint", ".")
    t_range = (0.4, 0.7)  # --t-range in train_selftrans.sh
    differences: ClassVar[tuple[str, ...]] = (
        "With --t-range, the authors multiply losses of shape (B,) by a mask of shape (B, 1, 1, "
        "1), so their loss is the mean of the mask times the mean of the loss of all samples; ours "
        "is the mean over the samples of the product, as in this comparison.",
        *SelfTranscendence.differences,
    )

    def compute_losses(self, case: Case) -> Losses:
        denoising, alignment = self.call_loss(case, None)
        denoising, alignment = denoising.mean(), (self.make_mask(case) * alignment).mean()
        return Losses(denoising, alignment, denoising + self.weight * alignment)

    def make_mask(self, case: Case) -> Tensor:
        """Return 1 for samples in the range and 0 for others, (B,)."""
        low, high = self.t_range
        return ((case.inputs.t >= low) & (case.inputs.t <= high)).float()

    def measure_differences(self, case: Case) -> dict[str, float]:
        _, masked = self.call_loss(case, self.t_range)
        _, alignment = self.call_loss(case, None)
        return {
            "alignment loss of the authors with --t-range": masked.mean().item(),
            "mean of the mask times mean of the loss": (
                self.make_mask(case).mean() * alignment.mean()
            ).item(),
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
