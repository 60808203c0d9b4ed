"""The tables of docs/{performance,data,evaluation,sampling}.md, from the files under benchmarks/results.

python -m benchmarks.table
"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NUM_IMAGENET_IMAGES = 1_281_167  # training images
PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
PAPERS_COST = "| the paper's: SiT-XL/2, batch 256, H100 | SRA 2 | 0 | 18M | +4%, latency +6% | | | | speed 7.2, without it 8.1 |"
TEACHER = "sra's teacher is the average that every run keeps: no external parameters, and no memory but its activations'."


def machine_name(result: dict) -> str:
    """'NVIDIA H200', or 'AMD EPYC, 2 threads'."""
    machine = result["machine"]
    return (
        machine["device"]
        if "cuda" in machine
        else f"{machine['device']}, {machine['cpu_threads']} threads"
    )


def with_quartiles(figure: dict, digits: str) -> str:
    """'1.041 (1.036 to 1.048)'."""
    low, high = figure["quartiles"]
    return f"{figure['median']:{digits}} ({low:{digits}} to {high:{digits}})"


def trained_how(result: dict) -> str:
    """'SiT-B/2, batch 8, fp32'."""
    precision, compiled = PRECISIONS[result["precision"]], ", compiled" * result["compile"]
    return f"{result['model']}, batch {result['batch_size']}, {precision}{compiled}"


def train_step_rows(result: dict) -> list[str]:
    """One row a way of training, the ratios beside those that align."""
    rows = []
    for name, figures in result["results"].items():
        ratios = [
            f"{with_quartiles(ratio, '.3f')} of {key.split('/')[1]}"
            for key, ratio in result["ratios"].items()
            if key.split("/")[0] == name
        ]
        rows.append(
            f"| {machine_name(result)} | {trained_how(result)} | {name} | {with_quartiles(figures['step_s'], '.3g')} | "
            f"{figures['images_per_s']:.3g} | {figures['mfu']:.0%} | {figures['first_step_s']:.3g} | {', '.join(ratios)} |"
        )
    return rows


def cost_rows(result: dict) -> list[str]:
    """One row a way of training, as in the paper's Table 5; what was not timed is left empty."""
    timed = "machine" in result
    what = (
        f"{machine_name(result)}: {trained_how(result)}" if timed else f"{result['model']}, counted"
    )
    rows = []
    for name, figures in result["results"].items():
        heads, external, forward = (
            figures["parameters"]["heads"],
            figures["parameters"]["external"],
            figures["forward_flops"],
        )
        cells = [
            f"{external / 1e6:.1f}M" if external else "0",
            f"{heads / 1e6:.1f}M (+{figures['more_parameters']:.1%})" if heads else "0",
            f"{sum(forward.values()) / 1e9:.4g}" + more(figures["more_forward_flops"]),
            f"{figures['training_flops'] / 1e9:.4g}" + more(figures["more_training_flops"]),
            f"{with_quartiles(figures['step_s'], '.3g')}, {figures['images_per_s']:.3g} images/s"
            if timed
            else "",
            f"{figures['peak_memory_gib']:.1f} GiB"
            if timed and "cuda" in result["machine"]
            else "",
            with_quartiles(result["ratios"][f"{name}/none"], ".3f")
            if timed and f"{name}/none" in result["ratios"]
            else "",
        ]
        rows.append(f"| {what} | {name} | {' | '.join(cells)} |")
    return rows


def more(share: float) -> str:
    """' (+4.0%)', or nothing."""
    return f" (+{share:.1%})" if share else ""


def cost_table(results: list[dict]) -> str:
    """The paper's Table 5, with the paper's own row last, and a line about the teacher."""
    head = "| what | method | external parameters | head parameters | GFLOPs forward | of training | step, s | peak memory |"
    rows = [row for result in results for row in cost_rows(result)]
    return "\n".join(
        [
            f"{head} step, times vanilla's |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            PAPERS_COST,
            "",
            TEACHER,
        ]
    )


