"""Lists, tars and `datasets` datasets as sources: real files, a real HTTP server, the real library."""

import datetime
import functools
import http.server
import io
import json
import os
import tarfile
import threading
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from tests.listed import inputs_of
from tinyflux.precache.images import Rejected, open_image
from tinyflux.precache.kinds import kind_of
from tinyflux.precache.kinds.base import ImageSource, SourceError
from tinyflux.shards.remote import Patience

COLOURS = ["red", "green", "blue", "white", "black", "orange"]
UNREADABLE = "rejected: unreadable image: not an image file of a known kind"


def spec(folder: Path, kind: str, location: str, **keys) -> ImageSource:
    return kind_of(kind)(name="photos", kind=kind, dataset_id=7, location=location, base=folder, **keys)


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(out, "PNG")
    return out.getvalue()


def contents(source: ImageSource) -> list[tuple]:
    """(captions, colour) of all inputs by origin; for a rejected input the reason."""
    found = []
    for item in sorted(inputs_of(source)):
        row = []
        for read in (lambda i=item: source.prompts(i, 0), lambda i=item: colour_of(source.read_image(i))):
            try:
                row.append(read())
            except Rejected as reason:
                row.append(f"rejected: {reason}")
        found.append(tuple(row))
    return found


def colour_of(data) -> str:
    pixel = open_image(data).getpixel((5, 5))
    return next(name for name in COLOURS if pixel == Image.new("RGB", (1, 1), name).getpixel((0, 0)))


ALL = [([f"a {colour} square"], colour) for colour in COLOURS]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_lists_of_paths_and_captions(tmp_path, kind):
    (tmp_path / "lists" / "images").mkdir(parents=True)
    rows = []
    for i, colour in enumerate(COLOURS):
        (tmp_path / "lists" / "images" / f"{i}.png").write_bytes(png(colour))
        path = f"images/{i}.png" if i else str(tmp_path / "lists" / "images" / "0.png")
        rows.append({"path": path, "prompt": f"a {colour} square"})
    rows += [{"path": "../lists.png", "prompt": "outside"}, {"path": "images/9.png", "prompt": "none"}]
    path = tmp_path / "lists" / f"list.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    else:
        comma = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("".join(f'"{a}"{comma}{b}\n' for a, b in [("path", "prompt"), *(r.values() for r in rows)]))
    kind = "jsonl" if kind == "jsonl" else "csv"
    source = spec(tmp_path, kind, f"lists/{path.name}", image="path", caption=["prompt"])
    expected = [(["outside"], "rejected: outside the folder: ../lists.png"), *ALL]
    assert contents(source) == [*expected, (["none"], "rejected: unreadable file: No such file or directory")]
    elsewhere = spec(tmp_path, kind, f"lists/{path.name}", image="path", caption=["prompt"], root="other")
    assert {colour for _, colour in contents(elsewhere)} > {"rejected: outside the folder: ../lists/images/0.png"}
    with pytest.raises(SourceError, match="no record has the field 'text'; the first has path, prompt"):
        inputs_of(spec(tmp_path, kind, f"lists/{path.name}", image="path", caption=["text"]))
    with pytest.raises(SourceError, match="text under 'image'" if kind == "jsonl" else "nothing in column 'image'"):
        inputs_of(spec(tmp_path, kind, f"lists/{path.name}", caption=["prompt"]))
    with pytest.raises(FileNotFoundError, match="no such file"):
        inputs_of(spec(tmp_path, kind, "lists/other"))


