# What depends on the cluster, sourced by both job scripts on the first node: the one file to edit for yours.

# Modules and environment: uncomment what your site needs, or set TINYFLUX_VENV.
# module load cuda/12.8 nccl
if [[ -n "${TINYFLUX_VENV:-}" ]]; then
    source "$TINYFLUX_VENV/bin/activate"
fi

# Options of every srun. With Pyxis a container image: TINYFLUX_IMAGE=/images/tinyflux.sqsh or registry#image:tag.
SRUN=()
if [[ -n "${TINYFLUX_IMAGE:-}" ]]; then
    SRUN+=(--container-image="$TINYFLUX_IMAGE" --container-mounts="$PWD,${TINYFLUX_MOUNTS:-$PWD}" --container-workdir="$PWD")
fi
# Since Slurm 22.05 srun no longer inherits --cpus-per-task from the job: without it each rank has one core.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
    SRUN+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
fi

# Downloaded shards go to a disk of the node: the shared file system would carry each byte twice, and its locks are slow.
# Where there is no such disk, the user's cache folder is used. --data.cache-dir wins.
if [[ -z "${TINYFLUX_CACHE:-}" ]]; then
    for scratch in "${SLURM_TMPDIR:-}" "${TMPDIR:-}"; do
        if [[ -n "$scratch" && -d "$scratch" ]]; then
            export TINYFLUX_CACHE="$scratch/tinyflux"
            echo "shards are cached in $TINYFLUX_CACHE, a disk of each node" >&2
            break
        fi
    done
fi

# NCCL and InfiniBand. The defaults suit most machines; these are the ones that a cluster's manual may name.
# export NCCL_SOCKET_IFNAME=ib0        # the interface on which ranks find each other
# export NCCL_IB_HCA=mlx5              # which InfiniBand adapters carry the data
# export NCCL_DEBUG=WARN               # INFO says which network NCCL chose
# export GLOO_SOCKET_IFNAME=ib0        # the same for checkpoints and other host-side exchanges
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a lost rank ends the job, see parallel.timeout
