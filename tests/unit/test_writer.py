"""Writes are atomic; equal samples give equal bytes."""

import hashlib
import json
import os
import signal
import tarfile

import pytest

from tests.forked import Forked
from tests.make_source import make_samples
from tests.training import environment
from tinyflux.shards.format import origin_hash, sample_key
from tinyflux.shards.tar import scan_tar
from tinyflux.shards.writer import Shard, write_shard
from tinyflux.util.files import atomic_write


def test_write_shard_describes_the_file(tmp_path):
    path = tmp_path / "a-000000.tar"
    shard = write_shard(path, make_samples(range(4)))
    data = path.read_bytes()
    assert (shard.name, shard.count, shard.bytes, shard.shape) == ("a-000000.tar", 4, len(data), (4, 4))
    again = Shard.from_dict(json.loads(json.dumps(shard.to_dict())))
    assert again.to_dict() == shard.to_dict() and again.captions.tolist() == [1] * 4
    assert shard.sha256 == hashlib.sha256(data).hexdigest()
    assert shard.origins.tolist() == [origin_hash(f"image-{i // 2}.png") for i in range(4)]
    assert [sample.key for sample in scan_tar(path)] == [sample_key(1, i) for i in range(4)]
    assert os.listdir(tmp_path) == ["a-000000.tar"]


def test_bytes_do_not_depend_on_who_writes_when(tmp_path):
    a = write_shard(tmp_path / "a.tar", make_samples(range(4)))
    old = os.umask(0o077)
    try:
        b = write_shard(tmp_path / "b.tar", make_samples(range(4)))
    finally:
        os.umask(old)
    assert a.sha256 == b.sha256
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert not member.pax_headers


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.tar"
    before = write_shard(path, make_samples(range(2)))

    def broken():
        yield from make_samples(range(3))
        raise ValueError("the teacher failed")

    with pytest.raises(ValueError, match="the teacher failed"):
        write_shard(path, broken())
    with pytest.raises(ValueError, match="at least one sample"):
        write_shard(path, [])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before.sha256
    assert os.listdir(tmp_path) == ["a.tar"]


def test_atomic_write_replaces(tmp_path):
    path = tmp_path / "notes.json"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["notes.json"]


LIMITED = """
import sys
from tests.make_source import make_samples
from tinyflux.shards.writer import write_shard
write_shard(sys.argv[1] + "/first.tar", make_samples(range(2)))
write_shard(sys.argv[1] + "/second.tar", make_samples(range(50)))
"""


def test_no_room_is_said_and_finished_shards_stay(tmp_path):
    process = Forked(["-c", LIMITED, tmp_path], environment(), file_limit=40_000)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"while writing {tmp_path}/second.tar" in said and "Make room" in said
    assert os.listdir(tmp_path) == ["first.tar"]
    assert len(scan_tar(tmp_path / "first.tar")) == 2


KILLED = """
import os, signal, sys
from tests.make_source import make_samples
from tinyflux.shards.writer import write_shard
def samples():
    for i, sample in enumerate(make_samples(range(20))):
        if i == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample
write_shard(sys.argv[1], samples())
"""


def test_a_killed_writer_leaves_no_shard_and_no_hindrance(tmp_path):
    path = tmp_path / "a.tar"
    assert Forked(["-c", KILLED, path], environment()).wait(300) == -signal.SIGKILL
    assert not path.exists()
    write_shard(path, make_samples(range(20)))
    assert len(scan_tar(path)) == 20
    assert os.listdir(tmp_path) == ["a.tar"]  # the killed writer's temporary file is gone too
