"""A loopback HTTP server for a folder, with the part of the Hub's API that its client needs, and with faults."""

import json
import re
import socket
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tinyflux.shards.source import Source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StoreServer(ThreadingHTTPServer):
    """`faults[name]`: faults of the next requests of a file; `bodies` counts answered requests, `sent` the bytes of
    bodies.

    rate: bytes per second of all answers together. latency: seconds before each answer. hold: files that are not
    answered before `held` is set; `holding` is set when one was asked for. login: the required Authorization header.
    port: to restart after an outage.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, root: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.root = Path(root)
        self.sent, self.latency, self.login = 0, 0.0, ""
        self.faults: dict[str, deque] = defaultdict(deque)
        self.bodies: Counter = Counter()
        self.rate: float | None = None
        self.hold: set[str] = set()
        self.held, self.holding = threading.Event(), threading.Event()
        self._line, self._free_at = threading.Lock(), 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def transmit(self, length: int) -> None:
        """Wait as long as `length` bytes need on the line that all answers share."""
        if self.rate is not None:
            with self._line:
                self._free_at = max(self._free_at, time.monotonic()) + length / self.rate
                until = self._free_at
            time.sleep(max(0.0, until - time.monotonic()))

    def handle_error(self, request, client_address):
        """Ignore clients that have gone away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StoreServer

    def log_message(self, *_):
        pass

    def _send(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/paths-info/" in self.path:
            paths = json.loads(body)["paths"]
            self._json([entry for path in paths if (entry := self._entry(path))])
        else:
            self._send(404)

    def _entry(self, path: str):
        file = self.server.root / path
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": "0" * 40}
        return {"type": "file", "path": path, "oid": "0" * 40, "size": file.stat().st_size} if file.is_file() else None

    def do_GET(self):
        path = self.path.partition("?")[0]
        if re.match(r"/api/datasets/[^/]+/[^/]+(/revision/[^/]+)?$", path):
            self._json({"id": "user/repo", "sha": COMMIT, "siblings": []})
        elif match := re.match(r"/api/datasets/[^/]+/[^/]+/tree/[^/]+/?(.*)$", path):
            folder = self.server.root / match[1]
            names = sorted(folder.iterdir()) if folder.is_dir() else []
            self._json([self._entry(str(file.relative_to(self.server.root))) for file in names])
        else:
            self._file(re.sub(rf"^/datasets/[^/]+/[^/]+/resolve/{COMMIT}/", "/", path).lstrip("/"))

    def _file(self, name: str):
        file = self.server.root / name
        if not file.is_file():
            return self._send(404)
        if self.server.login and self.headers.get("Authorization") != self.server.login:
            return self._send(401)
        data, base = file.read_bytes(), file.name
        time.sleep(self.server.latency)
        if base in self.server.hold:
            self.server.holding.set()
            self.server.held.wait()
        faults = self.server.faults[base]
        fault = faults.popleft() if faults and self.command == "GET" else ""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, headers = 200, {}
        if match and fault != "ignore range":
            start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            if start >= len(data):
                return self._send(416)
            status, headers = 206, {"Content_Range": f"bytes {start}-{end}/{len(data)}"}
            data = data[start : end + 1]
        if isinstance(fault, tuple):
            return self._send(fault[0], b"", **fault[1])
        if fault == "cut":  # announces the full length, but stops in the middle
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        if fault in ("no length", "trickle"):  # ends when the connection does, in the middle; a byte at a time
            self.send_response(status)
            self.end_headers()
            self.close_connection = True
            for i in range(len(data) if fault == "trickle" else 0):
                self.wfile.write(data[i : i + 1])
                time.sleep(0.1)
            self.wfile.write(data[: len(data) // 2])
            return None
        if fault == "page":  # a proxy's page instead of the file
            status, data = 200, b"<!DOCTYPE html><html><body>Please log in</body></html>"
        if fault == "short":  # a consistent answer that lacks the end
            data = data[: len(data) // 2]
        if fault == "flip":
            data = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
        if self.command == "GET":
            self.server.bodies[base] += 1
            self.server.sent += len(data)
            self.server.transmit(len(data))
        return self._send(status, data, **headers)


@contextmanager
def store_server(root: Path, port: int = 0) -> Iterator[StoreServer]:
    """A running server of a folder."""
    server = StoreServer(root, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


@contextmanager
def nobody_at(port: int) -> Iterator[None]:
    """Keep a port for a server that comes back: meanwhile nobody listens there, and nobody else gets it."""
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", port))
        yield


def fetch_all(source: Source, but: str = "") -> None:
    """Download all shards of a remote source except one, so that nothing else needs the store."""
    for layer in source.layers:
        for shard in layer.manifest.shards:
            if shard.name != but:
                layer.store.fetch(shard.path, shard.bytes, shard.sha256)


class S3:
    """moto's S3 server on loopback; its content survives `stop` and `start`."""

    def __init__(self):
        self.port = 0

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()

    @contextmanager
    def outage(self, until: threading.Event) -> Iterator[None]:
        """Stop it until this is set, at the end of the block at the latest."""
        self.stop()

        def come_back() -> None:
            until.wait(120)
            self.start()

        with nobody_at(self.port):
            thread = threading.Thread(target=come_back, daemon=True)
            thread.start()
            try:
                yield
            finally:
                until.set()
                thread.join()


@contextmanager
def s3_server(folder: Path, bucket: str, prefix: str, monkeypatch) -> Iterator[S3]:
    """A running S3 with the files of a folder under s3://bucket/prefix, as the environment's endpoint."""
    import boto3

    s3 = S3()
    s3.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "loopback")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
    try:
        yield s3
    finally:
        s3.stop()