@pytest.fixture
def tars(tmp_path) -> Path:
    """Two tars in img2dataset's layout: image, caption as text, record as JSON; one image without a caption."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for k in range(2):
        with webdataset.TarWriter(str(folder / f"{k:05d}.tar")) as writer:
            writer.write({"__key__": f"{k}_url", "json": {"status": "failed"}})
            for i, colour in enumerate(COLOURS[3 * k : 3 * k + 3]):
                texts = {"txt": f"a {colour} square", "json": {"caption": f"a {colour} square", "alt": [colour, "x"]}}
                writer.write({"__key__": f"{k:05d}{i:04d}", "png": png(colour)} | texts)
    return folder


def test_webdataset_folder_and_pattern(tmp_path, tars):
    assert contents(spec(tmp_path, "webdataset", "tars")) == ALL
    assert contents(spec(tmp_path, "webdataset", "tars/{00001..00001}.tar")) == ALL[3:]
    alt = spec(tmp_path, "webdataset", "tars", caption=["alt"])
    assert [texts for texts, _ in contents(alt)] == [[colour, "x"] for colour in COLOURS]
    assert [item.origin for item in inputs_of(alt)][:2] == ["00000.tar/000000000", "00000.tar/000000001"]
    with pytest.raises(FileNotFoundError, match="no such tar"):
        inputs_of(spec(tmp_path, "webdataset", "none-{0..1}.tar"))
    data = (tars / "00001.tar").read_bytes()
    (tars / "00001.tar").write_bytes(data[:3000])
    found = contents(spec(tmp_path, "webdataset", "tars"))
    assert found[:3] == ALL[:3] and found[3][1].startswith("rejected: damaged tar, some of its images are lost: ")


def test_nothing_in_a_tar_is_lost(tmp_path):
    """A name is a key up to its first dot; a hard link has no bytes of its own."""
    (tmp_path / "raw").mkdir()
    red, blue = png("red"), png("blue")
    members = {"a.depth.png": blue, "a.png": red, "a.TXT": b"one", "b.1.png": red, "b.1.txt": b"x", "b.2.png": blue}
    members |= {"c.jpg": red, "c.png": blue, "c.txt": b"x", "d.cr2": b"raw", "d.txt": b"x", "e.txt": b"x", "f.npy": b""}
    with tarfile.open(tmp_path / "raw" / "x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("e.png")
        info.type, info.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(info)
    source = spec(tmp_path, "webdataset", "raw")
    several = "rejected: 2 images of one key, which is a name up to its first dot"
    names = [item.origin.removeprefix("x.tar/") for item in inputs_of(source)]
    assert names == ["a", "b.1.png", "b.2.png", "c.jpg", "c.png", "d", "e"]
    assert contents(source) == [
        (["one"], "red"),
        *[(["x.tar"], several)] * 4,
        (["x.tar"], "rejected: no image beside the caption, only .cr2, .txt"),
        (["x.tar"], "rejected: no image beside the caption, only .txt"),
    ]


def test_what_is_beside_tars_is_counted(tmp_path, tars):
    for name in ("a.tar.gz", "b.jpg", ".hidden.tar", "README"):
        (tars / name).write_bytes(b"x")
    (tars / "c.tar").mkdir()
    source = spec(tmp_path, "webdataset", "tars")
    assert contents(source) == ALL and source.ignored == {".gz": 1, ".jpg": 1, "without one": 1}
    (tars / "linked").symlink_to("c.tar")
    with pytest.raises(SourceError, match="linked: is a link to a folder, which is not followed"):
        inputs_of(spec(tmp_path, "webdataset", "tars"))


def test_tars_of_one_name_in_several_folders(tmp_path, tars):
    """img2dataset names them all 00000.tar, ...: origins are paths below the common folder."""
    (tmp_path / "two" / "b").mkdir(parents=True)
    (tars / "00000.tar").rename(tmp_path / "two" / "00000.tar")
    (tars / "00001.tar").rename(tmp_path / "two" / "b" / "00000.tar")
    for location in ("two", "two/{.,b}/00000.tar"):
        source = spec(tmp_path, "webdataset", location)
        assert contents(source) == ALL
        origins = [item.origin for item in inputs_of(source)]
        assert len(set(origins)) == 6 and origins[0].startswith("00000.tar/") and origins[3].startswith("b/00000.tar/")


def test_webdataset_by_url(tmp_path, tars, monkeypatch):
    monkeypatch.setenv("TINYFLUX_CACHE", str(tmp_path / "cache"))
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tars))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        for _ in range(2):
            assert contents(spec(tmp_path, "webdataset", url + "/{00000..00001}.tar")) == ALL
        assert asked == ["/00000.tar", "/00000.tar", "/00001.tar", "/00001.tar"]  # each once, after a look at its size
        with pytest.raises(SourceError, match="00002.tar: cannot be downloaded: .*HTTP Error 404"):
            inputs_of(spec(tmp_path, "webdataset", url + "/00002.tar"))
    finally:
        server.shutdown()
        server.server_close()


def test_lists_of_urls(tmp_path, monkeypatch):
    """Images are fetched when they are read, again after an error of the server, and not for ever."""
    monkeypatch.setattr("tinyflux.shards.remote.FIRST_WAIT", 0.01)
    asked, wait = [], Patience.wait

    def impatient(patience, error):
        if patience.tries > 3:
            patience.outage = 0.0
        wait(patience, error)

    monkeypatch.setattr(Patience, "wait", impatient)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status = {"/gone.png": 404, "/broken.png": 500}.get(self.path, 200)
            if self.path == "/shaky.png" and asked.count(self.path) < 3:
                status = 503
            body = png("red")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + (self.path == "/cut.png")))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        names = ["good.png", "shaky.png", "gone.png", "broken.png", "cut.png"]
        (tmp_path / "list.jsonl").write_text(
            "".join(
                json.dumps({"image": f"http://127.0.0.1:{server.server_port}/{name}", "text": name}) + "\n"
                for name in names
            )
        )
        found = {texts[0]: outcome for texts, outcome in contents(spec(tmp_path, "jsonl", "list.jsonl"))}
    finally:
        server.shutdown()
        server.server_close()
    assert found["good.png"] == found["shaky.png"] == "red"
    assert found["gone.png"].startswith("rejected: cannot be downloaded: ") and "HTTP Error 404" in found["gone.png"]
    assert asked.count("/gone.png") == 1 and asked.count("/broken.png") > 3 < asked.count("/cut.png")
    assert "500" in found["broken.png"] and found["cut.png"].startswith("rejected: cannot be downloaded: ")


@pytest.fixture
def rows() -> datasets.Dataset:
    cells = [{"bytes": png(colour), "path": None} for colour in COLOURS]
    captions = [f"a {colour} square" for colour in COLOURS]
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"picture": cells, "text": captions}, features=features)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.parametrize("layout", ["parquet", "arrow", "arrow splits", "parquet streamed"])
def test_hf_layouts(tmp_path, rows, layout):
    folder = tmp_path / "set"
    keys = {"image": "picture"}
    if layout.startswith("parquet"):
        folder.mkdir()
        rows.to_parquet(folder / "train.parquet")
    elif layout == "arrow":
        rows.save_to_disk(folder)
    else:
        datasets.DatasetDict({"train": rows}).save_to_disk(folder)
    if layout.endswith("streamed"):
        keys |= {"streaming": True, "count": 6}
    assert contents(spec(tmp_path, "hf", "set", **keys)) == ALL
    if layout == "parquet streamed":
        source = spec(tmp_path, "hf", "set", **keys)
        inputs = inputs_of(source)
        assert [colour_of(source.read_image(inputs[i])) for i in (4, 5, 1, 0)] == ["black", "orange", "green", "red"]
        source = spec(tmp_path, "hf", "set", **keys | {"count": 7})
        inputs = inputs_of(source)
        with pytest.raises(SourceError, match="count: 7 rows asked for, set ends before row 7"):
            source.read_image(inputs[6])
        with pytest.raises(ValueError, match="streaming needs count"):
            inputs_of(spec(tmp_path, "hf", "set", streaming=True))
    with pytest.raises(SourceError, match=r"image: no column 'image'; .* has picture, text"):
        inputs_of(spec(tmp_path, "hf", "set"))
    bare = rows.cast_column("picture", datasets.Image(decode=False))
    binary = datasets.Dataset.from_dict({"picture": [cell["bytes"] for cell in bare["picture"]], "text": rows["text"]})
    (tmp_path / "raw").mkdir()
    binary.to_parquet(tmp_path / "raw" / "train.parquet")
    assert contents(spec(tmp_path, "hf", "raw", image="picture")) == ALL
    with pytest.raises(SourceError, match="image: column 'text' is .*string.*, must be an Image or binary"):
        inputs_of(spec(tmp_path, "hf", "set", image="text", caption=["picture"]))


def test_hf_cells_without_an_image(tmp_path):
    cells = [{"bytes": png("red"), "path": None}, {"bytes": None, "path": None}, None, {"bytes": b"", "path": None}]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = pyarrow.table({"image": pyarrow.array(cells, kind), "text": list("abcd")}, features.arrow_schema)
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    found = contents(spec(tmp_path, "hf", "set"))
    missing = "rejected: missing image"
    assert found == [(["a"], "red"), (["b"], missing), (["c"], missing), (["d"], UNREADABLE)]


@pytest.mark.parametrize(
    "column, kind", [([datetime.date(2020, 1, 1)], "date32"), ([b"x"], "binary"), ([[{"en": "x"}]], "string")]
)
def test_hf_captions_that_are_no_texts(tmp_path, column, kind):
    (tmp_path / "set").mkdir()
    table = pyarrow.table({"image": [png("red")], "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    with pytest.raises(SourceError, match=f"caption: column 'text' is .*{kind}.*, must be text"):
        inputs_of(spec(tmp_path, "hf", "set"))


def test_hf_says_why_it_cannot_be_loaded(tmp_path):
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "set" / "a.parquet")
    (tmp_path / "set" / "b.parquet").write_bytes(b"PAR1 junk PAR1")
    with pytest.raises(SourceError, match="(?i)cannot be loaded as a dataset: .*: .*parquet"):
        inputs_of(spec(tmp_path, "hf", "set"))


def test_hf_stamps_see_another_image(tmp_path):
    """The captions are the same."""
    (tmp_path / "set").mkdir()
    stamps = []
    for second, colour in enumerate(("red", "red", "blue")):
        path = tmp_path / "set" / "train.parquet"
        if second != 1:
            pyarrow.parquet.write_table(pyarrow.table({"image": [png(colour)], "text": ["x"]}), path)
            os.utime(path, (second, second))
        stamps.append([item.stamp for item in inputs_of(spec(tmp_path, "hf", "set"))])
    assert stamps[0] == stamps[1] != stamps[2]


def test_hf_imagefolder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for i, colour in enumerate(COLOURS):
            (folder / f"{i}.png").write_bytes(png(colour))
            file.write(json.dumps({"file_name": f"{i}.png", "text": f"a {colour} square"}) + "\n")
    assert contents(spec(tmp_path, "hf", "images")) == ALL
    assert contents(spec(tmp_path, "imagefolder", "images")) == ALL
    with pytest.raises(SourceError, match="cannot be loaded as a dataset"):
        inputs_of(spec(tmp_path, "hf", os.fspath(tmp_path / "nothing")))
