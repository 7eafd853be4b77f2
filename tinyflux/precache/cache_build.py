"""Shards from what a notebook holds: images and prompts, or an old cache. Listed sources are `sharding.build`'s."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tinyflux.model.zoo import ModelZoo
from tinyflux.precache.extract import by_group, extract, groups_of, load_for, null_embeddings, producer
from tinyflux.precache.images import Picture, Rejected, prepare, preview
from tinyflux.precache.legacy import FINGERPRINT, OldCache
from tinyflux.shards.format import encode_sample, sample_key
from tinyflux.shards.manifest import Manifest, diff_fingerprints, shard_name
from tinyflux.shards.schema import DTYPES, Field, fields_of, grouped
from tinyflux.shards.writer import Shard, write_null, write_shard
from tinyflux.util import rng
from tinyflux.util.buckets import BUCKETS
from tinyflux.util.files import atomic_write

NOTES = ".cache"  # folder beside the shards: config.json, and one file for each finished shard
SHARD_SIZE = 256
WORKERS = min(16, len(os.sched_getaffinity(0)))

_loading = Lock()


class CacheBuild:
    """Builds the shards of images and prompts into a folder; a folder that has some of them gets the others.

    images: PIL images, paths, arrays uint8 [H, W, 3] or tensors [3, H, W] (float in [-1, 1], or uint8); each is cut to
    its central square and resized to the zoo's size. Samples are keyed and batched as `sharding.build` does it.
    Raises ValueError where images and prompts don't go together, an image cannot be read, or the folder was begun
    with something else.
    """

    def __init__(
        self,
        folder: Path,
        zoo: ModelZoo,
        images: Sequence,
        prompts: Sequence[str],
        *,
        name: str,
        dataset_id: int,
        lune: bool,
        sol: bool,
        batch_size: int,
        dtype: torch.dtype,
        teacher_input: str,
        seed: int,
        shard_size: int = SHARD_SIZE,
    ):
        if len(images) != len(prompts) or not len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts: one of each per sample, at least one")
        wrong = next((i for i, text in enumerate(prompts) if not isinstance(text, str)), None)
        if isinstance(prompts, str) or wrong is not None:
            kind = "one text" if wrong is None else f"{type(prompts[wrong]).__name__} at number {wrong}"
            raise ValueError(f"prompts must be a list of texts, not {kind}")
        if str(dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"dtype is {dtype}, must be one of {', '.join(DTYPES)}")
        if min(batch_size, shard_size) < 1:
            raise ValueError(f"batch_size is {batch_size} and shard_size {shard_size}, both must be at least 1")
        shard_name(name, 0)  # refuses a name that is no file name
        self.folder, self.zoo, self.images, self.prompts = Path(folder), zoo, images, prompts
        self.name, self.dataset_id, self.dtype, self.seed = name, dataset_id, dtype, seed
        self.batch_size, self.shard_size = batch_size, shard_size
        self.features = {"lune": lune, "sol": sol, "teacher_input": teacher_input}

    def run(self) -> None:
        """Build what is missing, then write the manifest."""
        notes = self.folder / NOTES
        notes.mkdir(parents=True, exist_ok=True)
        with open(notes / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.folder}: another process builds a cache here") from None
            load_for(self.zoo, groups_of(self.features["lune"], self.features["sol"]))
            fingerprint = producer(self.zoo, self.zoo.image_size, self.dtype, seed=self.seed, **self.features)
            self._begin(fingerprint)
            starts = range(0, len(self.prompts), self.shard_size)
            made = {start: self._finished(start) for start in starts}
            done = sum(note["shard"]["count"] for note in made.values() if note)
            pool = ThreadPoolExecutor(WORKERS, "cache")
            try:
                with tqdm(total=len(self.prompts), initial=done, desc=self.name, unit="image") as bar:
                    for start in starts:
                        made[start] = made[start] or self._build(start, pool, bar)
            finally:
                pool.shutdown(cancel_futures=True)
            fields = {name: Field(f["dtype"], tuple(f["shape"])) for name, f in made[0]["fields"].items()}
            shards = [Shard.from_dict(made[start]["shard"]) for start in starts]
            null = null_embeddings(self.zoo, self.dtype)
            finish_source(self.folder, self.name, self.dataset_id, fields, shards, by_group(fingerprint), null)

    def _begin(self, fingerprint: dict) -> None:
        config = {"name": self.name, "dataset_id": self.dataset_id, "samples": len(self.prompts)}
        config |= {"shard_size": self.shard_size, "batch_size": self.batch_size, "fingerprint": fingerprint}
        path = self.folder / NOTES / "config.json"
        if not path.exists():
            if (self.folder / "manifest.json").exists():
                raise ValueError(f"{self.folder}: holds a source that was not built here; choose another folder")
            atomic_write(path, json.dumps(config, indent=1).encode())
        if differences := diff_fingerprints(json.loads(path.read_bytes()), config):
            lines = "\n  ".join(differences)
            raise ValueError(
                f"{self.folder}: was begun with other settings (there, against those asked for now):\n  {lines}\n"
                "Ask for the same ones, or choose another folder"
            )

    def _note(self, start: int) -> Path:
        return self.folder / NOTES / f"{start // self.shard_size:06d}.json"

    def _finished(self, start: int) -> dict | None:
        """The note of a shard that is finished, if its file is there and its inputs are still the same."""
        if not self._note(start).is_file():
            return None
        note = json.loads(self._note(start).read_bytes())
        file = self.folder / note["shard"]["name"]
        if not (file.is_file() and file.stat().st_size == note["shard"]["bytes"]):
            return None
        if note["inputs"] != self._stamp(start):
            raise ValueError(
                f"{file}: was made of other images or prompts than those from number {start} on; "
                "give the same ones in the same order, or choose another folder"
            )
        return note

    def _stamp(self, start: int) -> str:
        """Changes when the inputs of a shard do, as far as can be seen without decoding images."""
        rows = range(start, min(start + self.shard_size, len(self.prompts)))
        parts = [[self.prompts[i], *_describe(self.images[i])] for i in rows]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _build(self, start: int, pool: ThreadPoolExecutor, bar: tqdm) -> dict:
        """Write a shard and its note."""
        found: dict[str, Field] = {}
        path = self.folder / shard_name(self.name, start // self.shard_size)
        shard = write_shard(path, self._samples(start, pool, bar, found))
        fields = {name: asdict(field) for name, field in found.items()}
        note = {"shard": shard.to_dict(), "fields": fields, "inputs": self._stamp(start)}
        atomic_write(self._note(start), json.dumps(note).encode())
        return json.loads(json.dumps(note))

    def _samples(self, start: int, pool: ThreadPoolExecutor, bar: tqdm, found: dict) -> Iterator[dict]:
        """The shard's samples: images are read ahead, a batch is compressed while the next is encoded."""
        stop = min(start + self.shard_size, len(self.prompts))
        pictures = pool.map(self._picture, range(start, stop))
        compressing: list[Future] = []
        for first in range(start, stop, self.batch_size):
            rows = range(first, min(first + self.batch_size, stop))
            batch = [next(pictures) for _ in rows]
            pixels = torch.from_numpy(np.stack([picture.pixels for picture in batch]))  # [B, H, W, 3]
            seeds = torch.tensor([rng.signed_key(self.seed, self.dataset_id, i) for i in rows])
            tensors = extract(
                self.zoo, pixels, [self.prompts[i] for i in rows], seeds, dtype=self.dtype, **self.features
            )
            found.update(fields_of({name: tensor[0] for name, tensor in tensors.items()}))
            ready = compressing
            compressing = [
                pool.submit(self._encode, i, picture, {name: tensor[row] for name, tensor in tensors.items()})
                for row, (i, picture) in enumerate(zip(rows, batch, strict=True))
            ]
            yield from (future.result() for future in ready)
            bar.update(len(rows))
        yield from (future.result() for future in compressing)

    def _picture(self, i: int) -> Picture:
        try:
            return prepare(_readable(self.images[i]), self.zoo.image_size)
        except (Rejected, OSError, TypeError) as error:
            raise ValueError(f"image {i} of {self.name!r}: {error}") from error

    def _encode(self, i: int, picture: Picture, tensors: dict[str, Tensor]) -> dict:
        image, place = self.images[i], {"size": picture.size, "crop": picture.crop}
        origin = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"{self.name}/{i}"
        meta = {"prompts": [self.prompts[i]], "source": self.name, "dataset_id": self.dataset_id, "index": i} | place
        key = sample_key(self.dataset_id, i)
        return encode_sample(key, tensors, meta | {"origin": origin}, preview(picture.pixels))


