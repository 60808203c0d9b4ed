#!/bin/bash
# Train on several nodes of a SLURM cluster. Submit the script from the folder of train.py; the
# arguments are the flags of train.py:
#
#   sbatch --nodes 4 docs/cluster/slurm.sh --exp-name xl2 --data-dir data/imagenet256 --model SiT-XL/2
#
# The job is requeued before its time limit, after a preemption and after the failure of a node.
# To run another command, set PROGRAM, for example to "-m evaluations.evaluate".

#SBATCH --job-name=sra2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

EXIT_STOPPED=75 # train.py has saved a checkpoint after a signal
EXIT_INTERRUPTED=130 # Ctrl-C
MIN_SECONDS=${MIN_SECONDS:-600} # a job that crashes earlier than this is not requeued

export PROGRAM=${PROGRAM:-train.py}

# All processes connect to the first node. srun does not inherit --cpus-per-task.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Start one process per GPU. SLURM numbers the tasks. PROGRAM may consist of several words.
srun --kill-on-bad-exit=1 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python $PROGRAM "$@"' bash "$@" &
SRUN=$!

# SLURM sends SIGUSR1 to this script 120 seconds before the time limit. srun forwards it.
trap 'kill -USR1 "$SRUN"' USR1 TERM

# A trapped signal ends `wait` early, so repeat it while srun is running. The last `wait` returns the
# exit code of srun, or 127 if bash has already returned the code and discarded it.
CODE=127
while kill -0 "$SRUN" 2>/dev/null; do
  wait "$SRUN"
  CODE=$?
done
wait "$SRUN" 2>/dev/null
LAST=$?
((LAST != 127)) && CODE=$LAST

# Codes above 128 mean that a signal has killed a process, for example after a node failure.
echo "$PROGRAM ended with exit code $CODE after $SECONDS seconds"
if ((CODE == EXIT_STOPPED)) ||
  ((CODE > 128 && CODE != EXIT_INTERRUPTED && SECONDS >= MIN_SECONDS)); then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
