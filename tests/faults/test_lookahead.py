"""The look-ahead downloads remote shards before they are needed, keeps those needed next, and never hangs."""

import heapq
import itertools
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.make_source import make_source
from tests.store_server import fetch_all, store_server
from tinyflux.shards import lookahead as ahead
from tinyflux.shards import remote
from tinyflux.shards.cache import NodeCache
from tinyflux.shards.clients import DownloadError
from tinyflux.shards.reader import Reader
from tinyflux.shards.stream import DataConfig, Stream, open_sources
from tinyflux.util.files import Stopped

LANES, ROWS = 2, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("ahead") / "portraits", (ROWS,) * 8)


@pytest.fixture
def server(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "served" / "portraits")
    with store_server(tmp_path / "served") as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(ahead, "POLL", 0.1)


def stream_of(server, tmp_path, end_step=None, **options):
    sizes = {"global_batch_size": 2 * LANES, "micro_batch_size": 2 * LANES, "slots_per_stream": 2, "seed": 3}
    config = DataConfig([f"{server.url}/portraits"], cache_dir=str(tmp_path / "cache"), **sizes | options)
    return Stream(open_sources(config), config, end_step=end_step)


def shards_of(plan, steps) -> list[int]:
    """Shards in the order of their first use."""
    return list(dict.fromkeys(itertools.chain(*(plan.batch(step).shard.tolist() for step in steps))))


def name(shard: int) -> str:
    return f"portraits-{shard:06d}.tar"


def cached(tmp_path) -> set[int]:
    return {int(path.stem.rpartition("-")[2]) for path in (tmp_path / "cache").glob("*/*.tar")}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_shards_are_there_before_they_are_needed(server, tmp_path):
    with stream_of(server, tmp_path) as stream:
        next(stream)
        wait_for(lambda: len(cached(tmp_path)) == 8)  # all of the source, though two shards were read so far
        late = stream.counts()["late_shards"]
        for _ in range(60):
            next(stream)
        assert stream.counts()["late_shards"] == late
    assert [server.bodies[name(shard)] for shard in range(8)] == [1] * 8


def test_shards_come_in_the_order_of_their_use(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "DOWNLOADS", 1)
    monkeypatch.setattr(ahead, "MOST_DOWNLOADS", 1)
    with stream_of(server, tmp_path, threads=1) as stream:
        next(stream)
        wait_for(lambda: len(cached(tmp_path)) == 8)
        asked = [int(n[-10:-4]) for n in server.bodies if n.endswith(".tar")]  # in the order of the first request
        assert asked == shards_of(stream.plan, range(100))


def test_nothing_is_fetched_that_the_run_does_not_reach(server, tmp_path):
    with stream_of(server, tmp_path, end_step=4) as stream:
        wanted = set(shards_of(stream.plan, range(4)))
        next(stream)
        wait_for(lambda: cached(tmp_path) >= wanted)
        time.sleep(0.5)
        assert cached(tmp_path) == wanted and len(wanted) < 8
        assert [batch["step"] for batch in stream] == [1, 2, 3]


def test_the_start_waits_for_the_first_shards_alone(server, tmp_path):
    first = shards_of(stream_of(server, tmp_path).plan, [0])
    server.held = threading.Event()
    server.hold = {name(shard) for shard in range(8) if shard not in first}
    try:
        with stream_of(server, tmp_path) as stream:
            next(stream)
            assert cached(tmp_path) == set(first) and len(first) == LANES
    finally:
        server.held.set()


def soonest(stream) -> list[set[int]]:
    """The four shards that are needed next, of each step that may be the next to be loaded."""
    last = stream.step + stream._pipeline._room  # micro-batches in progress; here a step has one
    return [set(shards_of(stream.plan, range(n, n + 50))[:4]) for n in range(stream.step, last + 1)]


