"""Measure the time, the bytes read and the host memory of resuming from a checkpoint.

    torchrun --nproc_per_node 4 -m benchmarks.resume --model SiT-XL/2 --shard full --dest exps

Saves a checkpoint, then restores it as train.py does: each process verifies some of the files. With
sharding, each process reads its rows; otherwise, the first process reads all tensors and sends them
to the others. `read_bytes` counts the bytes that read calls return, also from the page cache.
`peak_host_bytes` is the largest increase of the resident memory. Without a GPU, it excludes the
restored moments of AdamW.
"""

import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from benchmarks.measure import make_parser, report, scratch_folder, synchronize
from benchmarks.run_steps import build_plan_state, build_trained_state
from benchmarks.variants import StepConfig, make_plan
from checkpointing.storage import list_checkpoints, verify_checkpoint
from common import cli
from training.checkpoints import CheckpointWriter
from training.config import SHARD_MODES
from training.resume import build_config_json
from training.sharding import make_sharding


def count_read_bytes() -> int:
    """Return the bytes that read calls of this process have returned so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def read_host_bytes(key: str) -> int:
    """Return a memory size of this process, for example VmRSS or the peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = dict(line.split(":") for line in lines)[key].removesuffix(" kB")
    return int(kibibytes) * 1024


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, "resume", model="SiT-XL/2", dest=Path("exps"))
    parser.add_argument("--shard", choices=SHARD_MODES, default="none", help="as in train.py")
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device = accelerator.device
    plan = make_plan(StepConfig(model=args.model), ["sra2"])
    sharding = make_sharding(args.shard, accelerator, torch.float32)
    state = build_trained_state(plan, device, sharding)

    config = build_config_json(plan.settings, plan.network, plan.align, plan.manifest)
    run = args.dest / "benchmark-resume"
    with scratch_folder(run) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        with CheckpointWriter(run, config, sharding=sharding) as writer:
            if sharding or accelerator.is_main_process:
                writer.submit(state)
        accelerator.wait_for_everyone()
        (checkpoint,) = list_checkpoints(run)
        num_bytes = sum(file.stat().st_size for file in checkpoint.iterdir())

        # Restore the checkpoint in a second state, and measure from here on.
        restored = build_plan_state(plan, device, sharding)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        bytes_before = count_read_bytes()
        memory_before = read_host_bytes("VmRSS")
        start_time = time.perf_counter()
        progress = verify_checkpoint(
            checkpoint, (accelerator.process_index, accelerator.num_processes)
        )
        restored.load(checkpoint, progress, sharding is not None or accelerator.is_main_process)
        if sharding is None and accelerator.num_processes > 1:
            restored.broadcast_from_first_process()
        synchronize(device)
        if device.type == "cpu":
            moments = [
                restored.get_rows(tensor).tensor for tensor in restored.get_moments().values()
            ]
            memory_before += sum(moment.numel() * moment.element_size() for moment in moments)
        measured = {
            "seconds": time.perf_counter() - start_time,
            "read_bytes": count_read_bytes() - bytes_before,
            "peak_host_bytes": read_host_bytes("VmHWM") - memory_before,
        }
        processes = gather_object([measured])
    if accelerator.is_main_process:
        report(
            args,
            device,
            ("model", "shard"),
            num_processes=accelerator.num_processes,
            checkpoint_bytes=num_bytes,
            largest_tensor_bytes=max(
                t.numel() * t.element_size() for t in state.model.parameters()
            ),
            total_read_bytes=sum(process["read_bytes"] for process in processes),
            processes=processes,
        )
    accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
