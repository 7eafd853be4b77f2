"""Builds that are killed, run on several ranks, or run out of disk space: the same command gives the same bytes."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import webdataset

from tests.builds import content
from tests.forked import Forked
from tests.held import holding
from tests.training import ROOT, environment
from tests.unit.test_images import encoded
from tinyflux.model.tiny import shapes
from tinyflux.shards.manifest import Manifest
from tinyflux.util.files import atomic_write

COUNT, SHARD, TARS = 48, 4, 6
KILLS = int(os.environ.get("TINYFLUX_KILLS", "3"))
PATIENCE = 300  # seconds
SHAPES = ("--shapes", "auto")


def rank(
    folder: Path,
    out: str,
    index: int = 0,
    world: int = 1,
    options: tuple = (),
    source: str = "drawn",
    most: Path | None = None,
    **limits,
) -> Forked:
    """A rank of the build of `folder`/sources.toml into `folder`/`out`. most: a file with the number of finished shards
    at which it waits."""
    args = ["-m", "sharding.build"] if most is None else [ROOT / "tests/held.py", "sharding.build"]
    args += ["--source", source, "--sources", "sources.toml", "--out", out, "--zoo", "tiny", "--threads", "1"]
    args += ["--shard-size", str(SHARD), "--batch-size", "4", "--workers", "2", "--device", "cpu"]
    env = environment() | {"RANK": str(index), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env |= holding({"shards": most}) if most else {}
    return Forked([*args, *options], env, cwd=folder, log=folder / f"{out}-{index}.log", **limits)


def finished(out: Path, count: int) -> None:
    """Wait until so many shards are noted as finished."""
    deadline = time.monotonic() + PATIENCE
    while len(list(out.glob(".build/0*.json"))) < count:
        assert time.monotonic() < deadline, f"{out} has no {count} shards yet"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A folder with a sources.toml, and what an undisturbed build of it holds."""
    folder = tmp_path_factory.mktemp("builds")
    (folder / "sources.toml").write_text(f'[drawn]\nkind = "shapes"\ndataset_id = 8\ncount = {COUNT}\n')
    assert rank(folder, "whole").wait(PATIENCE) == 0, (folder / "whole-0.log").read_text()
    assert f"{COUNT} samples in {COUNT // SHARD} shards" in (folder / "whole-0.log").read_text()
    return folder, content(folder / "whole")


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A folder with tars of portraits, landscapes and squares, and what an undisturbed build of them holds."""
    folder = tmp_path_factory.mktemp("tars")
    (folder / "raw").mkdir()
    draw = random.Random(0)
    for k in range(TARS):
        with webdataset.TarWriter(str(folder / "raw" / f"{k}.tar")) as writer:
            for i in range(COUNT // TARS):
                picture = shapes.render(100 * k + i)[0].resize(draw.choice([(96, 64), (64, 96), (64, 64)]))
                writer.write({"__key__": f"{k}-{i}", "png": encoded(picture, "PNG"), "txt": f"picture {i} of {k}"})
    (folder / "sources.toml").write_text('[tars]\nkind = "webdataset"\ndataset_id = 9\nlocation = "raw"\n')
    whole = rank(folder, "whole", source="tars", options=SHAPES)
    assert whole.wait(PATIENCE) == 0, (folder / "whole-0.log").read_text()
    assert len(Manifest.load(folder / "whole").shapes) == 3
    return folder, content(folder / "whole")


@pytest.mark.parametrize("world, kills", [(1, 1), (2, 0), (3, KILLS)])
def test_killed_ranks_come_back(tars, world, kills):
    """Ranks killed with SIGKILL at random moments while parts of several shapes are being built, and started again."""
    folder, expected = tars
    draw, out, most = random.Random(), f"storm-{world}", folder / f"most-{world}"
    shards = sum(name.endswith(".tar") for name in expected)

    def begin(index: int) -> Forked:
        return rank(folder, out, index, world, SHAPES, "tars", most)

    atomic_write(most, f"{shards - 1 if kills else shards}")  # a build that is to be killed does not end before
    ranks = {index: begin(index) for index in range(world)}
    for kill in range(kills):
        # shards finished when it strikes, or a few more
        finished(folder / out, int((kill + draw.random()) / kills * (shards - 1)))
        time.sleep(draw.random() * 0.1)
        while True:
            victim = draw.choice([index for index, process in ranks.items() if process.poll() is None])
            ranks[victim].kill()
            if (status := ranks[victim].wait(PATIENCE)) == -signal.SIGKILL:
                break
            assert status == 0, (folder / f"{out}-{victim}.log").read_text()  # it has just found no part left to build
        ranks[victim] = begin(victim)
    atomic_write(most, f"{shards}")
    for index, process in ranks.items():
        assert process.wait(PATIENCE) == 0, (folder / f"{out}-{index}.log").read_text()
    assert content(folder / out) == expected
    assert not list((folder / out).rglob("*.tmp"))


def test_fields_added_by_ranks_that_are_killed(whole):
    """--only on two ranks, one killed and restarted: the same bytes as on one rank, and an unchanged base."""
    folder, expected = whole
    assert rank(folder, "bare", options=("--no-lune",)).wait(PATIENCE) == 0, (folder / "bare-0.log").read_text()
    before, options, most = content(folder / "bare"), ("--only", "lune", "--from", "bare"), folder / "most"
    atomic_write(most, "1")
    ranks = {index: rank(folder, "taught", index, 2, options, most=most) for index in range(2)}
    finished(folder / "taught", 1)
    ranks[1].kill()
    assert ranks[1].wait(PATIENCE) == -signal.SIGKILL
    atomic_write(most, f"{COUNT}")
    ranks[1] = rank(folder, "taught", 1, 2, options)
    for index, process in ranks.items():
        assert process.wait(PATIENCE) == 0, (folder / f"taught-{index}.log").read_text()
    assert rank(folder, "calm", options=options).wait(PATIENCE) == 0, (folder / "calm-0.log").read_text()
    assert content(folder / "taught") == content(folder / "calm") and content(folder / "bare") == before


def test_no_room_leaves_finished_shards_intact(whole):
    """A file size limit in the place of a full disk: one clear message; with room, the same command finishes."""
    folder, expected = whole
    sizes = [len(expected[name]) for name in sorted(expected) if name.endswith(".tar")]
    last = max(range(len(sizes)), key=sizes.__getitem__)  # the first of the largest
    process = rank(folder, "full", file_limit=sizes[last] - 1)
    assert process.wait(PATIENCE) == 1
    log = (folder / "full-0.log").read_text()
    assert "Traceback" not in log
    assert f"error: File too large while writing full/drawn-{last:06d}.tar; what was finished before is intact" in log
    done = {json.loads(path.read_bytes())["shard"]["name"] for path in (folder / "full" / ".build").glob("0*.json")}
    assert f"drawn-{last:06d}.tar" not in done and len(done) >= last
    assert not (folder / "full" / "manifest.json").exists() and not list((folder / "full").rglob("*.tmp"))
    assert all((folder / "full" / name).read_bytes() == expected[name] for name in done)
    assert rank(folder, "full").wait(PATIENCE) == 0
    assert content(folder / "full") == expected
