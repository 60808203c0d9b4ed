"""How far each solver ends from the exact answer, over what it costs, on Gaussian data, for which everything is known.

python -m experiments.solvers --out docs/solvers.png

Data N(m, S), D numbers. x_t is then Gaussian with mean alpha m and covariance V = alpha^2 S + sigma^2 I, and the velocity is
affine in x. Writes the picture and, beside it, the figures as JSON. A few seconds on a CPU.
"""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import cli
from common.cli import UserError
from common.files import write_file
from common.keyed_random import Purpose, normal
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


class Gaussian(NamedTuple):
    """N(m, S) by its mean (D,), principal axes, the columns of (D, D), and standard deviations along them (D,)."""

    mean: Tensor
    axes: Tensor
    std: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.axes * self.std**2 @ self.axes.T

    def predict_expected(self, path: Interpolant, prediction: str) -> VelocityField:
        """E[v | x_t] = alpha' E[x | x_t] + sigma' E[eps | x_t], or one of the two others, for x (B, D) and one time or (B,) of
        them: what a perfect network of that prediction gives.
        """

        def predict_expected(x: Tensor, t: float | Tensor) -> Tensor:
            times = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
            alpha, sigma, d_alpha, d_sigma = path.coefficients(expand_like(times, x))
            away = (
                (x - alpha * self.mean) @ self.axes / (alpha**2 * self.std**2 + sigma**2)
            )  # V^-1 (x - alpha m), in the axes
            if prediction == "eps":
                return sigma * away @ self.axes.T
            data = self.mean + alpha * (self.std**2 * away) @ self.axes.T
            return (
                data if prediction == "x" else d_alpha * data + d_sigma * sigma * away @ self.axes.T
            )

        return predict_expected

    def velocity(self, path: Interpolant) -> VelocityField:
        """E[v | x_t]."""
        return self.predict_expected(path, "v")

    def flow(self, x: Tensor) -> Tensor:
        """Where the ODE takes noise x (B, D). Along an axis (x_t - alpha m) / V^(1/2) stays what it is, so to m + S^(1/2) x:
        each quantile of the noise becomes the same quantile of the data.
        """
        return self.mean + x @ self.axes * self.std @ self.axes.T


def example_gaussian(stds: list[float], seed: int = 0) -> Gaussian:
    """With these standard deviations along axes that are none of the coordinates'."""
    d = len(stds)
    draw = normal(seed, Purpose.NOISE, torch.arange(d + 1), (d,))
    return Gaussian(draw[0], torch.linalg.qr(draw[1:])[0], torch.tensor(stds, dtype=torch.float64))


def sde_moments(
    velocity: VelocityField,
    path: Interpolant,
    d: int,
    num_steps: int,
    last: float = 0.04,
    ends: tuple[float, float] = UNIT_INTERVAL,
) -> tuple[Tensor, Tensor]:
    """The mean (D,) and covariance (D, D) of `sde`'s samples, exact and without drawing any, for a velocity affine in x.

    The sample is then affine in the start and in every step's noise: one row of a batch gives the constant, one row for
    each number of start and noise gives a column.
    """
    rows = 1 + d * num_steps
    impulses = torch.eye(rows, dtype=torch.float64)[:, 1:].reshape(rows, num_steps, d)
    times = sde_times(num_steps, ends, last)
    end = euler_maruyama(velocity, path, impulses[:, 0], times, lambda i: impulses[:, 1 + i])
    end = denoise(velocity, path, end, times[-1])
    columns = end[1:] - end[0]
    return end[0], columns.T @ columns


EXAMPLE_STDS = [0.1, 0.4, 0.8, 1.5]
IMAGES = 256
DRAWN = (
    "linear",
    "cosine",
)  # the paths of SiT's and REPA's tables: the picture, and the table of solvers
EVALUATION_COUNTS = [8, 16, 32, 64, 128, 256, 512]  # network evaluations
TOLERANCES = [
    10.0**-k for k in range(1, 9)
]  # rtol; atol is a thousandth, as in the SiT repository (1e-6 to 1e-3)
SDE_BUDGETS = [8, 16, 32, 64, 128, 250, 512]  # SiT's and REPA's tables have 250
LAST = {"last step 0.04": lambda n: 0.04, "last step 1 / n": lambda n: 1 / n}


def start_noise(data: Gaussian) -> Tensor:
    """Noise, the same for all solvers: (IMAGES, D)."""
    return normal(0, Purpose.INITIAL_NOISE, torch.arange(IMAGES), data.mean.shape)


def relative_rms_error(data: Gaussian, end: Tensor, exact: Tensor) -> float:
    """Root mean square, in units of the data's standard deviation."""
    return ((end - exact).square().mean() / data.std.square().mean()).sqrt().item()


