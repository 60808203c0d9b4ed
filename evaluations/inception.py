"""Inception features as ADM's evaluator takes them, through torch-fidelity's port of the TensorFlow graph.

The port resizes as TensorFlow 1 does and its weights are converted from the same graph file, classify_image_graph_def.pb, whose
names are those below. B batch.
"""

import pickle
import threading
from pathlib import Path

import torch
from torch import Tensor

from common.cli import UserError
from common.files import sha256
from evaluations.metrics import no_tf32

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"


def find_weights(path: Path | None) -> Path:
    """The weights file given, or in torch hub's folder. Raises UserError that says what to fetch and where to put it."""
    place = path or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not place.exists():
        raise UserError(
            f"no Inception weights: fetch {URL} and put it at {place}, or pass --inception-weights FILE (the embedded garments "
            "need none: take the fashion features)"
        )
    try:
        torch.load(
            place, map_location="cpu", weights_only=True
        )  # torch-fidelity unpickles freely: look first
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--inception-weights {place} is no file of plain tensors ({reason}): fetch {URL} again"
        ) from None
    return place


class InceptionFeatures(torch.nn.Module):
    """(B, 3, H, W) uint8 -> pool_3 (B, 2048), spatial (B, 2023), class probabilities (B, 1008). In fp32 whatever surrounds it.

    Spatial is mixed_6/conv, its first 7 channels, 17 x 17 x 7 flattened with the channel last (_create_feature_graph of ADM).
    The scope of a convolution in the graph holds Conv2D, batchnorm, CheckNumerics, control_dependency, and, under the scope's
    own name, what they end in: its ReLU. So it is the output of Mixed_6d.branch1x1 here, not negative. Probabilities are the
    softmax of pool_3 times softmax/weights, without softmax/biases (_create_softmax_graph). `weights_sha256` is the file's.
    """

    def __init__(self, weights: Path | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = find_weights(weights)
        self.weights_sha256 = sha256(file)
        try:
            self.network = FeatureExtractorInceptionV3(
                "adm", ["2048", "logits_unbiased"], str(file)
            )
        except (
            RuntimeError,
            TypeError,
            AttributeError,
        ):  # pytorch-fid's file, for one, has other names
            raise UserError(f"--inception-weights {file} is not {WEIGHTS}: fetch {URL}") from None
        self.kept = (
            threading.local()
        )  # several threads may be in here, each with a batch of its own
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.kept.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(images.device.type, enabled=False), no_tf32():
            pool, logits = self.network(images)
            return pool, self.kept.spatial, logits.softmax(1)
