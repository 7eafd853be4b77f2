"""Published frozen models: their place (a Hub repo at a resolved commit, or local files), and how to load them."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@dataclass(frozen=True)
class Pretrained:
    """A model's place: `at` is a Hub repo or, with `local`, a folder. `file` is a single weights file in it."""

    at: str
    subfolder: str = ""
    file: str = ""
    revision: str | None = None
    local: bool = False

    def __str__(self) -> str:
        path = "/".join(part for part in (self.subfolder, self.file) if part)
        if self.local:
            return str(Path(self.at, path))
        return self.at + (f":{path}" if path else "") + (f" at {self.revision}" if self.revision else "")

    @classmethod
    def parse(cls, source: str | Path, name: str) -> "Pretrained":
        """From a folder with the model (or a subfolder `name` that has it), a file, or `user/repo[:sub/folder]`."""
        path = Path(source)
        if path.is_dir():
            inside = (path / name / "config.json").is_file() and not (path / "config.json").is_file()
            return cls(str(path / name if inside else path), local=True)
        if path.is_file():
            return cls(str(path.parent), file=path.name, local=True)
        repo, _, folder = str(source).partition(":")
        if repo.count("/") != 1 or path.is_absolute() or path.suffix == ".safetensors":
            raise FileNotFoundError(f"{name}: {source} is no file or folder and not of the form user/repo[:sub/folder]")
        return cls(repo, folder)

    def resolve(self, probe: str = "config.json") -> "Pretrained":
        """The same place with its revision resolved to a commit. Downloads `probe` to check that it is readable.

        Raises FileNotFoundError, PermissionError (gated) or ConnectionError, with what to do.
        """
        if self.local:
            if not Path(self.at, self.subfolder, self.file or probe).is_file():
                raise FileNotFoundError(f"{self} has no {self.file or probe}")
            return self
        name = self._name(self.file or probe)
        with _explained(self, name):
            # by the revision's name, not its commit, so that the cache can resolve the name offline
            path = Path(hf_hub_download(self.at, name, revision=self.revision))
        return replace(self, revision=path.parents[name.count("/")].name)

    def has(self, name: str) -> bool:
        """Whether the place has a file; downloads it. Raises as `resolve`, except for a missing file."""
        if self.local:
            return Path(self.at, self.subfolder, name).is_file()
        try:
            with _explained(self, self._name(name)):
                hf_hub_download(self.at, self._name(name), revision=self.revision)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return False
            raise
        return True

    def path(self) -> Path:
        """The single file, downloaded if it is on the Hub."""
        name = self._name(self.file)
        return Path(self.at, name) if self.local else Path(hf_hub_download(self.at, name, revision=self.revision))

    def _name(self, file: str) -> str:
        return f"{self.subfolder}/{file}" if self.subfolder else file

    def arguments(self) -> dict:
        """Keyword arguments for `from_pretrained`."""
        if self.local:
            return {"pretrained_model_name_or_path": str(Path(self.at, self.subfolder)), "local_files_only": True}
        return {"pretrained_model_name_or_path": self.at, "subfolder": self.subfolder, "revision": self.revision}

    def identity(self) -> dict[str, str]:
        """The model's identity: repo and commit, or the sha256 of the local files."""
        if not self.local:
            place = {"subfolder": self.subfolder, "file": self.file}
            return {"repo": self.at, "revision": str(self.revision)} | {k: v for k, v in place.items() if v}
        folder = Path(self.at, self.subfolder)
        files = [folder / self.file] if self.file else sorted(
            path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt", ".model")
        )  # fmt: skip
        total = hashlib.sha256()
        for path in files:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{digest}  {path.name}\n".encode())
        return {"sha256": total.hexdigest()}


@contextmanager
def _explained(place: Pretrained, name: str) -> Iterator[None]:
    """Turn the Hub's errors into messages that say what to do."""
    where, revision = place.at, place.revision or "main"
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{where} is gated: accept its terms at https://huggingface.co/{where}, then set HF_TOKEN or run "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"the Hub has no model repo {where}, or it is private: is HF_TOKEN set?") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"no answer from the Hub ({error.__cause__})"
        raise ConnectionError(
            f"{where}: {reason}, and {name} of revision {revision} is not in the cache; go online once to fetch it, "
            'give a local folder, or use the offline zoo (zoo="tiny")'
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{where} has no file {name} at revision {revision}") from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{where} is neither a folder here nor a possible name of a Hub repo") from error


