#!/bin/bash
# Start one training process per GPU of this node, forward SIGTERM and SIGUSR1 to the processes, and
# exit with their largest exit code. torchrun kills its processes 30 seconds after SIGTERM and
# replaces their exit codes; this script does neither. The arguments are the flags of train.py:
#
#   GPUS=8 NODES=4 NODE_RANK=0 MASTER_ADDR=node0 docs/cluster/launch_node.sh --exp-name xl2 ...

GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
if ! ((GPUS > 0)); then
  echo "launch_node.sh: no GPU was found; set GPUS to the number of processes" >&2
  exit 2
fi
NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
export MASTER_PORT=${MASTER_PORT:-29500}
export WORLD_SIZE=$((NODES * GPUS))
export LOCAL_WORLD_SIZE=$GPUS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun does

PROCESSES=()
for ((LOCAL = 0; LOCAL < GPUS; LOCAL++)); do
  RANK=$((NODE_RANK * GPUS + LOCAL)) LOCAL_RANK=$LOCAL python train.py "$@" &
  PROCESSES+=($!)
done
trap 'kill -TERM "${PROCESSES[@]}" 2>/dev/null' TERM
trap 'kill -USR1 "${PROCESSES[@]}" 2>/dev/null' USR1

# A trapped signal ends `wait` early, so repeat it while the process is running. The last `wait`
# returns the exit code, or 127 if bash has already returned the code and discarded it.
LARGEST=0
for PROCESS in "${PROCESSES[@]}"; do
  CODE=127
  while kill -0 "$PROCESS" 2>/dev/null; do
    wait "$PROCESS"
    CODE=$?
  done
  wait "$PROCESS" 2>/dev/null
  LAST=$?
  ((LAST != 127)) && CODE=$LAST
  ((CODE > LARGEST)) && LARGEST=$CODE
done
exit "$LARGEST"
