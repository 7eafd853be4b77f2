"""Checkpoints and records on disks that are full, do not answer, or lose data."""

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import default_planner

from tinyflux.model.dcp import write_metadata
from tinyflux.model.loader import load_model
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.run import checkpoint, folders, metrics
from tinyflux.run.checkpoint import PUBLISHED, Checkpointer
from tinyflux.run.folders import MARK, list_checkpoints
from tinyflux.run.metrics import Metrics
from tinyflux.run.records import read_metrics
from tinyflux.trainer.parallel import join_process_group

CONFIG = TinyFluxConfig(
    hidden_size=32,
    num_attention_heads=2,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    num_double_layers=1,
    num_single_layers=2,
    lune_hidden_dim=16,
    sol_hidden_dim=8,
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture(scope="module")
def model() -> TinyFluxDeep:
    join_process_group(torch.device("cpu"))
    return TinyFluxDeep(CONFIG)


@contextmanager
def opened(run_dir: Path, config: dict | None = None, **options):
    checkpointer = Checkpointer(run_dir / "checkpoints", CONFIG, config or {"trainer": {"shift": 3.0}}, **options)
    checkpointer.write_configs()
    yield checkpointer
    checkpointer.close()


def state(model: TinyFluxDeep) -> dict:
    weights = model.state_dict()
    return {"model": weights, "ema": {name: x.clone() for name, x in weights.items()}, "optimizer": {}}


def save(checkpointer: Checkpointer, model: TinyFluxDeep, *steps: int, reasons=frozenset({"step"})) -> None:
    for step in steps:
        checkpointer.save(step, state(model), {"epoch": 0, "best_loss": None}, set(reasons))
    checkpointer.wait()


def names(run_dir: Path, pattern: str = "step_*") -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").glob(pattern) if path.is_dir()}


def damage(folder: Path) -> None:
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])