def checkpoint_row(result: dict) -> str:
    """One row a file."""
    cells = [
        with_quartiles(result["results"][key], ".3g")
        for key in ("copy_s", "write_s", "longest_pause_s")
    ]
    return f"| {machine_name(result)} | {result['model']} | {result['bytes'] / 1e9:.2f} | {' | '.join(cells)} |"


def data_loading_rows(result: dict) -> list[str]:
    """One row a way of reading, with how many times faster than files it is."""
    rows = []
    for name, figures in result["results"].items():
        ratios = [
            with_quartiles(ratio, ".3g")
            for key, ratio in result["ratios"].items()
            if key.endswith(f"/{name}")
        ]
        rows.append(
            f"| {machine_name(result)} | {name} | {with_quartiles(scaled(figures['batch_s'], 1e3), '.3g')} | "
            f"{figures['samples_per_s']:,.0f} | {ratios[0] if ratios else ''} |"
        )
    return rows


def encode_rows(result: dict) -> list[str]:
    """One row a way of encoding."""
    how = f"{result['resolution']} pixels, {result['precision']}, batch {result['batch_size']}"
    beside = {
        "encode_latents": f"{with_quartiles(result['ratios']['one at a time/encode_latents'], '.3g')} times one at a time",
        "VAE alone": f"{with_quartiles(result['ratios']['VAE alone/encode_latents'], '.3f')} of encode_latents' time",
    }
    rows = []
    for name, figures in result["results"].items():
        share = (
            ""
            if figures["share_of_matmul_rate"] is None
            else f"{figures['share_of_matmul_rate']:.0%}"
        )
        rows.append(
            f"| {machine_name(result)} | {how} | {name} | {with_quartiles(figures['image_s'], '.3g')} | "
            f"{figures['images_per_s']:.3g} | {share} | {beside.get(name, '')} |"
        )
    return rows


def sampling_rows(result: dict) -> list[str]:
    """One row a way of sampling; beside sample_ddp.py's: how much faster than plain it is, and the two networks' share."""
    how = f"{result['model']}, {result['resolution']} pixels, {result['num_steps']} steps, batch {result['batch_size']}"
    fastest = {name: figures["fastest_image_s"] for name, figures in result["results"].items()}
    rows = []
    for name, figures in result["results"].items():
        gain, alone = (result["ratios"].get(f"{other}/{name}") for other in ("plain", "alone"))
        cells = (
            ["", "", ""]
            if gain is None
            else [
                with_quartiles(gain, ".3g"),
                f"{fastest['plain'] / fastest[name]:.3g}",
                with_quartiles(alone, ".3f"),
            ]
        )
        rows.append(
            f"| {machine_name(result)} | {how} | {name} | {with_quartiles(figures['image_s'], '.3g')} | "
            f"{fastest[name]:.3g} | {figures['images_per_s']:.3g} | {figures['share_of_matmul_rate']:.0%} | "
            f"{' | '.join(cells)} |"
        )
    return rows


def batch_size_rows(result: dict) -> list[str]:
    """One row a solver and batch size."""
    return [
        f"| {solver} | {result['batch_size']} and {other['batch_size']} | {other['largest']} | "
        f"{other['values'] * 1e6:.0f} | {other['images'] * result['images']:.0f} of {result['images']} |"
        for solver, others in result["results"].items()
        for other in others
    ]


def imagenet_rows(result: dict) -> list[str]:
    """What ImageNet's training images would take: size of the cache by count, time by the rate that was measured."""
    side, rate, figures = result["resolution"] // 8, result["matmul_flops_per_s"], result["results"]
    size, flops = NUM_IMAGENET_IMAGES * 8 * side**2 * 2, result["flops_per_image"]
    days = NUM_IMAGENET_IMAGES / figures["encode_latents"]["images_per_s"] / 86400
    share = figures["encode_latents"]["share_of_matmul_rate"]
    images = NUM_IMAGENET_IMAGES * 3 * result["resolution"] ** 2
    return [
        f"| {result['resolution']} | {size / 1e9:.0f} GB | {2 * size / 1e9:.0f} GB | {images / 1e9:,.0f} GB | "
        f"{flops / 1e9:.0f} | "
        f"{NUM_IMAGENET_IMAGES * flops / 1e15:.0f} | {days:.0f} days at {share:.0%} of {rate / 1e9:.0f} GFLOP/s |"
    ]


