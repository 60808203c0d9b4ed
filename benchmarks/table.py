"""Print the tables in the documentation, which are generated from benchmarks/results.

python -m benchmarks.table
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
NUM_IMAGENET_IMAGES = 1_281_167  # training images
PRECISION_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


class Quartiles(NamedTuple):
    """A median with its quartiles, which is formatted as "1.041 (1.036 to 1.048)"."""

    median: float
    low: float
    high: float

    def __format__(self, digits: str) -> str:
        return f"{self.median:{digits}} ({self.low:{digits}} to {self.high:{digits}})"


def parse_object(content: dict) -> Any:
    """Convert return values of `median_and_quartiles` in a JSON result to `Quartiles`."""
    return Quartiles(content["median"], *content["quartiles"]) if "median" in content else content


def make_tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return all tables in Markdown, by name."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    tables = {}
    for name, table in TABLES.items():
        benchmark = table.benchmark or name
        selected = {
            stem: result for stem, result in results.items() if result["benchmark"] == benchmark
        }
        if table.is_per_result:
            for stem, result in selected.items():
                tables[f"{name}/{stem}"] = table.format([result])
        else:
            tables[name] = table.format(list(selected.values()))
    return tables


def machine_name(result: dict) -> str:
    """Return the name of the machine, such as "NVIDIA H200" or "AMD EPYC, 2 threads"."""
    machine = result["machine"]
    if "cuda" in machine:
        return machine["device"]
    num_threads = machine["cpu_threads"]
    return f"{machine['device']}, {num_threads} {'thread' if num_threads == 1 else 'threads'}"


def run_name(result: dict) -> str:
    """Return a description of a training run, such as "SiT-B/2, batch 8, fp32"."""
    name = f"{result['model']}, batch {result['batch_size']}"
    name += f", {PRECISION_NAMES[result['precision']]}"
    return f"{name}, compiled" if result["compile"] else name


def format_increase(share: float) -> str:
    """Format an increase, such as " (+4.0%)"; return "" for zero."""
    return f" (+{share:.1%})" if share else ""


def train_step_rows(result: dict) -> Iterator[str]:
    """Yield one row per variant, with its time relative to the times of other variants."""
    for variant, values in result["results"].items():
        prefix = f"{variant}/"
        run = run_name(result)
        share = ""
        if "matmul_share" in values:
            share = f"{values['matmul_share']:.0%}"
        else:  # the step of REPA's repository, which has its own precision
            run = f"{result['model']}, batch {result['batch_size']}"
        ratios = ", ".join(
            f"{ratio:.3f} relative to {pair.removeprefix(prefix)}"
            for pair, ratio in result["ratios"].items()
            if pair.startswith(prefix)
        )
        yield (
            f"{machine_name(result)} | {run} | {variant} | {values['step_s']:.3g} | "
            f"{values['images_per_s']:.3g} | {share} | "
            f"{values['first_step_s']:.3g} | {ratios}"
        )


def cost_rows(result: dict) -> Iterator[str]:
    """Yield one row per variant, as in Table 5 of the paper, with times if they were measured."""
    is_timed = "machine" in result
    run = f"{result['model']}, not timed"
    if is_timed:
        run = f"{machine_name(result)}: {run_name(result)}"
    for variant, values in result["results"].items():
        parameters = {
            key: f"{count / 1e6:.1f}M" for key, count in values["parameters"].items() if count
        }
        heads = parameters.get("heads", "0") + format_increase(values["more_parameters"])
        forward = sum(values["forward_flops"].values())
        training = f"{values['training_flops'] / 1e9:.4g}"
        training += format_increase(values["more_training_flops"])
        yield (
            f"{run} | {variant} | {parameters.get('external', '0')} | {heads} | "
            f"{forward / 1e9:.4g}{format_increase(values['more_forward_flops'])} | "
            f"{training} | {time_cells(result, variant) if is_timed else ' |  | '}"
        )


def time_cells(result: dict, variant: str) -> str:
    """Return the cells of the step time, the peak memory on a GPU, and the relative time."""
    values = result["results"][variant]
    ratio = result["ratios"].get(f"{variant}/none")
    relative = f"{ratio:.3f}" if ratio else ""
    memory = f"{values['peak_memory_gib']:.1f} GiB" if "cuda" in result["machine"] else ""
    step = f"{values['step_s']:.3g}, {values['images_per_s']:.3g} images/s"
    return f"{step} | {memory} | {relative}"


def start_rows(result: dict) -> Iterator[str]:
    """Yield one row per start of train.py."""
    for name, values in result["results"].items():
        yield (
            f"{machine_name(result)} | {result['model']}, batch {result['batch_size']} | "
            f"{result['processes']} | {name} | {values['start_s']:.3g} | "
            f"{values['first_step_s']:.3g} | {values['cpu_s']:.3g}"
        )


def checkpoint_rows(result: dict) -> Iterator[str]:
    """Yield one row with the size and the times of a checkpoint."""
    times = " | ".join(f"{quartiles:.3g}" for quartiles in result["results"].values())
    yield f"{machine_name(result)} | {result['model']} | {result['bytes'] / 1e9:.2f} | {times}"


def data_loading_rows(result: dict) -> Iterator[str]:
    """Yield one row per source, with the speed-up over .npy files."""
    for name, values in result["results"].items():
        speedup = "".join(
            f"{ratio:.3g}" for pair, ratio in result["ratios"].items() if pair.endswith(f"/{name}")
        )
        milliseconds = Quartiles(*(1e3 * seconds for seconds in values["batch_s"]))
        yield (
            f"{machine_name(result)} | {name} | {milliseconds:.3g} | "
            f"{values['samples_per_s']:,.0f} | {speedup}"
        )


def encode_rows(result: dict) -> Iterator[str]:
    """Yield one row per method."""
    images = f"{result['resolution']} pixels, {result['precision']}, batch {result['batch_size']}"
    ratios = result["ratios"]
    comparisons = {
        "encode_latents": f"{ratios['one at a time/encode_latents']:.3g} times as fast as one at "
        "a time",
        "VAE alone": f"{ratios['VAE alone/encode_latents']:.3f} of the time of encode_latents",
    }
    for name, values in result["results"].items():
        share = values["share_of_matmul_rate"]
        percentage = "" if share is None else f"{share:.0%}"
        yield (
            f"{machine_name(result)} | {images} | {name} | {values['image_s']:.3g} | "
            f"{values['images_per_s']:.3g} | {percentage} | {comparisons.get(name, '')}"
        )


def imagenet_rows(result: dict) -> Iterator[str]:
    """Yield one row of estimates for the training images of ImageNet.

    The sizes are computed from the number of images, and the time from the measured rate.
    """
    num_values = 8 * (result["resolution"] // 8) ** 2
    num_bytes = NUM_IMAGENET_IMAGES * num_values * 2
    image_bytes = NUM_IMAGENET_IMAGES * 3 * result["resolution"] ** 2
    flops = result["flops_per_image"]
    values = result["results"]["encode_latents"]
    days = NUM_IMAGENET_IMAGES / values["images_per_s"] / 86400
    rate = f"{values['share_of_matmul_rate']:.0%} of {result['matmul_flops_per_s'] / 1e9:.0f}"
    yield (
        f"{result['resolution']} | {num_bytes / 1e9:.0f} GB | {2 * num_bytes / 1e9:.0f} GB | "
        f"{image_bytes / 1e9:,.0f} GB | {flops / 1e9:.0f} | "
        f"{NUM_IMAGENET_IMAGES * flops / 1e15:.0f} | {days:.0f} days at {rate} GFLOP/s"
    )


def evaluation_rows(result: dict) -> Iterator[str]:
    """Yield one row per implementation, with the speed-up over other implementations."""
    for name, values in result["results"].items():
        suffix = f"/{name}"
        speedups = ", ".join(
            f"{ratio:.3g} times as fast as {pair.removesuffix(suffix)}"
            for pair, ratio in result["ratios"].items()
            if pair.endswith(suffix)
        )
        yield (
            f"{machine_name(result)} | {result['images']:,} x {result['width']} | {name} | "
            f"{values['call_s']:.3g} | {speedups}"
        )


def sampling_rows(result: dict) -> Iterator[str]:
    """Yield one row per method; compare sample_ddp with `plain` and with its parts alone."""
    run = f"{result['model']}, {result['resolution']} pixels"
    run += f", {result['num_steps']} steps, batch {result['batch_size']}"
    fastest_plain = result["results"]["plain"]["fastest_image_s"]
    for name, values in result["results"].items():
        fastest = values["fastest_image_s"]
        comparison = " |  | "
        speedup = result["ratios"].get(f"plain/{name}")
        if speedup:
            share = result["ratios"][f"alone/{name}"]
            comparison = f"{speedup:.3g} | {fastest_plain / fastest:.3g} | {share:.3f}"
        yield (
            f"{machine_name(result)} | {run} | {name} | {values['image_s']:.3g} | {fastest:.3g} | "
            f"{values['images_per_s']:.3g} | {values['share_of_matmul_rate']:.0%} | {comparison}"
        )


def batch_size_rows(result: dict) -> Iterator[str]:
    """Yield one row per solver and batch size."""
    num_images = result["images"]
    for solver, others in result["results"].items():
        for other in others:
            yield (
                f"{solver} | {result['batch_size']} and {other['batch_size']} | "
                f"{other['largest']} | {other['values'] * 1e6:.0f} | "
                f"{other['images'] * num_images:.0f} of {num_images}"
            )


def scaling_rows(result: dict) -> Iterator[str]:
    """Yield one row per number of GPUs and sharding, with computed and measured values."""
    for row in result["rows"]:
        shard = row["shard"] or "any"
        run = (
            f"{row['model']} | {row['batch_size']} | {row['num_gpus']} {row['gpu']} | {shard} | "
            f"{row['network'] or ''} | {PRECISION_NAMES[row['precision']]}"
        )
        if row["limit"] == "batch":
            yield f"{run} | not a whole number |  |  |  |  | batch"
            continue
        images = f"{row['micro_batch']}"
        if row["accumulation"] > 1:
            images = f"{row['accumulation']} x {images}"
        memory = f"{row['memory_gib']:.1f}"
        step = f"{row['step_s']:.3f}"
        if "measured_step_s" in row:
            memory += f" (measured: {row['measured_memory_gib']:.1f})"
            step += f" (measured: {row['measured_step_s']:.3f})"
        yield (
            f"{run} | {images} | {memory} | {step} | {row['images_per_s']:,.0f} | "
            f"{row['compute_s'] / row['step_s']:.0%} | {row['limit']}"
        )


def scaling_count_rows(result: dict) -> Iterator[str]:
    """Yield one row per counted step, with the bytes of the formula relative to those counted."""
    for row in result["rows"]:
        yield (
            f"{row['model']} | {row['num_gpus']} | {row['shard']} | {row['micro_batch']} | "
            f"{row['counted_bytes'] / 2**30:.2f} | {row['computed_bytes'] / 2**30:.2f} | "
            f"{row['computed_bytes'] / row['counted_bytes'] - 1:+.1%}"
        )


def scaling_model_rows(result: dict) -> Iterator[str]:
    """Yield one row per model, with the values that do not depend on the number of GPUs."""
    for model in result["models"]:
        yield (
            f"{model['model']} | {model['parameters'] / 1e6:,.0f}M | "
            f"{model['head_parameters'] / 1e6:.1f}M | {model['training_flops'] / 1e9:,.0f} | "
            f"{model['stored_bytes_per_image'] / 2**30:.2f} | "
            f"{model['checkpoint_bytes'] / 1e9:.1f} | {model['checkpoint_copy_s']:.1f} | "
            f"{model['checkpoint_write_s']:.0f} | {model['preview_s']:.1f}"
        )


def scaling_assumption_rows(result: dict) -> Iterator[str]:
    """Yield one row per assumption."""
    for assumption in result["assumptions"]:
        yield " | ".join(assumption.values())


class Table(NamedTuple):
    """A table of the documentation."""

    rows: Callable[[dict], Iterator[str]]  # yields the rows of a result, without the outer bars
    header: str
    footer: tuple[str, ...] = ()  # lines after the rows of the results
    benchmark: str = ""  # value of "benchmark" in the results (default: name of the table)
    is_per_result: bool = False  # whether each result has its own table

    def format(self, results: list[dict]) -> str:
        """Return the table of several results in Markdown."""
        rule = "|" + "---|" * (self.header.count("|") - 1)
        parsed = json.loads(json.dumps(results), object_hook=parse_object)
        lines = [f"| {row} |" for result in parsed for row in self.rows(result)]
        lines = list(dict.fromkeys(lines))  # several results may contain the same row
        return "\n".join([self.header, rule, *lines, *self.footer])


TABLES = {
    "train_step": Table(
        train_step_rows,
        "| machine | run | variant | seconds per step | images/s | share of matmul rate "
        "| first step, s | time ratio |",
    ),
    "start": Table(
        start_rows,
        "| machine | run | processes | start | seconds to the end of the first step "
        "| first step, s | CPU time, s |",
    ),
    "checkpoint": Table(
        checkpoint_rows,
        "| machine | model | size, GB | copy to host memory, s | write in the background, s "
        "| longest pause of training, s |",
    ),
    "data_loading": Table(
        data_loading_rows,
        "| machine | source | ms per batch | samples/s | speed-up over .npy |",
    ),
    "encode": Table(
        encode_rows,
        "| machine | images | method | seconds per image | images/s | share of matmul rate "
        "| comparison |",
    ),
    "evaluation": Table(
        evaluation_rows,
        "| machine | features | implementation | seconds per call | speed-up |",
    ),
    "sampling": Table(
        sampling_rows,
        "| machine | run | method | seconds per image | fastest round | images/s "
        "| share of matmul rate | speed-up over plain | speed-up of the fastest round "
        "| network and VAE alone / sample_ddp |",
    ),
    "batch_size": Table(
        batch_size_rows,
        "| solver | batch sizes | largest difference, grey levels "
        "| values that differ, per million | images that differ |",
    ),
    "imagenet": Table(
        imagenet_rows,
        "| resolution | float16 cache | with --flip | stored images | GFLOPs per image "
        "| total PFLOPs | time on two CPU cores |",
        benchmark="encode",
    ),
    "scaling": Table(
        scaling_rows,
        "| model | batch | GPUs | sharding | network | precision | images per GPU | GiB per GPU "
        "| seconds per step | images/s | computing | limit |",
        is_per_result=True,
    ),
    "scaling_count": Table(
        scaling_count_rows,
        "| model | GPUs | sharding | images per GPU | counted, GiB | formula, GiB | difference |",
    ),
    "scaling_models": Table(
        scaling_model_rows,
        "| model | parameters | head | training GFLOPs per image | activations per image, GiB "
        "| checkpoint, GB | copy to host memory, s | write by one process, s "
        "| preview on 8 GPUs, s |",
        benchmark="scaling",
    ),
    "scaling_assumptions": Table(
        scaling_assumption_rows, "| assumption | value | source |", benchmark="scaling"
    ),
    "cost": Table(
        cost_rows,
        "| run | method | external parameters | head parameters | forward GFLOPs "
        "| training GFLOPs | seconds per step | peak memory | time relative to none |",
        footer=(
            # The paper does not state the unit of its speed.
            "| SRA 2 paper: SiT-XL/2, batch 256, H100 | SRA 2 | 0 | 18M | +4%, latency +6% |  |  "
            "|  | speed 7.2, without alignment 8.1 |",
            "",
            "The teacher of `sra` is the EMA of the run, so it adds no parameters; only its "
            "activations need memory.",
        ),
    ),
}


if __name__ == "__main__":
    print("\n\n".join(make_tables().values()))
