"""Run the benchmarks that need a GPU, the most important first, within a limited time.

    python -m benchmarks.gpu_session --dest benchmarks/results --repa-repository ../REPA

Each measurement runs a benchmark of this package as a separate process. A measurement is skipped if
its expected time exceeds the remaining time, and is stopped if it takes twice as long or if no time
is left. Its result is written to DEST/NAME.json when it is complete. `--trial` runs the same
commands with the smallest network, few rounds and no limit on the total time, to test the script on
a CPU.
"""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common import cli

# Real images, enlarged. Random weights and enlarged images do not affect the speed.
IMAGES = Path("assets/fashion-mnist/images.zip")


class Measurement(NamedTuple):
    """A benchmark to run.

    Attributes:
        name: Name of the result file, without extension.
        module: The module of `benchmarks` to run.
        flags: Its flags, except --json, quoted as for a shell.
        seconds: Expected seconds on an H100.
    """

    name: str
    module: str
    flags: str
    seconds: int


def plan_measurements(repa_repository: Path | None, dest: Path) -> list[Measurement]:
    """Return the measurements, the most important first."""
    dest_flag = f"--dest {shlex.quote(str(dest))}"
    repa = f" --repa-repository {shlex.quote(str(repa_repository))}" if repa_repository else ""
    step = "--precision bf16 --rounds 5 --steps 5"
    compare = f"{step} --compile --align none sra2{repa}"
    small = f"--model SiT-XL/2 --batch-size 64 {compare}"
    large = f"--model SiT-XL/2 --batch-size 256 {step} --rounds 3 --compile --align sra2"
    sharded = f"--batch-size 64 {step} --compile --align sra2 --shard full"
    recompute = "--activation-checkpointing --recomputed-blocks 5 --accumulated 2"
    sample = f"--model SiT-XL/2 {dest_flag} --images 128 --batch-size 64 --rounds 1"
    encode = f"{dest_flag} --rounds 1"
    table = shlex.quote(str(dest / "kernels-xl2-b64.txt"))
    plan = [
        ("step-xl2-b64", "train_step", f"{small} --kernel-table {table}", 110),
        ("step-xl2-b256", "train_step", f"{large} {recompute}", 90),
        ("step-xl2-b64-sharded", "train_step", f"{sharded} --model SiT-XL/2", 60),
        ("sampling-xl2-10steps", "sampling", f"{sample} --num-steps 10", 90),
        ("start-b2", "start", f"--model SiT-B/2 --batch-size 64 {dest_flag}", 120),
        ("step-b2-b256", "train_step", f"--model SiT-B/2 --batch-size 256 {compare}", 70),
        ("vae", "vae", f"--source {IMAGES} {dest_flag}", 60),
        ("encode-tf32", "encode", f"{encode} --precision tf32", 60),
        ("step-s2-b256", "train_step", f"--model SiT-S/2 --batch-size 256 {compare}", 60),
        ("step-1b-b64-sharded", "train_step", f"{sharded} --model SiT-1B/2", 70),
        ("encode-bf16", "encode", f"{encode} --precision bf16", 60),
        ("sampling-xl2-30steps", "sampling", f"{sample} --num-steps 30", 120),
        ("evaluation", "evaluation", "--images 50000 --rounds 1", 60),
    ]
    return [Measurement(*values) for values in plan]


# Flags that replace those of the plan in a trial, by module. argparse uses the last value.
TRIAL_FLAGS = {
    "train_step": "--batch-size 2 --rounds 1 --steps 1 --warm-up 0 --precision no",
    "sampling": "--model SiT-S/2 --resolution 64 --images 2 --batch-size 2 --num-steps 2",
    "start": "--model SiT-Ti/2 --batch-size 2",
    "vae": "--images 2 --resolution 64 --batch-size 2 --rounds 1 --warm-up 0",
    "encode": "--precision fp32 --images 2 --resolution 64 --batch-size 2",
    "evaluation": "--images 50 --width 16",
}


def main() -> None:
    """Run the measurements."""
    parser = cli.Parser(__doc__, "python -m benchmarks.gpu_session", "--dest PATH")
    add = parser.add_argument
    add("--dest", type=Path, required=True, help="folder for the results")
    add("--repa-repository", type=Path, metavar="DIR", help="clone of REPA's repository")
    add("--minutes", type=cli.positive_float, default=10.0, help="time for all measurements")
    add("--trial", action="store_true", help="run with tiny settings, to test the script")
    args = parser.parse_args()
    args.dest.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    for measurement in plan_measurements(args.repa_repository, args.dest):
        remaining = deadline - time.monotonic()
        if remaining < measurement.seconds and not args.trial:
            print(f"{measurement.name}: skipped, {remaining:.0f} s remain", flush=True)
            continue
        command = [sys.executable, "-m", f"benchmarks.{measurement.module}"]
        command += shlex.split(measurement.flags)
        if args.trial:
            command += TRIAL_FLAGS[measurement.module].split()
            command = [part for part in command if part != "--compile"]
            command = [re.sub("SiT-(XL|1B)/2", "SiT-S/2", part) for part in command]
        command += ["--json", str(args.dest / f"{measurement.name}.json")]
        print(f"{measurement.name}: {' '.join(command[1:])}", flush=True)
        started = time.monotonic()
        limit = 2 * measurement.seconds
        if not args.trial:
            limit = min(limit, remaining)
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
        outcome = "complete" if code == 0 else f"failed (exit code {code})"
        print(f"{measurement.name}: {outcome} in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    cli.run(main)
