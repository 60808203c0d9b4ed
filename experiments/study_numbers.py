"""What a study of convergence found, from its JSON alone: its curves, and the numbers as tables and prose write them.

The first of found["methods"] is the baseline. Runs are compared seed by seed, so of a study under way only the seeds that both
have.
"""

import math
from typing import NamedTuple

import numpy as np

from common.cli import UserError
from experiments.results import Estimate, estimate
from experiments.speedup import Span, SpeedUp, bootstrap, detectable, speed_up


class Curves(NamedTuple):
    """A metric of all runs at the P numbers of images where each of them has it: name -> seed -> (P,)."""

    images: np.ndarray
    of: dict[str, dict[int, np.ndarray]]

    def pair(self, name: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        """(n, P) of each, a row for each of the n seeds in common."""
        both = [self.of.get(each, {}) for each in (name, other)]
        seeds = sorted(both[0].keys() & both[1].keys())
        return tuple(
            np.array([each[seed] for seed in seeds]).reshape(len(seeds), len(self.images))
            for each in both
        )


def curves(found: dict, metric: str) -> Curves:
    """Raises UserError."""
    points: dict[tuple[str, int], dict[int, float]] = {}
    for run in found["runs"]:
        measured = zip(run["metrics"].get("images", []), run["metrics"].get(metric, []))
        at = {images: value for images, value in measured if value is not None}
        if not all(math.isfinite(value) for value in at.values()):
            raise UserError(
                f"{metric} of {run['name']}, seed {run['seed']}, is not finite: a run that failed has no mean"
            )
        if at:
            points[run["name"], run["seed"]] = at
    images = sorted(set.intersection(*(set(at) for at in points.values()))) if points else []
    if points and not images:
        raise UserError(
            f"{metric} was measured after other numbers of images in each run: nothing can be compared"
        )
    of: dict[str, dict[int, np.ndarray]] = {}
    for (name, seed), at in points.items():
        of.setdefault(name, {})[seed] = np.array([at[each] for each in images])
    return Curves(np.array(images), of)


def main_curves(found: dict) -> Curves:
    """Of the study's metric. Raises UserError without the baseline, which all others are compared with."""
    quality, base = curves(found, found["metric"]), found["methods"][0]
    if base["name"] not in quality.of:
        raise UserError(
            f"no finished run of {base['label']} ({base['name']}), which all others are compared with"
        )
    return quality


def held_out_times(found: dict) -> list[str]:
    """The times at which the loss on held-out images was measured, as its columns have them."""
    keys = dict.fromkeys(
        key for run in found["runs"] for key in run["metrics"] if key.startswith("held_out_")
    )
    return [key.removeprefix("held_out_") for key in keys]


def all_seeds(found: dict) -> list[int]:
    return sorted({run["seed"] for run in found["runs"]})


def mean_end(measured: Curves, name: str) -> float:
    """What a method ends with, over all of its seeds."""
    return float(np.mean([curve[-1] for curve in measured.of[name].values()]))


def costs(found: dict) -> dict[str, dict[str, float]]:
    """Unit -> method -> what training on an image costs, as a multiple of the baseline's. Only what is known."""
    each = {
        "FLOP": {method["name"]: method.get("training_flops") for method in found["methods"]},
        "second": {
            method["name"]: (method.get("step_s") or {}).get("median")
            for method in found["methods"]
        },
    }
    base = found["methods"][0]["name"]
    return {
        unit: {name: cost / of[base] for name, cost in of.items() if cost and of[base]}
        for unit, of in each.items()
    }


def probed_seeds(found: dict) -> set[int]:
    """The seeds with which every method that was probed at all was."""
    seeds: dict[str, set[int]] = {}
    for run in found["runs"]:
        if run.get("probe"):
            seeds.setdefault(run["name"], set()).add(run["seed"])
    return set.intersection(*seeds.values()) if seeds else set()


def probed_blocks(found: dict) -> tuple[int, int]:
    """How many blocks were probed, and with how many seeds."""
    each = [len(run["probe"]["accuracy"]) for run in found["runs"] if run.get("probe")]
    return max(each, default=0), len(probed_seeds(found))


def probe(found: dict, name: str) -> tuple[str, float] | None:
    """The block from which a linear probe reads the class best, and how often, as means over the seeds of probed_seeds."""
    seeds = probed_seeds(found)
    told = [
        run["probe"]["accuracy"]
        for run in found["runs"]
        if run["name"] == name and run["seed"] in seeds and run.get("probe")
    ]
    blocks = [block for block in (told[0] if told else []) if all(block in each for each in told)]
    means = {block: float(np.mean([each[block] for each in told])) for block in blocks}
    return max(means.items(), key=lambda item: item[1]) if means else None


def spelled(span: Span) -> str:
    """1.12, or on which side of a number it is."""
    if span.low == span.high:
        return f"{span.low:.2f}"
    bounds = [f"> {span.low:.2f}"] * (span.low > 0) + [f"< {span.high:.2f}"] * (
        span.high < math.inf
    )
    return " and ".join(bounds) or "unknown"


def spelled_speed_up(found: SpeedUp) -> str:
    """1.12 (1.05 to 1.20), or the bound alone where the interval's ends are the same one."""
    value, *ends = (spelled(span) for span in found[2:] if span)
    same = found.value.low < found.value.high and {*ends} == {value}
    return value if same or not ends else f"{value} ({' to '.join(ends)})"


def spelled_ends(found: Estimate, form: str) -> str:
    """-0.164 to -0.022."""
    return f"{found.low:{form}} to {found.high:{form}}"


def spelled_estimate(found: Estimate, form: str) -> str:
    """-0.093 (-0.164 to -0.022)."""
    return f"{found.mean:{form}}" + (
        f" ({spelled_ends(found, form)})" if found.low is not None else ""
    )


def decimals(mean: float) -> int:
    """As many as give a mean of this size four digits."""
    return max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 3


def figures(found: dict) -> dict[str, str]:
    """The numbers as tables and prose write them, under "METHOD WHAT". What was not measured has no entry. Raises UserError.

    Of each method `seeds` (in common with the baseline), the study's metric (`FD-fashion`), `agreement`, `precision`,
    `recall`, `held-out`, `probe`.
    Against the baseline `difference`, `better` (the seeds that are), `student` (its other interval), `detectable`, `agreement
    difference`, `held-out difference`, and `held-out at T` in percent; `speed-up`, `speed-up per FLOP`, `speed-up per second`
    at the quality that the baseline ends with, and `speed-up at IMAGES` at the one that it has there.
    """
    base, quality, told = found["methods"][0]["name"], main_curves(found), {}
    columns = {
        "agreement": "class_agreement",
        "held-out": "held_out",
        "precision": "precision",
        "recall": "recall",
    }
    others = {what: curves(found, column) for what, column in columns.items()}
    by_time = {t: curves(found, f"held_out_{t}") for t in held_out_times(found)}
    digits = decimals(mean_end(quality, base))
    for name in (method["name"] for method in found["methods"]):
        if name in quality.of:
            told[f"{name} seeds"] = str(len(quality.pair(name, base)[0]))
            told[f"{name} {found['metric']}"] = f"{mean_end(quality, name):.{digits}f}"
        for what, measured in others.items():
            if name not in measured.of:
                continue
            percent, (ours, theirs) = what == "agreement", measured.pair(name, base)
            end = mean_end(measured, name)
            places = (
                1
                if percent
                else decimals(mean_end(measured, base if base in measured.of else name))
            )
            told[f"{name} {what}"] = f"{end:.1%}" if percent else f"{end:.{places}f}"
            if name != base and len(ours) and what in ("agreement", "held-out"):
                apart = (ours - theirs)[:, -1] * (100 if percent else 1)
                told[f"{name} {what} difference"] = spelled_estimate(
                    bootstrap(apart.tolist()), f"+.{places}f"
                )
        if best := probe(found, name):
            told[f"{name} probe"] = f"{best[1]:.1%} (block {best[0]})"
        ours, theirs = quality.pair(name, base)
        if name == base or not len(ours):
            continue
        differences = (ours - theirs)[:, -1].tolist()
        told[f"{name} better"] = f"{sum(each < 0 for each in differences)} of {len(differences)}"
        for t, measured in by_time.items():
            ours_then, theirs_then = measured.pair(name, base)
            percent = 100 * (ours_then - theirs_then)[:, -1] / theirs_then[:, -1].mean()
            told[f"{name} held-out at {t}"] = spelled_estimate(bootstrap(percent.tolist()), "+.1f")
        told[f"{name} difference"] = spelled_estimate(bootstrap(differences), f"+.{digits}f")
        if len(ours) > 1:
            told[f"{name} student"] = spelled_ends(estimate(differences), f"+.{digits}f")
            told[f"{name} detectable"] = f"{detectable(differences):.{digits}f}"
        speeds = speed_up(quality.images, theirs, ours)
        told |= {f"{name} speed-up at {each.images}": spelled_speed_up(each) for each in speeds}
        told[f"{name} speed-up"] = spelled_speed_up(speeds[-1])
        for unit, of in costs(found).items():
            if name in of:
                told[f"{name} speed-up per {unit}"] = spelled_speed_up(speeds[-1].per(of[name]))
    return told
