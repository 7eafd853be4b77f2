"""Damaged shards: every fault is found and named, its sample is replaced, and nothing else of the run changes."""

import fcntl
import logging
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.make_source import make_samples, make_source, make_tensors
from tests.store_server import store_server
from tinyflux.shards.decode import decode_chunk
from tinyflux.shards.format import SUFFIX, ShardError, bits, encode_sample, parse_key, sample_key
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.reader import Reader
from tinyflux.shards.schema import fields_at
from tinyflux.shards.source import open_source
from tinyflux.shards.stream import BadSamples, DataConfig, Stream, open_sources
from tinyflux.shards.tar import scan, scan_tar
from tinyflux.shards.writer import write_shard

COUNTS = (6, 6, 6)
BAD_SHARD, BAD_ROW = 1, 3  # dataset positions 6..11, the bad one is 9
SHARD = "portraits-000001.tar"
STEPS = 12


def place(path, row, extension):
    return scan_tar(path)[row].members[extension]


def flip(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


def in_data(path, extension="latents" + SUFFIX):
    offset, size = place(path, BAD_ROW, extension)
    return offset + size // 2


def first_header(path, row=BAD_ROW):
    return min(offset for offset, _ in scan_tar(path)[row].members.values()) - 512


def header(path, row=BAD_ROW, extension="latents" + SUFFIX):
    return place(path, row, extension)[0] - 512


def rewrite(path, change):
    """The shard as a faulty producer would have written it, with a manifest to match."""
    samples = list(make_samples(range(6, 12)))
    change(samples[BAD_ROW])
    manifest = Manifest.load(path.parent)
    shards = list(manifest.shards)
    shards[BAD_SHARD] = write_shard(path, samples)
    Manifest.of("portraits", 1, manifest.groups, shards, null_sha256=manifest.null_sha256).save(path.parent)


def other_shape(sample):
    made = encode_sample(sample_key(1, 9), make_tensors(9, lune_width=5), None, origin=sample["__origin__"])
    sample["lune" + SUFFIX] = made["lune" + SUFFIX]


def of_another_image(sample):
    made = encode_sample(sample_key(1, 9), make_tensors(9), None, origin=sample["__origin__"] ^ 1 << 31)
    sample["lune" + SUFFIX] = made["lune" + SUFFIX]


def member_of_another_group(sample):
    sample["lune" + SUFFIX] = sample["sol" + SUFFIX]


def shorten(sample, group):
    """The content is all there, but nothing says that it is right."""
    sample[group + SUFFIX] = sample[group + SUFFIX][:-4]


def twice(sample):
    return {"sol" + SUFFIX: sample["sol" + SUFFIX] * 2}


REST = range(9, 12)  # a tar that breaks at row 3 loses the rows behind it as well

FAULTS = {
    "bit flipped in latents": (lambda p: flip(p, in_data(p)), [9], "latents"),
    "bit flipped in lune": (lambda p: flip(p, in_data(p, "lune" + SUFFIX), 7), [9], "lune: "),
    "bit flipped in a tar header's name": (lambda p: flip(p, header(p) + 3), [9], "missing .*checksum is wrong"),
    "bit flipped in a tar header's size": (lambda p: flip(p, header(p) + 130), [9], "missing .*checksum is wrong"),
    "bit flipped in a tar header's magic": (lambda p: flip(p, header(p) + 258), [9], "missing .*not a tar header"),
    "a tar header of zeros": (lambda p: zero(p, header(p), 512), [9], "missing .*zeros in place of a tar header"),
    "bits flipped in all headers of a sample": (lambda p: lose(p, BAD_ROW), [9], "no row 3: .*checksum is wrong"),
    "headers of two samples lost": (lambda p: (lose(p, 4), lose(p, 1)), [7, 10], "no row [14]: .*checksum is wrong"),
    "tensors of another image": (lambda p: rewrite(p, of_another_image), [9], "lune: made from another image"),
    "cut at a sample's boundary": (lambda p: cut(p, first_header(p)), REST, "cut short"),
    "cut inside a header": (lambda p: cut(p, first_header(p) + 200), REST, "cut short"),
    "cut inside data": (lambda p: cut(p, in_data(p)), REST, "missing|cut short"),
    "zeros from a boundary on": (lambda p: zero(p, first_header(p)), REST, "no row .: "),
    "member missing": (lambda p: rewrite(p, lambda s: s.pop("lune" + SUFFIX)), [9], "member lune.* is missing"),
    "tensors of another shape": (lambda p: rewrite(p, other_shape), [9], r"fields take"),
    "member of another group": (lambda p: rewrite(p, member_of_another_group), [9], "lune: "),
    "a frame without its checksum": (lambda p: rewrite(p, lambda s: shorten(s, "latents")), [9], "latents: "),
    "the last frame without its checksum": (lambda p: rewrite(p, lambda s: shorten(s, "text.0")), [9], "t5_embeds.*: "),
    "another frame behind one": (lambda p: rewrite(p, lambda s: s.update(twice(s))), [9], "sol_stats.*: "),
    "bomb": (lambda p: rewrite(p, lambda s: s.update({"lune" + SUFFIX: BOMB})), [9], "states 1073741824 bytes"),
    "huge member": (
        lambda p: rewrite(p, lambda s: s.update({"lune" + SUFFIX: bytes(10**6)})),
        [9],
        "must have at most",
    ),
}
BOMB = bytes.fromhex("28b52ffda4000000400000000000000000")  # a frame header that states 1 GiB, with a checksum


def zero(path, offset, size=None):
    data = path.read_bytes()
    size = len(data) - offset if size is None else size
    path.write_bytes(data[:offset] + bytes(size) + data[offset + size :])


def lose(path, row):
    for offset in sorted(offset for offset, _ in scan_any(path)[row].members.values()):
        flip(path, offset - 512 + 100)


def scan_any(path):
    with open(path, "rb") as file:
        return scan(file.fileno(), str(path)).samples


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("clean") / "portraits", COUNTS)