@contextmanager
def _readable(place: Pretrained) -> Iterator[None]:
    """Raises RuntimeError with the model that a library could not load, and the reason."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # damaged files: each library and version raises something else, even plain Exception
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RuntimeError(
            f"{place}: its files cannot be loaded ({why}). If their download was interrupted, remove "
            f"{'them' if place.local else 'the repo from the cache (hf cache)'} and run again"
        ) from error


TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
# while they build a model, diffusers and transformers change torch for the whole process, such as register_parameter of
# all modules; if two threads did so at once, the change could stay
_BUILDING = threading.Lock()
SMALLEST_VOCABULARY = 0.9  # of the model's, because models round up their vocabulary (T5: by 28 to 32,128)


def load_pretrained(kind: type, place: Pretrained, **options):
    """`kind.from_pretrained`. Raises ValueError for missing weights, which it would initialise randomly."""
    from diffusers import ModelMixin
    from diffusers.utils import is_accelerate_available
    from transformers.utils import logging

    weights = DIFFUSERS_WEIGHTS if issubclass(kind, ModelMixin) else TRANSFORMERS_WEIGHTS
    if options.get("use_safetensors"):
        weights = [name for name in weights if not name.endswith(".bin")]
    if variant := options.get("variant"):  # a word before the suffix, such as fp16
        weights = [f"{stem}.{variant}.{suffix}" for stem, _, suffix in (name.rpartition(".") for name in weights)]
    if not any(place.has(name) for name in weights):  # transformers also says so if the Hub does not answer
        raise FileNotFoundError(f"{place} has no weights: one of {', '.join(weights)} is needed")
    if issubclass(kind, ModelMixin):  # otherwise diffusers suggests installing accelerate for each model
        options = {**options, "low_cpu_mem_usage": is_accelerate_available()}
    with _BUILDING:
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # transformers prints a table of the weights that this part does not use
        try:
            with _readable(place):
                model, info = kind.from_pretrained(**place.arguments(), output_loading_info=True, **options)
        finally:
            logging.set_verbosity(level)
    _refuse(place, kind, [f"missing {key}" for key in info["missing_keys"]])
    return model


def _refuse(place: Pretrained | Path, kind: type, faults: list[str]) -> None:
    """Raises ValueError with the list of faults, if there are any."""
    if faults:
        shown = "\n  ".join(sorted(faults)[:20])
        raise ValueError(f"{place}: {len(faults)} weights do not fit the config of its {kind.__name__}:\n  {shown}")


def load_tokenizer(place: Pretrained, vocab_size: int):
    """The tokenizer of a model with `vocab_size` embeddings.

    If the files are missing, transformers 5 builds an empty one, to which every word is unknown. Raises
    FileNotFoundError or ConnectionError for missing files, ValueError if the vocabulary is not the model's.
    """
    from transformers import AutoTokenizer

    if not any(place.has(name) for name in TOKENIZERS):
        raise FileNotFoundError(f"{place} has no tokenizer: one of {', '.join(TOKENIZERS)} is needed")
    with _readable(place):
        tokenizer = AutoTokenizer.from_pretrained(**place.arguments(), trust_remote_code=False)
    if not SMALLEST_VOCABULARY * vocab_size <= len(tokenizer) <= vocab_size:
        known = f"its tokenizer knows {len(tokenizer)} tokens, its model {vocab_size}"
        raise ValueError(f"{place}: {known}: files are missing, or belong to another model")
    return tokenizer


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def load_unet(path: Path, config: Pretrained, dtype, skipped: tuple[str, ...] = ()):
    """A UNet from a weights file, strictly. Raises ValueError with all missing, unexpected and mis-shaped entries.

    skipped: parts whose weights are checked but not loaded; they stay on the meta device.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors import SafetensorError, safe_open

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(**config.arguments()))
    expected = {key: list(value.shape) for key, value in unet.state_dict().items()}
    try:
        with safe_open(path, "pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}
            faults = [f"missing {key}" for key in expected.keys() - found.keys()]
            faults += [f"unexpected {key}" for key in found.keys() - expected.keys()]
            faults += [
                f"{key} is {found[key]} instead of {expected[key]}"
                for key in expected.keys() & found.keys()
                if found[key] != expected[key]
            ]
            _refuse(path, UNet2DConditionModel, faults)
            wanted = (key for key in found if key.partition(".")[0] not in skipped)
            state = {key: file.get_tensor(key).to(dtype) for key in wanted}  # one by one: not twice in memory
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); delete it to download it again") from error
    unet.load_state_dict(state, assign=True, strict=not skipped)
    return unet
