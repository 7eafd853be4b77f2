"""Where a frozen model comes from: a Hub repo at a resolved commit, or a local folder or file, and its identity."""

import hashlib
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
class Origin:
    """A model's place: `at` is a Hub repo or, with `local`, a folder. `file` names a single weights file in it."""

    at: str
    subfolder: str = ""
    file: str = ""
    revision: str | None = None
    local: bool = False

    def __str__(self) -> str:
        place = "/".join(part for part in (self.subfolder, self.file) if part)
        if self.local:
            return str(Path(self.at, place))
        return self.at + (f":{place}" if place else "") + (f" at {self.revision}" if self.revision else "")

    @classmethod
    def parse(cls, source: str | Path, name: str) -> "Origin":
        """A folder with the model (or with a subfolder `name` that has it), a file, or `user/repo[:sub/folder]`."""
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

    def resolve(self, probe: str = "config.json") -> "Origin":
        """The same place with the commit that its revision names. It is readable: `probe` has been fetched from it.

        Errors: FileNotFoundError, PermissionError (gated), ConnectionError; each says what to do.
        """
        if self.local:
            if not Path(self.at, self.subfolder, self.file or probe).is_file():
                raise FileNotFoundError(f"{self} has no {self.file or probe}")
            return self
        name = self._name(self.file or probe)
        with _explained(self, name):
            # by the name of the revision, not by its commit: so the cache knows what the name stood for, offline too
            path = Path(hf_hub_download(self.at, name, revision=self.revision))
        return replace(self, revision=path.parents[name.count("/")].name)

    def path(self) -> Path:
        """The single file, fetched if it is on the Hub."""
        name = self._name(self.file)
        return Path(self.at, name) if self.local else Path(hf_hub_download(self.at, name, revision=self.revision))

    def _name(self, file: str) -> str:
        return f"{self.subfolder}/{file}" if self.subfolder else file

    def pretrained(self) -> dict:
        """Arguments of any `from_pretrained`."""
        if self.local:
            return {"pretrained_model_name_or_path": str(Path(self.at, self.subfolder)), "local_files_only": True}
        return {"pretrained_model_name_or_path": self.at, "subfolder": self.subfolder, "revision": self.revision}

    def identity(self) -> dict[str, str]:
        """What tells this model from another: repo and commit, or the sha256 of the local files."""
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
def _explained(origin: Origin, name: str) -> Iterator[None]:
    """The Hub's errors in words that say what to do."""
    where, revision = origin.at, origin.revision or "main"
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
