"""Existing latents: every common layout, their scaling, and the teachers' inputs."""

import io
import json
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

from tests.builds import run, samples
from tests.listed import inputs_of
from tinyflux.model.tiny import shapes
from tinyflux.model.tiny.pictures import to_pixels
from tinyflux.model.zoo import ModelZoo
from tinyflux.precache.extract import extract
from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds import kind_of
from tinyflux.precache.kinds.base import Input, SourceError
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.source import open_source
from tinyflux.util import rng

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 6


@pytest.fixture(scope="module")
def zoo() -> ModelZoo:
    zoo = ModelZoo(zoo="tiny")
    for name in ("vae", "sd_vae", "clip", "t5", "lune", "sol"):
        getattr(zoo, f"load_{name}")()
    return zoo


@pytest.fixture(scope="module")
def given(zoo) -> tuple[torch.Tensor, list[str]]:
    """Latents as the VAE has them, [N, 16, 8, 8], and their captions."""
    images, prompts = zip(*(shapes.render(i, seed=7) for i in range(COUNT)), strict=True)
    return zoo.encode_images(to_pixels(list(images))) / zoo.vae.config.scaling_factor, list(prompts)


def npy(x: torch.Tensor) -> bytes:
    out = io.BytesIO()
    np.save(out, x.numpy())
    return out.getvalue()


def npz(x: torch.Tensor) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, latent=x.numpy(), size=np.array([64, 64]))
    return out.getvalue()


def pt(x: object, **options) -> bytes:
    out = io.BytesIO()
    torch.save(x, out, **options)
    return out.getvalue()


def table(folder: Path, cells: list, prompts: list[str], **columns) -> None:
    folder.mkdir()
    datasets.Dataset.from_dict({"latent": cells, "prompt": prompts} | columns).to_parquet(folder / "train.parquet")


def lists(folder, x, prompts):
    table(folder, x.tolist(), prompts)


def flat(folder, x, prompts):
    table(folder, x.flatten(1).tolist(), prompts, dims=[list(x.shape[1:])] * len(x))


def cells(folder, x, prompts):
    table(folder, [npy(each) for each in x], prompts)


def plain_bytes(folder, x, prompts):
    raw = [each.bfloat16().view(torch.int16).numpy().tobytes() for each in x]
    table(folder, raw, prompts, dims=[[1, *x.shape[1:]]] * len(x))


def files(folder, x, prompts):
    folder.mkdir()
    written = {
        "npy": npy, "npz": npz, "safetensors": lambda each: safetensors.torch.save({"latents": each.contiguous()}),
        "pt": pt, "PTH": lambda each: pt({"latent": each[None], "step": 3}, _use_new_zipfile_serialization=False),
    }  # fmt: skip
    for i, each in enumerate(x):
        extension = [*written][i % len(written)]
        (folder / f"{i}.{extension}").write_bytes(written[extension](each))
        (folder / f"{i}.txt").write_text(prompts[i])


def tars(folder, x, prompts):
    folder.mkdir()
    for k in range(2):
        with webdataset.TarWriter(str(folder / f"{k}.tar")) as writer:
            for i in range(3 * k, 3 * k + 3):
                writer.write({"__key__": f"{i}", "npy": npy(x[i]), "json": json.dumps({"prompt": prompts[i]}).encode()})


