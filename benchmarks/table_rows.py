"""Format the results of the benchmarks as rows of tables, whose headers are in table.py."""

from collections.abc import Iterator
from typing import NamedTuple

NUM_IMAGENET_IMAGES = 1_281_167  # training images
PRECISION_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


class Quartiles(NamedTuple):
    """A median with its quartiles, which is formatted as "1.041 (1.036 to 1.048)"."""

    median: float
    low: float
    high: float

    def __format__(self, digits: str) -> str:
        return f"{self.median:{digits}} ({self.low:{digits}} to {self.high:{digits}})"


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


def list_differences(entry: dict) -> list[float]:
    """Return the differences of the three losses and the gradient from the authors' code."""
    losses = [loss["difference"] for loss in entry["losses"].values()]
    return [*losses, entry["gradient"]["largest_difference"]]


def rivals_rows(result: dict) -> Iterator[str]:
    """Yield one row per method, with its differences from the code of its authors."""
    for method, entry in result["results"].items():
        source = "formulas in method.md"
        if "url" in entry:
            source = f"[{entry['url'].split('/')[-1]}]({entry['url']}) {entry['commit'][:7]}"
        cells = [f"{value:.0e}" if value else "0" for value in list_differences(entry)]
        yield " | ".join([method, source, *cells])
