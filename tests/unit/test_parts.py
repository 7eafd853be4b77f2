"""Parts: who lists, fetches and reads what; listings larger than memory; file systems without locks; shapes."""

import errno
import fcntl
import functools
import http.server
import json
import multiprocessing
import random
import threading
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from tests.builds import content, run, samples, sources
from tests.unit.test_images import encoded, gradient
from tinyflux.precache import from_images
from tinyflux.precache.kinds import kind_of
from tinyflux.precache.kinds.base import Input
from tinyflux.precache.ledger import Ledger
from tinyflux.precache.listing import Counted, Parted, sorted_in_files
from tinyflux.shards.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_thread")
TARS, RANKS = 100, 3


def tar(path: Path, images: dict[str, Image.Image]) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for key, image in images.items():
            writer.write({"__key__": key, "png": encoded(image, "PNG"), "txt": f"picture {key}"})


def _rank(folder: Path, url: str, rank: int) -> None:
    """What an engine does with the parts that it claims, without any models."""
    source = kind_of("webdataset")(name="raw", kind="webdataset", base=folder, dataset_id=1, location=url)
    ledger = Ledger(folder / "out", "raw", 1, rank, RANKS)
    listing = Parted(ledger.notes / "inputs", source, 0)
    with ledger.lock():
        if not listing.load():
            listing.begin()
    ledger.parts, ledger.per_part = range(listing.parts), 1000
    for part in ledger.claim():
        names = [source.prompts(item, 0)[0] for _, item in listing.rows(part)]
        ledger.note_plan(part, {"shards": 1})
        rejected = [{"index": part, "origin": "", "reason": ", ".join(names)}]
        ledger.note(1000 * part, shard=None, fields={}, rejected=rejected, contents={}, pixels=[0, 0], remarks={})
        listing.done_with(part)
        ledger.release(part)


def test_each_tar_is_fetched_once_in_all(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYFLUX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    for k in range(TARS):
        tar(tmp_path / "served" / f"{k:05d}.tar", {f"{k}-{i}": Image.new("RGB", (8, 8)) for i in range(2)})
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    try:
        url = f"http://127.0.0.1:{server.server_port}/{{00000..{TARS - 1:05d}}}.tar"
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_rank, args=(tmp_path, url, rank)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        # only now, as a fork beside the server's threads may find a lock held for ever
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for process in ranks:
            process.join(300)
    finally:
        server.shutdown()
        server.server_close()
    assert [process.exitcode for process in ranks] == [0] * RANKS
    assert sorted(asked) == sorted(2 * [f"/{k:05d}.tar" for k in range(TARS)])  # each once, after a look at its size
    notes = [json.loads(path.read_bytes()) for path in sorted((tmp_path / "out" / ".build").glob("0*.json"))]
    found = {note["rejected"][0]["index"]: note["rejected"][0]["reason"] for note in notes}
    assert found == {k: f"picture {k}-0, picture {k}-1" for k in range(TARS)}
    assert not list((tmp_path / "cache").rglob("*.tar"))  # what was fetched is gone again


def test_sorting_through_files_is_sorting(tmp_path):
    rows = [[f"{random.Random(i).random():.12f}", i, None, ["x"]] for i in range(5000)]
    expected = sorted(rows, key=lambda row: row[0])
    for in_memory in (10**6, 999, 5000):
        assert list(sorted_in_files(iter(rows), lambda row: row[0], tmp_path, in_memory)) == expected
    assert not list(tmp_path.iterdir())


def listing_of(folder: Path, names: list[str], limit: int | None = None) -> Counted:
    """The listing of a jsonl source of these images, which need not be there."""
    folder.mkdir(exist_ok=True)
    (folder / "list.jsonl").write_text("".join(json.dumps({"image": name, "text": name}) + "\n" for name in names))
    source = kind_of("jsonl")(name="a", kind="jsonl", base=folder, dataset_id=3, location="list.jsonl")
    return Counted(folder / "inputs", source, 5, limit, part_size=4)


def every(listing: Counted) -> dict[int, str]:
    return {index: item.origin for k in range(listing.parts) for index, item in listing.rows(k)}


def test_a_listing_grows_and_tells_what_changed(tmp_path):
    def same(index: int, item: Input) -> bool:
        return False

    names = [f"{i}.png" for i in range(10)]
    listing = listing_of(tmp_path, names, limit=6)
    listing.begin()
    first = every(listing)
    assert listing.parts == 2 and list(first) == list(range(6)) and list(first.values()) != sorted(first.values())
    longer = listing_of(tmp_path, [*names, "new.png"])
    assert longer.load() and str(longer.changes(same)).startswith("5 (")
    assert not longer.changes(same, append=True)
    grown = every(longer)
    assert list(grown) == [*range(6), *range(8, 13)] and {**first, **grown} == grown
    assert set(grown.values()) == {*names, "new.png"}
    fewer = listing_of(tmp_path, [name for name in names if name != "3.png"] + ["new.png"])
    assert fewer.load() and str(fewer.changes(same)) == "1 (3.png) gone"
    again = listing_of(tmp_path / "again", names, limit=6)
    again.begin()
    assert every(again) == first


def test_a_larger_limit_reaches_the_next_tar(tmp_path):
    """Also if the old limit ended with a tar, or was never reached."""
    (tmp_path / "raw").mkdir()
    for k in range(3):
        tar(tmp_path / "raw" / f"{k}.tar", {f"{k}{i}": Image.new("RGB", (8, 8)) for i in range(2)})

    def listing(limit: int | None) -> Parted:
        source = kind_of("webdataset")(name="a", kind="webdataset", base=tmp_path, dataset_id=3, location="raw")
        return Parted(tmp_path / "inputs", source, 5, limit)

    def changes(limit: int | None, **options) -> str:
        longer = listing(limit)
        assert longer.load()
        return str(longer.changes(lambda index, item: False, **options))

    listing(2).begin()
    assert changes(2) == "" and changes(4) == changes(None) == "2 (1.tar, 2.tar) new"
    assert changes(9, append=True) == changes(None) == ""
    tar(tmp_path / "raw" / "3.tar", {"3": Image.new("RGB", (8, 8))})
    assert changes(6) == "" and changes(9) == "1 (3.tar) new"


def test_the_listing_and_the_settings_stay_while_another_process_builds(tmp_path, capsys):
    """Although no shard is finished yet."""
    (tmp_path / "images").mkdir()

    def picture(i: int) -> None:
        gradient(64, 64).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"picture {i}")

    picture(0)
    sources(tmp_path)
    context = multiprocessing.get_context("fork")
    building, go = context.Event(), context.Event()

    def slow(*args) -> list:
        building.set()
        go.wait(300)
        return encode(*args)

    encode = from_images.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_images, "encode", slow)
        other = context.Process(target=run, args=(tmp_path,))
        other.start()
    try:
        assert building.wait(300)
        assert run(tmp_path, "--seed", 3) == 2
        assert "another process is building here with other settings" in capsys.readouterr().err
        (tmp_path / "images" / "0.txt").write_text("something else")
        assert run(tmp_path) == 2 and "1 (0.png) changed" in capsys.readouterr().err
        (tmp_path / "images" / "0.txt").write_text("picture 0")
        picture(1)
        assert run(tmp_path) == 2 and "1 (1.png) new" in capsys.readouterr().err
    finally:
        go.set()
        other.join(300)
    assert [sample["meta"]["origin"] for sample in samples(tmp_path / "out").values()] == ["0.png"]