LAYOUTS = {
    "nested lists": (lists, {}, 1e-6),
    "flat lists": (flat, {"shape": "dims"}, 1e-6),
    "a file in each cell": (cells, {}, 1e-6),
    "plain bytes": (plain_bytes, {"shape": "dims", "dtype": "bfloat16"}, 0.05),
    "a stream": (lists, {"streaming": True, "count": COUNT}, 1e-6),
    "files of every kind": (files, {}, 1e-6),
    "tars": (tars, {}, 1e-6),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def latents_of(folder: Path, location: str, **keys):
    return kind_of("latents")(
        name="a", kind="latents", dataset_id=1, base=folder, location=location, scaling="raw", **keys
    )


def describe(folder: Path, scaling: str = "raw", **keys) -> None:
    keys = {"kind": "latents", "dataset_id": 7, "location": "given", "scaling": scaling} | keys
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    (folder / "sources.toml").write_text(f"[photos]\n{text}")


def test_tars_among_files_are_refused(tmp_path, given):
    files(tmp_path / "given", *given)
    with webdataset.TarWriter(str(tmp_path / "given" / "x.tar")) as writer:
        writer.write({"__key__": "x", "npy": npy(given[0][0]), "txt": "x"})
    with pytest.raises(SourceError, match="given: has tars and files of latents; make it two sources"):
        inputs_of(latents_of(tmp_path, "given"))


def test_too_many_shapes_in_a_slice(tmp_path, capsys):
    (tmp_path / "given").mkdir()
    for i in range(101):
        (tmp_path / "given" / f"{i}.npy").write_bytes(npy(torch.randn(16, 1 + i // 11, 1 + i % 11)))
        (tmp_path / "given" / f"{i}.txt").write_text("x")
    describe(tmp_path, "scaled")
    assert run(tmp_path, "--no-lune", "--no-sol") == 2
    assert "part 0 has 101 shards, at most 100: lower --shard-size" in capsys.readouterr().err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, given, layout):
    """The latents that were given, each with its caption."""
    write, keys, tolerance = LAYOUTS[layout]
    latents, prompts = given
    write(tmp_path / "given", latents, prompts)
    source = latents_of(tmp_path, "given", **keys)
    items = list(inputs_of(source))
    found = {source.prompts(item, 0)[0]: source.read_latents(item) for item in items}
    assert found.keys() == set(prompts) and {source.read_size(item) for item in items} == {(8, 8)}
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(found[prompt], latents[i], atol=tolerance, rtol=0)


def test_teachers_see_what_the_vae_decodes(tmp_path, zoo, given, capsys):
    """Two shapes, several batches: every tensor as of the decoded picture; a preview; nothing to resume."""
    latents, prompts = given
    (tmp_path / "given").mkdir()
    for i, each in enumerate(latents):
        wide = torch.cat((each, each[:, :, :8]), 2) if i % 2 else each
        (tmp_path / "given" / f"{i}.npy").write_bytes(npy(wide * zoo.vae.config.scaling_factor))
        (tmp_path / "given" / f"{i}.txt").write_text(prompts[i])
    (tmp_path / "given" / "cut.npy").write_bytes(npy(latents[0])[:999])
    (tmp_path / "given" / "cut.txt").write_text("cut")
    describe(tmp_path, "scaled")
    assert run(tmp_path, "--shard-size", 2, "--max-rejected", 0.5) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.shapes == ((8, 8), (8, 16)) and manifest.count == COUNT
    assert "1 of 7 inputs rejected" in capsys.readouterr().out
    for index, sample in samples(tmp_path / "out").items():
        pixels = zoo.decode_latents(sample["latents"].float()[None])
        seed = torch.tensor([rng.signed_key(0, 7, index)])
        expected = extract(zoo, pixels, sample["meta"]["prompts"], seed)
        for name in ("t5_embeds", "clip_pooled", "lune", "sol_stats", "sol_spatial"):
            found = sample[name].reshape(expected[name][0].shape)  # one caption
            torch.testing.assert_close(found.float(), expected[name][0].float(), atol=0.02, rtol=0.02)
        assert sample["meta"]["size"] == [8 * sample["latents"].shape[2], 64]
    assert "jpg" in open_source(tmp_path / "out").open(0).samples[0].members
    os.utime(tmp_path / "given" / "cut.npy", (1, 1))
    assert run(tmp_path, "--shard-size", 2, "--max-rejected", 0.5) == 0
    assert "complete" in (printed := capsys.readouterr().out) and "changed" not in printed
    assert run(tmp_path, "--out", tmp_path / "x", "--only", "lune", "--from", tmp_path / "out") == 2
    assert "which has no images" in capsys.readouterr().err


@pytest.mark.parametrize("told, factor", [("scaled", 1 / 0.7731 * 2), ("raw", 0.3), ("shifted", 2.5)])
def test_scaling_that_cannot_be_right(tmp_path, given, capsys, told, factor):
    latents, prompts = given
    lists(tmp_path / "given", latents * factor, prompts)
    describe(tmp_path, told)
    assert run(tmp_path, "--no-lune", "--no-sol") == 2
    error = capsys.readouterr().err
    assert f"scaling: '{told}' cannot be right: with it the first 6 latents have a standard deviation of" in error


def test_scaling_must_be_said(tmp_path, given, capsys):
    lists(tmp_path / "given", *given)
    describe(tmp_path, "half")
    assert run(tmp_path) == 2
    assert "scaling is 'half': it must be" in capsys.readouterr().err


@pytest.mark.parametrize("given", [torch.zeros(16, 6, 8), torch.zeros(1, 16, 6, 8)])
def test_a_header_gives_the_size(tmp_path, given):
    contents = {"a.npy": npy(given), "a.safetensors": safetensors.torch.save({"size": torch.zeros(2), "latent": given})}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content[:-9])  # what is missing at the end is not needed
        assert latents_of(tmp_path, ".").read_size(Input(name, "", [name, None])) == (8, 6)


class _Harm:
    def __reduce__(self):
        return (print, ("harm",))


REFUSED = {
    "a pickle that runs code": (pt(_Harm()), "refused, the file contains more than tensors"),
    "the same, old": (pickle.dumps(_Harm(), 2), "refused, the file contains more than tensors"),
    "cut short": (npy(torch.zeros(16, 8, 8))[:500], "its header says float32"),
    "a header that promises too much": (
        npy(torch.zeros(16, 8, 8)).replace(b"(16, 8, 8)", b"(1600000000000, 8, 8)").replace(b" " * 11 + b"\n", b"\n"),
        "",
    ),
    "a damaged safetensors": (safetensors.torch.save({"latent": torch.zeros(16, 8, 8)})[:-9], "unreadable latents: "),
    "integers": (npy(torch.zeros(16, 8, 8, dtype=torch.uint8)), "torch.uint8, must be floating point"),
    "flat": (npy(torch.zeros(1024)), "must be [C, h, w]; name the column"),
    "packed tokens": (npy(torch.zeros(16, 64)), "[16, 64], must be [C, h, w]"),
    "several": (safetensors.torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}), "which of a, b? Name it"),
    "not finite": (npy(torch.full((16, 8, 8), float("inf"))), "not finite"),
    "html": (b"<html>404</html>", "no .npy, .npz, .safetensors or .pt"),
    "a zip bomb": (npz(torch.zeros(17 << 20)), "more than 67108864 bytes when unpacked"),
    "empty": (b"", "no .npy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_reason(tmp_path, case, capsys):
    data, reason = REFUSED[case]
    (tmp_path / "a.npy").write_bytes(data)
    source = latents_of(tmp_path, ".")
    with pytest.raises(Rejected) as caught:
        source.read_latents(Input("a.npy", "", ["a.npy", None]))
    assert reason in str(caught.value) and "harm" not in capsys.readouterr().out