def run(folder, **options):
    config = DataConfig([str(folder)], global_batch_size=6, micro_batch_size=3, seed=3, **options)
    with Stream(open_sources(config), config) as stream:
        batches = [next(stream) for _ in range(2 * STEPS)]
    rows = {}
    for batch in batches:
        for i, slot in enumerate(batch["slots"].tolist()):
            rows[batch["step"], slot] = {name: batch[name][i] for name in batch if name != "step"}
    return rows, stream.stats


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_its_sample_replaced(clean, tmp_path, caplog, name):
    damage, bad, message = FAULTS[name]
    folder = tmp_path / "portraits"
    shutil.copytree(clean, folder)
    damage(folder / SHARD)
    expected, _ = run(clean)
    with caplog.at_level(logging.WARNING):
        rows, stats = run(folder)
    assert rows.keys() == expected.keys()
    replaced = 0
    for key, row in rows.items():
        same = expected[key]
        if int(same["local_indices"]) in bad:
            replaced += 1
            index = int(row["local_indices"])
            assert 6 <= index < 12 and index not in bad  # another sample of the same shard
            same = next(r for r in expected.values() if int(r["local_indices"]) == index) | {
                name: same[name] for name in ("sample_seeds", "slots")
            }
        for field, value in row.items():
            assert value == same[field] if field == "keys" else torch.equal(value, same[field]), (key, field)
    assert stats.bad == len(bad) and stats.replaced >= replaced > 0  # more where batches were loaded ahead
    assert len(caplog.records) == len(bad)  # each said once, with shard and, where there is one, key
    for record in caplog.records:
        assert SHARD in record.message and re.search(message, record.message), record.message
    if list(bad) == [9] and "no row" not in message:
        assert sample_key(1, 9) in caplog.text


@pytest.mark.parametrize("name", [name for name, (_, bad, _) in FAULTS.items() if bad is REST and "zeros" not in name])
def test_scan_names_what_is_broken(clean, tmp_path, name):
    path = tmp_path / SHARD
    shutil.copy(clean / SHARD, path)
    FAULTS[name][0](path)
    with pytest.raises(ShardError, match="cut short|tar header") as caught:
        scan_tar(path)
    assert caught.value.shard == str(path)


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """A base of two shapes with several captions, and an overlay on it with one member a sample."""
    folder = tmp_path_factory.mktemp("layered")
    shapes = [(4, 4), (6, 2)]
    base = make_source(folder / "portraits", (6, 5), shapes=shapes, captions=[1, 2], groups=("latents", "text", "lune"))
    make_source(folder / "sol", (6, 5), shapes=shapes, base=base, groups=("sol",))
    return folder


def readable(source, shard) -> dict[tuple[int, int, str], torch.Tensor]:
    """All tensors that can be read of a shard, by row, caption and name."""
    found = {}
    try:
        file = source.open(shard)
    except ShardError:
        return found
    fields = fields_at(source.fields, source.shapes[shard])
    batch = {name: torch.zeros(8, *field.shape, dtype=torch.float16) for name, field in fields.items()}
    for caption in (0, 1):
        rows = list(range(caption, file.count, 1 + caption))  # every second one has two
        out = {name: bits(tensor)[: len(rows)] for name, tensor in batch.items()}
        good = decode_chunk([file] * len(rows), rows, [caption] * len(rows), out)  # as the stream does
        for i, row in enumerate(rows):
            try:
                tensors = file.decode(row, caption=caption)
            except ShardError:
                assert not good[i]
                continue
            found |= {(row, caption, name): tensor for name, tensor in tensors.items()}
            assert not good[i] or all(torch.equal(tensor, batch[name][i]) for name, tensor in tensors.items())
    return found


