"""Clients of remote stores, one per URL scheme. Only this module knows the errors of their libraries.

To add a scheme, write a class with `Client`'s two members and a line in CLIENTS, and one in VERSIONED if it has
revisions.
"""

import asyncio
import base64
import http.client
import re
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote, urlsplit

from tinyflux.util.urls import redacted

CHUNK = 1 << 20  # bytes that are yielded at a time
BLOCK = 8 << 20  # bytes per request, for stores that are read in blocks
PLAIN = "/%:@~+,;=!$&()*"  # characters of a path that are not escaped in a URL
REQUESTS = 4  # blocks of a file that are requested in parallel
HUB = re.compile(r"(hf://datasets/[^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*?))?/?")


class DownloadError(OSError):
    """A remote file could not be downloaded; names the file and what to check.

    again: whether a retry may help. status: the HTTP status, if there is one. after: seconds the store asked to wait.
    wrong: whether something other than the file was received: other content, or a web page.
    """

    def __init__(self, message: str, *, again: bool = False, status: int = 0, after: float = 0.0, wrong: bool = False):
        super().__init__(redacted(message))
        self.again, self.status, self.after, self.wrong = again, status, after, wrong

    @property
    def missing(self) -> bool:
        """Whether the store says that there is no such file."""
        return self.status in (404, 410)

    @property
    def lacks(self) -> bool:
        """Whether the store answered, but has no such file or sent something else instead, such as a web page."""
        return self.missing or self.wrong

    @classmethod
    def of(cls, error: BaseException, status: int = 0, after: str | None = None) -> "DownloadError":
        """The DownloadError for a library's error, by its type and HTTP status. after: the Retry-After header."""
        said = f"{type(error).__name__}: {error}".strip(": ")
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return cls(f"there is no such file: {said}", status=404)
        if status == 416:
            return cls("the file is shorter than expected", status=status)
        if isinstance(error, PermissionError) or (400 <= status < 500 and status not in (408, 425, 429)):
            return cls(f"check your access (token, credentials): {said}", status=status)
        seconds = float(after) if after and after.replace(".", "", 1).isdecimal() else 0.0
        return cls(said, again=True, status=status, after=seconds)


class Chunk(NamedTuple):
    """Bytes of a file, their offset, and the file's size if the store gave it."""

    start: int
    data: bytes
    total: int | None


class Client(Protocol):
    """The files under one URL. Its constructor takes the URL and a revision, and raises ValueError, DownloadError."""

    pin: str | None
    """A version of all files, such as a commit; None if the store has no versions."""

    def read(self, name: str, start: int, size: int | None, silence: float) -> Iterator[Chunk]:
        """The bytes of a file in order, from `start`, or from 0 if the store has no ranges.

        size: of the file, if known. silence: seconds without a byte after which the request ends. Raises DownloadError.
        """
        ...


