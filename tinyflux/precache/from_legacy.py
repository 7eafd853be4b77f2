"""The recipe for a legacy cache: its rows become samples unchanged, except for groups that are turned off."""

from collections.abc import Mapping
from functools import partial

import safetensors
import safetensors.torch
from torch import Tensor

from tinyflux.precache.kinds.base import Input, SourceError
from tinyflux.precache.legacy import FILES, PRODUCER
from tinyflux.precache.recipe import Listed
from tinyflux.precache.work import Ready, Task
from tinyflux.shards.format import encode_sample, sample_key
from tinyflux.shards.schema import GROUP_OF


class FromLegacy(Listed):
    """Builds a source of kind "cache"."""

    def asked(self, begun: dict) -> dict:
        config = self.config
        others = {"dtype": "float16", "teacher_input": "image", "estimate": False, "revision": {}}
        if wrong := [name for name, value in others.items() if getattr(config, name) != value]:
            raise ValueError(f"--{wrong[0].replace('_', '-')} does not apply to a legacy cache: leave it out")
        names = ("shard_size", "lune", "sol")
        return {"settings": {"source": self.source.describe()} | {name: getattr(config, name) for name in names}}

    def probe(self) -> None:
        super().probe()
        self.null()

    def load(self, begun: dict) -> dict[str, dict]:
        if self.source.null is None and not self.strict:
            where = self.ledger.out / "null.safetensors"
            print(f"{where} is zeros: the cache has no empty prompt (to give one, set the key null in sources.toml)")
        tensors = self.source.rows.tensors
        for file, wanted in (("lune", self.config.lune), ("sol", self.config.sol)):
            for name in () if wanted else FILES[file]:
                tensors.pop(name, None)
        return {GROUP_OF[name]: PRODUCER for name in tensors}

    def null(self) -> dict[str, Tensor]:
        """The empty prompt from the source's `null` file, else zeros, which the original trainer's text dropout used.
        Raises SourceError, FileNotFoundError."""
        source, zeros = self.source, self.source.rows.null()
        if source.null is None:
            return zeros
        path = source.base / source.null
        if not path.is_file():
            raise FileNotFoundError(f"[{source.name}] null: {path}: no such file")
        try:
            null = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise SourceError(f"[{source.name}] null: {path}: not readable: {error}") from error
        for name, zero in zeros.items():
            if name not in null or null[name].shape != zero.shape:
                found = list(null[name].shape) if name in null else "missing"
                raise SourceError(f"[{source.name}] null: {path}: {name} is {found}, the cache has {list(zero.shape)}")
        return {name: null[name] for name in zeros}

    def task(self, index: int, item: Input, shape: int) -> Task:
        return Task(index, item.origin, partial(self.read, index, item))

    def read(self, index: int, item: Input) -> Ready:
        """Read a row, in a thread."""
        rows = self.source.rows
        return Ready(index, item.origin, prompts=[rows.prompt(item.place)], tensors=rows.row(item.place))

    def encode(self, group: list[list[Ready]]) -> list[Mapping]:
        return [
            {name: [ready.tensors[name] for ready in batch] for name in self.source.rows.tensors} for batch in group
        ]

    def pack(self, ready: Ready, tensors: dict[str, Tensor]) -> dict:
        source = self.source
        meta = {
            "prompts": list(ready.prompts),
            "source": source.name,
            "dataset_id": source.dataset_id,
            "index": ready.index,
            "origin": ready.origin,
        }
        return encode_sample(sample_key(source.dataset_id, ready.index), tensors, meta)
