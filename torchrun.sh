#!/usr/bin/env bash
# torchrun with its arguments filled in from SLURM, Kubernetes or the environment.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./torchrun.sh [TORCHRUN OPTION ...] SCRIPT [ARGUMENT ...]

Runs torchrun with nodes, node rank, endpoint and processes per node filled in. Your arguments follow these, so your
torchrun options win. Start it once on each node. Exit status 75: the training was stopped by a signal and has saved a
checkpoint; run the same command to resume.

  a laptop           ./torchrun.sh launch/train.py --config launch/configs/demo.toml
  inside a SLURM job srun --ntasks-per-node=1 ./torchrun.sh launch/train.py --config FILE.toml
  as a SLURM job     sbatch --nodes=2 launch/slurm/train.sbatch --config FILE.toml
  on Kubernetes      launch/k8s/train.yaml
  two hosts by hand  NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 ./torchrun.sh launch/train.py ...   (NODE_RANK=1 on the other)

variable          from SLURM                                    otherwise
NNODES            SLURM_JOB_NUM_NODES                           1
NODE_RANK         SLURM_NODEID                                  JOB_COMPLETION_INDEX, 0
MASTER_ADDR       NodeAddr of the first of SLURM_JOB_NODELIST    required if NNODES > 1
MASTER_PORT       20000 + SLURM_JOB_ID % 20000                  29500
NPROC_PER_NODE    SLURM_GPUS_ON_NODE                            number of GPUs in nvidia-smi, 1 without GPUs
MAX_RESTARTS      0                                             0
A variable that you set overrides SLURM's, and so do torchrun's own variables (PET_NNODES and so on, as Kubeflow sets
them). On one node without MASTER_ADDR, a free port is used (--standalone).
TEXT
}

die() { echo "torchrun.sh: $*" >&2; exit 2; }

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "") usage >&2; exit 2 ;;
esac

for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE MAX_RESTARTS; do
    torchruns=PET_$name
    [[ -n "${!name:-}" || -z "${!torchruns:-}" ]] || printf -v "$name" %s "${!torchruns}"
done

if [[ -n "${SLURM_JOB_ID:-}" ]]; then
    NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
    NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    if ((NNODES > 1)); then
        [[ -n "${SLURM_STEP_ID:-}" ]] || die "this job has $NNODES nodes: start with 'srun --ntasks-per-node=1 $0 ...'"
        if [[ -z "${MASTER_ADDR:-}" ]]; then
            # separate assignments, so that a failing scontrol ends the script
            hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
            node=$(scontrol show node "${hosts%%$'\n'*}")
            MASTER_ADDR=$(grep -o 'NodeAddr=[^ ]*' <<<"$node") # a node's name may not resolve, its address works
            MASTER_ADDR=${MASTER_ADDR#NodeAddr=}
        fi
        MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    fi
fi

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-${JOB_COMPLETION_INDEX:-0}}
MASTER_PORT=${MASTER_PORT:-29500}
if [[ -z "${NPROC_PER_NODE:-}" ]]; then
    NPROC_PER_NODE=1
    if command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi --list-gpus); then
        NPROC_PER_NODE=$(grep -c '^GPU' <<<"$gpus" || true)
        ((NPROC_PER_NODE > 0)) || NPROC_PER_NODE=1
    fi
fi
rendezvous=${PET_RDZV_ENDPOINT:-} # torchrun reads it itself; NNODES may then be a range
[[ -n "$rendezvous" || "$NNODES" =~ ^[1-9][0-9]*$ ]] || die "NNODES must be a positive number, not '$NNODES'"
[[ -n "$rendezvous" ]] || [[ "$NODE_RANK" =~ ^[0-9]+$ ]] && ((NODE_RANK < NNODES)) || die "NODE_RANK must be in 0..$((NNODES - 1)), not '$NODE_RANK'"

args=(--nnodes "$NNODES" --nproc_per_node "$NPROC_PER_NODE" --max_restarts "${MAX_RESTARTS:-0}")
if [[ -n "$rendezvous" ]]; then
    :
elif ((NNODES > 1)) || [[ -n "${MASTER_ADDR:-}" ]]; then
    [[ -n "${MASTER_ADDR:-}" ]] || die "NNODES=$NNODES needs MASTER_ADDR, the host name of node 0"
    args+=(--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
else
    args+=(--standalone)
fi

# one thread per process by default: ranks that share cores slow each other down
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# seconds between SIGTERM and SIGKILL (torchrun's default is 30): a step and a save must fit
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
echo "torchrun.sh: torchrun ${args[*]} $*" >&2
launcher=$(dirname "$0")/launch/torchrun.py # in a clone; in an installed package this script is in the folder launch
[[ -f "$launcher" ]] || launcher=$(dirname "$0")/torchrun.py
exec python "$launcher" "${args[@]}" "$@"