class HttpClient:
    """Files of a web server. `user:password@` becomes a header; a query is appended to each file's URL."""

    pin = None

    def __init__(self, url: str, revision: str | None = None):
        parts = urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        self._base = f"{parts.scheme}://{host}{quote(parts.path.rstrip('/'), PLAIN)}"
        self._query = f"?{parts.query}" if parts.query else ""
        self._secret = f"Basic {base64.b64encode(unquote(user).encode()).decode()}" if at else ""

    def read(self, name: str, start: int, size: int | None, silence: float) -> Iterator[Chunk]:
        request = urllib.request.Request(f"{self._base}/{quote(name, PLAIN)}{self._query}", headers=_range(start))
        if self._secret:
            request.add_unredirected_header("Authorization", self._secret)  # not sent to other hosts on redirects
        try:
            with urllib.request.urlopen(request, timeout=silence) as response:
                yield from _body(response.status, response.headers, iter(lambda: response.read1(CHUNK), b""))
        except urllib.error.HTTPError as error:
            with error:
                raise DownloadError.of(error, error.code, error.headers.get("Retry-After")) from error
        except DownloadError:
            raise
        except (ValueError, http.client.InvalidURL) as error:
            raise DownloadError(f"not a valid URL: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError.of(error) from error


class HubClient:
    """Files of a Hugging Face dataset repo at one commit. The token comes from HF_TOKEN or `hf auth login`."""

    def __init__(self, url: str, revision: str | None = None):
        match = HUB.fullmatch(url)
        if match is None:
            raise ValueError(f"source {url!r}: a Hub source is hf://datasets/USER/REPO[@REVISION][/FOLDER]")
        repo, wanted, folder = match.groups()
        self._repo, self._folder = repo.removeprefix("hf://datasets/"), f"{folder}/" if folder else ""
        self.pin = revision or self._asked(wanted)

    def _asked(self, revision: str | None) -> str:
        from huggingface_hub import HfApi

        with _hub_errors():
            return HfApi().dataset_info(self._repo, revision=revision, timeout=30).sha

    def read(self, name: str, start: int, size: int | None, silence: float) -> Iterator[Chunk]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        url = hf_hub_url(self._repo, self._folder + name, repo_type="dataset", revision=self.pin)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"} | _range(start)
        asked = {"headers": headers, "timeout": silence, "follow_redirects": True}
        with _hub_errors(), get_session().stream("GET", url, **asked) as response:
            if response.status_code >= 400:
                said = OSError(f"{response.status_code} {response.reason_phrase}")
                raise DownloadError.of(said, response.status_code, response.headers.get("Retry-After"))
            yield from _body(response.status_code, response.headers, response.iter_raw())


@contextmanager
def _hub_errors() -> Iterator[None]:
    """Turn errors of the Hub's client into DownloadErrors."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        yield
    except DownloadError:
        raise
    except OfflineModeIsEnabled as error:
        raise DownloadError(f"HF_HUB_OFFLINE is set: {error}") from error
    except (HTTPError, OSError) as error:
        response = getattr(error, "response", None)
        headers = getattr(response, "headers", {})
        raise DownloadError.of(error, getattr(response, "status_code", 0), headers.get("Retry-After")) from error


class FsspecClient:
    """Files of a store with an asynchronous fsspec file system, read in blocks, several in parallel."""

    pin = None

    def __init__(self, url: str, revision: str | None = None, **options: Any):
        import fsspec

        scheme = url.partition("://")[0]
        try:
            self._fs = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            what = f"source {redacted(url)!r}: {scheme}://"
            raise ValueError(f"{what} needs a package that is not installed: {error}") from error
        self._root = self._fs._strip_protocol(url.rstrip("/"))

    def read(self, name: str, start: int, size: int | None, silence: float) -> Iterator[Chunk]:
        path, under_way = f"{self._root}/{name}", deque()
        try:
            if size is None:
                size = self._begin(self._fs._info(path)).result(silence)["size"]
            places = iter(range(start, size, BLOCK))
            while True:
                while len(under_way) < REQUESTS and (place := next(places, None)) is not None:
                    stop = min(place + BLOCK, size)
                    under_way.append((place, stop, self._begin(self._fs._cat_file(path, start=place, end=stop))))
                if not under_way:
                    return
                place, stop, future = under_way.popleft()
                data = future.result(2 * silence)  # no bytes arrive before the whole block
                if not data:
                    raise DownloadError("the file is shorter than expected", status=416)
                yield Chunk(place, data[: stop - place], size)
                if len(data) < stop - place:
                    raise OSError(f"received {len(data)} bytes for bytes {place} to {stop}")
        except DownloadError:
            raise
        except Exception as error:  # each store's library has its own errors
            if type(error).__module__ == "builtins" and not isinstance(error, OSError):
                raise  # such as TypeError: a fault of the program, not of the network
            response = getattr(error, "response", None)
            answer = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
            status = answer.get("HTTPStatusCode") or getattr(error, "status", 0) or getattr(error, "code", 0)
            if type(error).__name__ in ("NoCredentialsError", "RefreshError", "DefaultCredentialsError"):
                status = 401
            raise DownloadError.of(error, status if isinstance(status, int) else 0) from error
        finally:
            for _, _, future in under_way:
                future.cancel()

    def _begin(self, request) -> Any:
        return asyncio.run_coroutine_threadsafe(request, self._fs.loop)


def _range(start: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-"} if start else {}


def _body(status: int, headers: Any, chunks: Iterator[bytes]) -> Iterator[Chunk]:
    """The chunks of an HTTP response. Raises OSError if it is shorter than announced."""
    length = headers.get("Content-Length")
    place, total = 0, int(length) if length else None
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if match is None:
            raise OSError(f"a range response with a bad Content-Range: {headers.get('Content-Range')!r}")
        place, total = int(match[1]), None if match[2] == "*" else int(match[2])
    for data in chunks:
        yield Chunk(place, data, total)
        place += len(data)
    if total is not None and place < total:
        raise OSError(f"the response ended at byte {place} of {total}")


CLIENTS: dict[str, Callable[[str, str | None], Client]] = {
    "hf": HubClient,
    "http": HttpClient,
    "https": HttpClient,
    "s3": partial(FsspecClient, config_kwargs={"retries": {"total_max_attempts": 1}}),  # `Patience` retries
    "gs": FsspecClient,
}
VERSIONED = {"hf": HUB}
"""The pattern of the URLs of each scheme with revisions: repo, revision, folder."""


def repo_of(url: str) -> str | None:
    """The URL of the repo, whose files have a revision together; None if the URL's scheme has no revisions."""
    match = _versioned(url)
    return match and match[1]


def without_revision(url: str) -> str:
    """A URL without its @REVISION; unchanged if its scheme has no revisions."""
    match = _versioned(url)
    return "/".join(filter(None, (match[1], match[3]))) if match else url


def _versioned(url: str) -> re.Match | None:
    pattern = VERSIONED.get(url.partition("://")[0])
    return pattern and pattern.fullmatch(url)
