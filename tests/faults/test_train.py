"""Trainings that are killed, stopped, damaged or asked for the impossible."""

import json
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch.distributed as dist

from launch.train import main
from tests.training import (
    curve,
    make_source,
    options_of_run,
    records,
    start_torchrun,
    train,
    train_until,
    wait_for,
)
from tinyflux.model.dcp import read_metadata
from tinyflux.model.zoo import ModelZoo
from tinyflux.run.folders import lock
from tinyflux.trainer import trainer
from tinyflux.trainer.preview import Preview
from tinyflux.trainer.sampling import Sampler

STEPS = 24
OPTIONS = ("--trainer.total-steps", STEPS, "--trainer.save-every-steps", 4, "--trainer.keep-last-n-steps", 2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return [make_source(folder / "a", 1), make_source(folder / "b", 2, samples=40)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, sources):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(run_dir, sources, *OPTIONS)
    assert done.returncode == 0, done.stdout
    return run_dir


def test_kept_and_published(unbroken):
    names = {path.name for path in (unbroken / "checkpoints").iterdir()}
    kept = {f"step_{step}{suffix}" for step in (20, 24) for suffix in ("", ".safetensors", "_ema.safetensors")}
    assert names == kept | {"config.json", "training_config.json"}
    assert [r["step"] for r in curve(unbroken)] == list(range(1, STEPS + 1))


def test_killed_at_a_random_step(unbroken, sources, tmp_path):
    step = random.SystemRandom().randrange(2, STEPS - 1)
    status, output = train_until(tmp_path / "run", sources, step, signal.SIGKILL, *OPTIONS, latest=f"step {STEPS - 1}")
    assert status == -signal.SIGKILL, output
    done = train(tmp_path / "run", sources, *OPTIONS)
    assert done.returncode == 0, done.stdout
    assert curve(tmp_path / "run") == curve(unbroken), f"killed after step {step}"


def test_killed_while_saving(unbroken, sources, tmp_path):
    saving = tmp_path / "run" / "checkpoints" / "step_8" / "__0_0.distcp"
    status, output = train_until(tmp_path / "run", sources, saving, signal.SIGKILL, *OPTIONS, latest="save 8")
    assert status == -signal.SIGKILL, output
    assert not (saving.parent / "metadata.json").exists()
    done = train(tmp_path / "run", sources, *OPTIONS)
    assert done.returncode == 0 and "resuming at step 4" in done.stdout, done.stdout
    assert curve(tmp_path / "run") == curve(unbroken)


def test_full_disk(sources, tmp_path):
    options = ("--trainer.save-every-steps", 2, "--trainer.total-steps")
    done = train(tmp_path / "run", sources, *options, 4)
    assert done.returncode == 0, done.stdout
    done = train(tmp_path / "run", sources, *options, 8, file_limit=300_000)
    assert done.returncode == 1 and "step 8 could not be saved" in done.stdout, done.stdout
    assert done.stdout.count("WARNING: saving") == 3 and len(curve(tmp_path / "run")) == 8
    assert {p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*") if p.is_dir()} == {"step_2", "step_4"}
    done = train(tmp_path / "run", sources, *options, 8)
    assert done.returncode == 0 and "resuming at step 4" in done.stdout, done.stdout


def test_stopped_by_signals_and_requeued(unbroken, sources, tmp_path):
    for step, number in ((3, signal.SIGTERM), (9, signal.SIGUSR1)):
        status, output = train_until(tmp_path / "run", sources, step, number, *OPTIONS, latest=f"step {step + 1}")
        assert status == 75 and "stopped by a signal" in output, output
        assert (tmp_path / "run" / "checkpoints" / f"step_{len(curve(tmp_path / 'run'))}" / "metadata.json").exists()
    done = train(tmp_path / "run", sources, *OPTIONS)
    assert done.returncode == 0, done.stdout
    assert curve(tmp_path / "run") == curve(unbroken)
    done = train(tmp_path / "run", sources, *OPTIONS)
    assert done.returncode == 0 and "finished" in done.stdout


def test_torchrun_killed_leaves_no_second_writer(unbroken, sources, tmp_path):
    """Workers whose torchrun was killed save and stop; a training started meanwhile waits for them."""
    killed = tmp_path / "killed"
    process = start_torchrun(tmp_path / "run", sources, *OPTIONS, holds={f"step {STEPS // 2}": killed})
    wait_for(process, tmp_path / "run", 5)
    process.kill()
    killed.touch()
    done = train(tmp_path / "run", sources, *OPTIONS, ranks=2)
    process.wait(300)
    deadline = time.monotonic() + 120
    while "stopped by a signal" not in (orphans := (tmp_path / "run.log").read_text()):  # it is said at the very end
        assert time.monotonic() < deadline, orphans
        time.sleep(0.05)
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stdout
    for a, b in zip(curve(tmp_path / "run"), curve(unbroken), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_locked_folder(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(RuntimeError, match="another training runs in"):
        lock(tmp_path, patience=0.1)
    held.close()
    lock(tmp_path, patience=0.1).close()


@pytest.mark.parametrize("damage", ["truncate", "flip", "unfinished"])
def test_damaged_newest_checkpoint(unbroken, sources, tmp_path, damage):
    run_dir = shutil.copytree(unbroken, tmp_path / "run")
    newest = run_dir / "checkpoints" / "step_24"
    data = newest / "__0_0.distcp"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:5000])
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    else:
        (newest / "metadata.json").unlink()
    done = train(run_dir, sources, *OPTIONS)
    assert done.returncode == 0 and "resuming at step 20" in done.stdout, done.stdout
    if damage != "unfinished":
        assert "WARNING" in done.stdout and "step_24" in done.stdout and "falling back" in done.stdout
    assert curve(run_dir) == curve(unbroken)


def test_no_sound_checkpoint(unbroken, sources, tmp_path):
    run_dir = shutil.copytree(unbroken, tmp_path / "run")
    for step in (20, 24):
        (run_dir / "checkpoints" / f"step_{step}" / "__0_0.distcp").unlink()
    done = train(run_dir, sources, *OPTIONS)
    assert done.returncode == 1 and "all checkpoints in" in done.stdout, done.stdout
    assert len(curve(run_dir)) == STEPS


def test_changed_data_is_said(sources, tmp_path):
    done = train(tmp_path / "run", sources, "--trainer.total-steps", 2)
    assert done.returncode == 0, done.stdout
    done = train(tmp_path / "run", sources[:1], "--trainer.total-steps", 3)
    assert done.returncode == 0 and "WARNING: sources was" in done.stdout, done.stdout


def test_saved_by_the_clock_and_epochs_no_faster(sources, tmp_path):
    """An epoch is 8 steps here. A checkpoint of one would be made at steps 8, 16 and 24, were it not for the clock."""
    run_dir, options = tmp_path / "run", ("--trainer.total-steps", STEPS, "--trainer.save-every-epochs", 1)
    done = train(run_dir, sources, *options)
    assert done.returncode == 0, done.stdout
    assert {path.name for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir()} == {"step_24"}
    assert read_metadata(run_dir / "checkpoints" / "step_24")["reasons"] == ["epoch", "step"]
    every = ("--trainer.save-every-minutes", 1e-9, "--trainer.keep-last-n-steps", 0)
    done = train(tmp_path / "often", sources, *options, *every)
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "often/checkpoints").glob("step_*") if path.is_dir())
    assert done.returncode == 0 and 6 < len(saved) < STEPS and saved[-1] == STEPS, done.stdout


