"""Kind "cache": an old cache (encodings.pt, lune.pt, sol.pt) as shards. No models are needed."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import safetensors
import safetensors.torch
from torch import Tensor

from tinyflux.precache.engine import check_tensors
from tinyflux.precache.images import Rejected
from tinyflux.precache.inputs import Input, digest
from tinyflux.precache.ledger import Job
from tinyflux.precache.legacy import OldCache
from tinyflux.precache.readers import folder
from tinyflux.precache.sources import SourceError, SourceSpec
from tinyflux.shards.format import encode_sample, sample_key
from tinyflux.shards.manifest import shard_name
from tinyflux.shards.schema import SCHEMA, Field, fields_at, shape_of
from tinyflux.shards.writer import write_shard


class Converter:
    """Turns the rows of an old cache into shards, without the groups that are not wanted.

    Raises FileNotFoundError, and ValueError where a file of the cache cannot be used.
    """

    def __init__(self, spec: SourceSpec, lune: bool, sol: bool, workers: int):
        self.spec, self.workers = spec, workers
        self.old = OldCache(folder(spec))
        for group, wanted in (("lune", lune), ("sol", sol)):
            for name in () if wanted else SCHEMA[group].fields:
                self.old.tensors.pop(name, None)
        self.fields: dict[str, Field] = self.old.fields
        self.images = self.rejects = 0  # rows done with, and rows left out

    def inputs(self) -> list[Input]:
        """A row each; they are never read as images."""
        shape = [(name, field.dtype, field.shape) for name, field in self.fields.items()]
        rows = [self.old.meta(i, self.spec.name, self.spec.dataset_id) for i in range(self.old.count)]
        return [Input(row["origin"], digest(shape, row["prompts"]), lambda: b"", lambda: []) for row in rows]

    def null(self) -> dict[str, Tensor]:
        """The empty prompt: of the file that the source names, else zeros. Raises SourceError, FileNotFoundError."""
        if self.spec.null is None:
            return self.old.null()
        path = self.spec.base / self.spec.null
        if not path.is_file():
            raise FileNotFoundError(f"[{self.spec.name}] null: {path}: no such file")
        try:
            null = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise SourceError(f"[{self.spec.name}] null: {path}: not readable: {error}") from error
        for name, zeros in self.old.null().items():
            if name not in null or null[name].shape != zeros.shape:
                found = list(null[name].shape) if name in null else "missing"
                wanted = list(zeros.shape)
                raise SourceError(f"[{self.spec.name}] null: {path}: {name} is {found}, the cache has {wanted}")
        return {name: null[name] for name in self.old.null()}

    def run(self, job: Job, shards: Iterable[int], inputs: list[Input | None], progress: Callable[[], None]) -> None:
        """Write these shards. `progress` is called after each."""
        with ThreadPoolExecutor(self.workers, "compress") as pool:
            for k in shards:
                rows = range(k * job.shard_size, min((k + 1) * job.shard_size, len(inputs)))
                rows = [i for i in rows if inputs[i] is not None]
                results = list(zip(rows, pool.map(self._sample, rows, [inputs[i] for i in rows]), strict=True))
                rejected = [
                    {"index": i, "origin": inputs[i].origin, "reason": str(result)}
                    for i, result in results
                    if isinstance(result, Rejected)
                ]
                samples = [result for _, result in results if not isinstance(result, Rejected)]
                shard = write_shard(job.out / shard_name(job.source, k), samples) if samples else None
                job.note(k, shard, self.fields if samples else {}, rejected)
                self.images, self.rejects = self.images + len(rows), self.rejects + len(rejected)
                progress()

    def _sample(self, index: int, item: Input) -> dict | Rejected:
        row = int(item.origin.rpartition("/")[2])  # --append leaves gaps in the index
        tensors = self.old.row(row)
        try:
            check_tensors(tensors, fields_at(self.fields, shape_of(tensors)))
        except Rejected as reason:
            return reason
        meta = self.old.meta(row, self.spec.name, self.spec.dataset_id) | {"index": index}
        return encode_sample(sample_key(self.spec.dataset_id, index), tensors, meta)
