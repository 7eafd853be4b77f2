"""Commands: parse, call, and turn errors that a user can fix into one message and an exit status."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

DONE = 0
FAILED = 1
REFUSED = 2
"""Nothing was started: the input is wrong."""
SAVED = 75
"""Stopped by a signal after saving (EX_TEMPFAIL): run the same command to resume."""
INTERRUPTED = 130

# errors before anything is started
SETUP = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

Options = TypeVar("Options")


class Failed(RuntimeError):
    """A failure after the start whose message says all that a user needs: it is reported without a traceback."""


def parse(options: type[Options], argv: list[str] | None, prog: str, description: str | None) -> Options:
    """The options of a command line, default sys.argv. Exits with 0 after --help, with 2 for a wrong option."""
    import tyro

    return tyro.cli(options, args=argv, prog=prog, description=description)


def report(action: Callable[[], int], failures: tuple[type[BaseException], ...] = ()) -> int:
    """Call `action`. Returns its exit status, or that of its error, which becomes one message on stderr.

    failures: errors, besides OSError, that are reported without a traceback.
    """
    try:
        return action()
    except KeyboardInterrupt:
        print("stopped; run the same command to resume", file=sys.stderr)
        return INTERRUPTED
    except SETUP as error:
        tell(message(error))
        return REFUSED
    except (OSError, Failed, *failures) as error:
        tell(message(error))
        return FAILED


def tell(text: str) -> None:
    """Print an error. Under torchrun, only a node's first rank prints; all ranks leave the text for torchrun, which
    prints the errors that the first rank did not."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {text}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time())), "py_callstack": text}
        try:
            with open(path, "w") as file:
                json.dump({"message": {"message": text, "extraInfo": extra}}, file)
        except OSError:  # a full disk; the exit status still reports the failure
            pass


def message(error: BaseException) -> str:
    """An error as text; an OSError of the system with its file name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def run(
    command: Callable[[Options], int | None],
    options: type[Options],
    argv: list[str] | None,
    *,
    prog: str,
    description: str | None,
    failures: tuple[type[BaseException], ...] = (),
) -> int:
    """Parse, call, report. Returns the exit status; None from a command means done."""
    return report(lambda: command(parse(options, argv, prog, description)) or DONE, failures)


def table(rows: list[tuple], *, right: bool = False) -> str:
    """Rows as text in aligned columns; right: align all columns except the first to the right."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        pairs = enumerate(zip(row, widths, strict=True))
        aligned = [cell.rjust(width) if right and i else cell.ljust(width) for i, (cell, width) in pairs]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)
