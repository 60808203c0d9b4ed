"""Compute Inception features in the same way as ADM's evaluator.

The network is torch-fidelity's port of the TensorFlow graph. The port resizes images as TensorFlow
1 does. The weights of the port were converted from ADM's graph file, classify_image_graph_def.pb.
This module uses the names of the layers in that graph.
Shapes: B images per batch.
"""

import pickle
import threading
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.cli import UserError
from common.files import sha256
from common.lfs import describe_lfs_pointer
from evaluations.features import FeatureNetwork, Features

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"
SPATIAL_CHANNELS = 7  # channels of mixed_6/conv that ADM's _create_feature_graph selects


def find_weights(path: Path | None) -> Path:
    """Return the path of the Inception weights, and check that the file contains only tensors.

    Args:
        path: File with the weights. By default, the file in the torch hub cache.

    Raises:
        UserError: If the file is missing or is not a file of tensors.
    """
    file = path or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if not file.exists():
        raise UserError(
            f"no Inception weights: fetch {WEIGHTS_URL} and save it as {file}, or pass "
            "--inception-weights FILE (or evaluate 32x32 images with the fashion features, which "
            "need no Inception weights)"
        )
    try:
        # torch-fidelity unpickles without restrictions, so check first that the file is safe.
        torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        if problem := describe_lfs_pointer(file):
            raise UserError(f"--inception-weights: {problem}") from None
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--inception-weights {file} is not a file of plain tensors ({reason}): "
            f"fetch {WEIGHTS_URL} again"
        ) from None
    return file


class InceptionFeatures(FeatureNetwork):
    """Maps uint8 images (B, 3, H, W) to pool_3 (B, 2048), spatial (B, 2023) and scores (B, 1008).

    `spatial` is the first 7 channels of mixed_6/conv, 17 x 17 x 7, flattened with the channel last
    (_create_feature_graph of ADM). In the graph, mixed_6/conv is the name of both a scope and its
    last operation, a ReLU, which follows Conv2D, batchnorm, CheckNumerics and control_dependency.
    The tensor is therefore the output of Mixed_6d.branch1x1 after the ReLU.

    `scores` are class probabilities: the softmax of pool_3 times softmax/weights, without
    softmax/biases (_create_softmax_graph of ADM).

    Args:
        weights: File with the weights. By default, the file in the torch hub cache.
    """

    def __init__(self, weights: Path | None = None):
        super().__init__()
        cli.require_package("torch_fidelity", "the Inception network")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = find_weights(weights)
        self.weights_sha256 = sha256(file)
        outputs = ["2048", "logits_unbiased"]
        try:
            self.network = FeatureExtractorInceptionV3("adm", outputs, str(file))
        except (RuntimeError, TypeError, AttributeError):
            # Weights of other ports, such as pytorch-fid, have other parameter names.
            raise UserError(
                f"--inception-weights {file} is not {WEIGHTS_NAME}: fetch {WEIGHTS_URL}"
            ) from None
        # The output is stored per thread, because several threads may call the network at once.
        self.hook_output = threading.local()
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._store_spatial)

    def _store_spatial(
        self, module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        """Store the spatial features in the forward hook of mixed_6/conv."""
        channels_last = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        self.hook_output.spatial = channels_last.flatten(1)

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features[Tensor]:
        """Return the features and class probabilities of a batch."""
        pool, logits = self.network(images)
        return Features(pool, self.hook_output.spatial, logits.softmax(1))
