"""Stop signals, in a separate process."""

import signal
import subprocess
import sys

from tests.training import environment

LOOP = """
import time
from tinyflux.util.signals import StopSignals
signals = StopSignals()
with signals.noted():
    print("listening", flush=True)
    while not signals.told:
        time.sleep(0.01)
    print("told", flush=True)
    time.sleep(600)
"""


def test_the_first_is_noted_and_a_second_interrupt_ends_at_once():
    process = subprocess.Popen([sys.executable, "-c", LOOP], env=environment(), stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "listening\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "told\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped at once" in said
