"""The tables of docs/performance.md, from the files under benchmarks/results.

python -m benchmarks.table"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


def machine_name(result: dict) -> str:
    """'NVIDIA H200', or 'AMD EPYC, 2 threads'."""
    machine = result["machine"]
    return machine["device"] if "cuda" in machine else f"{machine['device']}, {machine['cpu_threads']} threads"


def with_quartiles(figure: dict, digits: str) -> str:
    """'1.041 (1.036 to 1.048)'."""
    low, high = figure["quartiles"]
    return f"{figure['median']:{digits}} ({low:{digits}} to {high:{digits}})"


def train_step_rows(result: dict) -> list[str]:
    """One row a variant, the ratios beside `sra2`."""
    how = (
        f"{result['model']}, batch {result['batch_size']}, {PRECISIONS[result['precision']]}{', compiled' * result['compile']}"
    )
    rows = []
    for name, figures in result["results"].items():
        ratios = [f"{with_quartiles(ratio, '.3f')} of {key.split('/')[1]}" for key, ratio in result["ratios"].items()]
        rows.append(
            f"| {machine_name(result)} | {how} | {name} | {with_quartiles(figures['step_s'], '.3g')} | "
            f"{figures['images_per_s']:.3g} | {figures['mfu']:.0%} | {figures['first_step_s']:.3g} | "
            f"{', '.join(ratios) if name == 'sra2' else ''} |"
        )
    return rows


def checkpoint_row(result: dict) -> str:
    """One row a file."""
    cells = [with_quartiles(result["results"][key], ".3g") for key in ("copy_s", "write_s", "longest_pause_s")]
    return f"| {machine_name(result)} | {result['model']} | {result['bytes'] / 1e9:.2f} | {' | '.join(cells)} |"


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Markdown of each benchmark, by name."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    steps = [row for result in results if result["benchmark"] == "train_step" for row in train_step_rows(result)]
    checkpoints = [checkpoint_row(result) for result in results if result["benchmark"] == "checkpoint"]
    return {
        "train_step": "\n".join(
            ["| machine | what | step | seconds a step | images/s | MFU | first step, s | seconds, as a ratio |"]
            + ["|---|---|---|---|---|---|---|---|", *steps]
        ),
        "checkpoint": "\n".join(
            ["| machine | model | GB | copied to host memory, s | written beside training, s | longest pause meanwhile, s |"]
            + ["|---|---|---|---|---|---|", *checkpoints]
        ),
    }


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
