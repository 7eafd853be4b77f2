"""Trainings whose ranks are told to stop at bad moments, die, hang, or live on two hosts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.forked import Forked
from tests.training import (
    ROOT,
    curve,
    environment,
    make_source,
    options_of_run,
    records,
    start,
    start_torchrun,
    train,
    wait_for,
    workers,
)

STEPS = 16
OPTIONS = ("--trainer.total-steps", STEPS, "--trainer.save-every-steps", 4, "--data.val-fraction", 0.2)
OPTIONS += ("--trainer.validate-every", 3)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    # the tiny zoo's, which encodes the prompts
    tiny = {"shapes": [(8, 8)], "channels": 16, "t5_width": 128, "clip_width": 128}
    return [make_source(folder / "a", 1, **tiny), make_source(folder / "b", 2, samples=40, **tiny)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, sources):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(run_dir, sources, *OPTIONS)
    assert done.returncode == 0, done.stdout
    return curve(run_dir)


def same(run: list[dict], other: list[dict]) -> None:
    for a, b in zip(run, other, strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-4), (a["step"], name)


@pytest.mark.parametrize("line", ["training from step 0", "validating at step 3", "drawing samples at step 5"])
def test_told_to_stop_while_it_does_something_else(unbroken, sources, tmp_path, line):
    samples = ("--trainer.sample-every", 5, "--trainer.sample-prompts", "a red circle", "--trainer.zoo", "tiny")
    options = (*OPTIONS, *(samples if "samples" in line else ()))
    sent = tmp_path / "sent"
    process = start(tmp_path / "run", sources, *options, holds={f"step {STEPS - 4}": sent})
    said = ""
    for text in process.stdout:
        said += text
        if line in text:
            process.send_signal(signal.SIGTERM)
            sent.touch()
            break
    said += process.communicate(timeout=300)[0]
    assert process.returncode == 75 and "stopped by a signal" in said, said
    step = len(curve(tmp_path / "run"))
    assert step < STEPS and (tmp_path / "run" / "checkpoints" / f"step_{step}" / "metadata.json").exists()
    done = train(tmp_path / "run", sources, *OPTIONS)
    assert done.returncode == 0 and f"resuming at step {step}" in done.stdout, done.stdout
    same(curve(tmp_path / "run"), unbroken)


def test_torchrun_starts_again_when_a_rank_dies(unbroken, sources, tmp_path):
    killed = tmp_path / "killed"
    holds = {f"step {STEPS - 4}": killed}
    process = start_torchrun(tmp_path / "run", sources, *OPTIONS, more=["--max-restarts=1"], holds=holds)
    wait_for(process, tmp_path / "run", 9)
    os.kill(workers(process)[1], signal.SIGKILL)
    killed.touch()
    status, said = process.wait(timeout=300), (tmp_path / "run.log").read_text()
    assert status == 0, said
    assert "resuming at step" in said, said
    same(curve(tmp_path / "run"), unbroken)


def test_a_rank_that_hangs_ends_the_job_with_the_reason(sources, tmp_path):
    options = ("--parallel.timeout", 10, "--data.timeout", 6, "--trainer.total-steps", 10_000)
    holds = {"start": tmp_path / "started"}  # so that no rank waits so long for the other's imports
    process = start_torchrun(tmp_path / "run", sources, *options, holds=holds)
    wait_for(process, tmp_path / "run", 3)
    other, hanging = workers(process)
    started = time.monotonic()
    os.kill(hanging, signal.SIGSTOP)
    while Path(f"/proc/{other}").exists() and time.monotonic() < started + 300:
        time.sleep(0.1)
    assert 5 < time.monotonic() - started < 300  # the other one may have waited for it before
    os.kill(hanging, signal.SIGKILL)  # torchrun would wait 30 s for it
    status, said = process.wait(timeout=300), (tmp_path / "run.log").read_text()
    assert status == 1, said
    assert "error: rank 0 lost another rank" in said and "parallel.timeout = 10 s" in said, said


def launched(*argv: object, **env: str) -> Forked:
    """launch/torchrun.py with two ranks."""
    return Forked([ROOT / "launch/torchrun.py", "--standalone", "--nproc_per_node=2", *argv], environment() | env)


DIFFERENT = {  # what rank 1 has, and what is said of it
    "config": ("argv += ['--trainer.learning-rate', '2e-3']", "trainer.learning_rate is 0.002 on rank 1 ("),
    "data": ("argv[argv.index('--data.sources') + 1] = 'others/a'", "data.sources.a is "),
    "code": ("sys.path.insert(0, 'elsewhere')", "version.tinyflux is "),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_differ_are_refused_in_as_many_lines_as_it_takes(sources, tmp_path, what):
    change, expected = DIFFERENT[what]
    script = tmp_path / "differ.py"
    script.write_text(
        "import os, sys\n"
        f"argv = sys.argv[1:]\nos.chdir({str(tmp_path)!r})\n"
        f"if os.environ['RANK'] == '1':\n    {change}\n"
        "from launch.train import main\n"
        "sys.exit(main(argv))\n"
    )
    if what == "data":  # the same sizes, other values
        tiny = {"shapes": [(8, 8)], "channels": 16, "t5_width": 128, "clip_width": 128}
        make_source(tmp_path / "others" / "a", 1, captions=2, **tiny)
    if what == "code":
        for name in ("tinyflux", "launch"):
            shutil.copytree(ROOT / name, tmp_path / "elsewhere" / name)
        with open(tmp_path / "elsewhere" / "tinyflux" / "util" / "log.py", "a") as file:
            file.write("# one line more\n")
    process = launched(script, *options_of_run(tmp_path / "run", sources, *OPTIONS))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and "error: " in said, said
    lines = said[said.index("error: ") :].splitlines()  # data are compared once the network is there, which is said
    assert len(lines) == 2, said
    assert lines[0] == "error: the ranks differ, so they would train different models:"
    assert lines[1].startswith(f"  {expected}") and " on rank 1 (" in lines[1] and lines[1].endswith(" on rank 0")
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_an_error_of_one_rank_is_told_once(tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, sys, time\n"
        "from tinyflux.util import cli\n"
        "def action():\n"
        "    if os.environ['RANK'] == '0':\n"
        "        time.sleep(600)\n"
        "    raise ValueError('no such shard')\n"
        "sys.exit(cli.report(action))\n"
    )
    process = launched(script)
    said, _ = process.communicate(timeout=300)
    assert (process.returncode, said) == (2, "error: rank 1: no such shard\n")


def test_torchrun_waits_for_a_save_however_long_it_takes(tmp_path):
    script = tmp_path / "save.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(3)\n"
        "    sys.exit(75)\n"
        "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):\n"
        "    signal.signal(number, save)\n"
        "pathlib.Path(sys.argv[1] + os.environ['RANK']).touch()\n"
        "time.sleep(600)\n"
    )
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    processes = [launched(script, tmp_path / number.name, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1") for number in numbers]
    for number, process in zip(numbers, processes, strict=True):
        while not all((tmp_path / f"{number.name}{rank}").exists() for rank in (0, 1)):
            assert process.poll(0.05) is None
        process.send_signal(number)
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert (process.returncode, said) == (75, "")


@contextmanager
def two_hosts():
    """Two network namespaces joined by a cable; yields their names, addresses and devices."""
    names = [f"flux{os.getpid()}{x}" for x in "ab"]

    def ip(*args: str) -> None:
        subprocess.run(["ip", *args], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable0", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "cable0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2")
def test_two_hosts(unbroken, sources, tmp_path):
    with two_hosts() as names:
        hosts = []
        for i, name in enumerate(names):
            argv = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
            argv += [f"--node_rank={i}", "--nproc_per_node=1", "--master_addr=10.77.0.1", "--master_port=29400"]
            argv += [ROOT / "launch/train.py", *options_of_run(tmp_path / "run", sources, *OPTIONS)]
            env = environment() | {"GLOO_SOCKET_IFNAME": "cable0"}
            log = open(tmp_path / f"log{i}", "w")
            hosts.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True))
        try:
            statuses = [host.wait(timeout=300) for host in hosts]
        finally:
            for host in hosts:
                if host.poll() is None:
                    os.killpg(host.pid, signal.SIGKILL)
    said = "".join((tmp_path / f"log{i}").read_text() for i in (0, 1))
    assert statuses == [0, 0], said
    assert "on 2 x cpu" in said and (tmp_path / "run" / "report.html").exists()
    same(curve(tmp_path / "run"), unbroken)


def test_loss_spikes_are_skipped_also_after_a_resume(sources, tmp_path):
    """With the smallest allowed factor, every loss above the median is a spike."""
    options = ("--trainer.max-loss-spike", 1.05, "--trainer.max-nonfinite-steps", 50, "--data.micro-batch-size", 8)
    for steps in (25, 40):
        done = train(tmp_path / "parts", sources, *options, "--trainer.total-steps", steps)
        assert done.returncode == 0, done.stdout
    whole = train(tmp_path / "whole", sources, *options, "--trainer.total-steps", 40)
    assert whole.returncode == 0, whole.stdout
    one, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    skipped = [r["step"] for r in one if r["skipped"]]
    assert skipped and min(skipped) > 20 and skipped == [r["step"] for r in parts if r["skipped"]]
    assert "times the median" in whole.stdout and len(skipped) < 20