def test_an_io_error_is_no_damage(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(folders, "PAUSES", (0.05, 0.3))
    with opened(tmp_path) as checkpointer:
        save(checkpointer, model, 1, 2)
    path = tmp_path / "checkpoints" / "step_2" / "metadata.json"
    path.rename(tmp_path / "kept")
    path.symlink_to("/proc/self/mem")  # reading its first page is a real EIO
    with opened(tmp_path) as checkpointer:
        with pytest.raises(OSError, match="Input/output error"):
            checkpointer.load_newest(state(model))
        assert names(tmp_path) == {"step_1", "step_2"}
        said = capfd.readouterr().out
        with pytest.raises(OSError, match="Input/output error"):  # what a start reads first of all
            folders.newest_identity(checkpointer.root)
        assert capfd.readouterr().out.count("trying again in") == 2
        assert said.count("trying again in") == 2 and "falling back" not in said

        def heal(_pause: float) -> None:
            (tmp_path / "kept").replace(path)

        monkeypatch.setattr(folders, "time", SimpleNamespace(sleep=heal))  # while it waits for its second try
        assert checkpointer.load_newest(state(model))["step"] == 2


def test_the_same_step_damaged_twice(model, tmp_path):
    for _ in range(2):
        with opened(tmp_path) as checkpointer:
            save(checkpointer, model, 1, 2)
        damage(tmp_path / "checkpoints" / "step_2")
        with opened(tmp_path) as checkpointer:
            assert checkpointer.load_newest(state(model))["step"] == 1
    assert names(tmp_path) == {"step_1", "step_2.damaged", "step_2.damaged2"}


def test_damaged_metadata_of_an_older_checkpoint(model, tmp_path, capfd):
    with opened(tmp_path, keep_steps=2) as checkpointer:
        save(checkpointer, model, 1, 2)
        checkpointer.published.result()
        path = tmp_path / "checkpoints" / "step_1" / "metadata.json"
        path.write_text(path.read_text()[:-9])
        save(checkpointer, model, 3, reasons={"step", "best"})
        save(checkpointer, model, 4)
    said = capfd.readouterr().out
    assert said.count("WARNING") == 1 and "step_1/metadata.json is damaged" in said, said
    assert names(tmp_path) == {"step_1.damaged", "step_3", "step_4"}
    assert (tmp_path / "checkpoints" / "best_ema.safetensors").exists()


def test_what_remains_of_a_run_is_not_begun_at_0_unasked(model, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with opened(tmp_path) as checkpointer:  # died before its first checkpoint: nothing is lost
        assert checkpointer.load_newest(state(model)) is None
        save(checkpointer, model, 1)
    damage(tmp_path / "checkpoints" / "step_1")
    with opened(tmp_path) as checkpointer:
        with pytest.raises(RuntimeError, match="all checkpoints in"):
            checkpointer.load_newest(state(model))
        for left, gone in (("step_1.damaged", "*.damaged"), ("step_1_ema", "*.safetensors"), ("metrics.jsonl", None)):
            with pytest.raises(ValueError, match=rf"has remains of a run but no checkpoint: .*{left}.* --start-over"):
                checkpointer.load_newest(state(model))
            for path in (tmp_path / "checkpoints").glob(gone or "nothing"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert (tmp_path / MARK).read_text() == "1\n"
        assert checkpointer.load_newest(state(model), start_over=True) is None
    Metrics(tmp_path, None, 0, 10).close()
    assert (tmp_path / "metrics.1.jsonl").read_text() == '{"step": 1}\n' and not read_metrics(tmp_path)


def test_a_save_that_was_cut_off_is_kept_until_the_next_is_complete(model, tmp_path):
    with opened(tmp_path) as checkpointer:
        save(checkpointer, model, 1, 2)
    (tmp_path / "checkpoints" / "step_2" / "metadata.json").unlink()
    with opened(tmp_path) as checkpointer:
        assert checkpointer.load_newest(state(model))["step"] == 1
        assert names(tmp_path) == {"step_1", "step_2.cut"}
        save(checkpointer, model, 2)
    assert names(tmp_path) == {"step_1", "step_2"}


def test_exports_that_are_missing_are_made_at_the_next_start(model, tmp_path):
    """Of all checkpoints: a stop may come while several wait, and the best weights are copied from one."""
    with opened(tmp_path) as checkpointer:
        save(checkpointer, model, 1, reasons={"step", "best"})
        save(checkpointer, model, 2)
    paths = [tmp_path / "checkpoints" / f"{name}_ema.safetensors" for name in ("step_1", "step_2", "best")]
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    with opened(tmp_path) as checkpointer:
        checkpointer.load_newest(state(model))
    assert [path.read_bytes() for path in paths] == contents
    paths[2].unlink()
    (tmp_path / "checkpoints" / "step_1" / PUBLISHED).unlink()  # killed after the exports, before the copy
    with opened(tmp_path) as checkpointer:
        checkpointer.load_newest(state(model))
    assert paths[2].read_bytes() == contents[2]


def test_an_older_best_that_is_exported_late_does_not_replace_the_newest(model, tmp_path):
    with opened(tmp_path) as checkpointer:
        save(checkpointer, model, 1, reasons={"best", "step"})
        save(checkpointer, TinyFluxDeep(CONFIG), 2, reasons={"best", "step"})
    root = tmp_path / "checkpoints"
    newest = (root / "best_ema.safetensors").read_bytes()
    assert newest == (root / "step_2_ema.safetensors").read_bytes()
    (root / "step_1_ema.safetensors").unlink()
    with opened(tmp_path) as checkpointer:
        checkpointer.load_newest(state(model))
    assert (root / "step_1_ema.safetensors").exists() and (root / "best_ema.safetensors").read_bytes() == newest


def test_what_killed_exports_leave_is_deleted(model, tmp_path):
    with opened(tmp_path) as checkpointer:
        save(checkpointer, model, 1)
    left = [tmp_path / "checkpoints" / name for name in (".step_1.safetensors.0123abcd.tmp", ".step_1_lora.7.tmp")]
    left[0].write_bytes(b"half")
    left[1].mkdir()
    with opened(tmp_path):
        assert not any(path.exists() for path in left)


def test_an_interrupted_deletion_is_completed_by_the_next(model, tmp_path, capfd):
    export = tmp_path / "checkpoints" / "step_1_ema.safetensors"
    with opened(tmp_path, keep_steps=1) as checkpointer:
        save(checkpointer, model, 1)
        checkpointer.published.result()
        export.unlink()
        export.mkdir()  # it cannot be deleted as a file
        save(checkpointer, model, 2)
        checkpointer.published.result()
        assert "old checkpoints could not be deleted" in capfd.readouterr().out
        export.rmdir()
        save(checkpointer, model, 3)
    assert not list((tmp_path / "checkpoints").glob("step_[12]*"))


def test_a_folder_that_goes_away_after_a_save_stops_no_training(model, tmp_path):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(1, state(model), {"epoch": 0, "best_loss": None}, {"step"})
        checkpointer.pending.result()
        checkpointer.published.result()
        checkpointer.root.rename(tmp_path / "unmounted")
        checkpointer.wait()
        assert checkpointer.newest == 1


def test_a_large_state_is_exported_by_a_process_of_its_own(model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "APART", 0)
    with opened(tmp_path) as checkpointer:
        save(checkpointer, model, 1, reasons={"step", "best"})
        assert checkpointer.exporter is not None
        checkpointer.published.result()
        assert checkpointer.exporter.process.returncode == 0
    for name in ("step_1.safetensors", "best_ema.safetensors"):
        loaded = load_model(tmp_path / "checkpoints" / name).state_dict()
        assert all(torch.equal(x, loaded[key]) for key, x in model.state_dict().items())


def test_a_stop_saves_and_leaves_exports_to_the_next_start(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(checkpoint, "APART", 0)  # a separate process takes seconds
    root = tmp_path / "checkpoints"
    checkpointer = Checkpointer(root, CONFIG, {})
    checkpointer.write_configs()
    save(checkpointer, model, 1)
    assert (root / "step_1" / "metadata.json").exists()
    checkpointer.close(0.0)
    assert "written at the next start" in capfd.readouterr().out
    assert {path.name for path in root.iterdir()} == {"step_1", "config.json", "training_config.json"}
    with opened(tmp_path) as checkpointer:
        assert checkpointer.load_newest(state(model))["step"] == 1
    assert {"step_1.safetensors", "step_1_ema.safetensors"} <= {path.name for path in root.iterdir()}


def test_a_state_is_planned_once(model, tmp_path, monkeypatch):
    planned = []
    make = default_planner.create_default_global_save_plan
    monkeypatch.setattr(default_planner, "create_default_global_save_plan", lambda *a: planned.append(a) or make(*a))
    for place in ("a", "b"):  # a second run in the same process has its own plans
        with opened(tmp_path / place) as checkpointer:
            save(checkpointer, model, 1, 2, 3)
    assert len(planned) == 2
    with opened(tmp_path / "a") as checkpointer:
        loaded = state(TinyFluxDeep(CONFIG))
        assert checkpointer.load_newest(loaded)["step"] == 3
    assert all(torch.equal(x, loaded["model"][key]) for key, x in model.state_dict().items())


def test_a_resumed_run_says_what_changed(model, tmp_path, capfd):
    with opened(tmp_path, {"trainer": {"shift": 3.0, "betas": (0.9, 0.95)}, "run_dir": "a"}) as checkpointer:
        save(checkpointer, model, 1)
    with opened(tmp_path, {"trainer": {"shift": 1.0, "betas": [0.9, 0.95]}, "run_dir": "b"}) as checkpointer:
        checkpointer.load_newest(state(model))
    said = [line for line in capfd.readouterr().out.splitlines() if "WARNING" in line]
    assert said == ["WARNING: since this checkpoint trainer.shift was 3.0, is now 1.0"]


@contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    free = os.statvfs(disk)
    path = disk / "filler"
    path.write_bytes(bytes(free.f_bavail * free.f_frsize - leave))
    return path


@needs_root
def test_a_full_disk_stops_no_training(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(checkpoint, "RETRY", 0.05)
    with small_disk(tmp_path / "disk", "16m") as disk, opened(disk / "run", every=900) as checkpointer:
        save(checkpointer, model, 1)
        checkpointer.published.result()
        size = sum(path.stat().st_size for path in (disk / "run/checkpoints/step_1").iterdir())
        filler = fill(disk, leave=size // 2)
        assert not checkpointer.overdue
        save(checkpointer, model, 2, reasons={"epoch"})
        assert checkpointer.newest == 1 and "WARNING: saving" in capfd.readouterr().out
        assert names(disk / "run") == {"step_1"}
        filler.unlink()
        filler = fill(disk, leave=int(size * 1.3))  # room for the checkpoint, not for both exports
        time.sleep(0.06)
        assert checkpointer.overdue
        save(checkpointer, model, 3)
        checkpointer.published.result()
        assert checkpointer.newest == 3 and "exporting" in capfd.readouterr().out
        filler.unlink()
        save(checkpointer, model, 4)
        assert [path.name for path in list_checkpoints(disk / "run/checkpoints")] == ["step_4", "step_3", "step_1"]
        assert "epoch" in checkpoint.read_metadata(disk / "run/checkpoints/step_3")["reasons"]  # as step 2 was to be


@needs_root
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_records_wait_for_room(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(metrics, "RETRY", 0.1)
    join_process_group(torch.device("cpu"))
    with small_disk(tmp_path / "disk", "2m") as disk:
        records = Metrics(disk, disk / "logs", 0, 10_000)
        records.record({"step": 1})
        filler = fill(disk)
        for step in range(2, 2000):
            records.record({"step": step, "loss": 0.5})
            records.scalars({"loss": 0.5}, step)
        said = capfd.readouterr().out
        assert said.count("WARNING") == 2 and "metrics.jsonl" in said and "TensorBoard" in said, said
        filler.unlink()
        records.record({"step": 2000})
        records.close()
        assert [record["step"] for record in read_metrics(disk)] == list(range(1, 2001))


def test_a_damaged_record_is_named(tmp_path, capfd):
    join_process_group(torch.device("cpu"))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\0\n{"step": 2}\n{"step": 3}\n{"st')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is damaged"):
        read_metrics(tmp_path)
    Metrics(tmp_path, None, 2, 10).close()
    assert f"{path}: line 2 is damaged" in capfd.readouterr().out
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_file_of_another_step_is_no_checkpoint(model, tmp_path):
    """Intact metadata that belongs to other files."""
    with opened(tmp_path) as checkpointer:
        save(checkpointer, model, 1)
    folder = tmp_path / "checkpoints" / "step_1"
    write_metadata(folder, checkpoint.read_metadata(folder) | {"files": {"__0_0.distcp": [1, 1]}})
    with opened(tmp_path) as checkpointer, pytest.raises(RuntimeError, match="all checkpoints in"):
        checkpointer.load_newest(state(model))
