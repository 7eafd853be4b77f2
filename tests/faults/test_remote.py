"""Remote sources give the same samples as local ones, despite faults of the network and the cache."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.forked import Forked
from tests.make_source import make_samples, make_source
from tests.store_server import COMMIT, fetch_all, s3_server, store_server  # noqa: F401  (COMMIT: for HUB)
from tests.training import environment
from tinyflux.shards import cache, remote
from tinyflux.shards.cache import NodeCache
from tinyflux.shards.clients import DownloadError
from tinyflux.shards.lookahead import LookAhead
from tinyflux.shards.opened import OpenShards
from tinyflux.shards.reader import Reader
from tinyflux.shards.remote import RemoteStore
from tinyflux.shards.stream import DataConfig, Stream, _Pipeline, open_sources
from tinyflux.shards.writer import write_shard

SHARD = "portraits-000001.tar"
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("remote") / "portraits", (6, 6, 6))


@pytest.fixture
def server(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "served" / "portraits")
    with store_server(tmp_path / "served") as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(cache, "PAUSE", 0.02)


def config_of(urls, tmp_path, **options):
    urls = [urls] if isinstance(urls, str | Path) else urls
    return DataConfig(
        [str(url) for url in urls],
        global_batch_size=6,
        micro_batch_size=6,
        seed=3,
        cache_dir=str(tmp_path / "cache"),
        **options,
    )


def run(config, sources=None):
    with Stream(sources or open_sources(config), config) as stream:
        return [next(stream) for _ in range(STEPS)]


def all_but_one(config):
    """The sources, with all shards but SHARD in the cache, which from now on waits only for a moment for its store."""
    (source,) = sources = open_sources(config)
    fetch_all(source, but=SHARD)
    source.layers[0].store.cache.timeout = 0.5
    return sources


def assert_same(batches, folder, tmp_path):
    for a, b in zip(batches, run(config_of(folder, tmp_path)), strict=True):
        assert a["keys"] == b["keys"]
        for name, value in a.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, b[name]), name


def test_http_gives_the_same_batches_and_downloads_once(server, folder, tmp_path):
    config = config_of(f"{server.url}/portraits", tmp_path)
    assert_same(run(config), folder, tmp_path)
    before = server.bodies.copy()
    assert before[SHARD] == 1
    run(config)
    assert {name for name in server.bodies if server.bodies[name] != before[name]} == {"manifest.json"}


HUB = """
import sys
from tests.faults.test_remote import *
tmp_path, *folders = map(Path, sys.argv[1:])
config = config_of(["hf://datasets/user/repo/portraits", "hf://datasets/user/repo@main/places"], tmp_path)
sources = open_sources(config)
assert [source.revision for source in sources] == [COMMIT] * 2
assert_same(run(config), folders, tmp_path)
"""


def test_two_sources_from_the_hub_give_the_same_batches(server, folder, tmp_path):
    places = make_source(server.root / "places", (4, 9), "places", dataset_id=2)
    env = environment() | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    process = Forked(["-c", HUB, tmp_path, folder, places], env)  # the client reads env when imported
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def test_s3_gives_the_same_batches_through_an_outage(folder, tmp_path, monkeypatch, retried):
    config = config_of("s3://bucket/portraits", tmp_path)
    with s3_server(folder, "bucket", "portraits", monkeypatch) as s3:
        sources = open_sources(config)
        with s3.outage(until=retried):
            batches = run(config, sources)
    assert_same(batches, folder, tmp_path)


def test_faults_on_the_way_to_every_file_change_nothing(server, folder, tmp_path):
    for name in (path.name for path in folder.iterdir() if path.is_file()):
        server.faults[name].extend(["page", "cut", (503, {}), (429, {"Retry_After": "0"})])
    assert_same(run(config_of(f"{server.url}/portraits", tmp_path)), folder, tmp_path)


def test_retry_after_is_honoured(server, tmp_path):
    server.faults["manifest.json"].append((429, {"Retry_After": "0.7"}))
    began = time.monotonic()
    RemoteStore(f"{server.url}/portraits", NodeCache(tmp_path / "cache"))
    assert time.monotonic() - began >= 0.7


def test_gives_up_with_the_url(server, tmp_path, monkeypatch):
    """The store's own error, also where the thread that downloads was slow to begin."""
    server.faults[SHARD].extend([(503, {})] * 1000)
    fetch, begin = LookAhead._fetch, _Pipeline.__init__

    def late(look, *what):
        time.sleep(1.0)
        fetch(look, *what)

    def patient(pipeline, *given):
        begin(pipeline, *given)
        pipeline.patience = 120.0

    monkeypatch.setattr(LookAhead, "_fetch", late)
    monkeypatch.setattr(_Pipeline, "__init__", patient)
    config = config_of(f"{server.url}/portraits", tmp_path)
    sources = all_but_one(config)
    config.timeout = 1.0
    with pytest.raises(DownloadError, match=rf"{server.url}/portraits/{SHARD}: gave up after \d+ tries in \d+ s"):
        run(config, sources)


