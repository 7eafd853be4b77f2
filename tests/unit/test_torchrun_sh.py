"""torchrun.sh: its arguments from SLURM's and the user's environment, and a real launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "torchrun.sh"
SCONTROL = r"""case "$2 $3" in
    "hostnames n[1-2]") printf "n1\nn2\n" ;;
    "node n1") printf "NodeName=n1\n   NodeAddr=10.0.0.1 NodeHostName=n1\n" ;;
    *) exit 1 ;;
esac"""


@pytest.fixture
def bin_dir(tmp_path):
    """A PATH whose `python` prints the arguments of its script and whose `scontrol` knows two hosts."""
    path = tmp_path / "bin"
    path.mkdir()
    for name, text in {"python": 'shift; echo "$@"', "scontrol": SCONTROL}.items():
        (path / name).write_text(f"#!/bin/sh\n{text}\n")
        (path / name).chmod(0o755)
    return path


def launch(bin_dir, *args, **env):
    env = {"PATH": f"{bin_dir}:/usr/bin:/bin", **env}
    return subprocess.run([SCRIPT, *args], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"NPROC_PER_NODE": "2"}, "--nnodes 1 --nproc_per_node 2 --max_restarts 0 --standalone"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "h0", "NPROC_PER_NODE": "8", "MAX_RESTARTS": "3"},
            "--nnodes 2 --nproc_per_node 8 --max_restarts 3 --node_rank 1 --master_addr h0 --master_port 29500",
        ),
        (
            {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "h0", "PET_NPROC_PER_NODE": "gpu"},
            "--nnodes 2 --nproc_per_node gpu --max_restarts 0 --node_rank 1 --master_addr h0 --master_port 29500",
        ),
        (
            {"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "h0:29400", "PET_MAX_RESTARTS": "3", "NPROC_PER_NODE": "8"},
            "--nnodes 1:4 --nproc_per_node 8 --max_restarts 3",
        ),
        (
            {"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "train-0.train", "NPROC_PER_NODE": "8"},
            "--nnodes 2 --nproc_per_node 8 --max_restarts 0 --node_rank 1 --master_addr train-0.train"
            " --master_port 29500",
        ),
        (
            {
                "SLURM_JOB_ID": "41234",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_NODEID": "1",
                "SLURM_STEP_ID": "0",
                "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_GPUS_ON_NODE": "4",
            },
            "--nnodes 2 --nproc_per_node 4 --max_restarts 0 --node_rank 1 --master_addr 10.0.0.1 --master_port 21234",
        ),
    ],
)
def test_arguments_come_from_the_environment(bin_dir, env, expected):
    done = launch(bin_dir, "launch/train.py", "--run-dir", "a b", **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{expected} launch/train.py --run-dir a b"


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NNODES": "2"}, "needs MASTER_ADDR"),
        ({"NNODES": "two"}, "NNODES must be a positive number"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "h"}, "NODE_RANK must be in 0..1"),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}, "srun --ntasks-per-node=1"),
    ],
)
def test_an_environment_that_cannot_work_is_refused(bin_dir, env, words):
    done = launch(bin_dir, "launch/train.py", **env)
    assert done.returncode == 2 and words in done.stderr


def test_help(bin_dir):
    done = launch(bin_dir, "--help")
    assert done.returncode == 0 and "NPROC_PER_NODE" in done.stdout
    assert launch(bin_dir).returncode == 2


def test_two_real_processes_meet(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(
        "import sys, pathlib, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.tensor(dist.get_rank() + 1)\n"
        "dist.all_reduce(x)\n"
        "pathlib.Path(sys.argv[1], f'rank{dist.get_rank()}').write_text(str(x.item()))\n"
        "dist.destroy_process_group()\n"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    for name in [name for name in env if name.startswith("SLURM_")]:
        del env[name]
    done = subprocess.run([SCRIPT, script, tmp_path], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / name).read_text() for name in ("rank0", "rank1")] == ["3", "3"]
