"""Write job scripts for a SLURM cluster: encode, train, sample and evaluate as job arrays.

Each task of an array executes one command with docs/cluster/slurm.sh, which starts one process per
GPU, stops before the time limit and requeues the job. submit.sh submits the arrays with their
dependencies, and omits commands that have finished.
"""

import shlex
from collections.abc import Iterable
from pathlib import Path

from common.files import write_file
from experiments.paper_plan import PaperPlan
from experiments.tasks import Task

JOB_SCRIPT = "docs/cluster/slurm.sh"
HEADER = """\
#!/bin/bash
# {purpose}. submit.sh submits this script. To set the partition and the account, set
# SBATCH_PARTITION and SBATCH_ACCOUNT before running submit.sh, or edit the lines below.

#SBATCH --job-name=paper-{stage}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output={logs}/{stage}-%a.txt

case $SLURM_ARRAY_TASK_ID in
"""
FOOTER = f"""\
*)
  echo "array index $SLURM_ARRAY_TASK_ID does not exist" >&2
  exit 2
  ;;
esac

# slurm.sh requeues this job if it is interrupted.
export PROGRAM
exec bash {JOB_SCRIPT} "$@"
"""
PURPOSES = {
    "encode": "Encode the images",
    "train": "Train the networks",
    "sample": "Sample from the checkpoints",
    "evaluate": "Compute the metrics of the samples",
    "cost": "Time the training step",
}
SUBMIT = f"""\
#!/bin/bash
# Submit all jobs. Run this script from the folder of train.py, with the Python environment
# activated. A job starts when the jobs that it depends on have succeeded.

set -euo pipefail

if [ ! -f {JOB_SCRIPT} ]; then
  echo "{JOB_SCRIPT} does not exist here; run this script from the folder of train.py" >&2
  exit 2
fi

# Submit a job and print its number.
submit() {{
  local job
  job=$(sbatch --parsable "$@")
  echo "${{job%%;*}}"
}}
"""


def write_slurm_scripts(plan: PaperPlan, folder: Path, gpus: int) -> None:
    """Write a job script per stage, and submit.sh.

    Args:
        plan: The plan of the tables.
        folder: Folder of the scripts and of their output.
        gpus: Number of GPUs of a job, on one node.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for stage, tasks in plan.stages.items():
        path = folder / f"{stage}.sh"
        if tasks:
            stage_gpus = 1 if stage == "cost" else gpus
            write_script(path, format_script(stage, tasks, folder / "logs", stage_gpus))
        else:  # the folder may contain the script of an earlier call
            path.unlink(missing_ok=True)
    write_script(folder / "submit.sh", format_submit_script(plan, folder))


def write_script(path: Path, text: str) -> None:
    """Write an executable script."""
    write_file(path, text.encode())
    path.chmod(0o755)


def format_script(stage: str, tasks: list[Task], logs: Path, gpus: int) -> str:
    """Return the script of a job array. The array index selects the command."""
    lines = [
        HEADER.format(purpose=PURPOSES[stage], stage=stage, gpus=gpus, logs=shlex.quote(str(logs)))
    ]
    for index, task in enumerate(tasks):
        program, *arguments = task.command
        if program == "-m":
            module, *arguments = arguments
            program = f"-m {module}"
        lines.append(
            f"{index}) # {task.name}\n"
            f"  PROGRAM={shlex.quote(program)}\n"
            f"  set -- {shlex.join(arguments)}\n"
            "  ;;\n"
        )
    return "".join([*lines, FOOTER])


def format_submit_script(plan: PaperPlan, folder: Path) -> str:
    """Return the script that submits the unfinished commands with their dependencies."""
    stages = plan.stages

    def list_pending(stage: str) -> list[int]:
        tasks = stages[stage]
        return [k for k, task in enumerate(tasks) if not task.is_finished(plan.output_dir)]

    def submit(stage: str, indices: Iterable[int], dependency: str = "") -> str:
        array = ",".join(map(str, indices))
        script = shlex.quote(str(folder / f"{stage}.sh"))
        option = f'"--dependency=afterok:{dependency}" ' if dependency else ""
        return f"$(submit {option}--array={array} {script})"

    lines = [SUBMIT]
    train = [index for index, planned in enumerate(plan.runs) if plan.needs_training(planned)]
    encode = list_pending("encode") if train else []
    if encode:
        lines.append(f"encode={submit('encode', encode)}")
    if train:
        lines.append(f"train={submit('train', train, '$encode' if encode else '')}")

    # The checkpoints of a run are sampled as soon as this run has finished.
    pending_samples = list_pending("sample")
    pending_evaluations = list_pending("evaluate")
    for run_index, planned in enumerate(plan.runs):
        evaluations = [
            k
            for k, evaluation in enumerate(plan.evaluations.values())
            if evaluation.run is planned and k in pending_evaluations
        ]
        if not evaluations:
            continue
        lines.append(f"\n# {planned.cell.run_name}")
        samples = [k for k in evaluations if k in pending_samples]
        if samples:
            after_train = f"${{train}}_{run_index}" if run_index in train else ""
            lines.append(f"sample={submit('sample', samples, after_train)}")
        evaluate = submit("evaluate", evaluations, "$sample" if samples else "")
        lines.append(f"evaluate={evaluate}")
    cost = list_pending("cost")
    if cost:
        lines.append(f"\ncost={submit('cost', cost)}")
    lines.append('\necho "submitted; python -m experiments.paper --gather shows the progress"')
    return "\n".join(lines) + "\n"
