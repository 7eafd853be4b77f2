"""Upload weights to a model repo on the Hugging Face Hub during training, to checkpoint_runs/NAME/.

Only step_N.safetensors, step_N_ema.safetensors (the published layout), config.json, training_config.json and a model
card are sent. The token comes from HF_TOKEN or `hf auth login`.
"""

import json
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HTTPError

from tinyflux.model.dcp import step_in
from tinyflux.util.cards import begun, completed, origins, renewed, written
from tinyflux.util.files import replaced
from tinyflux.util.log import say
from tinyflux.util.urls import public

FAILURES = (HTTPError, OSError, ValueError, RuntimeError)  # RuntimeError: a file that the client cannot send
RETRY = 60.0  # seconds after a failure, besides the client's own retries; doubled after each further failure
LONGEST = 900.0
LAST_RETRY = 5.0  # at the end of the run


def section(repo: str, run: str, names: list[str], training: dict) -> str:
    """The model card's section about a run, between marks that the next upload finds."""
    trainer, data = training.get("trainer", {}), training.get("data", {})
    steps = sorted({step_in(name) for name in names} - {None})
    told = {"steps": f"{steps[-1]} of {trainer.get('total_steps')}" if steps else "none yet"}
    told |= {"sources": ", ".join(Path(urlsplit(url).path).name for url in data.get("sources", []))}
    told |= {key: data.get(key) for key in ("global_batch_size", "seed")}
    told |= {key: trainer.get(key) for key in ("optimizer", "learning_rate", "shift", "init_from")}
    rows = [f"| {key} | {value} |" for key, value in told.items() if value]
    place = f"{repo}:checkpoint_runs/{run}"
    return "\n".join(
        [
            f"<!-- tinyflux run {run}: rewritten by each upload -->",
            f"## {run}",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "```python",
            "from tinyflux.model.loader import from_pretrained",
            "",
            f'model = from_pretrained("{place}")    # the newest averaged weights',
            "```",
            "",
            f'    python launch/sample.py --checkpoint {place} --prompt "..."',
            "",
            f"<!-- /tinyflux run {run} -->",
        ]
    )


def render(old: str, repo: str, run: str, names: list[str], training: dict) -> str:
    """The text of the repo's README.md: `old` with this run's section updated, the rest unchanged."""
    card = ModelCard(begun(old, repo))
    facts = {"license": training.get("trainer", {}).get("hf_license", "mit"), "library_name": "tinyflux-deep"}
    defaults = {**facts, "pipeline_tag": "text-to-image", **origins(training)}
    data = completed(card.data.to_dict(), defaults, ["tinyflux", "rectified-flow", "text-to-image"])
    return written(ModelCardData(**data), renewed(card.text, section(repo, run, names, training)))


class Uploader:
    """Sends checkpoints from a separate thread. Unsent files wait in `root`/.upload, also across restarts.

    root: the run's checkpoints. repo: USER/NAME, created if it does not exist. run: the folder in checkpoint_runs.
    """

    def __init__(self, root: Path, repo: str, run: str):
        self.root, self.repo, self.run = root, repo, run
        self.waiting = root / ".upload"
        self.failures, self.sent = 0, []
        self.wake, self.closing, self.given_up = threading.Event(), False, False
        # a daemon thread, so that a hanging upload does not keep the process alive
        self.thread = threading.Thread(target=self._work, name="upload", daemon=True)
        if get_token() is None:
            say(
                f"WARNING: no token for the upload to {repo}: set HF_TOKEN or run `hf auth login`, then run the same"
                " command again"
            )
        if self.pending():
            say(f"{len(self.pending())} files of an earlier start wait for upload to {repo}")
            self.wake.set()
        self.thread.start()

    def pending(self) -> list[Path]:
        """Unsent files."""
        return sorted(self.waiting.glob("step_*.safetensors"))

    def add(self, folder: Path) -> None:
        """Queue the exported weights of a checkpoint. They are hard-linked to `.upload`, so pruning does not matter."""
        self.waiting.mkdir(exist_ok=True)
        for name in (f"{folder.name}.safetensors", f"{folder.name}_ema.safetensors"):
            target = self.waiting / name
            if name in self.sent or target.exists():
                continue
            if not (self.root / name).exists():  # its export has failed with a message
                say(f"WARNING: {name} does not exist, so it is not uploaded")
                continue
            try:
                os.link(self.root / name, target)
            except OSError:  # a file system without links
                with replaced(target) as temporary:
                    shutil.copyfile(self.root / name, temporary)
        self.wake.set()

    def _work(self) -> None:
        delay = None
        while True:
            self.wake.wait(delay)
            self.wake.clear()
            if files := self.pending():
                try:
                    self._send(files)
                    self.failures, delay = 0, None
                except FAILURES as error:
                    self.failures += 1
                    delay = LAST_RETRY if self.closing else min(LONGEST, RETRY * 2 ** (self.failures - 1))
                    names = ", ".join(path.name for path in files)
                    say(f"WARNING: upload to {self.repo} failed ({self.failures} in a row): {error}")
                    say(f"  training continues; {names} will be sent at the next try")
            if self.given_up or (self.closing and not self.pending()):
                return

    def _send(self, files: list[Path]) -> None:
        api = HfApi()
        api.create_repo(self.repo, exist_ok=True)
        place, training = f"checkpoint_runs/{self.run}", self.root / "training_config.json"
        config = public(json.loads(training.read_text()))
        known = api.file_exists(self.repo, "README.md")
        old = Path(api.hf_hub_download(self.repo, "README.md")).read_text(encoding="utf-8") if known else ""
        names = [path.name for path in files]
        operations = [
            *(CommitOperationAdd(f"{place}/{path.name}", path) for path in files),
            CommitOperationAdd(f"{place}/config.json", self.root / "config.json"),
            CommitOperationAdd(f"{place}/training_config.json", json.dumps(config, indent=2).encode()),
            CommitOperationAdd("README.md", render(old, self.repo, self.run, names, config).encode()),
        ]
        api.create_commit(self.repo, operations, commit_message=f"{self.run}: {', '.join(names)}")
        for path in files:
            path.unlink(missing_ok=True)
        self.sent += names
        say(f"uploaded {', '.join(names)} to {self.repo}:{place}")

    def finish(self, seconds: float) -> None:
        """Send the queued files, for at most `seconds`, and report the result."""
        if self.pending() and seconds:
            say(f"waiting for the upload to {self.repo}, up to {seconds:g} s (trainer.upload_wait)")
        self.closing = True
        self.wake.set()
        self.thread.join(seconds)
        self.given_up = True
        self.wake.set()
        if waiting := self.pending():
            names = ", ".join(path.name for path in waiting)
            say(f"WARNING: not uploaded to {self.repo}: {names}; run the same command to send them")
