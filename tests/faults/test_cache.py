"""Remote files and the node's cache: faults of the network, the disk and the store."""

import base64
import errno
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import safetensors.numpy

from tests.store_server import nobody_at, s3_server, store_server
from tinyflux.shards import cache as cache_module
from tinyflux.shards import remote
from tinyflux.shards.cache import NodeCache, NoRoom
from tinyflux.shards.clients import CLIENTS, DownloadError, FsspecClient
from tinyflux.shards.remote import RemoteStore, download
from tinyflux.util.files import Stopped
from tinyflux.util.urls import public, redacted

SHARDS = 6
SIZE = 100_000
NULL = safetensors.numpy.save({"t5_embeds": np.ones((4, 3), "float16")})
SUM = hashlib.sha256(NULL).hexdigest()


def content(k: int) -> bytes:
    return hashlib.shake_128(str(k).encode()).digest(SIZE)


def sha(k: int) -> str:
    return hashlib.sha256(content(k)).hexdigest()


@pytest.fixture
def files(tmp_path):
    """A folder as a store has it."""
    folder = tmp_path / "served" / "x"
    folder.mkdir(parents=True)
    for k in range(SHARDS):
        (folder / f"{k}.tar").write_bytes(content(k))
    (folder / "manifest.json").write_text(json.dumps({"shards": SHARDS}))
    (folder / "null.safetensors").write_bytes(NULL)
    (folder / "rejected.jsonl").write_text('{"origin": "a"}\n{"origin": "b", "why": "small"}\n')
    return folder


@pytest.fixture
def server(files):
    with store_server(files.parent) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.2)
    monkeypatch.setattr(cache_module, "PAUSE", 0.02)


def store_of(server, tmp_path, *, limit=1 << 30, **options):
    return RemoteStore(f"{server.url}/x", NodeCache(tmp_path / "cache", limit, timeout=120.0), **options)


def fetch(store, k, **options):
    path = store.fetch(f"{k}.tar", SIZE, sha(k), **options)
    assert path.read_bytes() == content(k)
    return path


def cached(tmp_path) -> set[int]:
    return {int(path.stem) for path in (tmp_path / "cache").glob("*/*.tar")}


NETWORK = {
    "cut": ["cut", "cut"],
    "429s": [(429, {"Retry_After": "0"})] * 4,
    "500s": [(500, {}), (503, {"Retry_After": "²"}), (502, {})],
    "cut and no ranges": ["cut", "ignore range"],
    "shorter": ["short"],
    "flipped bit": ["flip"],
    "a page": ["page"],
}


@pytest.mark.parametrize("name", NETWORK)
def test_faults_of_the_network(server, tmp_path, name):
    server.faults["0.tar"].extend(NETWORK[name])
    fetch(store_of(server, tmp_path), 0)
    assert server.sent < 2.2 * SIZE


@pytest.mark.parametrize("fault", ["page", "no length", "cut"])
@pytest.mark.parametrize("file", ["manifest.json", "null.safetensors", "rejected.jsonl"])
def test_what_is_not_the_file_does_not_stay(server, files, tmp_path, file, fault):
    server.faults[file].append(fault)
    path = store_of(server, tmp_path).fetch(file, None, SUM if file == "null.safetensors" else None)
    assert path.read_bytes() == (files / file).read_bytes()


@pytest.mark.parametrize("file", ["manifest.json", "null.safetensors", "rejected.jsonl"])
def test_a_damaged_small_file_in_the_cache_is_fetched_again(server, files, tmp_path, file):
    store = store_of(server, tmp_path)
    path = store.fetch(file)
    path.write_bytes(path.read_bytes()[:-9])
    assert store.fetch(file).read_bytes() == (files / file).read_bytes()
    store = store_of(server, tmp_path, revision=store.revision)  # as another rank opens it
    assert server.bodies["manifest.json"] <= 2 and store.manifest == (files / "manifest.json").read_bytes()


def test_a_page_that_stays_is_named_and_does_not(server, files, tmp_path):
    server.faults["manifest.json"].extend(["page"] * 2)
    with pytest.raises(DownloadError, match="not what its name says .*starts with b'<!DOCTYPE") as error:
        store_of(server, tmp_path)
    assert error.value.lacks
    assert store_of(server, tmp_path).manifest == (files / "manifest.json").read_bytes()


def test_a_trickle_ends_and_the_next_try_is_free(server, files, tmp_path):
    server.faults["null.safetensors"].extend(["trickle"] * 3)
    store = store_of(server, tmp_path)
    store.cache.timeout = 0.8
    with pytest.raises(DownloadError, match="null.safetensors: (not downloaded within 1 s|gave up after)") as error:
        store.fetch("null.safetensors")
    assert not error.value.lacks
    server.faults.clear()
    store.cache.timeout = 120.0
    assert store.fetch("null.safetensors").read_bytes() == NULL


