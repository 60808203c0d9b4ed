"""Print the tables in the documentation, which are generated from benchmarks/results.

python -m benchmarks.table
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import table_rows
from benchmarks.table_rows import Quartiles

RESULTS = Path(__file__).resolve().parent / "results"


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
        table_rows.train_step_rows,
        "| machine | run | variant | seconds per step | images/s | share of matmul rate "
        "| first step, s | time ratio |",
    ),
    "start": Table(
        table_rows.start_rows,
        "| machine | run | processes | start | seconds to the end of the first step "
        "| first step, s | CPU time, s |",
    ),
    "checkpoint": Table(
        table_rows.checkpoint_rows,
        "| machine | model | size, GB | copy to host memory, s | write in the background, s "
        "| longest pause of training, s |",
    ),
    "data_loading": Table(
        table_rows.data_loading_rows,
        "| machine | source | ms per batch | samples/s | speed-up over .npy |",
    ),
    "encode": Table(
        table_rows.encode_rows,
        "| machine | images | method | seconds per image | images/s | share of matmul rate "
        "| comparison |",
    ),
    "evaluation": Table(
        table_rows.evaluation_rows,
        "| machine | features | implementation | seconds per call | speed-up |",
    ),
    "sampling": Table(
        table_rows.sampling_rows,
        "| machine | run | method | seconds per image | fastest round | images/s "
        "| share of matmul rate | speed-up over plain | speed-up of the fastest round "
        "| network and VAE alone / sample_ddp |",
    ),
    "batch_size": Table(
        table_rows.batch_size_rows,
        "| solver | batch sizes | largest difference, grey levels "
        "| values that differ, per million | images that differ |",
    ),
    "imagenet": Table(
        table_rows.imagenet_rows,
        "| resolution | float16 cache | with --flip | stored images | GFLOPs per image "
        "| total PFLOPs | time on two CPU cores |",
        benchmark="encode",
    ),
    "scaling": Table(
        table_rows.scaling_rows,
        "| model | batch | GPUs | sharding | network | precision | images per GPU | GiB per GPU "
        "| seconds per step | images/s | computing | limit |",
        is_per_result=True,
    ),
    "scaling_count": Table(
        table_rows.scaling_count_rows,
        "| model | GPUs | sharding | images per GPU | counted, GiB | formula, GiB | difference |",
    ),
    "scaling_models": Table(
        table_rows.scaling_model_rows,
        "| model | parameters | head | training GFLOPs per image | activations per image, GiB "
        "| checkpoint, GB | copy to host memory, s | write by one process, s "
        "| preview on 8 GPUs, s |",
        benchmark="scaling",
    ),
    "scaling_assumptions": Table(
        table_rows.scaling_assumption_rows, "| assumption | value | source |", benchmark="scaling"
    ),
    "rivals": Table(
        table_rows.rivals_rows,
        "| method | reference | denoising loss | alignment loss | total loss | gradient |",
    ),
    "cost": Table(
        table_rows.cost_rows,
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
