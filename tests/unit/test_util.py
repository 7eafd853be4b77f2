"""Files, settings and commands: the helpers of all packages."""

import errno
import threading
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from tinyflux.util import cli, settings
from tinyflux.util.files import Stopped, atomic_write, locked, replaced, sha256
from tinyflux.util.settings import Above, AtLeast, Match, Within, check


@dataclass
class Inner:
    threads: Annotated[int, AtLeast(1)] = 2
    rate: Annotated[float, Above(0)] = 1e-4
    fraction: Annotated[float, Within(0, 1, open_high=True)] = 0.0
    limit: Annotated[int | None, AtLeast(1)] = None
    repo: Annotated[str | None, Match(r"\w+/\w+", "USER/NAME")] = None
    betas: Annotated[tuple[float, float], Within(0, 1, open_high=True)] = (0.9, 0.95)
    mode: Literal["a", "b"] = "a"
    on: bool = True

    def __post_init__(self):
        check(self, "inner.")


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)


WRONG = {
    "threads": (0, "inner.threads is 0: it must be at least 1"),
    "rate": (0.0, "inner.rate is 0.0: it must be more than 0"),
    "fraction": (float("nan"), "inner.fraction is nan: it must be in [0, 1)"),
    "limit": (0, "inner.limit is 0: it must be at least 1"),
    "repo": ("me", "inner.repo is 'me': it must be USER/NAME"),
    "betas": ((0.9, 1.0), "inner.betas is (0.9, 1.0): it must be in [0, 1)"),
    "mode": ("c", "inner.mode is 'c': it must be one of a, b"),
    "on": (1, "inner.on is 1: it must be true or false"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_out_of_range_is_refused_with_its_key(name):
    value, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        Inner(**{name: value})
    assert message in str(error.value)


FILES = {
    "a typo": ("[inner]\nthread = 1", "unknown key inner.thread: did you mean threads?"),
    "a number as a text": ('[inner]\nrate = "1e-4"', "inner.rate is '1e-4': it must be a number"),
    "a value for a table": ("inner = 1", "inner is 1: it must be a table"),
    "not TOML": ("[inner", "not a TOML file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_refused(tmp_path, name):
    text, message = FILES[name]
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError) as error:
        settings.load(Outer, ["--config", str(tmp_path / "a.toml")], presets=tmp_path)
    assert message in str(error.value) and "a.toml" in str(error.value)


def test_the_command_line_overrides_the_file(tmp_path):
    (tmp_path / "mine.toml").write_text('[inner]\nthreads = 3\non = false\nmode = "b"\n[other]\nx = 1\n')
    argv = ["--config", "mine", "--inner.threads", "4"]
    config, given = settings.load(Outer, argv, presets=tmp_path, ignored=("other",))
    assert (config.inner.threads, config.inner.on, config.inner.mode) == (4, False, "b")
    assert given == {"inner.threads", "inner.no_on", "inner.mode"}
    with pytest.raises(FileNotFoundError, match="did you mean mine"):
        settings.load(Outer, ["--config", "min"], presets=tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, b"old")
    with pytest.raises(OSError, match="No space left.*what was finished before is intact"), replaced(path) as temporary:
        temporary.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    assert sha256(path) == "cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4"


def test_a_lock_excludes_and_is_given_up(tmp_path):
    stopped = threading.Event()
    with locked(tmp_path / "lock"):
        with pytest.raises(TimeoutError, match="the build"), locked(tmp_path / "lock", timeout=0, what="the build"):
            pass
        stopped.set()
        with pytest.raises(Stopped), locked(tmp_path / "lock", stopped=stopped):
            pass
    with locked(tmp_path / "lock", timeout=0):
        pass


STATUSES = {
    "done": (lambda _: None, 0),
    "its own": (lambda _: cli.SAVED, 75),
    "bad input": (lambda _: int("x"), 2),
    "a missing file": (lambda _: open("/nowhere/at/all"), 2),
    "a fault on the way": (lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error", "a")), 1),
}


@pytest.mark.parametrize("name", STATUSES)
def test_exit_status(name, capsys):
    command, status = STATUSES[name]
    assert cli.run(command, Outer, [], prog="x", description=None) == status
    assert capsys.readouterr().err.count("\n") == (status in (1, 2))