def test_a_slow_request_is_sent_again(server, tmp_path, monkeypatch):
    wait = remote.Patience.wait

    def second(patience, error):
        monkeypatch.setattr(remote, "SILENCE", 60.0)
        wait(patience, error)

    store = store_of(server, tmp_path)
    monkeypatch.setattr(remote, "SILENCE", 0.3)
    monkeypatch.setattr(remote.Patience, "wait", second)
    server.faults["0.tar"].append("trickle")
    fetch(store, 0)
    assert server.bodies["0.tar"] == 1


def test_a_stalled_store_does_not_keep_the_lock(server, tmp_path):
    server.hold = {"0.tar"}
    store, stopped = store_of(server, tmp_path), threading.Event()
    store.cache.timeout = 1.0
    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(fetch, store, 0, stopped=stopped)
        assert server.holding.wait(120)
        stopped.set()  # the result is no longer needed, but the running request ends by itself
        server.hold = set()
        fetch(store_of(server, tmp_path), 0)
        server.held.set()
        assert isinstance(left.exception(), Stopped | DownloadError)


def test_an_outage_shorter_than_the_timeout_is_survived(server, files, tmp_path, retried):
    store, port = store_of(server, tmp_path), server.server_port
    server.shutdown()
    server.server_close()

    def come_back():
        retried.wait(120)
        with store_server(files.parent, port):
            back.wait(120)

    back = threading.Event()
    with nobody_at(port):
        thread = threading.Thread(target=come_back, daemon=True)
        thread.start()
        fetch(store, 0)
        back.set()
        thread.join()
        store.cache.timeout = 0.5
        with pytest.raises(DownloadError, match=r"x/1.tar: gave up after \d+ tries in \d+ s: .*is the store up"):
            store.fetch("1.tar", 1000, sha(1))


def test_s3_through_an_outage(files, tmp_path, monkeypatch, retried):
    with s3_server(files, "bucket", "x", monkeypatch) as s3:
        store = RemoteStore("s3://bucket/x", NodeCache(tmp_path / "cache", timeout=120))
        assert store.manifest == (files / "manifest.json").read_bytes()
        fetch(store, 0)
        retried.clear()
        with s3.outage(until=retried):
            fetch(store, 1)
        with pytest.raises(DownloadError, match="s3://bucket/x/none.tar: there is no such file") as caught:
            store.fetch("none.tar", 5, sha(0))
        assert caught.value.missing


@pytest.mark.parametrize(
    ("client", "error"),
    [
        (partial(FsspecClient, config_kwargs={"no_such_option": 1}), TypeError),
        (lambda url, revision: FsspecClient(url.replace("s3", "memory")), AttributeError),  # a synchronous file system
    ],
)
def test_a_fault_of_the_program_is_not_an_outage(tmp_path, monkeypatch, client, error):
    monkeypatch.setitem(CLIENTS, "s3", client)
    with pytest.raises(error, match="no_such_option|_info"):
        RemoteStore("s3://bucket/x", NodeCache(tmp_path / "cache", timeout=0.5))


def test_secrets_are_not_shown(server, tmp_path, caplog):
    server.login = "Basic " + base64.b64encode(b"me:p@ss/word").decode()
    url = server.url.replace("//", "//me:p%40ss%2Fword@") + "/x?sig=SECRET"
    store = RemoteStore(url, NodeCache(tmp_path / "cache", timeout=120))
    server.faults["0.tar"].extend([(503, {})] * 2)
    fetch(store, 0)
    with pytest.raises(DownloadError) as missing:
        store.fetch("none.tar", 5, sha(0))
    store.cache.timeout = 0.5
    server.faults["1.tar"].extend([(503, {})] * 1000)
    with pytest.raises(DownloadError) as down:
        store.fetch("1.tar", 1, sha(1))
    shown = f"{store.url} {missing.value} {down.value} {caplog.text} {[*(tmp_path / 'cache').rglob('*')]}"
    assert f"{server.url}/x/0.tar" in shown and "SECRET" not in shown and "ss%2F" not in shown and "me:" not in shown
    config = {"sources": [url, "hf://datasets/me/faces@v1/portraits", "a/folder@2?"], "seed": 1}
    assert public(config) == {
        "sources": [f"{server.url}/x", "hf://datasets/me/faces@v1/portraits", "a/folder@2?"],
        "seed": 1,
    }
    assert redacted("at s3://k:s@b/x, 'https://h/p?X-Amz-Signature=1' ") == "at s3://b/x, 'https://h/p' "


def test_one_file_at_a_url(server, files, tmp_path):
    cache = NodeCache(tmp_path / "cache")
    server.faults["2.tar"].extend(["cut"] * 2)
    for _ in range(2):
        assert download(f"{server.url}/x/2.tar?sig=1", cache).read_bytes() == content(2)
    with pytest.raises(DownloadError, match="there is no such file"):
        download(f"{server.url}/x/none.tar", cache)
    (files / "2.tar").write_bytes(content(3))  # a query may choose the file
    assert download(f"{server.url}/x/2.tar?sig=2", cache).read_bytes() == content(3)


