"""Shards contain what was written, are bytewise reproducible, and can be read by other tools."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
import safetensors.numpy
import torch
import webdataset
import zstandard

from tests.make_source import make_samples, make_source, make_tensors
from tinyflux.shards.format import (
    SUFFIX,
    Layout,
    ShardError,
    bits,
    decode_member,
    describe_member,
    encode_member,
    encode_sample,
    member_name,
    origin_hash,
    parse_key,
    sample_key,
)
from tinyflux.shards.schema import DTYPES, SCHEMA, Field
from tinyflux.shards.tar import scan_tar
from tinyflux.shards.writer import write_shard

TEXT = "text.0" + SUFFIX
ORIGIN = origin_hash("a")


def layout(group, dtype="float16"):
    tensors = make_tensors(1)
    return Layout({name: Field(dtype, tuple(tensors[name].shape)) for name in SCHEMA[group].fields})


def frame(blob: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**{"write_checksum": True, **options}).compress(blob)


def joined(planes: dict[str, np.ndarray], name: str) -> torch.Tensor:
    """A tensor of the planes of a blob, by the line that the documentation gives."""
    low, high = planes[f"{name}.0"], planes[f"{name}.1"]
    return torch.from_numpy((high.astype("<u2") << 8 | low).view("<f2"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_round_trip(dtype):
    tensors = make_tensors(3, DTYPES[dtype])
    sample, decoded = encode_sample(sample_key(1, 3), tensors, {"origin": "a"}), {}
    for group in ("latents", "text", "lune", "sol"):
        member = member_name(group, 0 if group == "text" else None)
        decoded |= decode_member(sample[member], layout(group, dtype), ORIGIN)
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert decoded[name].dtype == DTYPES[dtype] and torch.equal(decoded[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_bits_survives(dtype):
    """All finite values of 16 bits, and of float32 all high halves."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    patterns = patterns.astype(np.uint32) << 16 | 0x1234 if dtype == "float32" else patterns
    values = torch.from_numpy(patterns.copy()).view(DTYPES[dtype])
    values = values[values.isfinite()]
    one = Layout({"lune": Field(dtype, (len(values),))})
    found = decode_member(encode_member({"lune": values}, one, 7), one, 7)["lune"]
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decodes_into_rows_of_a_batch(dtype):
    tensors = make_tensors(3, DTYPES[dtype])
    sample = encode_sample(sample_key(1, 3), tensors, {"origin": "a"})
    batch = {name: torch.zeros(4, *tensors[name].shape, dtype=DTYPES[dtype]) for name in SCHEMA["sol"].fields}
    decode_member(sample["sol" + SUFFIX], layout("sol", dtype), ORIGIN, {n: bits(t)[2] for n, t in batch.items()})
    for name, tensor in batch.items():
        assert torch.equal(tensor[2], tensors[name])
        assert not tensor[[0, 1, 3]].any()


def test_a_member_describes_itself():
    sample = encode_sample(sample_key(1, 3), make_tensors(3), {"origin": "a"})
    assert describe_member(sample["lune" + SUFFIX]) == (layout("lune").fields, ORIGIN)
    for data in (b"", b"x" * 100, frame(bytes(300)), frame(b"\xff" * 300), frame(safetensors.numpy.save({}))):
        with pytest.raises(ValueError):
            describe_member(data)


def test_several_captions_are_as_many_members():
    tensors = make_tensors(3, captions=3)
    sample = encode_sample(sample_key(1, 3), tensors, {"origin": "a"})
    for i in range(3):
        found = decode_member(sample[member_name("text", i)], layout("text"), ORIGIN)
        assert torch.equal(found["t5_embeds"], tensors["t5_embeds"][i])
    assert sum(member.startswith("text.") for member in sample) == 3
    with pytest.raises(ValueError, match="must have the same number of captions"):
        encode_sample(sample_key(1, 3), tensors | {"clip_pooled": tensors["clip_pooled"][:2]}, {"origin": "a"})


