"""A loopback Hugging Face Hub of dataset and model repos, with commits and downloads, for the real client.

Shards, pictures and models' weights are stored as LFS objects, as on the Hub; a commit has all files of the repo.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from urllib.parse import unquote

from huggingface_hub import RepoCard

TOKEN = "hf_loopback"


class DatasetHub(ThreadingHTTPServer):
    """`repos[name]` is the list of its commits, each {path: bytes}; `lfs` the objects by SHA-256, in order of arrival.

    `fail_after`: how many more LFS objects are taken before the hub refuses them; `fail_commits`: how many commits get
    a 500 from now on.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.lfs: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.served: list[tuple[str, str]] = []  # (commit, path) of every file that was read
        self.fail_after = 1 << 30
        self.fail_commits = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1]


def commit_id(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith((".tar", ".jpg")) or path.startswith("checkpoint_runs/") and path.endswith(".safetensors")


def entry(path: str, data: bytes) -> dict:
    info = {"type": "file", "path": path, "size": len(data), "rfilename": path}
    info["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if is_lfs(path):
        info["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return info


def yaml_faults(card: str) -> list[str]:
    """Faults in a card's metadata, by some of the Hub's rules."""
    data = RepoCard(card, ignore_metadata_errors=True).data.to_dict()
    sizes = {f"{a}<n<{b}" for a, b in pairwise(("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"))}
    rules = {
        "license": lambda value: isinstance(value, str) and re.fullmatch(r"[a-z0-9.-]+", value),
        "size_categories": lambda values: set(values) <= sizes | {"n<1K", "n>1T"},
        "task_categories": lambda values: all(re.fullmatch("[a-z0-9-]+", value) for value in values),
        "tags": lambda values: all(isinstance(value, str) for value in values),
        "pipeline_tag": lambda value: value == "text-to-image",
        "library_name": lambda value: re.fullmatch(r"[\w.-]+", value),
        "base_model": lambda values: all(re.fullmatch(r"[\w.-]+/[\w.-]+", value) for value in values),
        "datasets": lambda values: all(re.fullmatch(r"[\w.-]+/[\w.-]+", value) for value in values),
        "widget": lambda values: all(value["text"] and not value["output"]["url"].startswith("/") for value in values),
        "configs": lambda values: all(set(value) == {"config_name", "data_files"} for value in values),
    }
    return [f"{key}: {data[key]!r} is not valid" for key, rule in rules.items() if key in data and not rule(data[key])]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DatasetHub

    def log_message(self, *_):
        pass

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self) -> bool:
        """Reading a private repo, and all writing, needs the token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or an answer with the Hub's error."""
        commits = self.server.repos.get(repo)
        if commits is None or (repo in self.server.private and not self.allowed()):
            return self.send(401 if commits else 404, b"", X_Error_Code="RepoNotFound")
        ids = [commit_id(repo, i) for i in range(len(commits))]
        if revision in ("main", *ids):
            number = len(ids) - 1 if revision == "main" else ids.index(revision)
            return ids[number], commits[number]
        return self.send(404, b"", X_Error_Code="RevisionNotFound")

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        if match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if found := self.find(match[1], match[2] or "main"):
                siblings = [{"rfilename": name} for name in found[1]]
                private = match[1] in self.server.private
                self.json({"id": match[1], "sha": found[0], "private": private, "siblings": siblings, "tags": []})
        elif match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            if found := self.find(match[1], match[2]):
                self.tree(found[1], match[3], "recursive=true" in self.path.lower())
        elif match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            if found := self.find(match[1], match[2]):
                self.file(*found, match[3])
        else:
            self.send(404)

    do_HEAD = do_GET

    def tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        prefix = folder and f"{folder}/"
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        folders = {prefix + path[len(prefix) :].rpartition("/")[0] for path in inside if "/" in path[len(prefix) :]}
        shown = {path: data for path, data in inside.items() if recursive or "/" not in path[len(prefix) :]}
        if folder and not inside:
            return self.send(404, b"", X_Error_Code="EntryNotFound")
        return self.json(
            [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
            + [entry(path, data) for path, data in sorted(shown.items())]
        )

    def file(self, commit: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        self.server.served.append((commit, path))
        data, status = files[path], 200
        headers = {"X_Repo_Commit": commit, "ETag": f'"{entry(path, data)["oid"]}"', "Accept_Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            status, headers["Content_Range"] = 206, f"bytes {start}-{end}/{len(data)}"
            data = data[start : end + 1]
        return self.send(status, data, **headers)

    def do_PUT(self):
        data, oid = self.body(), self.path.rpartition("/")[2]
        with self.server.lock:
            self.server.fail_after -= 1
            full = self.server.fail_after < 0
        if full:
            return self.send(400, b"the disk of the hub is full")
        if hashlib.sha256(data).hexdigest() != oid:
            return self.send(422)
        self.server.lfs[oid] = data
        return self.send(200)

    def do_POST(self):
        data, path = self.body(), unquote(self.path.partition("?")[0])
        if path == "/api/validate-yaml":
            errors = [{"message": fault} for fault in yaml_faults(json.loads(data)["content"])]
            return self.send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())
        if match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            if found := self.find(match[1], match[2]):
                self.paths_info(data, found[1])
            return None
        if not self.allowed():
            return self.send(401, b"Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(data))
        if match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/(preupload|commit)/main", path):
            if match[1] not in self.server.repos:
                return self.send(404, b"", X_Error_Code="RepoNotFound")
            if match[2] == "preupload":
                return self.preupload(json.loads(data))
            if self.server.fail_commits > 0:
                self.server.fail_commits -= 1
                return self.send(500, b"the hub is out of order")
            return self.commit(match[1], data)
        return self.send(404)

    def paths_info(self, data: bytes, files: dict[str, bytes]) -> None:
        if data.startswith(b"{"):
            asked = json.loads(data)["paths"]
        else:
            asked = [unquote(part.partition("=")[2].replace("+", " ")) for part in data.decode().split("&")]
        found = [entry(name, files[name]) for name in asked if name in files]
        folders = [name for name in asked if any(path.startswith(f"{name}/") for path in files)]
        self.json(found + [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders])

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.url}/datasets/{name}", "name": name}
        if name in self.server.repos:
            return self.json({"error": "You already created this dataset repo", **url}, 409)
        self.server.repos[name] = [{".gitattributes": b"*.tar filter=lfs diff=lfs merge=lfs -text\n"}]
        if asked.get("visibility") == "private" or asked.get("private"):
            self.server.private.add(name)
        return self.json(url)

    def preupload(self, asked: dict) -> None:
        modes = [{"path": f["path"], "uploadMode": "lfs" if is_lfs(f["path"]) else "regular"} for f in asked["files"]]
        self.json({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})

    def batch(self, asked: dict) -> None:
        objects = []
        for item in asked["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.lfs:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, data: bytes) -> None:
        files = dict(self.server.files(repo))
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repos[repo].append(files)
        oid = commit_id(repo, len(self.server.repos[repo]) - 1)
        self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/datasets/{repo}/commit/{oid}"})


@contextmanager
def dataset_hub():
    """A running hub."""
    hub = DatasetHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(timeout=5)
