"""Compare the speed of the metrics, without the feature networks, with other implementations.

    python -m benchmarks.evaluation --json evaluation.json

The features are random numbers with the dimension of Inception features. There are as many samples
as references. The other implementations run on the CPU:

- `sqrtm` is calculate_frechet_distance of pytorch-fid. It has ADM's formula, and uses the matrix
  square root of scipy. It is compared with `frechet_distance`.
- `numpy` is mean and cov of numpy. It is compared with `statistics`.
- `torch-fidelity` is compared with `precision_recall`.
"""

from functools import partial

import numpy as np
import scipy
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_prc import prc_features_to_metric

from benchmarks.measure import (
    Action,
    compare_times,
    describe_machine,
    make_parser,
    median_and_quartiles,
    report,
    time_interleaved,
)
from common import cli
from evaluations.metrics import compute_statistics, frechet_distance, precision_recall

# Pairs of another implementation and the equivalent function of this repository.
PAIRS = [
    ("sqrtm", "frechet_distance"),
    ("numpy", "statistics"),
    ("torch-fidelity", "precision_recall"),
]


def draw_features(num_images: int, width: int) -> np.ndarray:
    """Draw two sets of correlated, nonnegative features, (2, num_images, width) float32."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((width, width), np.float32) / width**0.5
    values = rng.standard_normal((2, num_images, width), np.float32)
    return np.maximum(values @ mix + 0.3, 0)


def main() -> None:
    """Run the benchmark."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = make_parser(
        __doc__, "evaluation", images=10_000, device=default_device, rounds=5, warm_up=1
    )
    parser.add_argument(
        "--width", type=cli.positive_int, default=2048, help="dimension of the features"
    )
    args = parser.parse_args()

    device = torch.device(args.device)
    a, b = draw_features(args.images, args.width)
    statistics_a = compute_statistics(a, device)
    statistics_b = compute_statistics(b, device)
    actions: dict[str, Action] = {
        "frechet_distance": partial(frechet_distance, statistics_a, statistics_b, device),
        "sqrtm": partial(calculate_frechet_distance, *statistics_a, *statistics_b),
        "statistics": partial(compute_statistics, a, device),
        "numpy": lambda: (a.mean(0), np.cov(a, rowvar=False)),
        "precision_recall": partial(precision_recall, a, b, device=device),
        "torch-fidelity": partial(
            prc_features_to_metric, torch.from_numpy(b), torch.from_numpy(a), verbose=False
        ),
    }
    seconds = time_interleaved(actions, device, args.rounds, warm_up=args.warm_up).seconds

    machine = describe_machine(device) | {"numpy": np.__version__, "scipy": scipy.__version__}
    report(
        args,
        device,
        ("images", "width", "rounds"),
        machine=machine,
        results={
            name: {"call_s": median_and_quartiles(values)} for name, values in seconds.items()
        },
        ratios=compare_times(seconds, PAIRS),
    )


if __name__ == "__main__":
    cli.run(main)
