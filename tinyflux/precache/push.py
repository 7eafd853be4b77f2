"""Push a source to a dataset repo on the Hugging Face Hub, to a folder of its name, with a dataset card."""

import hashlib
import logging
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from tinyflux.precache.card import PREVIEW, contact_sheet, render
from tinyflux.shards.index import FILE as INDEX
from tinyflux.shards.manifest import Manifest, check_name
from tinyflux.shards.source import open_source
from tinyflux.util import files

log = logging.getLogger(__name__)

COMMIT = 100  # new shards per commit


class Pushed(NamedTuple):
    """What a push did: shards of the source, shards sent, files removed, and the URL for training."""

    shards: int
    sent: int
    removed: int
    url: str


def same(remote: RepoFile | None, size: int, sha256: str, data: bytes | None = None) -> bool:
    """Whether the repo's file has this content, by its LFS hash or git hash."""
    if remote is None or remote.size != size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == sha256
    return data is not None and remote.blob_id == hashlib.sha1(b"blob %d\0" % size + data).hexdigest()


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises FileNotFoundError or ValueError if a shard is missing or has not the size in the manifest."""
    for shard in manifest.shards:
        path = folder / shard.path
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing, and the manifest lists it; see python -m sharding.verify {folder}"
            )
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}: nothing was pushed"
            )


def place_of(folder: Path, manifest: Manifest) -> str:
    """The folder of a source in the repo: the source's name, or for an overlay the name of its local folder."""
    return manifest.source if manifest.base is None else check_name(folder.resolve().name)


def check_base(repo: "Repo", place: str, manifest: Manifest) -> None:
    """Raises ValueError if the repo lacks the base of an overlay."""
    if manifest.base is None or "://" in manifest.base.location:
        return
    path = f"{_path_of_base(place, manifest)}/manifest.json"
    if path not in repo.files or files.sha256(repo.file(path)) != manifest.base.sha256:
        raise ValueError(
            f"{repo.name} has no {path}, or not the one that {place} was built for: push the base first, from a folder "
            "of the same name beside the overlay's"
        )


def _path_of_base(place: str, manifest: Manifest) -> str:
    return posixpath.normpath(f"{place}/{manifest.base.location}")


def check_hash(path: Path, sha256: str) -> None:
    """Raises ValueError if a shard's content does not match the manifest."""
    if files.sha256(path) != sha256:
        raise ValueError(f"{path}: its content is not what the manifest says; see python -m sharding.verify --deep")


def small_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The manifest, the index and the empty prompt. Raises ValueError if a build has replaced one since."""
    sums = {"manifest.json": manifest.sha256, INDEX: manifest.index.digest["sha256"]}
    if manifest.null_sha256:
        sums["null.safetensors"] = manifest.null_sha256
    found = {name: (folder / name).read_bytes() for name in sums}
    for name, data in found.items():
        if hashlib.sha256(data).hexdigest() != sums[name]:
            raise ValueError(f"{folder / name}: was replaced during the push; run the same command again")
    return found


class Repo:
    """A dataset repo on the Hub: its content, and commits to it."""

    def __init__(self, api: HfApi, name: str):
        self.api, self.name = api, name
        entries = api.list_repo_tree(name, repo_type="dataset", recursive=True)
        self.files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def text(self, path: str) -> str:
        """A small file's text, "" if it does not exist."""
        if path not in self.files:
            return ""
        return self.file(path).read_text(encoding="utf-8")

    def file(self, path: str) -> Path:
        """Download a file."""
        return Path(self.api.hf_hub_download(self.name, path, repo_type="dataset"))

    def manifests(self) -> dict[str, Manifest]:
        """The manifests of the repo's sources by folder."""
        folders = [
            path.partition("/")[0] for path in self.files if path.endswith("/manifest.json") and path.count("/") == 1
        ]
        found = {}
        for folder in folders:
            try:
                text, where = self.text(f"{folder}/manifest.json").encode(), f"{self.name}/{folder}/manifest.json"
                found[folder] = Manifest.from_parts(text, self.file(f"{folder}/{INDEX}"), where)
            except (ValueError, EntryNotFoundError) as error:
                log.warning("%s is left out of the card: %s", folder, error)
        return found

    def commit(self, message: str, operations: list) -> None:
        if operations:
            self.api.create_commit(self.name, operations, commit_message=message, repo_type="dataset")


