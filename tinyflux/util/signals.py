"""Signals that ask a run to stop: it saves a checkpoint at the end of a step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Whether this rank was told to stop: by a signal, or because its torchrun has ended."""

    def __init__(self):
        self.number = 0  # of the last signal
        # workers survive a killed torchrun: they notice that their parent has changed, save and stop
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def told(self) -> bool:
        return self.number > 0 or self.parent not in (None, os.getppid())

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record stop signals instead of dying from them, within a `with` block. A second Ctrl-C ends the process at
        once."""

        def note(number: int, _frame) -> None:
            if number == self.number == signal.SIGINT:
                os.write(2, b"\nstopped at once: resuming repeats the steps since the last checkpoint\n")
                os._exit(130)  # sys.exit would wait for threads that save or download
            self.number = number

        main = threading.current_thread() is threading.main_thread()  # other threads cannot set signal handlers
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS if main}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