def test_tensors_of_another_image_are_refused():
    sample = encode_sample(sample_key(1, 3), make_tensors(3), {"origin": "a"})
    with pytest.raises(ShardError, match="lune: made from another image .origin hash"):
        decode_member(sample["lune" + SUFFIX], layout("lune"), origin_hash("b"))


def test_low_bytes_come_first_and_a_block_ends_with_them():
    """One frame, so that plain zstd reads it; a block boundary, so that each plane has its own statistics."""
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).half()
    one = Layout({"lune": Field("float16", (1 << 16,))})
    data = encode_member({"lune": values}, one, 0)
    plain = frame(values.numpy().tobytes(), level=3)
    assert len(data) < 0.86 * values.nbytes < 0.94 * len(plain)
    blob = zstandard.ZstdDecompressor().decompress(data)
    assert blob[: len(one.head)] == one.head
    assert blob[len(one.head) + 4 :] == values.numpy().view("u1").reshape(-1, 2).T.tobytes()


def test_equal_input_gives_equal_bytes():
    tensors = make_tensors(3)
    first = encode_sample(sample_key(1, 3), tensors, {"prompts": ["é"], "origin": "a"}, b"jpg")
    backwards = dict(reversed(tensors.items())) | {"latents": tensors["latents"].mT.contiguous().mT}
    assert encode_sample(sample_key(1, 3), backwards, {"origin": "a", "prompts": ["é"]}, b"jpg") == first


