"""What a study of convergence found, from its JSON alone: the numbers as prose quotes them, tables, and a figure.

The first of found["methods"] is the baseline. Runs are compared seed by seed, so of a study under way only the seeds that both
have."""

import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError
from experiments.results import Estimate, estimate
from experiments.speedup import COVERAGE, Span, SpeedUp, bootstrap, detectable, speed_up
from files import write_file

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")  # Okabe and Ito, without yellow
MARKERS = "osD^vPX"


class Curves(NamedTuple):
    """A metric of all runs at the P numbers of images where each of them has it: name -> seed -> (P,)."""

    images: np.ndarray
    of: dict[str, dict[int, np.ndarray]]

    def pair(self, name: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        """(n, P) of each, a row for each of the n seeds in common."""
        both = [self.of.get(each, {}) for each in (name, other)]
        seeds = sorted(both[0].keys() & both[1].keys())
        return tuple(np.array([each[seed] for seed in seeds]).reshape(len(seeds), len(self.images)) for each in both)


def curves(found: dict, metric: str) -> Curves:
    """Raises UserError."""
    points: dict[tuple[str, int], dict[int, float]] = {}
    for run in found["runs"]:
        measured = zip(run["metrics"].get("images", []), run["metrics"].get(metric, []))
        at = {images: value for images, value in measured if value is not None}
        if not all(math.isfinite(value) for value in at.values()):
            raise UserError(f"{metric} of {run['name']}, seed {run['seed']}, is not finite: a run that failed has no mean")
        if at:
            points[run["name"], run["seed"]] = at
    images = sorted(set.intersection(*(set(at) for at in points.values()))) if points else []
    if points and not images:
        raise UserError(f"{metric} was measured after other numbers of images in each run: nothing can be compared")
    of: dict[str, dict[int, np.ndarray]] = {}
    for (name, seed), at in points.items():
        of.setdefault(name, {})[seed] = np.array([at[each] for each in images])
    return Curves(np.array(images), of)


def main_curves(found: dict) -> Curves:
    """Of the study's metric. Raises UserError without the baseline, which all others are compared with."""
    quality, base = curves(found, found["metric"]), found["methods"][0]
    if base["name"] not in quality.of:
        raise UserError(f"no finished run of {base['label']} ({base['name']}), which all others are compared with")
    return quality


def all_seeds(found: dict) -> list[int]:
    return sorted({run["seed"] for run in found["runs"]})


def costs(found: dict) -> dict[str, dict[str, float]]:
    """Unit -> method -> what training on an image costs, as a multiple of the baseline's. Only what is known."""
    each = {
        "FLOP": {method["name"]: method.get("training_flops") for method in found["methods"]},
        "second": {method["name"]: (method.get("step_s") or {}).get("median") for method in found["methods"]},
    }
    base = found["methods"][0]["name"]
    return {unit: {name: cost / of[base] for name, cost in of.items() if cost and of[base]} for unit, of in each.items()}


def probe(found: dict, name: str) -> tuple[str, float] | None:
    """The block from which a linear probe reads the class best, and how often, as means over seeds."""
    told = [run["probe"]["accuracy"] for run in found["runs"] if run["name"] == name and run.get("probe")]
    blocks = [block for block in (told[0] if told else []) if all(block in each for each in told)]
    means = {block: float(np.mean([each[block] for each in told])) for block in blocks}
    return max(means.items(), key=lambda item: item[1]) if means else None


def spelled(span: Span) -> str:
    """1.12, or on which side of a number it is."""
    if span.low == span.high:
        return f"{span.low:.2f}"
    bounds = [f"> {span.low:.2f}"] * (span.low > 0) + [f"< {span.high:.2f}"] * (span.high < math.inf)
    return " and ".join(bounds) or "unknown"


def spelled_speed_up(found: SpeedUp) -> str:
    """1.12 (1.05 to 1.20)."""
    if found.low is None:
        return spelled(found.value)
    return f"{spelled(found.value)} ({spelled(found.low)} to {spelled(found.high)})"


def spelled_ends(found: Estimate, form: str) -> str:
    """-0.164 to -0.022."""
    return f"{found.low:{form}} to {found.high:{form}}"


def spelled_estimate(found: Estimate, form: str) -> str:
    """-0.093 (-0.164 to -0.022)."""
    return f"{found.mean:{form}}" + (f" ({spelled_ends(found, form)})" if found.low is not None else "")


def decimals(mean: float) -> int:
    """As many as give a mean of this size four digits."""
    return max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 3


def figures(found: dict) -> dict[str, str]:
    """The numbers as tables and prose write them, under "METHOD WHAT". What was not measured has no entry. Raises UserError.

    Of each method `seeds` (in common with the baseline), the study's metric (`FD-fashion`), `agreement`, `held-out`, `probe`.
    Against the baseline `difference`, `student` (its other interval), `detectable`, `agreement difference`, `held-out
    difference`; `speed-up`, `speed-up per FLOP`, `speed-up per second` at the quality that the baseline ends with, and
    `speed-up at IMAGES` at the one that it has there."""
    base, quality, told = found["methods"][0]["name"], main_curves(found), {}
    others = {"agreement": curves(found, "class_agreement"), "held-out": curves(found, "held_out")}
    digits = decimals(np.mean([curve[-1] for curve in quality.of[base].values()]))
    for name in (method["name"] for method in found["methods"]):
        if name in quality.of:
            told[f"{name} seeds"] = str(len(quality.pair(name, base)[0]))
            told[f"{name} {found['metric']}"] = f"{np.mean([curve[-1] for curve in quality.of[name].values()]):.{digits}f}"
        for what, measured in others.items():
            percent = what == "agreement"
            ours, theirs = measured.pair(name, base)
            if name not in measured.of:
                continue
            end = float(np.mean([curve[-1] for curve in measured.of[name].values()]))
            places = 1 if percent else decimals(end)
            told[f"{name} {what}"] = f"{end:.1%}" if percent else f"{end:.{places}f}"
            if name != base and len(ours):
                apart = (ours - theirs)[:, -1] * (100 if percent else 1)
                told[f"{name} {what} difference"] = spelled_estimate(bootstrap(apart.tolist()), f"+.{places}f")
        if best := probe(found, name):
            told[f"{name} probe"] = f"{best[1]:.1%} (block {best[0]})"
        ours, theirs = quality.pair(name, base)
        if name == base or not len(ours):
            continue
        differences = (ours - theirs)[:, -1].tolist()
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


def markdown(rows: list[list[str]]) -> list[str]:
    """The first is the head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body, ""]


def table(found: dict) -> str:
    """Markdown: quality and speed-up at the end; what else was measured there; speed-up on the way. Raises UserError."""
    metric, told, quality = found["metric"], figures(found), main_curves(found)
    base, floor, seeds = found["methods"][0], found.get("floor") or {}, all_seeds(found)
    ends = ["difference", "student", "detectable", "speed-up", "speed-up per FLOP", "speed-up per second"]
    rest = ["agreement", "agreement difference", "held-out", "held-out difference", "probe"]
    against = f"against {base['label']}"
    first = [["", metric, against, "Student's 95%", "detectable", "speed-up in images", "in FLOPs", "in seconds"]]
    second = [["", "classes agree", f"{against}, points", "held-out loss", against, "probe, best block"]]
    at = sorted({int(key.rpartition(" ")[2]) for key in told if " speed-up at " in key})
    third = [["", "FLOPs per image", "seconds per step", *(f"at {base['label']}'s {thousands(images)}" for images in at)]]
    cost = costs(found)
    for method in found["methods"]:
        name, count = method["name"], int(told.get(f"{method['name']} seeds", 0))
        label = method["label"] + f" ({count} of {len(seeds)} seeds)" * (0 < count < len(seeds))
        if f"{name} {metric}" not in told:
            first.append([label, "not run", *[""] * len(ends)])
            continue
        first.append([label, *(told.get(f"{name} {key}", "") for key in (metric, *ends))])
        second.append([label, *(told.get(f"{name} {key}", "") for key in rest)])
        relative = [f"x {of[name]:.2f}" if name in of else "" for of in cost.values()]
        third.append([label, *relative, *(told.get(f"{name} speed-up at {images}", "") for images in at)])
    if metric in floor:
        first.append(["*the autoencoder's own*", f"*{floor[metric]:.3f}*", *[""] * len(ends)])
    if "class_agreement" in floor:
        second.append(["*the autoencoder's own*", f"*{floor['class_agreement']:.1%}*", *[""] * (len(rest) - 1)])
    tables = [line for rows in (first, second, third) for line in markdown(rows)]
    return "\n".join([*tables, *legend(found, quality), "", "```bash", found["command"], "```"]) + "\n"


def legend(found: dict, quality: Curves) -> list[str]:
    """What the tables' numbers are."""
    base, metric, seeds = found["methods"][0], found["metric"], " ".join(map(str, all_seeds(found)))
    counts = {len(quality.pair(method["name"], base["name"])[0]) for method in found["methods"][1:]}
    cover = [f"{COVERAGE[count]:.0%} with {count}" for count in sorted(counts) if count in COVERAGE]
    few = f"That is too narrow for few seeds (it covers about {', '.join(cover)}): " if cover else ""
    return [
        f"{found['model']}, {found['steps']:,} steps of {found['batch_size']} images ({thousands(quality.images[-1])} seen), "
        f"seeds {seeds}. Means over seeds at the end. {metric} and held-out loss: lower is better.",
        f"Against {base['label']}: mean difference of runs of one seed, and its 95% percentile bootstrap interval over seeds.",
        f"{few}Student's is exact if differences scatter normally.",
        "Detectable: the mean difference that a paired t test (5%, two-sided) finds in 80% of such studies.",
        f"Speed-up: images that {base['label']} needs for the quality it ends with / images that the method needs for it, of mean",
        "curves, interpolated in logarithms. In FLOPs, seconds: divided by what an image costs. > and <: beyond what was measured.",
    ]  # fmt: skip


def thousands(images: float) -> str:
    """384000 -> 384K."""
    return f"{images / 1e6:.3g}M" if images >= 1e6 else f"{images / 1e3:.3g}K" if images >= 1e3 else f"{images:g}"


def shift(i: int, count: int) -> float:
    """Of the i-th of `count` methods beside a tick, in ticks."""
    return 0.11 * (i - (count - 1) / 2) if count > 1 else 0.0


def draw(found: dict, out: Path) -> None:
    """Curves over images; and as points beside the same numbers of images what each method differs by, and its speed-up.
    Raises UserError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    quality, held_out, methods = main_curves(found), curves(found, "held_out"), found["methods"]
    looks = {method["name"]: {"color": COLOURS[i % 7], "marker": MARKERS[i % 7]} for i, method in enumerate(methods)}
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 8.4), layout="constrained")
    draw_curves(axes[0, 0], found, quality, looks)
    draw_speed_ups(axes[0, 1], found, quality, looks)
    draw_differences(axes[1, 0], found, quality, looks, found["metric"])
    draw_differences(axes[1, 1], found, held_out, looks, "held-out loss")
    axes[1, 1].set_visible(bool(held_out.of))
    for axis in axes.flat:
        axis.grid(True, axis="y", which="both", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [
        plt.Line2D([], [], **looks[method["name"]], markersize=5, label=method["label"])
        for method in methods if method["name"] in quality.of
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, columnspacing=1.2)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    write_file(out, png.getvalue())


def draw_curves(axis, found: dict, quality: Curves, looks: dict) -> None:
    """Means over seeds, and from the smallest to the largest seed."""
    for name, look in looks.items():
        if name in quality.of:
            each = np.array([*quality.of[name].values()])
            axis.plot(quality.images / 1e3, each.mean(0), **look, markersize=3.5, linewidth=1.4)
            axis.fill_between(quality.images / 1e3, each.min(0), each.max(0), color=look["color"], alpha=0.13, linewidth=0)
    floor = (found.get("floor") or {}).get(found["metric"])
    if floor:
        axis.axhline(floor, color="0.35", linestyle="--", linewidth=1.2)
        axis.text(0.02, floor, "the autoencoder's own", color="0.35", va="bottom", transform=axis.get_yaxis_transform())
    axis.set(xscale="log", yscale="log", title=f"{found['metric']}: mean over seeds, band from least to most")
    axis.set_xlabel("thousand images seen")


def draw_speed_ups(axis, found: dict, quality: Curves, looks: dict) -> None:
    """In images, where the baseline has measured points; an arrow stands for an end of an interval that is unknown."""
    base, *names = looks
    pairs = {name: quality.pair(name, base) for name in names}
    speeds = {name: speed_up(quality.images, theirs, ours) for name, (ours, theirs) in pairs.items() if len(ours)}
    spans = [span for each in speeds.values() for speed in each for span in speed[2:] if span]
    known = [bound for span in spans for bound in span if 0 < bound < math.inf] + [1.0]
    low, high = 0.97 * min(known), 1.03 * max(known)
    for i, (name, each) in enumerate(speeds.items()):
        for k, (_, _, value, least, most) in enumerate(each):
            x, look = k + shift(i, len(speeds)), {"color": looks[name]["color"], "clip_on": False}
            if least is not None:
                axis.plot([x, x], [max(low, least.low), min(high, most.high)], linewidth=2.6, **look)
                for there, marker, missing in ((low, "v", least.low == 0), (high, "^", most.high == math.inf)):
                    if missing:
                        axis.plot(x, there, marker=marker, **look)
            if value.low == value.high:
                axis.plot(x, value.low, **looks[name], markersize=4.5)
            elif value != (0, math.inf):
                bound, marker = (value.high, "v") if value.low == 0 else (value.low, "^")
                axis.plot(x, bound, marker=marker, markersize=7, fillstyle="none", **look)
    axis.axhline(1, color=looks[base]["color"], linewidth=1)
    points = next(iter(speeds.values()), [])
    axis.set_xticks(range(len(points)), [thousands(speed.images) for speed in points])
    axis.set(ylim=(low, high), title="speed-up in images, 95% over seeds")
    axis.set_xlabel(f"at {found['methods'][0]['label']}'s quality after as many images")


def draw_differences(axis, found: dict, measured: Curves, looks: dict, title: str) -> None:
    """Of runs of one seed, in percent of the baseline's mean: thick the bootstrap's interval, thin Student's."""
    base, *names = looks
    names = [name for name in names if name in measured.of]
    for i, name in enumerate(names):
        ours, theirs = measured.pair(name, base)
        if not len(ours):
            continue
        apart, color = 100 * (ours - theirs) / theirs.mean(0), looks[name]["color"]
        for k, column in enumerate(apart.T.tolist()):
            x = k + shift(i, len(names))
            for told, width in ((estimate(column), 0.8), (bootstrap(column), 2.6)):
                if told.low is not None:
                    axis.plot([x, x], [told.low, told.high], color, linewidth=width)
            axis.plot(x, np.mean(column), **looks[name], markersize=4.5)
    axis.axhline(0, color=looks[base]["color"], linewidth=1)
    axis.set_xticks(range(len(measured.images)), [thousands(images) for images in measured.images])
    axis.set(xlabel="images seen", ylabel=f"% of {found['methods'][0]['label']}'s", title=title)