def evaluation_rows(result: dict) -> list[str]:
    """One row a way of computing a metric, the ratio beside ours."""
    rows = []
    for name, figures in result["results"].items():
        ratios = [
            f"{with_quartiles(ratio, '.3g')} times {key.split('/')[0]}"
            for key, ratio in result["ratios"].items()
            if key.endswith(f"/{name}")
        ]
        how = f"{result['images']:,} x {result['width']}"
        rows.append(
            f"| {machine_name(result)} | {how} | {name} | {with_quartiles(figures['call_s'], '.3g')} | {', '.join(ratios)} |"
        )
    return rows


def scaled(figure: dict, factor: float) -> dict:
    """A median and its quartiles in another unit."""
    return {
        "median": figure["median"] * factor,
        "quartiles": [value * factor for value in figure["quartiles"]],
    }


def make_tables(folder: Path = RESULTS) -> dict[str, str]:
    """Markdown of each benchmark, by name."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    steps = [
        row
        for result in results
        if result["benchmark"] == "train_step"
        for row in train_step_rows(result)
    ]
    checkpoints = [
        checkpoint_row(result) for result in results if result["benchmark"] == "checkpoint"
    ]
    loadings = [
        row
        for result in results
        if result["benchmark"] == "data_loading"
        for row in data_loading_rows(result)
    ]
    encodings = [result for result in results if result["benchmark"] == "encode"]
    samplings = [
        row
        for result in results
        if result["benchmark"] == "sampling"
        for row in sampling_rows(result)
    ]
    batch_sizes = [
        row
        for result in results
        if result["benchmark"] == "batch_size"
        for row in batch_size_rows(result)
    ]
    return {
        "train_step": "\n".join(
            [
                "| machine | what | step | seconds a step | images/s | MFU | first step, s | seconds, as a ratio |"
            ]
            + ["|---|---|---|---|---|---|---|---|", *steps]
        ),
        "cost": cost_table([result for result in results if result["benchmark"] == "cost"]),
        "checkpoint": "\n".join(
            [
                "| machine | model | GB | copied to host memory, s | written beside training, s | longest pause meanwhile, s |"
            ]
            + ["|---|---|---|---|---|---|", *checkpoints]
        ),
        "data_loading": "\n".join(
            [
                "| machine | what | ms a batch | samples/s | times faster than .npy, the same way |",
                "|---|---|---|---|---|",
            ]
            + loadings
        ),
        "encode": "\n".join(
            [
                "| machine | what | way | seconds an image | images/s | of matmul rate | |",
                "|---|---|---|---|---|---|---|",
            ]
            + [row for result in encodings for row in encode_rows(result)]
        ),
        "evaluation": "\n".join(
            ["| machine | features | what | seconds | as fast as |", "|---|---|---|---|---|"]
            + [
                row
                for result in results
                if result["benchmark"] == "evaluation"
                for row in evaluation_rows(result)
            ]
        ),
        "sampling": "\n".join(
            [
                "| machine | what | way | seconds an image | fastest | images/s | of matmul rate | times plain's rate | "
                "fastest | the two alone |",
                "|---|---|---|---|---|---|---|---|---|---|",
            ]
            + samplings
        ),
        "batch_size": "\n".join(
            [
                "| solver | batches of | largest difference, grey levels | values that differ, in a million | images with any |"
            ]
            + ["|---|---|---|---|---|", *batch_sizes]
        ),
        "imagenet": "\n".join(
            [
                "| pixels | cache, float16 | with --flip | --keep-images | GFLOPs an image | PFLOPs in all | on two CPU cores |"
            ]
            + [
                "|---|---|---|---|---|---|---|",
                *(row for result in encodings for row in imagenet_rows(result)),
            ]
        ),
    }


if __name__ == "__main__":
    print("\n\n".join(make_tables().values()))