def test_random_damage_is_never_silent(layered, tmp_path):
    """300 flipped bits and 100 truncations in the shards of a base and of its overlay: all samples that are read are
    correct, and a flipped bit costs at most one sample."""
    copy = shutil.copytree(layered, tmp_path / "copy")
    random, source, lost = np.random.default_rng(11), open_source(copy / "sol"), []
    expected = [readable(source, shard) for shard in (0, 1)]
    paths = sorted(layered.glob("*/*.tar"))
    assert [len(tensors) for tensors in expected] == [9 * 6, 7 * 6] and len(paths) == 4
    for i in range(400):
        path, shard = paths[i % 4], i % 2
        data, place = bytearray(path.read_bytes()), copy / path.relative_to(layered)
        if i < 300:
            bit = int(random.integers(8 * len(data)))
            data[bit // 8] ^= 1 << bit % 8
        else:
            del data[int(random.integers(len(data))) :]
        place.write_bytes(data)
        found = readable(source, shard)
        assert all(torch.equal(tensor, expected[shard][key]) for key, tensor in found.items()), (path, i)
        lost.append(len({row for row, *_ in expected[shard]} - {row for row, *_ in found}))
        shutil.copy(path, place)
    assert max(lost[:300]) == 1 and sum(lost[:300]) > 50 and sum(lost[300:]) > 100


def test_rows_are_placed_between_two_gaps(tmp_path):
    """Of a shard that lost two samples, the ones between them, whose place only their tensors tell."""
    folder = make_source(tmp_path / "portraits", (12,), groups=("latents", "text"))
    path = folder / "portraits-000000.tar"
    lose(path, 7)
    lose(path, 2)
    file = open_source(folder).open(0)
    assert [row for row in range(12) if file.samples[row] is None] == [2, 7]
    for row in set(range(12)) - {2, 7}:
        assert file.key(row) == sample_key(1, row)


@pytest.mark.parametrize("content", [b"", b"x", b"not a tar " * 100, bytes(512)])
def test_scan_refuses_what_is_no_tar(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(ShardError, match="x.tar"):
        scan_tar(path)


def test_replacements_are_the_same_on_any_number_of_ranks(clean, tmp_path):
    folder = tmp_path / "portraits"
    shutil.copytree(clean, folder)
    flip(folder / SHARD, in_data(folder / SHARD))
    whole, _ = run(folder)
    config = DataConfig([str(folder)], global_batch_size=6, micro_batch_size=3, seed=3)
    for rank in range(2):
        with Stream(open_sources(config), config, rank, 2) as stream:
            for step in range(STEPS):
                batch = next(stream)
                for i, slot in enumerate(batch["slots"].tolist()):
                    assert batch["keys"][i] == whole[step, slot]["keys"]


def test_stops_after_max_bad_samples(clean, tmp_path):
    folder = tmp_path / "portraits"
    shutil.copytree(clean, folder)
    cut(folder / SHARD, first_header(folder / SHARD))
    rows, stats = run(folder, max_bad_samples=3)
    assert len(rows) == 6 * STEPS and stats.bad == 3
    with pytest.raises(BadSamples, match=f"more than data.max_bad_samples = 2 bad samples.*{SHARD}"):
        run(folder, max_bad_samples=2)


def test_stops_where_a_whole_shard_is_bad(tmp_path):
    folder = make_source(tmp_path / "portraits", (30, 30))
    for row in range(30):
        flip(folder / SHARD, place(folder / SHARD, row, "lune" + SUFFIX)[0])
    with pytest.raises(BadSamples, match=f"{SHARD} .* 20 bad samples in a row"):
        run(folder)


def test_a_shard_that_vanished_is_named(clean, tmp_path):
    folder = tmp_path / "portraits"
    shutil.copytree(clean, folder)
    (folder / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"{SHARD} does not exist"):
        run(folder)


def test_a_read_that_hangs_is_named(clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "portraits")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    config = DataConfig([str(folder)], global_batch_size=6, micro_batch_size=3, seed=3)
    with open(folder / SHARD, "r+b") as file:  # who opens a leased file waits, as on a dead network file system
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with Stream(open_sources(config), config) as stream, ThreadPoolExecutor(1) as pool:
            reader = stream._reader
            read = pool.submit(lambda: [next(stream) for _ in range(2 * STEPS)])
            deadline = time.monotonic() + 120
            while stream._pipeline is None or (0, BAD_SHARD) not in [*reader.reading.values()]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with stream._pipeline._lock:  # it has waited long enough, as soon as it has come to that shard
                stream._pipeline.patience = 0.2
                stream._pipeline._ready.notify_all()
            with pytest.raises(TimeoutError, match=rf"no sample came for 0.2 s .*; being read: .*{SHARD}"):
                read.result(timeout=120)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    signal.signal(signal.SIGIO, before)
    assert run(folder)[1].bad == 0


def test_a_shard_of_another_build_is_refused(clean, tmp_path):
    folder = tmp_path / "portraits"
    shutil.copytree(clean, folder)
    size = (folder / SHARD).stat().st_size
    for indices in (range(5), range(6, 13), range(6, 30)):
        write_shard(folder / SHARD, make_samples(indices))
        with pytest.raises(ShardError, match=f"{SHARD}: is not the shard of the manifest .* expected {size} with 6"):
            run(folder)
    write_shard(folder / SHARD, make_samples(range(20, 26)))  # of equal size and count: its rows tell
    assert run(folder)[1].bad == 6


def test_a_shard_unlinked_under_a_reader_stays_readable(clean, tmp_path):
    folder = tmp_path / "portraits"
    shutil.copytree(clean, folder)
    source = open_sources(DataConfig([str(folder)]))[0]
    file = source.open(BAD_SHARD)
    (folder / SHARD).unlink()
    assert file.decode(0).keys() == source.fields.keys()


@pytest.mark.parametrize("remote", [False, True])
def test_a_bad_sample_of_an_unlinked_shard_is_marked(clean, tmp_path, remote):
    folder = shutil.copytree(clean, tmp_path / "portraits")
    rewrite(folder / SHARD, lambda sample: sample.pop("lune" + SUFFIX))
    with store_server(tmp_path) as server:
        url = f"{server.url}/portraits" if remote else str(folder)
        config = DataConfig([url], cache_dir=str(tmp_path / "cache"))
        reader = Reader(open_sources(config), config)
        opened = reader.shards.get(0, BAD_SHARD)
        Path(opened.path).unlink()
        zero = np.zeros(1, np.int64)
        micro = reader.new_batch((4, 4), zero, zero + BAD_SHARD, zero + BAD_ROW, seeds=zero, slots=zero, step=0)
        thread = threading.Thread(target=reader.load, args=(micro, range(1)), daemon=True)
        thread.start()
        thread.join(60)
    assert opened.is_unlinked and not thread.is_alive() and micro.good == [False] and reader.stats.bad == 1


def test_a_shard_that_the_disk_cannot_read_is_named(clean, tmp_path, caplog):
    folder = shutil.copytree(clean, tmp_path / "portraits")
    config = DataConfig([str(folder)], global_batch_size=6, micro_batch_size=3, seed=3)
    with Stream(open_sources(config), config) as stream, open("/proc/self/mem", "rb") as memory:
        os.dup2(memory.fileno(), stream._reader.shards.get(0, BAD_SHARD).fd)  # whose first bytes give an I/O error
        for _ in range(2 * STEPS):
            next(stream)
        assert stream.stats.bad == 6
    assert f"{SHARD}, sample {sample_key(1, 9)}: member latents{SUFFIX} cannot be read: Input/output" in caplog.text
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("/proc/self/mem")
    with pytest.raises(ShardError, match=f"{SHARD}: cannot be read: Input/output error"):
        run(folder)


def test_bad_held_out_samples_are_marked(clean, tmp_path, caplog):
    folder = tmp_path / "portraits"
    shutil.copytree(clean, folder)
    flip(folder / SHARD, in_data(folder / SHARD))
    config = DataConfig([str(folder)], global_batch_size=6, micro_batch_size=3, val_fraction=0.6, seed=3)
    batches = list(Stream(open_sources(config), config).validation(4))
    rows = [
        (int(batch["local_indices"][i]), bool(batch["valid"][i]), batch["latents"][i])
        for batch in batches
        for i in range(4)
        if batch["slots"][i] < sum(len(b["keys"]) for b in batches)
    ]
    bad = [latents for _, valid, latents in rows if not valid]
    assert bad and not bad[0].any()
    assert SHARD in caplog.text and sample_key(1, 9) in caplog.text


def test_a_manifest_of_other_fields_is_said(clean, tmp_path, caplog):
    folder = tmp_path / "portraits"
    shutil.copytree(clean, folder)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"shape": [10, 6]', '"shape": [10, 5]'))
    with pytest.raises(BadSamples, match="bad samples in a row"):
        run(folder)
    assert "lune: has 124 bytes of tensors, its fields take 104" in caplog.text
    assert parse_key(scan_tar(folder / SHARD)[0].key) == (1, 6)