def test_a_second_run_over_what_remains(sources, tmp_path):
    options = ("--trainer.total-steps", 2)
    assert train(tmp_path / "run", sources, *options).returncode == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_2")
    done = train(tmp_path / "run", sources, *options)
    assert done.returncode == 2 and "has remains of a run" in done.stdout, done.stdout
    assert len(curve(tmp_path / "run")) == 2
    done = train(tmp_path / "run", sources, *options, "--start-over", "--trainer.shift", 1.0)
    assert done.returncode == 0 and "metrics.1.jsonl" in done.stdout, done.stdout
    done = train(tmp_path / "run", sources, "--trainer.total-steps", 3, "--start-over")
    assert done.returncode == 0 and "resuming at step 2" in done.stdout, done.stdout
    assert "WARNING: since this checkpoint trainer.shift was 1.0, is now 3.0" in done.stdout
    assert [record["step"] for record in records(tmp_path / "run") if "resumed" in record] == [3]


def test_pictures_stop_no_training(tmp_path, monkeypatch):
    """A decode that hangs, then a folder that cannot be written to."""
    tiny = {"shapes": [(8, 8)], "channels": 16, "t5_width": 128, "clip_width": 128}
    source = make_source(tmp_path / "a", 1, **tiny)
    options = ("--trainer.total-steps", 6, "--trainer.sample-every", 1, "--trainer.sample-steps", 1)
    options += ("--trainer.sample-prompts", "a red circle", "--trainer.zoo", "tiny")
    released, decode = threading.Event(), Sampler.decode
    monkeypatch.setattr(Sampler, "decode", lambda *args: released.wait(300) and decode(*args))

    def release() -> None:
        while len(records(tmp_path / "run")) < 4:
            time.sleep(0.01)
        released.set()

    threading.Thread(target=release, daemon=True).start()
    done = train(tmp_path / "run", [source], *options)
    assert done.returncode == 0 and released.is_set(), done.stdout
    assert "no samples of step 2: the previous ones are not decoded yet" in done.stdout
    drawn = {path.name for path in (tmp_path / "run/samples").iterdir()}
    assert {"step_1.png", "step_1_raw.png", "step_6.png"} <= drawn  # the last ones are never left out
    (tmp_path / "other").mkdir()
    (tmp_path / "other/samples").touch()
    done = train(tmp_path / "other", [source], *options)
    assert done.returncode == 0 and "WARNING: no samples of step 1: " in done.stdout, done.stdout


