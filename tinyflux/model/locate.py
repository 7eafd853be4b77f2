"""Find a checkpoint's file in a folder, a run or a Hub repo."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import httpx

from tinyflux.model.dcp import METADATA, read_metadata, step_in, step_of

log = logging.getLogger(__name__)

REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<folder>[\w.-]+(/[\w.-]+)*)/?)?")


class CheckpointError(ValueError):
    """A file is not a complete checkpoint of this network; the message names the file and the reason."""


def pick_weights(names: Iterable[str], use_ema: bool) -> str | None:
    """The file to load from a folder: model or ema, else the newest step, else the best, else the only file, else None.

    Weights of the requested kind are preferred; if there are only others, they are used with a warning.
    """
    ranked = []
    for name in names:
        found = re.fullmatch(r"(?:(model)|(ema)|step_(\d+)|best|(.+?))(_ema)?\.(safetensors|pt)", name)
        if found:
            fixed, ema, step, other, suffix, kind = found.groups()
            is_ema = kind == "safetensors" and bool(ema or suffix)  # a .pt holds both
            order = 3 if fixed or ema else 2 if step else 0 if other else 1
            wanted = kind == "pt" or is_ema == use_ema
            ranked.append((wanted, kind == "safetensors", order, int(step or 0), name))
    if not ranked:
        return None
    ranked.sort()
    wanted, *rank, name = ranked[-1]
    if len(ranked) > 1 and ranked[-2][:-1] == (wanted, *rank):
        raise CheckpointError(f"both {name} and {ranked[-2][-1]} match: name one of them")
    if not wanted:
        log.warning("no %s weights here: loading %s", "averaged (EMA)" if use_ema else "trained", name)
    return name


def locate(source: str | Path, use_ema: bool, revision: str | None = None) -> tuple[Path, Path | None]:
    """The weights file and its config.json (or None) of a file, a directory or `user/repo[:sub/folder]`.

    For a run's checkpoint folder, `checkpoints/step_N`, the folder itself is returned; also for a `step_N.pt` or
    `best.pt` that was not written.
    """
    path = Path(source)
    if path.suffix == ".pt" and not path.exists():
        path = _folder_of(path) or path
    if (path / METADATA).is_file():
        return path, path.with_name("config.json") if path.with_name("config.json").is_file() else None
    if path.is_dir():
        if (path / ".metadata").is_file() or any(path.glob("*.distcp")):
            raise CheckpointError(f"{path}: {METADATA} is missing: the save was interrupted; use another checkpoint")
        for folder in (path, path / "checkpoints"):
            names = [entry.name for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []
            if name := pick_weights(names, use_ema):
                path = folder / name
                break
        else:
            raise FileNotFoundError(f"{path}: no .safetensors or .pt weights in this folder")
    if path.is_file():
        folders = [path.parent, path.parent.parent] if path.parent.name == "checkpoints" else [path.parent]
        return path, next((f / "config.json" for f in folders if (f / "config.json").is_file()), None)
    match = REPO.fullmatch(str(source))
    known = [f"{folder}: {', '.join(names)}" for folder in (path.parent, path.parent / "checkpoints")
             if (names := _checkpoints(folder))]  # fmt: skip
    if known:
        raise FileNotFoundError(f"{source}: no such checkpoint; existing ones are in {'; in '.join(known)}")
    if path.suffix in (".safetensors", ".pt") or not match:
        raise FileNotFoundError(f"{source}: no such file or directory, and not of the form user/repo[:sub/folder]")
    return _locate_on_hub(match["repo"], match["folder"] or "", use_ema, revision)


def _folder_of(path: Path) -> Path | None:
    """The checkpoint folder of a `step_N.pt` or `best.pt` that was not written."""
    for folder in sorted(path.parent.glob("step_*"), key=step_of, reverse=True):
        if step_of(folder) >= 0 and (folder / METADATA).is_file():
            is_best = path.stem == "best" and "best" in read_metadata(folder).get("reasons", ())
            if is_best or path.stem == folder.name:
                return folder
    return None


def _checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, by step: complete checkpoint folders and weights files."""
    if not folder.is_dir():
        return []
    names = [
        path.name
        for path in folder.iterdir()
        if (path / METADATA).is_file() or (path.suffix in (".safetensors", ".pt") and path.name[0] != ".")
    ]
    return sorted(names, key=lambda name: (step_in(name) or 0, name))


def find_training_config(source: str | Path, use_ema: bool = True, revision: str | None = None) -> Path | None:
    """The training_config.json of a checkpoint's run, None if there is none. Raises as `locate`."""
    weights, _ = locate(source, use_ema, revision)
    for folder in weights.parents[:2]:
        if (path := folder / "training_config.json").is_file():
            return path
    if Path(source).exists() or not (match := REPO.fullmatch(str(source))):
        return None
    try:  # from the commit of the weights
        commit = weights.parents[len(PurePosixPath(match["folder"] or "").parts)].name
        name = str(PurePosixPath(match["folder"] or "", "training_config.json"))
        return Path(hf_hub_download(match["repo"], name, revision=commit))
    except EntryNotFoundError:
        return None


def _locate_on_hub(repo: str, folder: str, use_ema: bool, revision: str | None) -> tuple[Path, Path | None]:
    try:
        if is_offline_mode():
            root = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            paths = [PurePosixPath(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        else:
            paths = [PurePosixPath(file.rfilename) for file in HfApi().model_info(repo, revision=revision).siblings]
    except httpx.TransportError as error:
        raise ConnectionError(
            f"{repo}: no answer from the Hub ({error}); HF_HUB_OFFLINE=1 loads a cached copy"
        ) from error
    name = pick_weights([path.name for path in paths if path.parent == PurePosixPath(folder)], use_ema)
    if name is None:
        where = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(f"{repo}{folder and ':' + folder} has no .safetensors or .pt weights{where}")
    weights = PurePosixPath(folder, name)
    config = next((p / "config.json" for p in weights.parents if p / "config.json" in paths), None)
    fetched = Path(hf_hub_download(repo, str(weights), revision=revision))
    commit = fetched.parents[len(weights.parts) - 1].name
    log.info("loading %s of %s at revision %s", weights, repo, commit)
    # the config from the same commit, so that a push in between cannot mix two models
    return fetched, Path(hf_hub_download(repo, str(config), revision=commit)) if config else None
