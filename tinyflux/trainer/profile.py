"""A profile of some steps, for chrome://tracing or Perfetto."""

from pathlib import Path

import torch

from tinyflux.util.log import say


class Profiler:
    """Records `count` steps, starting with step `first`; first 0: none."""

    def __init__(self, first: int, count: int, run_dir: Path):
        self.first, self.end, self.run_dir = first, first + count, run_dir
        self.profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Start or end the recording. Call it before each step."""
        if self.first and step == self.first:
            self.profile = torch.profiler.profile()  # all activities of this device: CPU, and CUDA if available
            self.profile.start()
        if step == self.end:
            self.finish()

    def finish(self) -> None:
        """End a running recording and write its file."""
        if self.profile is None:
            return
        profile, self.profile = self.profile, None
        path = self.run_dir / f"profile_step_{self.first}.json.gz"
        try:
            profile.stop()
            profile.export_chrome_trace(str(path))
            say(f"profile: {path}")
        except (OSError, RuntimeError) as error:
            say(f"WARNING: no profile: {error}")