def test_at_the_end_no_rank_waits_for_pictures(tmp_path, monkeypatch):
    """Decoding may take longer than a collective may: what the ranks do together is done before."""
    source = make_source(tmp_path / "a", 1, shapes=[(8, 8)], channels=16, t5_width=128, clip_width=128)
    done = []

    def noted(what: str, call):
        return lambda *args, **kwargs: done.append(what) or call(*args, **kwargs)

    monkeypatch.setattr(Preview, "wait", noted("rank 0 waits", Preview.wait))
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast_object_list", "barrier"):
        monkeypatch.setattr(dist, name, noted("together", getattr(dist, name)))
    options = ("--trainer.total-steps", 2, "--trainer.sample-every", 2, "--trainer.sample-steps", 1)
    result = train(tmp_path / "run", [source], *options, "--trainer.sample-prompts", "a", "--trainer.zoo", "tiny")
    assert result.returncode == 0 and (tmp_path / "run/samples/step_2.png").exists(), result.stdout
    assert "together" in done and done[-1] == "rank 0 waits"


def test_a_stop_saves_before_it_draws(tmp_path, monkeypatch):
    """Told to stop while it draws, the run draws nothing more; an error that nobody expects of a picture is told."""
    source = make_source(tmp_path / "a", 1, shapes=[(8, 8)], channels=16, t5_width=128, clip_width=128)
    drawn, draw = [], Preview.draw

    def told(preview, model, ema, step, *others, **more):
        drawn.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(preview, model, ema, step, *others, **more)

    def decode(*_):
        raise MemoryError

    monkeypatch.setattr(Preview, "draw", told)
    monkeypatch.setattr(Sampler, "decode", decode)
    options = ("--trainer.total-steps", 9, "--trainer.sample-every", 1, "--trainer.sample-steps", 1)
    done = train(tmp_path / "run", [source], *options, "--trainer.sample-prompts", "a", "--trainer.zoo", "tiny")
    step = len(records(tmp_path / "run"))
    assert done.returncode == 75 and drawn == list(range(1, step)), (drawn, done.stdout)
    assert f"no samples of step {step}: the training stops" in done.stdout and "preview: MemoryError" in done.stdout


def test_a_stop_gives_up_scores_that_take_long(tmp_path, monkeypatch):
    """Told to stop at the third of 80 pictures, the run is saved and ends after one more at most."""
    source = make_source(tmp_path / "a", 1, samples=80, shapes=[(8, 8)], channels=16, t5_width=128, clip_width=128)
    decoded, decode, given_up, stop = [], ModelZoo.decode_latents, threading.Event(), Sampler.stop

    def told(zoo, latents):
        decoded.append(len(latents))
        if len(decoded) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(decoded) > 3:
            given_up.wait(300)
        return decode(zoo, latents)

    monkeypatch.setattr(Sampler, "stop", lambda sampler: stop(sampler) or given_up.set())
    monkeypatch.setattr(ModelZoo, "decode_latents", told)
    monkeypatch.setattr(trainer, "STOP_PATIENCE", 0.0)
    options = ("--trainer.evaluate-every", 1, "--trainer.evaluation-samples", 40, "--trainer.sample-steps", 1)
    options += ("--data.val-fraction", 0.8, "--trainer.zoo", "tiny", "--trainer.total-steps", 10_000)
    done = train(tmp_path / "run", [source], *options)
    assert done.returncode == 75 and "stopped by a signal" in done.stdout, done.stdout
    for thread in threading.enumerate():
        if thread.name.startswith("scores"):
            thread.join(10)
    assert len(decoded) <= 4 and not (tmp_path / "run" / "evaluations").exists()


BAD = {
    "unknown option": (("--trainer.learning-rat", "1"), "learning-rat"),
    "wrong value": (("--trainer.lr-scheduler", "wavy"), "cosine"),
    "negative": (("--trainer.ema-decay", "1.5"), "trainer.ema_decay is 1.5: it must be in [0, 1)"),
    "batch": (("--data.global-batch-size", "9"), "data.global_batch_size is 9, must be a multiple of"),
    "contradiction": (("--model.in-channels", "16"), "model.in_channels is 16, but the shards' latents are [4, 4, 4]"),
    "no folder": (("--data.sources", "nowhere"), "nowhere"),
    "no file": (("--config", "nowhere.toml"), "nowhere.toml"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(sources, tmp_path, capfd, name):
    options, message = BAD[name]
    try:
        status = main(options_of_run(tmp_path / "run", sources, *options))
    except SystemExit as error:  # what the option parser itself refuses
        status = error.code
    assert status == 2
    assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_nonfinite_steps_stop_the_run(sources, tmp_path):
    options = ("--trainer.learning-rate", "1e38", "--trainer.max-nonfinite-steps", 3, "--trainer.total-steps", 40)
    done = train(tmp_path / "run", sources, *options)
    assert done.returncode == 1 and "error: 3 steps in a row" in done.stdout, done.stdout
    dump = json.loads(next((tmp_path / "run").glob("nonfinite_step_*.json")).read_text())
    assert len(dump["keys"]) == 8
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # JSON has neither NaN nor Infinity
    assert [r["skipped"] for r in found][-3:] == [True] * 3 and found[-1]["step"] == dump["step"]
    assert None in found[-1]["main_by_t"] and found[-1]["loss"] is None
