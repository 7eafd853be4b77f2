"""Inspecting sources: the table, and the page in a real browser."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sharding import build, inspect
from tests.make_source import make_source, make_tensors
from tinyflux.model.tiny.shapes import render
from tinyflux.precache.survey import look, spread
from tinyflux.shards.format import encode_member, encode_sample, layout_of, origin_hash, sample_key
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.schema import SCHEMA, Field, fields_of, grouped
from tinyflux.shards.source import open_source
from tinyflux.shards.tar import scan_tar
from tinyflux.shards.writer import write_null, write_shard
from tinyflux.util.buckets import BUCKETS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</p><script>document.title='gotcha'</script><img src=x onerror=\"document.title='gotcha'\"> & 'quoted'"


LONG = "and then it is said once more in other words " * 60


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Nine pictures of three shapes by the tiny zoo, some of two captions, one of a long one; Lune in an overlay."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "images").mkdir()
    for i in range(9):
        image, prompt = render(i, seed=3)
        image.resize([(96, 64), (64, 96), (80, 80)][i % 3]).save(folder / "images" / f"{i}.png")
        text = f"{prompt} {LONG}" if i == 1 else f"{prompt}\nthe other caption of {i}" if i % 2 else prompt
        (folder / "images" / f"{i}.txt").write_text(text)
    (folder / "sources.toml").write_text(
        '[photos]\nkind = "imagefolder"\ndataset_id = 8\nlocation = "images"\ncaptions = "all"\n'
    )
    args = ["--source", "photos", "--sources", str(folder / "sources.toml"), "--batch-size", "4", "--device", "cpu"]
    base, overlay = str(folder / "photos"), str(folder / "photos-lune")
    assert build.main([*args, "--zoo", "tiny", "--shapes", "auto", "--no-lune", "--out", base]) == 0
    assert build.main([*args, "--zoo", "tiny", "--only", "lune", "--from", base, "--out", overlay]) == 0
    return folder / "photos-lune"


def nasty_source(folder: Path) -> Path:
    """One sample whose every text is an attack on the page."""
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (20, 160, 60)).save(picture, "JPEG")
    meta = {"origin": NASTY, "prompts": [NASTY], "index": 0}
    samples = [
        encode_sample(sample_key(3, i), make_tensors(i), meta | {"index": i}, picture.getvalue()) for i in (0, 1)
    ]
    shard = write_shard(folder / "evil-000000.tar", samples)
    null = write_null(folder, {name: make_tensors(0)[name] for name in ("t5_embeds", "clip_pooled")})
    producers = dict.fromkeys(SCHEMA, {"source": {"location": NASTY}})
    groups = grouped(fields_of(make_tensors(0)), BUCKETS, producers)
    Manifest.of("evil", 3, groups, [shard], null_sha256=null).save(folder)
    (folder / "rejected.jsonl").write_text(json.dumps({"index": 2, "origin": NASTY, "reason": NASTY}) + "\n")
    return folder


def table_row(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()


def test_the_table_says_what_is_there(tmp_path, capsys):
    source = make_source(tmp_path / "portraits")
    rejected = [
        {"index": 1, "origin": "a", "reason": "too small: 3 x 3"},
        {"index": 2, "origin": "b", "reason": "too small: 1 x 9"},
    ]
    (source / "rejected.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rejected))
    assert inspect.main([str(source)]) == 0
    text = capsys.readouterr().out
    assert "portraits: 12 samples in 3 shards" in text and "looked at 12 samples; 0 prompts are empty, 0 repeat" in text
    every = torch.stack([make_tensors(i)["lune"] for i in range(12)]).double()
    row = table_row(text, "lune")
    assert row[:4] == ["lune", "float16", "10x6", "120"] and row[-1] == "0"
    assert [float(cell) for cell in row[5:7]] == pytest.approx(
        [every.mean().item(), every.std(unbiased=False).item()], rel=1e-3
    )
    member = table_row(text, "text.safetensors.zst")
    a_sample, raw, stored, ratio = (float(cell) for cell in member[-4:])
    assert a_sample == 1 and raw == 2 * (6 * 8 + 8) and ratio == pytest.approx(stored / raw, abs=0.01)
    assert table_row(text, "characters")[1:] == ["10", "10", "11", "11"]
    assert "  vae.revision: 'abc'" in text and "  2  too small" in text


def test_a_sample_is_taken_from_all_over(tmp_path):
    source = open_source(make_source(tmp_path / "portraits", (10, 10, 10, 10)))
    report = look(source, samples=8, shards=2, shown=4)
    assert (report.read, report.scanned) == (8, 20)
    assert len(report.shown) == 4 and report.shown[-1].key > sample_key(1, 19)
    assert report.similarity.shape == (10, 10) and np.allclose(np.diag(report.similarity), 1)
    assert [spread(10, 3), spread(2, 5), spread(7, 7)] == [[0, 3, 6], [0, 1], list(range(7))]


def test_damage_is_told(tmp_path, capsys):
    """A damaged sample is a fault and decides the exit status; the others are still looked at."""
    source = make_source(tmp_path / "portraits", (4,))
    path = source / "portraits-000000.tar"
    offset, size = scan_tar(path)[1].members["lune.safetensors.zst"]
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 1
    path.write_bytes(data)
    assert inspect.main([str(source), "--html", str(tmp_path / "page.html")]) == 1
    text = capsys.readouterr().out
    assert "faults" in text and "0001_000000001" in text and "looked at 3 samples" in text
    assert "0001_000000001" in (tmp_path / "page.html").read_text()


def test_a_damaged_list_of_rejects_is_told(tmp_path, capsys):
    source = make_source(tmp_path / "portraits", (4,))
    (source / "rejected.jsonl").write_text('{"reason": "too small: 3 x 3"}\n[]\n{"reason": 3}\n{"reas')
    assert inspect.main([str(source)]) == 0
    assert "3  unreadable line of rejected.jsonl\n  1  too small" in capsys.readouterr().out


def test_nan_is_counted(tmp_path, capsys):
    """In a shard that another tool wrote: ours refuses to."""
    source = make_source(tmp_path / "portraits", (1,))
    sample = encode_sample(sample_key(1, 0), make_tensors(0), {"origin": "a", "prompts": [""], "index": 0})
    lune = make_tensors(0)["lune"]
    lune[0, :2] = torch.tensor([torch.nan, torch.inf])
    frame = encode_member({"lune": lune}, layout_of({"lune": Field("float16", (10, 6))}), origin_hash("a"))
    shard = write_shard(source / "portraits-000000.tar", [sample | {"lune.safetensors.zst": frame}])
    found = Manifest.load(source)
    Manifest.of("portraits", 1, found.groups, [shard], null_sha256=found.null_sha256).save(source)
    assert inspect.main([str(source), "--html", str(tmp_path / "page.html")]) == 0
    row = table_row(capsys.readouterr().out, "lune")
    assert row[-1] == "2" and "nan" not in row


def test_what_is_refused(tmp_path, capsys, built):
    assert inspect.main([str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    for args, message in (
        (["--decode"], "--decode needs --html"),
        (["--shown", "0"], "--shown is 0: it must be at least 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            inspect.main([str(built), *args])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    other = make_source(tmp_path / "other")
    page = tmp_path / "page.html"
    assert inspect.main([str(other), "--html", str(page), "--decode", "--zoo", "tiny"]) == 2
    assert "--zoo tiny is not what the source was built with: vae." in capsys.readouterr().err and not page.exists()


class Links(html.parser.HTMLParser):
    """All tags, and everything that a browser might fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action", "data")
        ]
        assert not any(name.startswith("on") for name, _ in attrs)


