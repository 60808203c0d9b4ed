"""Print the tables of the documentation, from the results in benchmarks/results.

python -m benchmarks.table
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
NUM_IMAGENET_IMAGES = 1_281_167  # training images
PRECISION_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


def make_tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return the tables as Markdown, by name."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    tables = {}
    for name, table in TABLES.items():
        selected = [result for result in results if result["benchmark"] == table.benchmark]
        tables[name] = table.format(selected)
    return tables


def machine_name(result: dict) -> str:
    """Return a name such as "NVIDIA H200", or "AMD EPYC, 2 threads"."""
    machine = result["machine"]
    if "cuda" in machine:
        return machine["device"]
    return f"{machine['device']}, {machine['cpu_threads']} threads"


def run_name(result: dict) -> str:
    """Return a description of a training run such as "SiT-B/2, batch 8, fp32"."""
    name = f"{result['model']}, batch {result['batch_size']}"
    name += f", {PRECISION_NAMES[result['precision']]}"
    return f"{name}, compiled" if result["compile"] else name


def with_quartiles(figure: dict, digits: str, factor: float = 1.0) -> str:
    """Return a median with its quartiles, such as "1.041 (1.036 to 1.048)".

    Args:
        figure: Return value of `median_and_quartiles`.
        digits: Format of the numbers.
        factor: Factor that converts the unit.
    """
    low, high = figure["quartiles"]
    median, low, high = (value * factor for value in (figure["median"], low, high))
    return f"{median:{digits}} ({low:{digits}} to {high:{digits}})"


def increase(share: float) -> str:
    """Return an increase such as " (+4.0%)", or "" if there is none."""
    return f" (+{share:.1%})" if share else ""


def train_step_rows(result: dict) -> list[list[str]]:
    """Return one row per variant, with the ratios of its time to those of others."""
    rows = []
    for variant, figures in result["results"].items():
        ratios = []
        for pair, ratio in result["ratios"].items():
            name, baseline = pair.split("/")
            if name == variant:
                ratios.append(f"{with_quartiles(ratio, '.3f')} relative to {baseline}")
        rows.append(
            [
                machine_name(result),
                run_name(result),
                variant,
                with_quartiles(figures["step_s"], ".3g"),
                f"{figures['images_per_s']:.3g}",
                f"{figures['mfu']:.0%}",
                f"{figures['first_step_s']:.3g}",
                ", ".join(ratios),
            ]
        )
    return rows


def cost_rows(result: dict) -> list[list[str]]:
    """Return one row per variant, as in Table 5 of the paper; times are empty if not measured."""
    is_timed = "machine" in result
    run = f"{result['model']}, not timed"
    if is_timed:
        run = f"{machine_name(result)}: {run_name(result)}"
    rows = []
    for variant, figures in result["results"].items():
        external = figures["parameters"]["external"]
        heads = figures["parameters"]["heads"]
        forward = sum(figures["forward_flops"].values())
        timing = time_cells(result, variant) if is_timed else ["", "", ""]
        rows.append(
            [
                run,
                variant,
                f"{external / 1e6:.1f}M" if external else "0",
                f"{heads / 1e6:.1f}M{increase(figures['more_parameters'])}" if heads else "0",
                f"{forward / 1e9:.4g}{increase(figures['more_forward_flops'])}",
                f"{figures['training_flops'] / 1e9:.4g}{increase(figures['more_training_flops'])}",
                *timing,
            ]
        )
    return rows


def time_cells(result: dict, variant: str) -> list[str]:
    """Return time, peak memory on a GPU, and time relative to that without alignment."""
    figures = result["results"][variant]
    step = with_quartiles(figures["step_s"], ".3g")
    memory = ""
    if "cuda" in result["machine"]:
        memory = f"{figures['peak_memory_gib']:.1f} GiB"
    ratio = result["ratios"].get(f"{variant}/none")
    relative = with_quartiles(ratio, ".3f") if ratio else ""
    return [f"{step}, {figures['images_per_s']:.3g} images/s", memory, relative]


def checkpoint_rows(result: dict) -> list[list[str]]:
    """Return one row."""
    keys = ("copy_s", "write_s", "longest_pause_s")
    return [
        [
            machine_name(result),
            result["model"],
            f"{result['bytes'] / 1e9:.2f}",
            *(with_quartiles(result["results"][key], ".3g") for key in keys),
        ]
    ]


def data_loading_rows(result: dict) -> list[list[str]]:
    """Return one row per source, with its speedup over .npy files."""
    rows = []
    for name, figures in result["results"].items():
        speedups = [
            with_quartiles(ratio, ".3g")
            for pair, ratio in result["ratios"].items()
            if pair.endswith(f"/{name}")
        ]
        rows.append(
            [
                machine_name(result),
                name,
                with_quartiles(figures["batch_s"], ".3g", factor=1e3),
                f"{figures['samples_per_s']:,.0f}",
                speedups[0] if speedups else "",
            ]
        )
    return rows


def encode_rows(result: dict) -> list[list[str]]:
    """Return one row per method."""
    images = f"{result['resolution']} pixels, {result['precision']}, batch {result['batch_size']}"
    speedup = with_quartiles(result["ratios"]["one at a time/encode_latents"], ".3g")
    vae_share = with_quartiles(result["ratios"]["VAE alone/encode_latents"], ".3f")
    comparisons = {
        "encode_latents": f"{speedup} times as fast as one at a time",
        "VAE alone": f"{vae_share} of the time of encode_latents",
    }
    rows = []
    for name, figures in result["results"].items():
        share = figures["share_of_matmul_rate"]
        rows.append(
            [
                machine_name(result),
                images,
                name,
                with_quartiles(figures["image_s"], ".3g"),
                f"{figures['images_per_s']:.3g}",
                "" if share is None else f"{share:.0%}",
                comparisons.get(name, ""),
            ]
        )
    return rows


def imagenet_rows(result: dict) -> list[list[str]]:
    """Return one row of estimates for ImageNet's training images.

    Sizes follow from the number of images, and the time from the measured rate.
    """
    num_values = 8 * (result["resolution"] // 8) ** 2
    num_bytes = NUM_IMAGENET_IMAGES * num_values * 2
    image_bytes = NUM_IMAGENET_IMAGES * 3 * result["resolution"] ** 2
    flops = result["flops_per_image"]
    figures = result["results"]["encode_latents"]
    days = NUM_IMAGENET_IMAGES / figures["images_per_s"] / 86400
    rate = f"{figures['share_of_matmul_rate']:.0%} of {result['matmul_flops_per_s'] / 1e9:.0f}"
    return [
        [
            str(result["resolution"]),
            f"{num_bytes / 1e9:.0f} GB",
            f"{2 * num_bytes / 1e9:.0f} GB",
            f"{image_bytes / 1e9:,.0f} GB",
            f"{flops / 1e9:.0f}",
            f"{NUM_IMAGENET_IMAGES * flops / 1e15:.0f}",
            f"{days:.0f} days at {rate} GFLOP/s",
        ]
    ]


def evaluation_rows(result: dict) -> list[list[str]]:
    """Return one row per implementation, with the speedup of ours."""
    rows = []
    for name, figures in result["results"].items():
        speedups = [
            f"{with_quartiles(ratio, '.3g')} times as fast as {pair.split('/')[0]}"
            for pair, ratio in result["ratios"].items()
            if pair.endswith(f"/{name}")
        ]
        rows.append(
            [
                machine_name(result),
                f"{result['images']:,} x {result['width']}",
                name,
                with_quartiles(figures["call_s"], ".3g"),
                ", ".join(speedups),
            ]
        )
    return rows


def sampling_rows(result: dict) -> list[list[str]]:
    """Return one row per method; those of sample_ddp are compared with `plain` and the parts."""
    run = f"{result['model']}, {result['resolution']} pixels"
    run += f", {result['num_steps']} steps, batch {result['batch_size']}"
    fastest = {name: figures["fastest_image_s"] for name, figures in result["results"].items()}
    rows = []
    for name, figures in result["results"].items():
        comparison = ["", "", ""]
        if f"plain/{name}" in result["ratios"]:
            comparison = [
                with_quartiles(result["ratios"][f"plain/{name}"], ".3g"),
                f"{fastest['plain'] / fastest[name]:.3g}",
                with_quartiles(result["ratios"][f"alone/{name}"], ".3f"),
            ]
        rows.append(
            [
                machine_name(result),
                run,
                name,
                with_quartiles(figures["image_s"], ".3g"),
                f"{fastest[name]:.3g}",
                f"{figures['images_per_s']:.3g}",
                f"{figures['share_of_matmul_rate']:.0%}",
                *comparison,
            ]
        )
    return rows


def batch_size_rows(result: dict) -> list[list[str]]:
    """Return one row per solver and batch size."""
    num_images = result["images"]
    return [
        [
            solver,
            f"{result['batch_size']} and {other['batch_size']}",
            str(other["largest"]),
            f"{other['values'] * 1e6:.0f}",
            f"{other['images'] * num_images:.0f} of {num_images}",
        ]
        for solver, others in result["results"].items()
        for other in others
    ]


class Table(NamedTuple):
    """A table of the documentation."""

    benchmark: str  # value of "benchmark" in the results
    rows: Callable[[dict], list[list[str]]]  # rows of one result
    header: str
    footer: tuple[str, ...] = ()  # further lines

    def format(self, results: list[dict]) -> str:
        """Return the table of several results as Markdown."""
        rule = "|" + "---|" * (self.header.count("|") - 1)
        rows = [row for result in results for row in self.rows(result)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([self.header, rule, *lines, *self.footer])


TABLES = {
    "train_step": Table(
        "train_step",
        train_step_rows,
        "| machine | run | variant | seconds per step | images/s | MFU | first step, s "
        "| time ratio |",
    ),
    "checkpoint": Table(
        "checkpoint",
        checkpoint_rows,
        "| machine | model | GB | copy to host memory, s | write in the background, s "
        "| longest pause of training, s |",
    ),
    "data_loading": Table(
        "data_loading",
        data_loading_rows,
        "| machine | source | ms per batch | samples/s | speedup over .npy |",
    ),
    "encode": Table(
        "encode",
        encode_rows,
        "| machine | images | method | seconds per image | images/s | share of matmul rate "
        "| comparison |",
    ),
    "evaluation": Table(
        "evaluation",
        evaluation_rows,
        "| machine | features | implementation | seconds per call | speedup |",
    ),
    "sampling": Table(
        "sampling",
        sampling_rows,
        "| machine | run | method | seconds per image | fastest round | images/s "
        "| share of matmul rate | speedup over plain | speedup of the fastest round "
        "| network and VAE alone / sample_ddp |",
    ),
    "batch_size": Table(
        "batch_size",
        batch_size_rows,
        "| solver | batch sizes | largest difference, grey levels "
        "| values that differ, per million | images that differ |",
    ),
    "imagenet": Table(
        "encode",
        imagenet_rows,
        "| pixels | cache, float16 | with --flip | --keep-images | GFLOPs per image "
        "| total PFLOPs | on two CPU cores |",
    ),
    "cost": Table(
        "cost",
        cost_rows,
        "| run | method | external parameters | head parameters | forward GFLOPs "
        "| training GFLOPs | seconds per step | peak memory | time relative to none |",
        footer=(
            # The paper does not state the unit of its speed.
            "| SRA 2 paper: SiT-XL/2, batch 256, H100 | SRA 2 | 0 | 18M | +4%, latency +6% |  |  "
            "|  | speed 7.2, without alignment 8.1 |",
            "",
            "The teacher of sra is the run's EMA: it adds no parameters, and only the memory of "
            "its activations.",
        ),
    ),
}


if __name__ == "__main__":
    print("\n\n".join(make_tables().values()))
