"""A real Slurm cluster of two nodes on this machine, for a `with` block (needs slurm-wlm and munge, as root)."""

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def missing() -> list[str]:
    """Missing programs of a cluster."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _wait(folder: Path, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"Slurm's two nodes did not come up in 180 s:\n{logs}")
        time.sleep(0.1)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and two slurmd; yields the environment in which sbatch, srun and scontrol find them."""
    folder.mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host, (control, n1, n2) = socket.gethostname(), free_ports(3)
    first = random.SystemRandom().randrange(1, 10_000)  # jobs of two clusters here differ, and so do their ports
    (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
FirstJobId={first}
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
""")
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
              f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed"]  # fmt: skip
    daemons = []

    def begin(*command: str) -> None:
        with open(folder / f"{len(daemons)}-{command[0]}.out", "wb") as out:
            daemons.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))

    try:
        begin(*munged)
        _wait(folder, (folder / "munge.socket").exists)
        begin("slurmctld", "-D")
        _wait(folder, lambda: " UP" in _said(env, "scontrol", "ping"))
        for node in ("n1", "n2"):
            begin("slurmd", "-D", "-N", node)
        _wait(folder, lambda: len(_said(env, "sinfo", "-h", "-N", "-t", "idle").splitlines()) == 2)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _said(env: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False).stdout