@pytest.fixture(scope="module")
def page(built, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "drawn.html"
    assert inspect.main([str(built), "--html", str(path), "--decode", "--zoo", "tiny"]) == 0
    return path


def test_the_page_needs_nothing_and_escapes_everything(page, tmp_path):
    evil = tmp_path / "evil.html"
    assert inspect.main([str(nasty_source(tmp_path / "evil")), "--html", str(evil)]) == 0
    for path in (page, evil):
        found = Links(path.read_text())
        assert "script" not in found.tags and "img" not in found.tags
        local = ("data:image/jpeg;base64,", "data:image/png;base64,", "#p")
        assert found.links and all(link.startswith(local) for link in found.links)
    assert "gotcha" in evil.read_text() and "url(" not in evil.read_text()


def maps_of(page: str) -> list[np.ndarray]:
    """The opacities [h, w] of the maps over the pictures."""
    found = re.findall(r'href="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[..., 3] for data in found]


def test_the_table_has_shapes_captions_layers_timesteps_and_producers(built, capsys):
    assert inspect.main([str(built)]) == 0
    text = capsys.readouterr().out
    assert [table_row(text, shape)[1:] for shape in ("8x8", "7x10", "10x7")] == [["3", "33.3%", "1"]] * 3
    assert text.count("\nlatents  ") == 3 and "16x7x10" in text and "16x10x7" in text
    assert "captions per sample  samples\n1                          6\n2                          3\n" in text
    base = str(built.parent / "photos")
    assert table_row(text, base)[1:5] == ["base", "latents,", "text,", "sol"]
    assert table_row(text, str(built))[1:3] == ["overlay", "lune"]
    assert "timesteps of lune, sol: 0.05, 0.15," in text and "  lune.sha256: '" in text and "  t5.sha256: '" in text
    assert inspect.main([base]) == 0
    assert table_row(capsys.readouterr().out, str(built))[1:] == ["overlay,", "not", "read", "lune"]
    assert inspect.main([str(built.parent)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shared = ["9", "3", "3"]
    assert rows[1:] == [["photos", *shared, "latents,", "text,", "sol"], ["photos-lune", "photos", *shared, "lune"]]


def test_producers_that_differ_say_of_what(tmp_path, capsys):
    base = make_source(tmp_path / "a", groups=("latents", "text"))
    overlay = make_source(tmp_path / "b", groups=("lune",), base=base, producer={"vae": {"revision": "xyz"}})
    assert inspect.main([str(overlay)]) == 0
    text = capsys.readouterr().out
    assert "  vae.revision: 'abc' (latents, text)" in text and "  vae.revision: 'xyz' (lune)" in text


def test_the_page_shows_pictures_maps_and_reconstructions(page):
    text = page.read_text()
    assert text.count('class="card"') == 9 + 6  # samples, histograms
    assert len(re.findall(r'<image id="p\d+"', text)) == len(re.findall(r'<image id="d\d+"', text)) == 9
    assert text.count("Sol, t = 0.95") == 9 and "Lune: cosine between buckets" in text
    maps = maps_of(text)
    assert len(maps) == 27 and all(opacity.min() == 0 and opacity.max() == 204 for opacity in maps)
    assert np.mean([opacity.mean() for opacity in maps]) < 140, "they are not all red"


def screenshot(page: Path, out: Path, profile: Path, *more: str) -> subprocess.CompletedProcess:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [f"--user-data-dir={profile}", "--window-size=1280,2400", "--hide-scrollbars", *more]
    flags += [f"--screenshot={out}"] if not more else []
    return subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_the_page(page, tmp_path):
    assert screenshot(page, tmp_path / "page.png", tmp_path / "profile").returncode == 0
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert pixels.shape == (2400, 1280, 3)
    assert len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 1000, "there are pictures"
    done = screenshot(page, tmp_path / "page.png", tmp_path / "profile", "--dump-dom")
    assert done.returncode == 0 and not done.stdout.count("<details open")
    dom = done.stdout
    heads = re.findall(r"<h[123]>([^<]+)</h[123]>", dom)
    titles = ["Layers", "Shapes", "Members", "Fields", "Captions", "Prompts", "Samples"]
    assert [head for head in heads if head in titles] == titles
    assert [head for head in heads if head.startswith("latents ")] == [
        f"latents {shape}: 3 shown" for shape in ("7 x 10", "8 x 8", "10 x 7")
    ]
    # a picture is as wide and high as its shape says, and comes with the page
    sizes = re.findall(r'<image id="p\d+" href="data:image/jpeg;base64,[^"]+" width="(\d+)" height="(\d+)">', dom)
    assert sorted(sizes) == sorted([("96", "67"), ("80", "80"), ("67", "96")] * 3)
    assert dom.count("the other caption of") == 3 and "3 captions" not in dom and dom.count(">2 captions<") == 3
    long = f"{render(1, seed=3)[1]} {LONG}".strip()
    assert f"... ({len(long)} characters)" in dom and long not in dom, "it is cut"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_runs_nothing_of_a_hostile_source(tmp_path):
    evil = tmp_path / "evil.html"
    assert inspect.main([str(nasty_source(tmp_path / "evil")), "--html", str(evil)]) == 0
    done = screenshot(evil, tmp_path / "evil.png", tmp_path / "profile", "--dump-dom")
    assert done.returncode == 0 and "<title>evil</title>" in done.stdout