def test_the_cache_keeps_what_is_needed_soonest(server, folder, tmp_path):
    size = (folder / name(0)).stat().st_size
    with stream_of(server, tmp_path, cache_gb=4.5 * size / 1e9, prefetch=1, open_shards=LANES) as stream:
        for step in range(40):
            assert next(stream)["step"] == step
            assert len(cached(tmp_path)) <= 4
        wait_for(lambda: cached(tmp_path) in soonest(stream))
        late = stream.counts()["late_shards"]
        for _ in range(ROWS // 2 - 1):  # at least one lane changes shard
            wait_for(lambda: cached(tmp_path) in soonest(stream))
            next(stream)
        assert stream.counts()["late_shards"] <= late + 1
        assert len(cached(tmp_path)) <= 4


def test_an_entry_that_is_out_of_date_holds_nothing_up(server, folder, tmp_path):
    """A shard that a reader fetched itself, used and lost has an early place in the queue and no use for long: behind
    it stands one that is needed before another one that is cached."""
    size = (folder / name(0)).stat().st_size
    with stream_of(server, tmp_path, cache_gb=4.5 * size / 1e9, prefetch=1, open_shards=LANES) as stream:
        next(stream)
        wait_for(lambda: cached(tmp_path) in soonest(stream))
        look = stream._reader.shards._ahead
        wait_for(lambda: len(look._needed) > 5)
        with look._change:
            *_, missing, there, fetched = sorted(look._needed.values(), key=lambda needed: needed.uses[0])[:6]
            ((store, shard),), ((_, other),) = missing.files, there.files
            store.cache.drop(store.path(shard.path))
            store.fetch(other.path, other.bytes, other.sha256)
            look._look_at(missing)
            look._look_at(there)
            heapq.heappush(look._missing, (-1, 0, fetched.key))
        wait_for(lambda: cached(tmp_path) in soonest(stream))


class Line:
    """A line between a server and its clients, on which time passes only when the test says so."""

    def __init__(self):
        self.waiting: list[list[float]] = []  # the bytes that each answer still needs, in the order of the requests
        self.done = 0
        self._change = threading.Condition()

    def transmit(self, length: int) -> None:
        """Wait until `length` bytes are sent."""
        answer = [float(length)]
        with self._change:
            self.waiting.append(answer)
            self._change.wait_for(lambda: answer[0] <= 0)
            self.done += 1

    def send(self, length: float) -> None:
        """Send so many bytes of the waiting answers. What they do not need is lost."""
        with self._change:
            for answer in [*self.waiting]:
                sent = min(answer[0], length)
                answer[0], length = answer[0] - sent, length - sent
                if answer[0] <= 0:
                    self.waiting.remove(answer)
            self._change.notify_all()


def test_a_steady_consumer_never_waits(server, folder, tmp_path, monkeypatch):
    """A store 45/35 times as fast as its consumer: 45 MB/s for 100 full-size samples of 0.35 MB per second. By the time
    of a step, what the store has sent until then is enough for it."""
    monkeypatch.setattr(ahead, "MOST_DOWNLOADS", ahead.DOWNLOADS)
    line, shard = Line(), (folder / name(0)).stat().st_size
    with ThreadPoolExecutor(1) as consumer, stream_of(server, tmp_path) as stream:
        server.transmit = line.transmit
        first = consumer.submit(next, stream)
        while not first.done():
            line.send(shard / 100)
            time.sleep(0.001)
        for step in range(1, 8 * ROWS // (2 * LANES)):
            wait_for(lambda: len(line.waiting) >= min(ahead.DOWNLOADS, 8 - line.done))  # it uses the line all the time
            line.send(shard * 45 / 35 * 2 * LANES / ROWS)
            assert consumer.submit(next, stream).result(timeout=120)["step"] == step


def impatient(stream) -> NodeCache:
    """A cache that from now on waits only for a moment for its store."""
    cache = stream.sources[0].layers[0].store.cache
    cache.timeout = 0.5
    return cache


def test_a_failed_look_ahead_is_said_and_surfaces_where_it_is_needed(server, tmp_path, caplog):
    last = shards_of(stream_of(server, tmp_path).plan, range(24))[-1]
    server.faults[name(last)].extend([(503, {})] * 1000)
    with stream_of(server, tmp_path) as stream:
        fetch_all(stream.sources[0], but=name(last))
        cache = impatient(stream)
        next(stream)
        wait_for(lambda: f"{name(last)}: gave up after" in caplog.text)
        server.faults.clear()  # by the time it is needed it is there
        cache.timeout = 120.0
        for _ in range(24):
            next(stream)
        assert last in cached(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    server.faults[name(last)].extend([(503, {})] * 1000)
    with stream_of(server, tmp_path) as stream:
        fetch_all(stream.sources[0], but=name(last))
        impatient(stream)
        with pytest.raises(DownloadError, match=f"{server.url}/portraits/{name(last)}: gave up after"):
            for _ in range(24):
                next(stream)
        assert stream.step > 12


@pytest.fixture
def silent(server, tmp_path):
    """A store that answers nothing for shards until the test is over."""
    server.held, server.hold = threading.Event(), {name(shard) for shard in range(8)}
    yield server
    server.held.set()


def test_every_wait_for_a_shard_ends_and_names_it(silent, tmp_path):
    stream = stream_of(silent, tmp_path)
    impatient(stream)
    with pytest.raises(DownloadError, match=rf"{silent.url}/portraits/portraits-\d+.tar: gave up after"):
        next(stream)


@pytest.mark.parametrize("reader", ["waits for a download", "has dropped its part"])
def test_closing_is_prompt_while_a_download_hangs(silent, tmp_path, monkeypatch, reader):
    stream = stream_of(silent, tmp_path)
    began, failures = threading.Event(), []
    if reader == "has dropped its part":  # it saw, between two parts, that the stream is closed
        monkeypatch.setattr(Reader, "load", lambda self, micro, part, stopped: (began.set(), wait_for(stopped)))

    def consume():
        try:
            next(stream)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is looked at below)
            failures.append(error)

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    wait_for(lambda: stream.counts()["late_shards"] > 0 or began.is_set())
    closing = time.monotonic()
    stream.close()
    assert time.monotonic() - closing < 25  # it would wait 30 s for a thread, if it had to
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert [type(error) for error in failures] == [Stopped]


def test_files_deleted_under_the_look_ahead_come_back(server, tmp_path):
    with stream_of(server, tmp_path) as stream:
        next(stream)
        wait_for(lambda: len(cached(tmp_path)) == 8)
        for path in (tmp_path / "cache").glob("*/*.tar"):
            os.unlink(path)
        wait_for(lambda: len(cached(tmp_path)) >= 6)  # without a reader that asks for them
        assert [next(stream)["step"] for _ in range(10)] == list(range(1, 11))