def test_without_locks_each_rank_keeps_to_its_share(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    shares = []
    for rank in range(2):
        ledger = Ledger(tmp_path / "out", "a", 1, rank, 2)
        with ledger.lock():
            ledger.begin({"settings": {}})
        ledger.parts = range(5)
        shares.append(list(ledger.claim()))
    assert shares == [[0, 2, 4], [1, 3]]
    assert capsys.readouterr().out.count("has no locks: each of 2 ranks builds only its share") == 2


def test_tars_of_many_shapes(tmp_path, capsys):
    """Each part is sorted into shapes; only a lost shard is built again."""
    (tmp_path / "raw").mkdir()
    for k in range(2):
        sizes = [(80, 80), (120, 80), (80, 120), (80, 80), (80, 80)]
        tar(tmp_path / "raw" / f"{k}.tar", {f"{k}{i}": gradient(*size) for i, size in enumerate(sizes)})
    (tmp_path / "sources.toml").write_text('[photos]\nkind = "webdataset"\ndataset_id = 7\nlocation = "raw"\n')
    args = ("--shard-size", 2, "--shapes", "auto", "--no-lune", "--no-sol")
    assert run(tmp_path, *args) == 0
    printed = capsys.readouterr().out
    assert "pixels cut" in printed and "10 samples in 8 shards" in printed
    manifest, before = Manifest.load(tmp_path / "out"), content(tmp_path / "out")
    assert manifest.shapes == ((7, 10), (8, 8), (10, 7)) and manifest.count == 10
    assert sorted(samples(tmp_path / "out")) == [*range(5), *range(10**6, 10**6 + 5)]
    lost = manifest.shards[2].name
    for name in ("manifest.json", lost):
        (tmp_path / "out" / name).unlink()
    assert run(tmp_path, *args) == 0
    assert f"this run: {manifest.shards[2].count} images" in capsys.readouterr().out
    assert content(tmp_path / "out") == before
    tar(tmp_path / "raw" / "2.tar", {"2": gradient(80, 80)})
    assert run(tmp_path, *args) == 0 and "1 (2.tar) new. --append" in capsys.readouterr().out
    assert run(tmp_path, *args, "--append") == 0
    after = content(tmp_path / "out")
    assert all(after[name] == data for name, data in before.items() if name.endswith(".tar"))
    assert Manifest.load(tmp_path / "out").count == 11
