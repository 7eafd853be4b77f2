"""A run's checkpoint folders, read without a process group: their content, and what is refused."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import _version, default_planner

from tests.training import make_source, train
from tinyflux.model.dcp import read_metadata, read_tensors, write_metadata
from tinyflux.model.loader import CheckpointError, load_checkpoint, load_model
from tinyflux.model.model import TinyFluxDeep


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """The checkpoints of a run of four steps, step 4 as a .pt too."""
    folder = tmp_path_factory.mktemp("sharded")
    source = make_source(folder / "portraits", dataset_id=1)
    process = train(folder / "run", [source], "--trainer.total-steps", 4, "--trainer.save-pt")
    assert process.returncode == 0, process.stdout
    return folder / "run" / "checkpoints"


@pytest.fixture
def step(checkpoints, tmp_path) -> Path:
    """A copy of step_4 that may be damaged."""
    shutil.copy(checkpoints / "config.json", tmp_path)
    return Path(shutil.copytree(checkpoints / "step_4", tmp_path / "step_4"))


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


def test_a_folder_gives_what_its_single_file_does(checkpoints):
    folder, file = load_checkpoint(checkpoints / "step_4"), load_checkpoint(checkpoints / "step_4.pt")
    assert isinstance(folder["model"], TinyFluxDeep) and folder["step"] == 4
    assert folder["model"].config.to_dict() == file["model"].config.to_dict() == file.pop("model_config")
    assert equal(folder.pop("model").state_dict(), file.pop("model").state_dict())
    assert folder["optimizer"]["state"] and folder["trainer_config"]["total_steps"] == 4
    assert equal(folder, file)


def test_the_folder_stands_in_for_a_file_that_was_not_written(checkpoints, step):
    """The calls of the original package: `load_checkpoint("checkpoints/step_5000.pt")` and `best.pt`."""
    root = step.parent
    loaded = load_checkpoint(root / "step_4.pt")
    assert loaded["step"] == 4 and equal(loaded["model"].state_dict(), load_model(checkpoints / "step_4").state_dict())
    with pytest.raises(FileNotFoundError, match=r"step_5.pt: no such checkpoint; existing ones are in .*: step_4$"):
        load_checkpoint(root / "step_5.pt")
    with pytest.raises(FileNotFoundError, match="best.pt: no such checkpoint"):
        load_checkpoint(root / "best.pt")
    with pytest.raises(FileNotFoundError, match=r"step_7: no such .*existing ones are in .*checkpoints: .*step_4.pt"):
        load_model(checkpoints.parent / "step_7")
    write_metadata(step, read_metadata(step) | {"reasons": ["best", "step"]})
    assert load_checkpoint(root / "best.pt")["step"] == 4


def test_both_sets_of_weights(checkpoints):
    for ema, name in ((False, "step_4.safetensors"), (True, "step_4_ema.safetensors")):
        model = load_model(checkpoints / "step_4", use_ema=ema)
        assert equal(model.state_dict(), load_model(checkpoints / name).state_dict())


def test_reading_beside_a_save(checkpoints, monkeypatch):
    """Nothing that a save in another thread uses is changed, not for a moment."""

    class Unchanged:
        def __getattr__(self, name):
            return getattr(_version, name)

    monkeypatch.setattr(default_planner, "_version", Unchanged())
    Unchanged.__setattr__ = lambda self, name, value: pytest.fail(f"{name} = {value!r}")
    weights = read_tensors(checkpoints / "step_4", "ema")
    assert weights and all(name.startswith("ema.") and x.isfinite().all() for name, x in weights.items())


def test_incomplete_damaged_and_misplaced_folders(step):
    (step.parent / "config.json").rename(step.parent / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"step_4: no config.json beside it"):
        load_checkpoint(step)
    (step.parent / "elsewhere.json").rename(step.parent / "config.json")
    shard = next(step.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged: its checksum differs"):
        load_checkpoint(step)
    shard.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing or not {len(data)} bytes long"):
        load_checkpoint(step)
    text = (step / "metadata.json").read_text()
    (step / "metadata.json").write_text(text.replace('"seed": 7', '"seed": 8'))
    with pytest.raises(CheckpointError, match="metadata.json is damaged: its checksum differs"):
        load_checkpoint(step)
    (step / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="metadata.json is missing: the save was interrupted"):
        load_checkpoint(step)


def test_another_network_is_refused(step):
    config = (step.parent / "config.json").read_text()
    (step.parent / "config.json").write_text(config.replace('"num_single_layers": 2', '"num_single_layers": 3'))
    with pytest.raises(CheckpointError, match=r"(?s)step_4: .*missing single_blocks.2"):
        load_checkpoint(step)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_bomb_does_not_run(step, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (step / ".metadata").write_bytes(pickle.dumps(Bomb()))
    write_metadata(step, {"files": {}, "step": 4, "epoch": 0, "best_loss": None})
    with pytest.raises(CheckpointError, match=r"\.metadata is refused or damaged: it names posix.mkdir"):
        load_checkpoint(step)
    assert not Path("exploded").exists()


def test_names_that_leave_the_folder_are_refused(step):
    with open(step / ".metadata", "rb") as file:
        metadata = pickle.load(file)  # noqa: S301  it was written by the run above
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    listed = read_metadata(step)
    del listed["files"][".metadata"]  # its checksum is another one now
    write_metadata(step, listed)
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: it names '\.\./elsewhere.distcp'"):
        load_checkpoint(step)
    listed["files"]["../config.json"] = [1, 1]
    write_metadata(step, listed)
    with pytest.raises(CheckpointError, match=r"metadata.json is refused: it names '\.\./config.json'"):
        load_checkpoint(step)