def test_a_shard_that_is_asked_for_late_has_its_whole_time(folder, tmp_path, monkeypatch):
    """The stream's time for a shard begins when a thread asks for it, not with the last sample before it."""
    opened, get, asked = Reader._open, OpenShards.get, []

    def late(reader, *where):
        reader.progress = -1.0  # long ago
        return opened(reader, *where)

    def noted(shards, *where):
        asked.append(stream._reader.progress)
        return get(shards, *where)

    monkeypatch.setattr(Reader, "_open", late)
    monkeypatch.setattr(OpenShards, "get", noted)
    config = config_of(folder, tmp_path, threads=1)
    with Stream(open_sources(config), config) as stream:
        next(stream)
    assert asked and min(asked) > 0


@pytest.mark.parametrize(
    "status, message", [(404, "there is no such file"), (403, "check your access"), (401, "check your")]
)
def test_hopeless_answers_are_not_retried(server, tmp_path, status, message):
    server.faults["manifest.json"].append((status, {}))
    with pytest.raises(DownloadError, match=f"manifest.json: {message}"):
        open_sources(config_of(f"{server.url}/portraits", tmp_path))


def test_a_server_that_is_gone_is_named(tmp_path):
    with pytest.raises(DownloadError, match="http://127.0.0.1:9/x/manifest.json: gave up"):
        open_sources(config_of("http://127.0.0.1:9/x", tmp_path, timeout=0.3))


def test_a_shard_replaced_by_another_version_is_refused(server, tmp_path):
    write_shard(server.root / "portraits" / SHARD, make_samples(range(20, 26)))
    with pytest.raises(DownloadError, match=f"{SHARD}: its content is not what the manifest says"):
        run(config_of(f"{server.url}/portraits", tmp_path))
    assert not list((tmp_path / "cache").glob(f"*/{SHARD}"))


def test_a_resume_reads_the_revision_that_it_began_with(server, folder, tmp_path):
    config = config_of(f"{server.url}/portraits", tmp_path)
    revision = open_sources(config)[0].revision
    make_source(server.root / "portraits", (7, 5, 6))
    assert open_sources(config, revisions=[revision])[0].revision == revision  # what the cache has of it
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="not that of revision"):
        open_sources(config, revisions=[revision])
    assert open_sources(config)[0].revision != revision


def on_disk(tmp_path) -> tuple[int, int]:
    """Shards in the cache, and evicted shards that an open descriptor keeps."""
    while True:
        there, held = {*(tmp_path / "cache").glob("*/*.tar")}, []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # another thread closed it meanwhile
                held.append(os.readlink(link))
        gone = {name for name in held if name.startswith(str(tmp_path / "cache")) and name.endswith(".tar (deleted)")}
        if there == {*(tmp_path / "cache").glob("*/*.tar")}:  # otherwise the two were not there at the same time
            return len(there), len(gone)


def test_the_cache_bounds_the_disk(tmp_path):
    folder = make_source(tmp_path / "served" / "portraits", (6,) * 24)
    size = (folder / SHARD).stat().st_size
    with store_server(tmp_path / "served") as server:
        config = config_of(f"{server.url}/portraits", tmp_path, cache_gb=4.5 * size / 1e9, open_shards=64)
        with Stream(open_sources(config), config) as stream:
            batches = []
            for _ in range(24):
                batches.append(next(stream))
                there, held = on_disk(tmp_path)
                assert there + held <= 5  # one may be read at this moment
    config = config_of(folder, tmp_path)
    with Stream(open_sources(config), config) as stream:
        assert [next(stream)["keys"] for _ in batches] == [batch["keys"] for batch in batches]


def test_a_cache_that_is_too_small_for_a_step_is_refused(server, folder, tmp_path):
    size = (folder / SHARD).stat().st_size
    config = config_of(f"{server.url}/portraits", tmp_path, cache_gb=1.5 * size / 1e9, slots_per_stream=1)
    with pytest.raises(ValueError, match=r"data.cache_gb is too small: rank 0 reads 3 shards at once"):
        run(config)