def ode_figures(data: Gaussian, path: Interpolant) -> dict[str, dict[str, list]]:
    """Solver -> network evaluations, and how far the images end from the exact ones."""
    start, velocity = start_noise(data), data.velocity(path)
    error = partial(relative_rms_error, data, exact=data.flow(start))
    adaptive = [dopri5(velocity, start, rtol / 1000, rtol) for rtol in TOLERANCES]
    counts = torch.stack([count for _, count in adaptive]).double()
    return {
        "Euler": {
            "evaluations": EVALUATION_COUNTS,
            "error": [error(euler(velocity, start, ode_times(n))) for n in EVALUATION_COUNTS],
        },
        "Heun": {
            "evaluations": [n - 1 for n in EVALUATION_COUNTS],
            "error": [error(heun(velocity, start, ode_times(n // 2))) for n in EVALUATION_COUNTS],
        },
        "dopri5": {
            "evaluations": counts.amax(1).tolist(),
            "of an image, mean": counts.mean(1).tolist(),
            "rtol": TOLERANCES,
            "error": [error(end) for end, _ in adaptive],
        },
    }


def sde_figures(data: Gaussian, path: Interpolant, last: Callable[[int], float]) -> dict[str, list]:
    """Evaluations, and |C - S| / |S| in Frobenius norm, C being the covariance of the samples."""

    def error(n: int) -> float:
        _, covariance = sde_moments(data.velocity(path), path, len(data.mean), n, last(n))
        return ((covariance - data.covariance).norm() / data.covariance.norm()).item()

    return {"evaluations": SDE_BUDGETS, "error": [error(n) for n in SDE_BUDGETS]}


def interval_figures(
    data: Gaussian, null: Gaussian, path: Interpolant, low: float = 0.25, high: float = 0.75
) -> dict:
    """dopri5 with guidance in an interval, taken in one go and in pieces: tolerance, evaluations of an image, error.

    The exact end is that of pieces at a tolerance a thousand times finer, which a test holds to scipy's.
    """
    start, labels = start_noise(data), torch.zeros(IMAGES, dtype=torch.int64)
    classes = data.velocity(path), null.velocity(path)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        v, v_null = (velocity(x.double(), t.double()) for velocity in classes)
        return torch.where(expand_like(y == 1, x), v_null, v)

    guidance = {"scale": 2.0, "low": low, "high": high}
    velocity = GuidedVelocity(model, labels, 1, **guidance)
    in_pieces = partial(guided_dopri5, velocity, start)
    exact, _ = in_pieces(atol=1e-10, rtol=1e-7)
    figures: dict = {**guidance, "rtol": [1e-3, 1e-4]}
    for how, solve in {
        "one go": partial(dopri5, velocity, start),
        "pieces": in_pieces,
    }.items():
        ends = [solve(atol=rtol / 1000, rtol=rtol) for rtol in figures["rtol"]]
        figures[how] = {
            "evaluations": [count.double().mean().item() for _, count in ends],
            "error": [relative_rms_error(data, end, exact) for end, _ in ends],
        }
    return figures


def objective_figures(data: Gaussian, name: str, prediction: str) -> dict[str, float]:
    """Of a perfect network of that prediction: distance of the ODE's images, and of the SDE's covariance as in sde_figures."""
    path, start, network = (
        INTERPOLANTS[name],
        start_noise(data),
        data.predict_expected(INTERPOLANTS[name], prediction),
    )
    lo, hi = ends = time_interval(path, prediction)

    def velocity(x: Tensor, t: float | Tensor) -> Tensor:
        times = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return prediction_to_velocity(path, prediction, network(x, times), x, times)

    adaptive, evaluations = dopri5(velocity, start, t_start=hi, t_end=lo)
    if lo > 0:
        adaptive, evaluations = denoise(velocity, path, adaptive, lo), evaluations + 1
    _, covariance = sde_moments(velocity, path, len(data.mean), 250, ends=ends)
    times = ode_times(32, ends)
    heun_end = denoise(velocity, path, heun(velocity, start, times), times[-1])
    return {
        "Heun": relative_rms_error(data, heun_end, data.flow(start)),
        "dopri5": relative_rms_error(data, adaptive, data.flow(start)),
        "evaluations": evaluations.double().mean().item(),
        "SDE": ((covariance - data.covariance).norm() / data.covariance.norm()).item(),
    }


def order(figures: dict[str, list]) -> float:
    """Minus the slope of the error over the evaluations, both as logarithms, at the finest two."""
    (n0, n1), (e0, e1) = np.log(figures["evaluations"][-2:]), np.log(figures["error"][-2:])
    return -(e1 - e0) / (n1 - n0)


def measure() -> dict:
    """All figures, to four digits."""
    data = example_gaussian(EXAMPLE_STDS)
    odes = {name: ode_figures(data, INTERPOLANTS[name]) for name in DRAWN}
    sdes = {
        name: {how: sde_figures(data, INTERPOLANTS[name], last) for how, last in LAST.items()}
        for name in DRAWN
    }
    orders = {
        name: {solver: order(odes[name][solver]) for solver in ("Euler", "Heun")} for name in DRAWN
    }
    for name in DRAWN:
        orders[name]["Euler-Maruyama"] = order(sdes[name]["last step 1 / n"])
    guidance = interval_figures(
        data, example_gaussian([0.5, 0.9, 1.1, 1.4], seed=1), INTERPOLANTS["linear"]
    )
    what = {"standard deviations": EXAMPLE_STDS, "images": IMAGES}
    objectives = {
        name: {prediction: objective_figures(data, name, prediction) for prediction in PREDICTIONS}
        for name in INTERPOLANTS
    }
    return rounded(
        {
            **what,
            "ode": odes,
            "sde": sdes,
            "order": orders,
            "interval": guidance,
            "objectives": objectives,
        }
    )


def markdown_tables(figures: dict) -> list[str]:
    """The rows of docs/sampling.md: of each path; of guidance in an interval; of each objective."""
    paths, k, published = [], TOLERANCES.index(1e-3), SDE_BUDGETS.index(250)
    for name in DRAWN:
        solved, sdes = figures["ode"][name], figures["sde"][name]
        at = {
            solver: solved[solver]["error"][EVALUATION_COUNTS.index(64)]
            for solver in ("Euler", "Heun")
        }
        adaptive = "{:.2g} ({:.0f}, at most {:.0f})".format(
            *(solved["dopri5"][key][k] for key in ("error", "of an image, mean", "evaluations"))
        )
        orders = " | ".join(f"{value:.2f}" for value in figures["order"][name].values())
        off = " | ".join(f"{sdes[how]['error'][published]:.2%}" for how in LAST)
        paths.append(
            f"| {name} | {orders} | {at['Euler']:.2g} | {at['Heun']:.2g} | {adaptive} | {off} |"
        )
    ways = [
        f"| {how} | {rtol:g} | {figures['interval'][how]['evaluations'][i]:.0f} | {figures['interval'][how]['error'][i]:.2g} |"
        for how in ("one go", "pieces")
        for i, rtol in enumerate(figures["interval"]["rtol"])
    ]
    objectives = [
        f"| {name} | {prediction} | {at['Heun']:.2g} | {at['dopri5']:.2g} ({at['evaluations']:.0f}) | {at['SDE']:.2%} |"
        for name, predictions in figures["objectives"].items()
        for prediction, at in predictions.items()
    ]
    return ["\n".join(paths), "\n".join(ways), "\n".join(objectives)]


def rounded(value: dict | list | float) -> dict | list | float:
    """Every number to four digits, so that another machine's last bit changes nothing."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else float(f"{value:.4g}")


def draw(figures: dict, out: Path) -> None:
    """The ODE on either path, then the SDE on both; dashed, what the order of a solver promises."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axis, (name, solvers) in zip(axes, figures["ode"].items()):
        axis.set_title(f"ODE, {name} path")
        for (solver, curve), p, color in zip(solvers.items(), (1, 2, 5), ("C0", "C1", "C2")):
            axis.plot(
                curve["evaluations"],
                curve["error"],
                color,
                marker="o",
                markersize=3.5,
                label=solver,
            )
            slope(axis, curve, p)
        axis.set_ylim(1e-10, 2)
    axes[0].set_ylabel("error of an image (RMS, data's std = 1)")
    axes[2].set_title("SDE, Euler-Maruyama")
    axes[2].set_ylabel("error of the covariance, relative")
    for (name, ways), color in zip(figures["sde"].items(), ("C3", "C4")):
        for (how, curve), style in zip(ways.items(), ("-", ":")):
            axes[2].plot(
                curve["evaluations"],
                curve["error"],
                color,
                linestyle=style,
                marker="o",
                markersize=3.5,
                label=f"{name}, {how}",
            )
    slope(axes[2], figures["sde"]["linear"]["last step 1 / n"], 1)
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="network evaluations", xlim=(6, 1000))
        axis.set_xticks(EVALUATION_COUNTS, [str(n) for n in EVALUATION_COUNTS])
        axis.minorticks_off()
        axis.grid(True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower left")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    write_file(out, png.getvalue())


def slope(axis, curve: dict[str, list], p: int) -> None:
    """A dashed line falling as evaluations^-p, beside the finest three points."""
    n, error = np.array(curve["evaluations"][-3:]), curve["error"][-1]
    line = (0.3 if p > 2 else 2.5) * error * (n / n[-1]) ** -float(p)
    axis.plot(n, line, "0.5", linestyle="--", linewidth=1)
    axis.annotate(
        f"order {p}",
        (n[-1], line[-1]),
        (4, -3),
        textcoords="offset points",
        color="0.35",
        fontsize=8.5,
    )


def main() -> None:
    parser = cli.Parser(__doc__, "python -m experiments.solvers", "--out PICTURE.png")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="picture to write; the figures go beside it as .json",
    )
    args = parser.parse_args()
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out} must end in .png")
    figures = measure()
    write_file(args.out.with_suffix(".json"), json.dumps(figures, indent=1).encode() + b"\n")
    draw(figures, args.out)
    print(f"solvers: {args.out}")


if __name__ == "__main__":
    cli.run(main)
