"""The two job scripts on a real Slurm: a training that is requeued or nears its time limit, a build as an array."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import Forked
from tests.held import holding
from tests.slurm_cluster import missing, slurm_cluster
from tests.training import ROOT, curve, environment, make_source, options_of_run, records, train

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())} (slurm-wlm, munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons need root"),
]
STEPS = 60
PATIENCE = 300  # seconds
SBATCH = ("sbatch", "--parsable", "--cpus-per-task=1")  # the nodes here are small


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder to submit from: the repository's entry points, and room for the logs. The training waits at places, if
    its environment has any."""
    path = tmp_path_factory.mktemp("jobs")
    (path / "torchrun.sh").symlink_to(ROOT / "torchrun.sh")
    (path / "launch").mkdir()
    for file in (ROOT / "launch").iterdir():
        if file.name != "train.py":
            (path / "launch" / file.name).symlink_to(file)
    held, train = ROOT / "tests/held.py", ROOT / "launch/train.py"
    (path / "launch" / "train.py").write_text(
        f"import runpy, sys\nsys.argv.insert(1, {str(train)!r})\nrunpy.run_path({str(held)!r}, run_name='__main__')\n"
    )
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as env:
        yield env | environment() | {"SLURM_CONF": env["SLURM_CONF"], "PATH": path, "GLOO_SOCKET_IFNAME": "lo"}


def call(cluster: dict[str, str], folder: Path, *args: object) -> str:
    done = subprocess.run(list(map(str, args)), cwd=folder, env=cluster, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait(cluster: dict[str, str], folder: Path, job: str, reached: Callable[[], bool] | None = None) -> None:
    """Until `reached`, or until no task of a job is queued or running, a requeued one's next start included."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if reached() if reached else not call(cluster, folder, "squeue", "-h", "-j", job):
            return
        # a requeued job is held for two minutes, lest its nodes still be busy with it
        subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], env=cluster, capture_output=True)
        time.sleep(0.5)
    call(cluster, folder, "scancel", job)
    pytest.fail(f"job {job} did not end:\n{logs(folder)}")


def logs(folder: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*.log")))


def rank_of(job: str, rank: int) -> int:
    """Process id of a rank of a running job."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if {f"SLURM_JOB_ID={job}", f"RANK={rank}"} <= {*path.read_text().split("\0")}:
                return int(path.parent.name)
    raise LookupError(f"job {job} has no rank {rank}")


def pending(pid: int) -> set[int]:
    """Signals that wait for a process."""
    masks = re.findall(r"^(?:Sig|Shd)Pnd:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return {number for number in range(1, 65) if any(int(mask, 16) >> number - 1 & 1 for mask in masks)}


def wait_until(folder: Path, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, logs(folder)
        time.sleep(0.002)


def test_a_training_that_is_stopped_goes_on_by_itself(cluster, folder, tmp_path):
    """Its own exit status asks for it: both nodes get the signal, as near the time limit, while a checkpoint is being
    written, for which one of them stands still until it has it. Then by another's hand."""
    sources = [make_source(tmp_path / "a", 1), make_source(tmp_path / "b", 2, samples=40)]
    run_dir = tmp_path / "run"
    options = ["--trainer.total-steps", STEPS]
    saves = ["--trainer.save-every-steps", 8, "--trainer.keep-last-n-steps", 0]
    words = options_of_run(run_dir, sources, *options, *saves)
    told, requeued = tmp_path / "told", tmp_path / "requeued"
    held = cluster | holding({"save 16": told, f"step {STEPS // 2}": requeued})
    job = call(held, folder, *SBATCH, "--nodes=2", "launch/slurm/train.sbatch", *words)
    saving = run_dir / "checkpoints" / "step_16"
    wait_until(folder, (run_dir / "checkpoints" / "step_8" / "metadata.json").exists)
    still = rank_of(job, 1)
    wait_until(folder, lambda: list(saving.glob("__1_*.distcp")))
    os.kill(still, signal.SIGSTOP)  # a save is over when all ranks have written their part
    try:
        deadline = time.monotonic() + PATIENCE
        while signal.SIGUSR1 not in pending(still):  # again, in case a busy node has missed it
            assert time.monotonic() < deadline, logs(folder)
            call(cluster, folder, "scancel", "--signal=USR1", job)
            time.sleep(2)
        assert not (saving / "metadata.json").exists()
    finally:
        os.kill(still, signal.SIGCONT)
        told.touch()
    wait(cluster, folder, job, lambda: any("resumed" in record for record in records(run_dir)))
    call(cluster, folder, "scontrol", "requeue", job)
    requeued.touch()
    wait(cluster, folder, job)
    log = (folder / f"tinyflux-train-{job}-node0.log").read_text()
    assert "saved step_16" in log and "stopped by a signal at step" in log, logs(folder)
    assert log.count("resuming at step") == 2 and "Traceback" not in log, logs(folder)
    assert (folder / f"tinyflux-train-{job}-node1.log").exists()
    assert [r["step"] for r in records(run_dir)] == list(range(1, STEPS + 1)), logs(folder)
    done = train(tmp_path / "unbroken", sources, *options, ranks=2)
    assert done.returncode == 0, done.stdout
    for a, b in zip(curve(tmp_path / "unbroken"), curve(run_dir), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), a["step"]


def test_a_build_as_an_array_has_the_bytes_of_one_process(cluster, folder):
    (folder / "sources.toml").write_text('[drawn]\nkind = "shapes"\ndataset_id = 8\ncount = 16\n')
    options = ["--source", "drawn", "--zoo", "tiny", "--device", "cpu", "--shard-size", "4", "--batch-size", "4"]
    job = call(cluster, folder, *SBATCH, "--array=0-1", "launch/slurm/build.sbatch", *options, "--out", "array")
    wait(cluster, folder, job)
    build = Forked(["-m", "sharding.build", *options, "--out", "alone"], environment(), cwd=folder)
    said, _ = build.communicate(timeout=PATIENCE)
    assert build.returncode == 0, said
    array, alone = (
        {path.name: path.read_bytes() for path in (folder / name).iterdir() if path.is_file()}
        for name in ("array", "alone")
    )
    assert array == alone and len([name for name in array if name.endswith(".tar")]) == 4, logs(folder)
    for task in (0, 1):  # which of them wrote how many shards depends on who started first
        assert "array: " in (folder / f"tinyflux-build-{job}-{task}.log").read_text(), logs(folder)
