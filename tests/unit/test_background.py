"""Jobs in the background: who has waited for one has read what it had to say."""

import time

from tinyflux.trainer import background
from tinyflux.trainer.background import Background


def test_an_error_is_told_before_the_wait_is_over(monkeypatch):
    said = []

    def fail() -> None:
        time.sleep(0.2)  # it is waited for meanwhile
        raise MemoryError

    monkeypatch.setattr(background, "say", lambda text: time.sleep(0.3) or said.append(text))
    jobs = Background("preview")
    jobs.submit(fail)
    assert jobs.wait(120) and said == ["WARNING: preview: MemoryError(); training continues"]