def test_keys():
    assert sample_key(7, 42) == "0007_000000042"
    assert parse_key(sample_key(12345, 10**10)) == (12345, 10**10)
    for key in ("", "0001-000000001", "0001_000000001.json", "0001_1", "../0001_000000001", f"0001_{10**19}"):
        with pytest.raises(ValueError, match="not a sample key"):
            parse_key(key)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sol_stats": None}, "sol_stats missing from group 'sol'"),
        ({"mystery": torch.zeros(1)}, "unknown tensors .*mystery"),
        ({"lune": torch.zeros(10, 6, dtype=torch.int32)}, "lune is torch.int32"),
        ({"lune": torch.full((10, 6), float("nan"))}, "lune has NaN"),
        ({"sol_stats": torch.full((10, 3), float("inf"))}, "sol_stats has NaN"),
        ({"sol_stats": torch.zeros(10, 4)}, "sol_stats has shape .*, the schema has the axes"),
        ({"latents": torch.zeros(4, 4)}, "latents has shape .*, the schema has the axes"),
    ],
)
def test_encode_refuses(change, message):
    tensors = {name: tensor for name, tensor in (make_tensors(1) | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        encode_sample(sample_key(1, 1), tensors, {"origin": "a"})


def lune_blob(lune=None):
    data = encode_member({"lune": make_tensors(1)["lune"] if lune is None else lune.half()}, layout("lune"), ORIGIN)
    return zstandard.ZstdDecompressor().decompress(data)


def with_header(header) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(124)


def with_entries(**change) -> bytes:
    entries = {
        "__metadata__": {"lune": "float16"},
        "origin": entry(0, 4),
        "lune.0": entry(4, 64),
        "lune.1": entry(64, 124),
    }
    return with_header(entries | change)


def entry(begin, end, **change) -> dict:
    shape = [4] if end == 4 else [10, 6]
    return {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]} | change


NAN, INF = torch.full((10, 6), float("nan")), torch.full((10, 6), float("-inf"))

BAD_MEMBERS = {
    "not zstd": (b"garbage", "lune: "),
    "empty": (b"", "lune: "),
    "cut": (frame(lune_blob())[:-9], "lune: "),
    "bytes behind the frame": (frame(lune_blob()) + b"x", "lune: "),
    "two frames": (frame(lune_blob()) + frame(lune_blob()), "lune: "),
    "no checksum": (frame(lune_blob(), write_checksum=False), "no checksum"),
    "no size": (frame(lune_blob(), write_content_size=False), "fields take 124"),
    "bomb": (frame(bytes(1 << 30)), "states 1073741824 bytes"),
    "too small": (frame(bytes(16)), "states 16 bytes"),
    "header length beyond the blob": (frame(b"\xff" * 8 + bytes(200)), "bytes of tensors"),
    "not JSON": (frame(with_header(b"{{")), "lune: "),
    "deep JSON": (frame(with_header(b"[" * 4000)), "lune: "),
    "JSON list": (frame(with_header([entry(0, 4)])), "not an object"),
    "a name twice": (frame(with_header(b'{"lune": {}, "lune": {}}')), "occurs twice"),
    "another tensor": (frame(with_entries(extra=entry(0, 4))), "'extra'"),
    "plain tensors": (frame(safetensors.numpy.save({"lune": np.zeros(62, "f2")})), "its header says"),
    "another type": (frame(with_entries(__metadata__={"lune": "bfloat16"})), "its header says .*bfloat16"),
    "wrong dtype": (frame(with_entries(**{"lune.0": entry(4, 64, dtype="I8")})), "lune.0 is 'I8'"),
    "dtype a list": (frame(with_entries(**{"lune.0": entry(4, 64, dtype=[[]])})), r"lune.0 is \[\[\]\]"),
    "wrong shape": (frame(with_entries(**{"lune.0": entry(4, 64, shape=[6, 10])})), r"\[6, 10\]"),
    "wrong offsets": (frame(with_entries(**{"lune.1": entry(64, 123)})), "data_offsets"),
    "offsets of text": (frame(with_entries(origin=entry("0", 4))), "data_offsets"),
    "offsets huge": (frame(with_entries(**{"lune.1": entry(10**400, 10**400 + 60)})), "starts at byte"),
    "offsets negative": (frame(with_entries(**{"lune.1": entry(-60, 0)})), "starts at byte -60"),
    "planes that overlap": (frame(with_entries(**{"lune.1": entry(4, 64)})), "starts at byte 4"),
    "NaN": (frame(lune_blob(NAN)), "lune has NaN"),
    "-inf": (frame(lune_blob(INF)), "lune has NaN"),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_decode_refuses(name):
    data, message = BAD_MEMBERS[name]
    with pytest.raises(ShardError, match=message) as caught:
        decode_member(data, layout("lune"), ORIGIN, where=("a.tar", "0001_000000001"))
    assert (caught.value.shard, caught.value.key) == ("a.tar", "0001_000000001")
    assert str(caught.value).startswith("a.tar, sample 0001_000000001: ")


def test_planes_in_another_order_are_read():
    """Planes in the order of other safetensors writers; the header has their offsets."""
    lune = make_tensors(1)["lune"]
    planes = lune.numpy().view("u1").reshape(10, 6, 2)
    arrays = {"lune.1": planes[..., 1].copy(), "lune.0": planes[..., 0].copy(), "origin": np.array([7, 0, 0, 0], "u1")}
    data = frame(safetensors.numpy.save(arrays, metadata={"lune": "float16"}))
    assert torch.equal(decode_member(data, layout("lune"), 7)["lune"], lune)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_any_value_that_is_not_finite_is_found(dtype, value):
    lune, one = make_tensors(1, DTYPES[dtype])["lune"], layout("lune", dtype)
    lune[-1, -1] = torch.finfo(DTYPES[dtype]).max  # the largest finite ones pass
    lune[0, 0] = torch.finfo(DTYPES[dtype]).min
    assert torch.equal(decode_member(encode_member({"lune": lune}, one, 1), one, 1)["lune"], lune)
    lune[4, 3] = value
    with pytest.raises(ShardError, match="lune has NaN or infinity"):
        decode_member(encode_member({"lune": lune}, one, 1), one, 1)


def test_every_flipped_bit_of_a_member_is_caught():
    data, lune = frame(lune_blob()), make_tensors(1)["lune"]
    for i in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        try:
            decoded = decode_member(bytes(flipped), layout("lune"), ORIGIN)["lune"]
        except ShardError:
            continue
        assert torch.equal(decoded, lune), f"bit {i}"  # a bit that no decoder reads


def test_incompressible_members_stay_within_the_limit():
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 0x7C00, (1 << 16,), np.uint16)).view(torch.float16)
    one = Layout({"lune": Field("float16", tuple(noise.shape))})
    assert len(encode_member({"lune": noise}, one, 0)) <= one.limit


