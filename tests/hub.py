"""A loopback Hugging Face Hub of model repositories, read by the real client."""

import hashlib
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants
from transformers.utils.hub import hf_api


class Hub(ThreadingHTTPServer):
    """`repos[name][revision]` is a folder; a revision is a branch here and its commit is a hash of the name."""

    def __init__(self, repos: dict[str, dict[str, Path]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.gated: set[str] = set()
        self.fetched: list[str] = []  # USER/REPO/FILE
        self.faults: dict[str, tuple[int, bytes, dict[str, str]]] = {}  # by file: what is answered in its place

    def find(self, repo: str, revision: str) -> tuple[str, Path] | None:
        for branch, folder in self.repos.get(repo, {}).items():
            commit = hashlib.sha1(branch.encode()).hexdigest()
            if revision in (branch, commit):
                return commit, folder
        return None


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, revision, file = "/".join(parts[2:4]), (parts[5:] or ["main"])[0], None
        elif parts[2:3] == ["resolve"]:
            repo, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        else:
            return self.answer(404, b"", {})
        found = self.server.find(repo, revision)
        if found is None:
            code = "RevisionNotFound" if repo in self.server.repos else "RepoNotFound"
            return self.answer(404, b"", {"X-Error-Code": code})
        commit, folder = found
        if parts[4:5] == ["tree"]:  # of a folder: transformers asks for one that no repo here has
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if file and repo in self.server.gated:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if file is None:
            names = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
            return self.answer(200, json.dumps({"id": repo, "sha": commit, "siblings": names}).encode(), {})
        if not (folder / file).is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if fault := self.server.faults.get(file):
            return self.answer(*fault)
        path = folder / file
        size = path.stat().st_size
        tag = hashlib.sha1(path.read_bytes() if size < 1 << 24 else f"{path} {size}".encode()).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "Content-Length": str(size)}
        if self.command == "HEAD":
            return self.answer(200, b"", headers)
        self.server.fetched.append(f"{repo}/{file}")
        self.answer(200, b"", headers, body_follows=True)
        with path.open("rb") as content:
            shutil.copyfileobj(content, self.wfile, 1 << 20)

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str], body_follows: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and not body_follows:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serve(repos: dict[str, dict[str, Path]], cache: Path, monkeypatch):
    """The hub, running, as the client's endpoint, with an empty cache."""
    with Hub(repos) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(hf_api(), "endpoint", url)  # transformers keeps one client for good
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield hub
        hub.shutdown()