def test_a_damaged_shard_in_the_cache_heals(server, folder, tmp_path, caplog):
    config = config_of(f"{server.url}/portraits", tmp_path)
    run(config)
    paths = sorted((tmp_path / "cache").glob("*/*.tar"))
    paths[0].write_bytes(paths[0].read_bytes()[:20000])  # seen when it is opened
    data = bytearray(paths[1].read_bytes())
    for place in range(0, len(data), 97):  # seen, with luck, when a sample is decoded
        data[place] ^= 4 if place % 512 > 100 and data[place] else 0
    paths[1].write_bytes(data)
    with Stream(open_sources(config), config) as stream:
        batches = [next(stream) for _ in range(STEPS)]
        assert stream.counts()["bad_samples"] == 0
    assert_same(batches, folder, tmp_path)
    assert caplog.text.count("the copy in the cache is damaged, downloading it again") == 2


def test_the_cache_may_be_deleted_under_a_run(server, folder, tmp_path):
    config = config_of(f"{server.url}/portraits", tmp_path, open_shards=1)
    with Stream(open_sources(config), config) as stream:
        batches = [next(stream)]
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        batches += [next(stream) for _ in range(STEPS - 1)]
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert_same(run(config), folder, tmp_path)
    assert_same(batches, folder, tmp_path)


KILLED = """
import os, signal, sys
from tinyflux.shards import cache, clients, remote
clients.CHUNK = 8000
progress, done = remote.Patience.progress, 0
def dying(self):
    global done
    done += self.what.endswith(".tar")
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    progress(self)
remote.Patience.progress = dying
store = remote.RemoteStore(sys.argv[1], cache.NodeCache(sys.argv[2]))
store.fetch("portraits-000001.tar", int(sys.argv[3]))
"""


def test_a_killed_download_leaves_no_half_file_and_is_resumed(server, folder, tmp_path):
    size = (folder / SHARD).stat().st_size
    process = Forked(["-c", KILLED, f"{server.url}/portraits", tmp_path / "cache", size], environment())
    assert process.wait(300) == -signal.SIGKILL
    assert not list((tmp_path / "cache").glob("*/*.tar"))
    (part,) = (tmp_path / "cache").glob(f"*/.{SHARD}.*.part")
    left, before = part.stat().st_size, server.sent
    assert left >= 8000
    store = RemoteStore(f"{server.url}/portraits", NodeCache(tmp_path / "cache"))
    before = server.sent
    assert store.fetch(SHARD, size).read_bytes() == (folder / SHARD).read_bytes()
    assert server.sent - before == size - left


def test_a_file_is_downloaded_once_by_all(server, folder, tmp_path):
    def fetch(_):  # with its own store and cache, like another process: the lock is the kernel's
        store = RemoteStore(f"{server.url}/portraits", NodeCache(tmp_path / "cache"))
        return store.fetch(SHARD, (folder / SHARD).stat().st_size)

    with ThreadPoolExecutor(6) as pool:
        (path,) = set(pool.map(fetch, range(6)))
    assert path.read_bytes() == (folder / SHARD).read_bytes()
    assert server.bodies[SHARD] == 1


@pytest.fixture
def small_disk(folder, tmp_path):
    """A file system with room for half a shard besides the small files."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    (tmp_path / "cache").mkdir()
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    room = sum(-(-file.stat().st_size // 4096) * 4096 for file in files) + (folder / SHARD).stat().st_size // 2
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room + 8192}", "tmpfs", tmp_path / "cache"], check=True)
    yield
    subprocess.run(["umount", "-l", tmp_path / "cache"], check=True)


def test_a_full_disk_is_said(server, folder, small_disk, tmp_path):
    config = config_of(f"{server.url}/portraits", tmp_path)
    with pytest.raises(DownloadError, match=r"no room in the cache .*portraits-00000\d.tar \(\d+ bytes\): free space"):
        run(config)
    assert not list((tmp_path / "cache").glob("*/*.tar"))
    subprocess.run(["mount", "-o", "remount,size=10m", tmp_path / "cache"], check=True)  # space was freed
    assert_same(run(config), folder, tmp_path)


def test_bad_hub_urls_are_refused(tmp_path):
    for url in ("hf://models/user/repo", "hf://datasets/user"):
        with pytest.raises(ValueError, match="a Hub source is hf://datasets/USER/REPO"):
            open_sources(config_of(url, tmp_path))