def test_scan_finds_the_samples_that_tarfile_finds(tmp_path):
    path = make_source(tmp_path / "portraits") / "portraits-000000.tar"
    samples = scan_tar(path)
    assert [sample.key for sample in samples] == [sample_key(1, i) for i in range(5)]
    with tarfile.open(path) as tar:
        expected = {member.name: (member.offset_data, member.size) for member in tar}
    assert {f"{s.key}.{extension}": place for s in samples for extension, place in s.members.items()} == expected


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_scan_reads_other_peoples_tars(tmp_path, format):
    path, name = tmp_path / "other.tar", "é" * 60  # needs a long-name header in pax and GNU
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("./folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for member in ("README", "./folder/a.json", "./folder/a.x.zst", f"folder/{name if format != 0 else 'b'}.json"):
            info = tarfile.TarInfo(member)
            info.size = len(member.encode())
            tar.addfile(info, io.BytesIO(member.encode()))
    samples = scan_tar(path)
    assert [sample.key for sample in samples] == ["folder/a", f"folder/{name if format != 0 else 'b'}"]
    assert samples[0].members.keys() == {"json", "x.zst"}
    offset, size = samples[0].members["x.zst"]
    assert path.read_bytes()[offset : offset + size] == b"./folder/a.x.zst"


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.json", "b.json", "a.jpg"], "sample a: .*not adjacent"),
        (["a.json", "a.json"], r"sample a: .*\.json occurs twice"),
    ],
)
def test_scan_refuses(tmp_path, names, message):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ShardError, match=message):
        scan_tar(path)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_scan_ends_at_a_negative_size(tmp_path, format):
    path, info = tmp_path / "x.tar", tarfile.TarInfo("a.json")
    if format == tarfile.PAX_FORMAT:
        info.pax_headers = {"size": "-1024"}
        data = info.tobuf(format)
    else:
        data = bytearray(info.tobuf(format))
        data[124:136] = (-1024).to_bytes(12, "big", signed=True)
        data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:]))
    path.write_bytes(bytes(data) + bytes(10240))
    with pytest.raises(ShardError, match="negative size"):
        scan_tar(path)


def test_webdataset_reads_a_shard(tmp_path):
    path = make_source(tmp_path / "portraits") / "portraits-000000.tar"
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [sample_key(1, i) for i in range(5)]
    for i, sample in enumerate(samples):
        assert json.loads(sample["json"])["prompts"] == [f"prompt {i}.0"]
        with zstandard.ZstdDecompressor().stream_reader(sample[TEXT]) as reader:
            planes = safetensors.numpy.load(reader.read())
        assert torch.equal(joined(planes, "t5_embeds"), make_tensors(i)["t5_embeds"])


def test_datasets_reads_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    files = str(make_source(tmp_path / "source") / "*.tar")
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 12
    assert rows[7]["json"]["prompts"] == ["prompt 7.0"]
    blob = rows[7][TEXT]  # already decompressed: datasets knows the ending
    assert torch.equal(joined(safetensors.numpy.load(blob), "t5_embeds"), make_tensors(7)["t5_embeds"])


def test_tar_and_zstd_read_a_shard(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, make_samples(range(2)))
    member = f"{sample_key(1, 1)}.latents{SUFFIX}"
    listed = subprocess.run(["tar", "-tf", path], check=True, capture_output=True, text=True).stdout.split()
    assert member in listed and len(listed) == 12
    data = subprocess.run(["tar", "-xOf", path, member], check=True, capture_output=True).stdout
    try:
        blob = subprocess.run(["zstd", "-dc"], input=data, check=True, capture_output=True).stdout
    except FileNotFoundError:  # no zstd command on this machine: its library's own stream reader
        blob = zstandard.ZstdDecompressor().stream_reader(data).read()
    assert torch.equal(joined(safetensors.numpy.load(blob), "latents"), make_tensors(1)["latents"])
