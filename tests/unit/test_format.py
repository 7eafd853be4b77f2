"""Shards hold what was put in, byte for byte the same each time, and other people's tools read them."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
import zstandard

from tests.make_source import make_samples, make_source, make_tensors
from tinyflux.shards.format import (
    GROUPS,
    SUFFIX,
    ShardError,
    bits,
    decode_member,
    encode_sample,
    member_limit,
    parse_key,
    sample_key,
)
from tinyflux.shards.schema import fields_of
from tinyflux.shards.tar import scan_tar
from tinyflux.shards.writer import write_shard

ENCODINGS = "encodings" + SUFFIX


def groups_of(tensors):
    return {group: fields_of({n: tensors[n] for n in names}) for group, names in GROUPS.items()}


def frame(blob: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**{"write_checksum": True, **options}).compress(blob)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sample_round_trip(dtype):
    tensors = make_tensors(3, dtype)
    sample = encode_sample(sample_key(1, 3), tensors, {"origin": "a"})
    decoded = {}
    for group, fields in groups_of(tensors).items():
        decoded |= decode_member(sample[group + SUFFIX], fields)
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert decoded[name].dtype == dtype and torch.equal(decoded[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_decodes_into_rows_of_a_batch(dtype):
    tensors = make_tensors(3, dtype)
    sample = encode_sample(sample_key(1, 3), tensors, {"origin": "a"})
    batch = {name: torch.zeros(4, *tensors[name].shape, dtype=dtype) for name in GROUPS["sol"]}
    decode_member(sample["sol" + SUFFIX], groups_of(tensors)["sol"], {n: bits(t)[2] for n, t in batch.items()})
    for name, tensor in batch.items():
        assert torch.equal(tensor[2], tensors[name])
        assert not tensor[[0, 1, 3]].any()


def test_equal_input_gives_equal_bytes():
    tensors = make_tensors(3)
    first = encode_sample(sample_key(1, 3), tensors, {"prompt": "é", "origin": "a"}, b"jpg")
    backwards = dict(reversed(tensors.items())) | {"latents": tensors["latents"].mT.contiguous().mT}
    assert encode_sample(sample_key(1, 3), backwards, {"origin": "a", "prompt": "é"}, b"jpg") == first


def test_keys():
    assert sample_key(7, 42) == "0007_000000042"
    assert parse_key(sample_key(12345, 10**10)) == (12345, 10**10)
    for key in ("", "0001-000000001", "0001_000000001.json", "0001_1", "../0001_000000001"):
        with pytest.raises(ValueError, match="not a sample key"):
            parse_key(key)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents": None}, "'latents'.* missing"),
        ({"mystery": torch.zeros(1)}, "unknown tensors .*mystery"),
        ({"lune": torch.zeros(2, dtype=torch.int32)}, "lune is torch.int32"),
        ({"lune": torch.tensor([float("nan")])}, "lune has NaN"),
        ({"sol_stats": torch.tensor([float("inf")])}, "sol_stats has NaN"),
    ],
)
def test_encode_refuses(change, message):
    tensors = {name: tensor for name, tensor in (make_tensors(1) | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        encode_sample(sample_key(1, 1), tensors, {"origin": "a"})


def lune_blob(**change):
    return safetensors.torch.save({"lune": make_tensors(1)["lune"]} | change)


def with_header(header) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(120)


LUNE = {"dtype": "F16", "shape": [10, 6], "data_offsets": [0, 120]}
NAN, INF = torch.full((10, 6), float("nan")), torch.full((10, 6), float("-inf"))

BAD_MEMBERS = {
    "not zstd": (b"garbage", "lune: "),
    "empty": (b"", "lune: "),
    "cut": (frame(lune_blob())[:-9], "lune: "),
    "bytes behind the frame": (frame(lune_blob()) + b"x", "lune: "),
    "two frames": (frame(lune_blob()) + frame(lune_blob()), "lune: "),
    "no checksum": (frame(lune_blob(), write_checksum=False), "no checksum"),
    "no size": (frame(lune_blob(), write_content_size=False), "fields take 120"),
    "bomb": (frame(bytes(1 << 30)), "states 1073741824 bytes"),
    "too small": (frame(bytes(16)), "states 16 bytes"),
    "header length beyond the blob": (frame(b"\xff" * 8 + bytes(200)), "bytes of tensors"),
    "not JSON": (frame(with_header(b"{{")), "lune: "),
    "deep JSON": (frame(with_header(b"[" * 4000)), "lune: "),
    "JSON list": (frame(with_header([LUNE])), "not an object"),
    "a name twice": (frame(with_header(b'{"lune": {}, "lune": {}}')), "occurs twice"),
    "another tensor": (frame(with_header({"lune": LUNE, "extra": LUNE})), "'extra'"),
    "wrong name": (frame(with_header({"moon": LUNE})), "'moon'"),
    "wrong dtype": (frame(with_header({"lune": LUNE | {"dtype": "BF16"}})), "lune is BF16"),
    "wrong shape": (frame(with_header({"lune": LUNE | {"shape": [6, 10]}})), r"\[6, 10\]"),
    "wrong offsets": (frame(with_header({"lune": LUNE | {"data_offsets": [0, 118]}})), "data_offsets"),
    "offsets of text": (frame(with_header({"lune": LUNE | {"data_offsets": ["0", "120"]}})), "data_offsets"),
    "shifted offsets": (frame(with_header({"lune": LUNE | {"data_offsets": [8, 128]}})), "begins at byte 8"),
    "NaN": (frame(lune_blob(lune=NAN.half())), "lune has NaN"),
    "-inf": (frame(lune_blob(lune=INF.half())), "lune has NaN"),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_decode_refuses(name):
    data, message = BAD_MEMBERS[name]
    with pytest.raises(ShardError, match=message) as caught:
        decode_member(data, groups_of(make_tensors(1))["lune"], where=("a.tar", "0001_000000001"))
    assert (caught.value.shard, caught.value.key) == ("a.tar", "0001_000000001")
    assert str(caught.value).startswith("a.tar, sample 0001_000000001: ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_any_value_that_is_not_finite_is_found(dtype, value):
    lune = make_tensors(1, dtype)["lune"]
    fields = {"lune": fields_of({"lune": lune})["lune"]}
    lune[-1, -1] = torch.finfo(dtype).max  # the largest finite ones pass
    lune[0, 0] = torch.finfo(dtype).min
    assert torch.equal(decode_member(frame(safetensors.torch.save({"lune": lune})), fields)["lune"], lune)
    lune[4, 3] = value
    with pytest.raises(ShardError, match="lune has NaN or infinity"):
        decode_member(frame(safetensors.torch.save({"lune": lune})), fields)


def test_every_flipped_bit_of_a_member_is_caught():
    fields = groups_of(make_tensors(1))["lune"]
    data = frame(lune_blob())
    for i in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        try:
            decoded = decode_member(bytes(flipped), fields)["lune"]
        except ShardError:
            continue
        assert torch.equal(decoded, make_tensors(1)["lune"]), f"bit {i}"  # a bit that no decoder reads


def test_incompressible_members_stay_within_the_limit():
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 0x7C00, (1 << 16,), np.uint16)).view(torch.float16)
    fields = {"lune": fields_of({"lune": noise})["lune"]}
    assert len(frame(safetensors.torch.save({"lune": noise}))) <= member_limit(fields)


def test_scan_finds_the_samples_that_tarfile_finds(tmp_path):
    path = make_source(tmp_path) / "portraits-000000.tar"
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


def decode_encodings(data: bytes) -> torch.Tensor:
    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        return safetensors.torch.load(reader.read())["latents"]


def test_webdataset_reads_a_shard(tmp_path):
    path = make_source(tmp_path) / "portraits-000000.tar"
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [sample_key(1, i) for i in range(5)]
    for i, sample in enumerate(samples):
        assert json.loads(sample["json"])["prompt"] == f"prompt {i}"
        assert torch.equal(decode_encodings(sample[ENCODINGS]), make_tensors(i)["latents"])


def test_datasets_reads_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    files = str(make_source(tmp_path / "source") / "*.tar")
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 12
    assert rows[7]["json"]["prompt"] == "prompt 7"
    blob = rows[7][ENCODINGS]  # already decompressed: datasets knows the ending
    assert torch.equal(safetensors.torch.load(blob)["latents"], make_tensors(7)["latents"])


def test_tar_and_zstd_read_a_shard(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, make_samples(range(2)))
    member = f"{sample_key(1, 1)}.{ENCODINGS}"
    listed = subprocess.run(["tar", "-tf", path], check=True, capture_output=True, text=True).stdout.split()
    assert member in listed and len(listed) == 10
    data = subprocess.run(["tar", "-xOf", path, member], check=True, capture_output=True).stdout
    try:
        blob = subprocess.run(["zstd", "-dc"], input=data, check=True, capture_output=True).stdout
    except FileNotFoundError:  # no zstd command on this machine: its library's own stream reader
        blob = zstandard.ZstdDecompressor().stream_reader(data).read()
    assert torch.equal(safetensors.torch.load(blob)["latents"], make_tensors(1)["latents"])