def test_a_url_that_cannot_be_is_refused_at_once(tmp_path):
    with pytest.raises(DownloadError, match="not a valid URL: nonnumeric port"):
        RemoteStore("http://127.0.0.1:80a/x", NodeCache(tmp_path / "cache", timeout=60))


def test_a_huge_manifest_is_not_read(server, files, tmp_path):
    (files / "manifest.json").write_bytes(b'{"a": [' + b"0," * (9 << 20) + b"0]}")
    with pytest.raises(DownloadError, match="manifest.json: it has more than 16777216 bytes"):
        store_of(server, tmp_path)


def test_a_damaged_shard_heals_and_a_whole_one_stays(server, tmp_path, monkeypatch):
    store = store_of(server, tmp_path)
    path = fetch(store, 0)
    assert not store.heal("0.tar", SIZE, sha(0)) and path.is_file()
    path.write_bytes(content(0)[:500] + b"x" + content(0)[501:])
    assert store.heal("0.tar", SIZE, sha(0)) and not path.exists()
    fetch(store, 0)

    def unreadable(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", unreadable)
        assert store.heal("0.tar", SIZE, sha(0)) and not path.exists()
    fetch(store, 0)


def test_files_needed_sooner_are_not_evicted_for_later_ones(server, tmp_path):
    store = store_of(server, tmp_path, limit=int(2.5 * SIZE))
    cache = store.cache
    dates = {step: cache.date_of(step) for step in (1, 10, 15, 20, 25)}  # at once: after LEASE there are others
    for k, step in ((0, 20), (1, 10)):
        assert cache.keep(fetch(store, k), dates[step])
    assert not cache.keep(store.path("9.tar"), dates[1])
    with pytest.raises(NoRoom):
        fetch(store, 2, due=dates[25])
    assert cached(tmp_path) == {0, 1}
    fetch(store, 2, due=dates[15])
    assert cached(tmp_path) == {1, 2}
    fetch(store, 3)  # it is needed now
    assert 3 in cached(tmp_path) and len(cached(tmp_path)) == 2


def test_dates_in_the_future_and_leftovers_are_the_first_to_go(server, tmp_path):
    store = store_of(server, tmp_path, limit=int(3.5 * SIZE))
    for k in range(3):
        os.utime(fetch(store, k), (2e9, 2e9) if k == 1 else None)  # a clock that was wrong
    store = store_of(server, tmp_path, limit=int(3.5 * SIZE))
    fetch(store, 3)
    assert cached(tmp_path) == {0, 2, 3}
    left = store.path(".5.tar.100000.part")  # of processes that were killed
    old = store.path(".4.tar.100000.part")
    for path, age in ((left, 3600), (old, 2 * 86400)):
        path.write_bytes(b"x" * 50)
        os.utime(path, (time.time() - age,) * 2)
    (tmp_path / "cache" / ".total").unlink()
    store = store_of(server, tmp_path, limit=int(4.5 * SIZE))
    fetch(store, 1)
    assert not old.exists() and not left.exists() and cached(tmp_path) == {0, 1, 2, 3}


def test_a_killed_download_is_resumed(server, tmp_path):
    store = store_of(server, tmp_path)
    store.path(f".0.tar.{SIZE}.part").write_bytes(content(0)[: SIZE // 2])
    sent = server.sent
    fetch(store, 0)
    assert server.sent - sent == SIZE // 2


def test_eviction_looks_at_what_it_removes_alone(server, tmp_path, monkeypatch):
    """For any number of files: they are listed once, and the total is read, not counted, under the node's lock."""
    listed = []
    monkeypatch.setattr(cache_module, "_files", lambda folder, of=cache_module._files: listed.append(1) or of(folder))
    store = store_of(server, tmp_path, limit=int(2.5 * SIZE))
    for k in (0, 1, 2, 3, 4, 5) * 4:
        fetch(store, k)
    assert len(cached(tmp_path)) == 2 and len(listed) <= 2


def test_files_that_vanish_while_they_are_counted_hide_no_others(tmp_path):
    for k in range(9):
        (tmp_path / f"{k}.tar").write_bytes(bytes(100))
    found = cache_module._files(tmp_path)
    first = next(found)[0].name
    gone = next(path for path in tmp_path.iterdir() if path.name != first)
    gone.unlink()
    assert len(list(found)) == 7


def test_the_total_of_all_processes_is_kept(server, tmp_path):
    stores = [store_of(server, tmp_path, limit=int(3.5 * SIZE)) for _ in range(3)]

    def fetch_some(n: int) -> None:
        for k in range(n, n + 18):
            stores[n].fetch(f"{k % SHARDS}.tar", SIZE, sha(k % SHARDS))  # another one may evict it at once

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(fetch_some, range(len(stores))))
    total = int((tmp_path / "cache" / ".total").read_text().split()[0])
    there = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar"))
    assert there <= 3.5 * SIZE and total == there + len(stores[0].manifest)
