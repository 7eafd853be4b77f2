"""Remote sources give the same samples as local ones, whatever the network and the cache go through."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.make_source import make_samples, make_source
from tests.store_server import COMMIT, store_server  # noqa: F401  (COMMIT: for HUB)
from tinyflux.shards import remote as cache_module
from tinyflux.shards.remote import DownloadError, NodeCache, RemoteStore
from tinyflux.shards.stream import DataConfig, Stream, open_sources
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
    monkeypatch.setattr(cache_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(cache_module, "BLOCK", 8000)  # several requests a shard


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


def run(config, **options):
    with Stream(open_sources(config, **options), config) as stream:
        return [next(stream) for _ in range(STEPS)]


def assert_same(batches, folder, tmp_path):
    for a, b in zip(batches, run(config_of(folder, tmp_path)), strict=True):
        assert a["keys"] == b["keys"]
        for name, value in a.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, b[name]), name


def test_http_gives_the_same_batches_and_downloads_once(server, folder, tmp_path):
    config = config_of(f"{server.url}/portraits", tmp_path)
    assert_same(run(config), folder, tmp_path)
    before = server.bodies.copy()
    assert before[SHARD] == -(-(folder / SHARD).stat().st_size // 8000)
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
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", HUB, str(tmp_path), str(folder), str(places)]  # the client reads env when imported
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


NETWORK = {
    "cut mid-shard": ["cut", "cut"],
    "429 storm": [(429, {"Retry_After": "0"})] * 4,
    "500s": [(500, {}), (503, {}), (502, {})],
    "wrong length": ["short"],
    "ranges ignored": ["ignore range"] * 20,
    "flipped bit on the way": ["flip"],
}


@pytest.mark.parametrize("name", NETWORK)
def test_network_faults_change_nothing(server, folder, tmp_path, name):
    server.faults[SHARD].extend(NETWORK[name])
    server.faults["manifest.json"].extend(f for f in NETWORK[name] if f in ("cut",) or isinstance(f, tuple))
    assert_same(run(config_of(f"{server.url}/portraits", tmp_path)), folder, tmp_path)


def test_retry_after_is_honoured(server, tmp_path):
    server.faults["manifest.json"].append((429, {"Retry_After": "0.7"}))
    began = time.monotonic()
    RemoteStore(f"{server.url}/portraits", NodeCache(tmp_path / "cache"))
    assert time.monotonic() - began >= 0.7


def test_gives_up_with_the_url(server, tmp_path):
    server.faults[SHARD].extend([(503, {})] * 100)
    with pytest.raises(DownloadError, match=f"{server.url}/portraits/{SHARD}: gave up after 8 tries"):
        run(config_of(f"{server.url}/portraits", tmp_path))


@pytest.mark.parametrize(
    "status, message", [(404, "there is no such file"), (403, "check your access"), (401, "check your")]
)
def test_hopeless_answers_are_not_retried(server, tmp_path, status, message):
    server.faults["manifest.json"].append((status, {}))
    with pytest.raises(DownloadError, match=f"manifest.json: {message}"):
        open_sources(config_of(f"{server.url}/portraits", tmp_path))


def test_a_server_that_is_gone_is_named(tmp_path):
    with pytest.raises(DownloadError, match="http://127.0.0.1:9/x/manifest.json: gave up"):
        open_sources(config_of("http://127.0.0.1:9/x", tmp_path))


def test_a_shard_replaced_by_another_version_is_refused(server, tmp_path):
    write_shard(server.root / "portraits" / SHARD, make_samples(range(20, 26)))
    with pytest.raises(DownloadError, match=f"{SHARD}: its content is not what the manifest says"):
        run(config_of(f"{server.url}/portraits", tmp_path))
    assert not list((tmp_path / "cache").glob("*/*.tar"))[3:]


def test_a_resume_reads_the_revision_that_it_began_with(server, folder, tmp_path):
    config = config_of(f"{server.url}/portraits", tmp_path)
    revision = open_sources(config)[0].revision
    make_source(server.root / "portraits", (7, 5, 6))
    with pytest.raises(ValueError, match="not the one of revision"):
        open_sources(config, revisions=[revision])
    assert open_sources(config)[0].revision != revision


def test_the_cache_stays_within_its_limit(server, folder, tmp_path):
    size = (folder / SHARD).stat().st_size
    config = config_of(f"{server.url}/portraits", tmp_path, cache_gb=2.5 * size / 1e9, open_shards=1)
    assert_same(run(config), folder, tmp_path)
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) <= 2


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
from tinyflux.shards import remote as cache
cache.BLOCK = 8000
store = cache.RemoteStore(sys.argv[1], cache.NodeCache(sys.argv[2]))
read, done = store._read, 0
def dying(*args):
    global done
    done += 1
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*args)
store._read = dying
store.fetch("portraits-000001.tar", int(sys.argv[3]))
"""


def test_a_killed_download_leaves_no_half_file_and_goes_on(server, folder, tmp_path):
    size = (folder / SHARD).stat().st_size
    command = [sys.executable, "-c", KILLED, f"{server.url}/portraits", str(tmp_path / "cache"), str(size)]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert not list((tmp_path / "cache").glob("*/*.tar"))
    assert list((tmp_path / "cache").glob(f"*/.{SHARD}.part"))
    before = server.bodies[SHARD]
    assert_same(run(config_of(f"{server.url}/portraits", tmp_path)), folder, tmp_path)
    assert server.bodies[SHARD] <= -(-size // 8000)  # the first blocks were there
    assert before >= 1


def test_a_file_is_downloaded_once_by_all(server, folder, tmp_path):
    def fetch(_):  # with a store and a cache of its own, as another process has: the lock is the kernel's
        store = RemoteStore(f"{server.url}/portraits", NodeCache(tmp_path / "cache"))
        return store.fetch(SHARD, (folder / SHARD).stat().st_size)

    with ThreadPoolExecutor(6) as pool:
        (path,) = set(pool.map(fetch, range(6)))
    assert path.read_bytes() == (folder / SHARD).read_bytes()
    assert server.bodies[SHARD] == -(-path.stat().st_size // 8000)


@pytest.fixture
def small_disk(folder, tmp_path):
    """A file system with room for half a shard besides the manifest and the empty prompt."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    (tmp_path / "cache").mkdir()
    files = [folder / "manifest.json", folder / "null.safetensors"]
    room = sum(-(-file.stat().st_size // 4096) * 4096 for file in files) + (folder / SHARD).stat().st_size // 2
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", tmp_path / "cache"], check=True)
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