def push(folder: Path, name: str, private: bool, *, rejected: bool = False, license_id: str | None = None) -> Pushed:
    """Push a source or an overlay. Raises ValueError, and OSError for errors of the Hub, with what to do."""
    with _hub_errors(name):
        return _push(folder, name, private, rejected, license_id)


def _push(folder: Path, name: str, private: bool, rejected: bool, license_id: str | None) -> Pushed:
    manifest = Manifest.load(folder)
    source = open_source(folder)
    check_files(folder, manifest)
    api = HfApi()
    api.create_repo(name, repo_type="dataset", private=True if private else None, exist_ok=True)
    if private and not api.dataset_info(name).private:
        raise ValueError(f"{name} is a public repo, but --private was given: change it on the Hub, or use another repo")
    repo, place = Repo(api, name), place_of(folder, manifest)
    check_base(repo, place, manifest)

    changed = [s for s in manifest.shards if not same(repo.files.get(f"{place}/{s.path}"), s.bytes, s.sha256)]
    replaced = {shard.name for shard in changed if f"{place}/{shard.path}" in repo.files}
    bar = tqdm(total=len(manifest.shards), initial=len(manifest.shards) - len(changed), desc=place, unit="shard")
    operations = []
    for shard in sorted(changed, key=lambda shard: shard.name in replaced):
        check_hash(folder / shard.path, shard.sha256)
        operations.append(CommitOperationAdd(f"{place}/{shard.path}", folder / shard.path))
        if len(operations) == COMMIT and shard.name not in replaced:
            repo.commit(f"Add shards of {place}", operations)
            bar.update(len(operations))
            operations = []

    listed = {f"{place}/{shard.path}" for shard in manifest.shards}
    gone = [
        path for path in repo.files if path.startswith(f"{place}/") and path.endswith(".tar") and path not in listed
    ]
    sheet = contact_sheet(source)
    manifests = repo.manifests() | {place: manifest}
    pictured = {other for other in manifests if f"{other}/{PREVIEW}" in repo.files} - {place}
    pictured |= {place} if sheet else set()
    small = {"README.md": render(repo.text("README.md"), name, manifests, pictured, license_id).encode()}
    small |= {f"{place}/{file}": data for file, data in small_files(folder, manifest).items()}
    if sheet:
        small[f"{place}/{PREVIEW}"] = sheet
    if rejected and (folder / "rejected.jsonl").is_file():
        small[f"{place}/rejected.jsonl"] = (folder / "rejected.jsonl").read_bytes()
    sent = len(operations)
    for path, data in small.items():
        if not same(repo.files.get(path), len(data), hashlib.sha256(data).hexdigest(), data):
            operations.append(CommitOperationAdd(path, data))
    operations += [CommitOperationDelete(path) for path in gone]
    repo.commit(f"Add {place}: {manifest.count} samples in {len(manifest.shards)} shards", operations)
    bar.update(sent)
    bar.close()
    for other, overlay in sorted(manifests.items()):
        if overlay.base and _path_of_base(other, overlay) == place and overlay.base.sha256 != manifest.sha256:
            log.warning("%s/%s was built for the old %s and is unreadable: build and push it again", name, other, place)
    return Pushed(len(manifest.shards), len(changed), len(gone), f"hf://datasets/{name}/{place}")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of the Hub into OSErrors that say what to do."""
    try:
        yield
    except HTTPError as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if isinstance(error, GatedRepoError) or status in (401, 403):
            why = f"the Hub refuses it; set HF_TOKEN or run `hf auth login` with a token that may write ({error})"
        elif isinstance(error, RepositoryNotFoundError):
            why = f"the Hub shows no such dataset repo to you ({error})"
        else:
            why = f"{error}\nrun the same command to resume"
        raise OSError(f"{repo}: {why}") from error