def _describe(image) -> list:
    if isinstance(image, (str, os.PathLike)):
        return [os.fspath(image), os.path.getsize(image) if os.path.isfile(image) else None]
    if isinstance(image, Image.Image):
        return [*image.size, image.mode]
    return [str(getattr(image, "dtype", type(image).__name__)), *getattr(image, "shape", ())]


def _readable(image) -> bytes | Image.Image:
    """An image of any accepted kind as `prepare` takes it. Raises TypeError, OSError."""
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    if isinstance(image, Image.Image):
        with _loading:  # one object may stand for several samples, and Pillow loads it in one thread only
            image.load()
        return image
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3:
        if image.is_floating_point():
            if not image.isfinite().all():  # as uint8 it would be a black picture
                raise TypeError("the tensor has NaN or infinity")
            image = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        image = image.permute(1, 2, 0).contiguous().cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    kind = f"{type(image).__name__} {' '.join(map(str, _describe(image)))}"
    raise TypeError(f"{kind} is no PIL image, path, uint8 array [H, W, 3] or tensor [3, H, W] of uint8 or in [-1, 1]")


def finish_source(
    folder: Path,
    name: str,
    dataset_id: int,
    fields: dict[str, Field],
    shards: list[Shard],
    producers: dict[str, dict],
    null: dict[str, Tensor],
) -> None:
    """Write what a source has beside its shards, the manifest last."""
    null_sha256 = write_null(folder, null)
    atomic_write(folder / "rejected.jsonl", b"")
    groups = grouped(fields, BUCKETS, producers)
    Manifest.of(name, dataset_id, groups, shards, null_sha256=null_sha256).save(folder)


def convert(old: OldCache, folder: Path, name: str, dataset_id: int, shard_size: int = SHARD_SIZE) -> None:
    """Write an old cache as a source. Raises ValueError with the key of a sample that has NaN or infinity."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in tqdm(range(0, old.count, shard_size), desc=name, unit="shard"):
        rows = range(start, min(start + shard_size, old.count))
        path = folder / shard_name(name, start // shard_size)
        shards.append(write_shard(path, (old.sample(i, name, dataset_id) for i in rows)))
    finish_source(folder, name, dataset_id, old.fields, shards, by_group(FINGERPRINT), old.null())
