"""Measure the error of each solver as a function of its cost, for Gaussian data.

    python -m experiments.solvers --out docs/solvers.png

For D-dimensional data N(m, S), x_t is Gaussian with mean alpha m and covariance V = alpha^2 S +
sigma^2 I, the velocity is affine in x, and the exact solution is known. The command writes a
figure, writes the numbers to a JSON file next to it, and prints the rows of the tables in
docs/sampling.md. It takes a few seconds on a CPU.
"""

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import cli
from common.cli import UserError
from common.files import write_file
from common.keyed_random import Purpose, normal
from experiments.plotting import add_grid, load_pyplot, save_png
from interpolant import (
    INTERPOLANTS,
    PREDICTIONS,
    Interpolant,
    expand_like,
    prediction_to_velocity,
    time_interval,
)
from samplers import (
    UNIT_INTERVAL,
    GuidedVelocity,
    VelocityField,
    denoise,
    dopri5,
    euler,
    euler_maruyama,
    guided_dopri5,
    heun,
    ode_times,
    sde_times,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLE_STDS = [0.1, 0.4, 0.8, 1.5]
NUM_IMAGES = 256
PATH_TYPES = ("linear", "cosine")  # the paths in the tables of SiT and REPA
EVALUATION_COUNTS = [8, 16, 32, 64, 128, 256, 512]
SDE_EVALUATION_COUNTS = [8, 16, 32, 64, 128, 250, 512]  # the tables of SiT and REPA use 250
RTOLS = [10.0**-k for k in range(1, 9)]  # with atol = rtol / 1000, as in the SiT repository
# Functions that return the time at which the last step starts, given the number of evaluations n.
LAST_TIMES: dict[str, Callable[[int], float]] = {
    "last step 0.04": lambda n: 0.04,
    "last step 1 / n": lambda n: 1 / n,
}


class Gaussian(NamedTuple):
    """A normal distribution N(m, S)."""

    mean: Tensor  # (D,)
    axes: Tensor  # principal axes in columns, (D, D)
    std: Tensor  # standard deviations along the axes, (D,)

    @property
    def covariance(self) -> Tensor:
        """The covariance S, (D, D)."""
        return self.axes * self.std**2 @ self.axes.T

    def predict_expected(self, interpolant: Interpolant, prediction: str) -> VelocityField:
        """Return the function that a network with this kind of prediction approximates.

        Args:
            interpolant: The interpolant that defines x_t.
            prediction: "x" for E[x | x_t], "eps" for E[eps | x_t], or "v" for
                E[v | x_t] = alpha' E[x | x_t] + sigma' E[eps | x_t].

        Returns:
            A function of x_t, (B, D), and of a single time or times (B,).
        """

        def predict(x: Tensor, t: float | Tensor) -> Tensor:
            times = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
            alpha, sigma, d_alpha, d_sigma = interpolant.coefficients(expand_like(times, x))
            # Compute V^-1 (x - alpha m) in the basis of the principal axes.
            whitened = (x - alpha * self.mean) @ self.axes / (alpha**2 * self.std**2 + sigma**2)
            eps = sigma * whitened @ self.axes.T
            data = self.mean + alpha * (self.std**2 * whitened) @ self.axes.T
            return {"x": data, "eps": eps, "v": d_alpha * data + d_sigma * eps}[prediction]

        return predict

    def velocity(self, interpolant: Interpolant) -> VelocityField:
        """Return the exact velocity E[v | x_t] as a function of x_t and t."""
        return self.predict_expected(interpolant, "v")

    def flow(self, x: Tensor) -> Tensor:
        """Return the exact solution of the ODE at t = 0 for noise x at t = 1, (B, D).

        Along each principal axis, (x_t - alpha m) / V^(1/2) is constant, so the solution is
        m + S^(1/2) x: each quantile of the noise is mapped to the same quantile of the data.
        """
        return self.mean + x @ self.axes * self.std @ self.axes.T


def make_example_gaussian(stds: list[float], seed: int = 0) -> Gaussian:
    """Return a Gaussian with the given standard deviations along random principal axes."""
    d = len(stds)
    draw = normal(seed, Purpose.NOISE, torch.arange(d + 1), (d,))
    axes, _ = torch.linalg.qr(draw[1:])
    return Gaussian(draw[0], axes, torch.tensor(stds, dtype=torch.float64))


def compute_sde_moments(
    velocity: VelocityField,
    interpolant: Interpolant,
    d: int,
    num_steps: int,
    last: float = 0.04,
    ends: tuple[float, float] = UNIT_INTERVAL,
) -> tuple[Tensor, Tensor]:
    """Return the exact mean and covariance of the samples of the SDE solver, without sampling.

    The velocity must be affine in x. A sample is then affine in the initial noise and in the noise
    of each step, so the moments follow from a batch whose first row has zero noise and whose other
    rows have a single unit impulse each.

    Args:
        velocity: The velocity field.
        interpolant: The interpolant that relates velocity and score.
        d: Number of dimensions.
        num_steps: Number of network evaluations.
        last: Time at which the last step starts (see `samplers.sde_times`).
        ends: Lower and upper end of the integration interval.

    Returns:
        The mean, (D,), and the covariance, (D, D).
    """
    num_rows = 1 + d * num_steps
    impulses = torch.eye(num_rows, dtype=torch.float64)[:, 1:].reshape(num_rows, num_steps, d)
    times = sde_times(num_steps, ends, last)
    end = euler_maruyama(
        velocity, interpolant, impulses[:, 0], times, lambda step: impulses[:, 1 + step]
    )
    end = denoise(velocity, interpolant, end, times[-1])
    responses = end[1:] - end[0]
    return end[0], responses.T @ responses


def draw_initial_noise(data: Gaussian) -> Tensor:
    """Return the initial noise of all solvers, (NUM_IMAGES, D)."""
    return normal(0, Purpose.INITIAL_NOISE, torch.arange(NUM_IMAGES), data.mean.shape)


def compute_relative_rms_error(data: Gaussian, end: Tensor, exact: Tensor) -> float:
    """Return the root-mean-square error relative to the standard deviation of the data."""
    return ((end - exact).square().mean() / data.std.square().mean()).sqrt().item()


def compute_relative_covariance_error(data: Gaussian, covariance: Tensor) -> float:
    """Return |C - S| / |S| in the Frobenius norm, where C is the covariance of the samples."""
    return ((covariance - data.covariance).norm() / data.covariance.norm()).item()


def measure_odes(data: Gaussian, interpolant: Interpolant) -> dict[str, dict[str, list]]:
    """Return the numbers of evaluations and the errors of the ODE solvers."""
    noise = draw_initial_noise(data)
    velocity = data.velocity(interpolant)
    error = partial(compute_relative_rms_error, data, exact=data.flow(noise))
    adaptive = [dopri5(velocity, noise, rtol / 1000, rtol) for rtol in RTOLS]
    counts = torch.stack([count for _, count in adaptive]).double()
    return {
        "Euler": {
            "evaluations": EVALUATION_COUNTS,
            "error": [error(euler(velocity, noise, ode_times(n))) for n in EVALUATION_COUNTS],
        },
        "Heun": {
            "evaluations": [n - 1 for n in EVALUATION_COUNTS],
            "error": [error(heun(velocity, noise, ode_times(n // 2))) for n in EVALUATION_COUNTS],
        },
        "dopri5": {
            "evaluations": counts.amax(1).tolist(),
            "of an image, mean": counts.mean(1).tolist(),
            "rtol": RTOLS,
            "error": [error(end) for end, _ in adaptive],
        },
    }


def measure_sde(
    data: Gaussian, interpolant: Interpolant, last: Callable[[int], float]
) -> dict[str, list]:
    """Return the numbers of evaluations and the covariance errors of the SDE solver."""
    velocity = data.velocity(interpolant)
    moments = [
        compute_sde_moments(velocity, interpolant, len(data.mean), n, last(n))
        for n in SDE_EVALUATION_COUNTS
    ]
    errors = [compute_relative_covariance_error(data, covariance) for _, covariance in moments]
    return {"evaluations": SDE_EVALUATION_COUNTS, "error": errors}


def measure_guidance(data: Gaussian, null: Gaussian, interpolant: Interpolant) -> dict[str, Any]:
    """Compare a single integration with one integration per piece, for guidance in an interval.

    The reference solution is computed in pieces with a much smaller tolerance. A test compares it
    with the solution of scipy.
    """
    noise = draw_initial_noise(data)

    def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        v_class = data.velocity(interpolant)(x.double(), t.double())
        v_null = null.velocity(interpolant)(x.double(), t.double())
        return torch.where(expand_like(labels == 1, x), v_null, v_class)

    guidance = {"scale": 2.0, "low": 0.25, "high": 0.75}
    labels = torch.zeros(NUM_IMAGES, dtype=torch.int64)
    velocity = GuidedVelocity(model, labels, null_class=1, **guidance)
    exact, _ = guided_dopri5(velocity, noise, atol=1e-10, rtol=1e-7)
    rtols = [1e-3, 1e-4]

    def measure_solver(solve: Callable) -> dict[str, list]:
        solutions = [solve(velocity, noise, rtol / 1000, rtol) for rtol in rtols]
        return {
            "evaluations": [count.double().mean().item() for _, count in solutions],
            "error": [compute_relative_rms_error(data, end, exact) for end, _ in solutions],
        }

    return {
        **guidance,
        "rtol": rtols,
        "one go": measure_solver(dopri5),
        "pieces": measure_solver(guided_dopri5),
    }


def measure_prediction(
    data: Gaussian, interpolant: Interpolant, prediction: str
) -> dict[str, float]:
    """Return the errors of the solvers for an exact network with this kind of prediction."""
    noise = draw_initial_noise(data)
    network = data.predict_expected(interpolant, prediction)
    low, high = time_interval(interpolant, prediction)

    def velocity(x: Tensor, t: float | Tensor) -> Tensor:
        times = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return prediction_to_velocity(interpolant, prediction, network(x, times), x, times)

    times = ode_times(32, (low, high))
    fixed = denoise(velocity, interpolant, heun(velocity, noise, times), times[-1])
    adaptive, evaluations = dopri5(velocity, noise, t_start=high, t_end=low)
    if low > 0:
        adaptive = denoise(velocity, interpolant, adaptive, low)
        evaluations = evaluations + 1
    _, covariance = compute_sde_moments(
        velocity, interpolant, len(data.mean), 250, ends=(low, high)
    )
    return {
        "Heun": compute_relative_rms_error(data, fixed, data.flow(noise)),
        "dopri5": compute_relative_rms_error(data, adaptive, data.flow(noise)),
        "evaluations": evaluations.double().mean().item(),
        "SDE": compute_relative_covariance_error(data, covariance),
    }


def estimate_order(curve: dict[str, list]) -> float:
    """Return the order of convergence, estimated from the last two points of a curve."""
    logs = np.log([curve["error"][-2:], curve["evaluations"][-2:]])
    error, n = np.diff(logs)[:, 0]
    return -error / n


def measure() -> dict:
    """Return all measurements, rounded to four significant digits."""
    data = make_example_gaussian(EXAMPLE_STDS)
    null = make_example_gaussian([0.5, 0.9, 1.1, 1.4], seed=1)
    odes = {}
    sdes = {}
    orders = {}
    for name in PATH_TYPES:
        interpolant = INTERPOLANTS[name]
        odes[name] = measure_odes(data, interpolant)
        sdes[name] = {key: measure_sde(data, interpolant, last) for key, last in LAST_TIMES.items()}
        orders[name] = {
            "Euler": estimate_order(odes[name]["Euler"]),
            "Heun": estimate_order(odes[name]["Heun"]),
            "Euler-Maruyama": estimate_order(sdes[name]["last step 1 / n"]),
        }
    objectives: dict[str, dict] = {name: {} for name in INTERPOLANTS}
    for name, prediction in itertools.product(INTERPOLANTS, PREDICTIONS):
        objectives[name][prediction] = measure_prediction(data, INTERPOLANTS[name], prediction)
    measurements = {
        "standard deviations": EXAMPLE_STDS,
        "images": NUM_IMAGES,
        "ode": odes,
        "sde": sdes,
        "order": orders,
        "interval": measure_guidance(data, null, INTERPOLANTS["linear"]),
        "objectives": objectives,
    }
    return json.loads(json.dumps(measurements), parse_float=round_number, parse_int=round_number)


def round_number(text: str) -> float:
    """Round a number to four significant digits, so that results agree between machines."""
    return float(f"{float(text):.4g}")


def format_tables(measurements: dict) -> list[str]:
    """Return the rows of the tables in docs/sampling.md: solvers, guidance, and objectives."""
    solver_rows = [format_solver_row(measurements, name) for name in PATH_TYPES]
    interval = measurements["interval"]
    guidance_rows = [
        f"| {label} | {rtol:g} | {evaluations:.0f} | {error:.2g} |"
        for name, label in (("one go", "single interval"), ("pieces", "in pieces"))
        for rtol, evaluations, error in zip(interval["rtol"], *interval[name].values())
    ]
    objective_rows = [
        f"| {name} | {prediction} | {errors['Heun']:.2g} | "
        f"{errors['dopri5']:.2g} ({errors['evaluations']:.0f}) | {errors['SDE']:.2%} |"
        for name, predictions in measurements["objectives"].items()
        for prediction, errors in predictions.items()
    ]
    return ["\n".join(rows) for rows in (solver_rows, guidance_rows, objective_rows)]


def format_solver_row(measurements: dict, name: str) -> str:
    """Return the row for an interpolant in the table of the solvers."""
    index_of_64 = EVALUATION_COUNTS.index(64)
    index_of_250 = SDE_EVALUATION_COUNTS.index(250)
    index_of_default = RTOLS.index(1e-3)
    solvers = measurements["ode"][name]
    adaptive = {key: values[index_of_default] for key, values in solvers["dopri5"].items()}
    cells = [
        name,
        *(f"{order:.2f}" for order in measurements["order"][name].values()),
        f"{solvers['Euler']['error'][index_of_64]:.2g}",
        f"{solvers['Heun']['error'][index_of_64]:.2g}",
        f"{adaptive['error']:.2g} ({adaptive['of an image, mean']:.0f}, "
        f"at most {adaptive['evaluations']:.0f})",
        *(f"{curve['error'][index_of_250]:.2%}" for curve in measurements["sde"][name].values()),
    ]
    return f"| {' | '.join(cells)} |"


def draw_figure(measurements: dict, path: Path) -> None:
    """Draw the errors of the ODE solvers for each path, and the errors of the SDE solver."""
    plt = load_pyplot()
    figure, grid = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axes, (name, solvers) in zip(grid, measurements["ode"].items()):
        axes.set_title(f"ODE, {name} path")
        for (solver, curve), color, order in zip(solvers.items(), ("C0", "C1", "C2"), (1, 2, 5)):
            draw_curve(axes, curve, color=color, label=solver)
            draw_slope(axes, curve, order)
        axes.set_ylim(1e-10, 2)
    grid[0].set_ylabel("RMS error of the images / std of the data")

    axes = grid[2]
    axes.set_title("SDE, Euler-Maruyama")
    axes.set_ylabel("relative error of the covariance")
    for color, (name, curves) in zip(("C3", "C4"), measurements["sde"].items()):
        for linestyle, (last, curve) in zip(("-", ":"), curves.items()):
            draw_curve(axes, curve, color=color, linestyle=linestyle, label=f"{name}, {last}")
    draw_slope(axes, measurements["sde"]["linear"]["last step 1 / n"], 1)

    for axes in grid:
        axes.set(xscale="log", yscale="log", xlabel="network evaluations", xlim=(6, 1000))
        axes.set_xticks(EVALUATION_COUNTS, EVALUATION_COUNTS)
        axes.minorticks_off()
        add_grid(axes)
        axes.legend(frameon=False, loc="lower left")
    save_png(figure, path)


def draw_curve(axes: "Axes", curve: dict[str, list], **style: Any) -> None:
    """Draw the error as a function of the number of evaluations."""
    axes.plot(curve["evaluations"], curve["error"], marker="o", markersize=3.5, **style)


def draw_slope(axes: "Axes", curve: dict[str, list], order: int) -> None:
    """Draw a dashed line whose slope is an order of convergence, near the last three points."""
    n = np.array(curve["evaluations"][-3:])
    offset = 0.3 if order > 2 else 2.5
    line = offset * curve["error"][-1] * (n / n[-1]) ** -float(order)
    axes.plot(n, line, "0.5", linestyle="--", linewidth=1)
    end = (n[-1], line[-1])
    axes.annotate(
        f"order {order}", end, (4, -3), textcoords="offset points", color="0.35", fontsize=8.5
    )


def main() -> None:
    """Run the command line."""
    parser = cli.Parser(__doc__, "python -m experiments.solvers", "--out FILE.png")
    parser.add_argument(
        "--out", type=Path, required=True, help="figure to write, with a .json file next to it"
    )
    args = parser.parse_args()
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out} must end in .png")
    measurements = measure()
    write_file(args.out.with_suffix(".json"), json.dumps(measurements, indent=1).encode() + b"\n")
    draw_figure(measurements, args.out)
    print(*format_tables(measurements), sep="\n\n")
    print(f"solvers: {args.out}")


if __name__ == "__main__":
    cli.run(main)
