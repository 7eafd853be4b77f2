# Everything that depends on your cluster: the one file to edit. Both job scripts source it on the first node.

# Modules and environment: uncomment what your site needs, or set TINYFLUX_VENV.
# module load cuda/12.8 nccl
if [[ -n "${TINYFLUX_VENV:-}" ]]; then
    source "$TINYFLUX_VENV/bin/activate"
fi

# Options of every srun. With Pyxis, TINYFLUX_IMAGE is the container image: /images/tinyflux.sqsh or registry#image:tag.
SRUN=()
if [[ -n "${TINYFLUX_IMAGE:-}" ]]; then
    SRUN+=(--container-image="$TINYFLUX_IMAGE" --container-mounts="$PWD,${TINYFLUX_MOUNTS:-$PWD}" --container-workdir="$PWD")
fi
# Since Slurm 22.05, srun does not inherit --cpus-per-task from the job: without this, each rank has one core.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
    SRUN+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
fi

# Downloaded shards go to a local disk: a shared file system would carry each byte twice, and its locks are slow.
# Without a local disk, the user's cache folder is used. --data.cache-dir overrides this.
if [[ -z "${TINYFLUX_CACHE:-}" ]]; then
    for scratch in "${SLURM_TMPDIR:-}" "${TMPDIR:-}"; do
        if [[ -n "$scratch" && -d "$scratch" ]]; then
            export TINYFLUX_CACHE="$scratch/tinyflux"
            echo "shards are cached in $TINYFLUX_CACHE on each node" >&2
            break
        fi
    done
fi

# NCCL and InfiniBand. The defaults suit most clusters; if your cluster's manual names other values, set them here.
# export NCCL_SOCKET_IFNAME=ib0        # the interface on which ranks find each other
# export NCCL_IB_HCA=mlx5              # which InfiniBand adapters carry the data
# export NCCL_DEBUG=WARN               # INFO logs which network NCCL chose
# export GLOO_SOCKET_IFNAME=ib0        # the same for checkpoints and other host-side exchanges
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a lost rank ends the job, see parallel.timeout
