"""Export a checkpoint folder's weights in the published layout, beside the folder.

python -m tinyflux.run.export RUN_DIR/checkpoints/step_N [--out FILE.safetensors|FILE.pt] [--no-ema]
"""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import tyro

from tinyflux.model.config import TinyFluxConfig
from tinyflux.util import cli
from tinyflux.util.files import replaced, sync

KINDS = ("_ema.safetensors", ".safetensors")
"""What is written beside each checkpoint."""
LORA, LORA_FILE = "_lora", "tinyflux_lora.safetensors"
"""The averaged adapters of a LoRA run: a folder in PEFT's layout, with a file in the original package's layout."""


def beside(folder: Path, kind: str) -> Path:
    """The path of an export of a checkpoint folder, such as step_N_ema.safetensors."""
    return folder.with_name(folder.name + kind)


def export(folder: Path, config: TinyFluxConfig, out: Path, *, ema: bool = True) -> Path:
    """Write a checkpoint folder's weights in the published layout. Returns `out`.

    A `.safetensors` file has the averaged weights, or the trained ones with `ema=False`; a `.pt` file has both, the
    optimizer's state by parameter name, step, epoch, best_loss and the configs, and loads with `weights_only=True`.
    """
    import torch

    from tinyflux.model.dcp import read_checkpoint
    from tinyflux.model.loader import save_published, to_published

    if out.suffix == ".safetensors":
        kind = "ema" if ema else "model"
        save_published(read_checkpoint(folder, kind)[kind], out, config)
        return out
    if out.suffix != ".pt":
        raise ValueError(f"{out}: a checkpoint is exported to .safetensors or .pt")
    content = read_checkpoint(folder, "model", "ema", "optimizer") | {"model_config": config.to_dict()}
    content |= {kind: to_published(content[kind], config) for kind in ("model", "ema")}
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced(out) as temporary:
        torch.save(content, temporary)
    return out


def export_missing(folder: Path, *, save_pt: bool = False) -> None:
    """Write a checkpoint's missing exports."""
    from tinyflux.model.dcp import read_adapters

    config = TinyFluxConfig.from_json(folder.parent / "config.json")
    for kind in (*KINDS, *([".pt"] if save_pt else [])):
        if not beside(folder, kind).exists():
            export(folder, config, beside(folder, kind), ema=kind == KINDS[0])
    if not beside(folder, LORA).exists() and (lora := read_adapters(folder, "ema")):
        temporary = folder.with_name(f".{folder.name}{LORA}.{os.getpid()}.tmp")
        lora.save_peft(temporary)
        lora.save_original(temporary / LORA_FILE)
        for path in temporary.iterdir():
            sync(path)
        temporary.rename(beside(folder, LORA))


class Exporter:
    """Runs `export_missing` in a separate process, so that it does not block this interpreter or use the GPU."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.stopped, self.starting = False, threading.Lock()

    def __call__(self, folder: Path, *, save_pt: bool = False) -> None:
        """Export. Raises RuntimeError with the process's last line if it fails."""
        private = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HF_TOKEN")
        env = {key: value for key, value in os.environ.items() if key not in private}
        command = [sys.executable, "-m", "tinyflux.run.export", str(folder), "--beside"]
        with self.starting:
            if self.stopped:
                return
            self.process = subprocess.Popen(
                [*command, *(["--save-pt"] if save_pt else [])],
                env=env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C must not reach it
            )
        _, said = self.process.communicate()
        if self.process.returncode and not self.stopped:
            raise RuntimeError((said.strip() or f"status {self.process.returncode}").splitlines()[-1])

    def stop(self) -> None:
        """End a running process; unfinished exports are dropped."""
        with self.starting:
            self.stopped = True
            if self.process is not None and self.process.poll() is None:
                self.process.terminate()


@dataclass
class Options:
    folder: tyro.conf.Positional[Path]
    """RUN_DIR/checkpoints/step_N, or RUN_DIR for its newest checkpoint."""
    out: Path | None = None
    """A .safetensors or .pt file; by default step_N_ema.safetensors or step_N.safetensors, beside the folder."""
    ema: bool = True
    """Export the averaged weights; otherwise the trained ones. A .pt file has both."""
    beside: bool = False
    """Write all missing files that training writes beside its checkpoints."""
    save_pt: bool = False
    """With --beside: also write step_N.pt."""


def command(options: Options) -> None:
    """Check the checkpoint, then write."""
    from tinyflux.model.dcp import METADATA, check_files
    from tinyflux.run.folders import list_checkpoints

    folder = options.folder
    if not (folder / METADATA).is_file():
        found = list_checkpoints(folder) or list_checkpoints(folder / "checkpoints")
        if not found:
            raise FileNotFoundError(f"{folder}: no complete checkpoint here")
        folder = found[0]
    if options.beside:
        os.nice(10)
        export_missing(folder, save_pt=options.save_pt)
        return
    check_files(folder)
    config = TinyFluxConfig.from_json(folder.parent / "config.json")
    out = options.out or beside(folder, KINDS[0] if options.ema else KINDS[1])
    print(export(folder, config, out, ema=options.ema))


def main(argv: list[str] | None = None) -> int:
    """The command of this module."""
    return cli.run(command, Options, argv, prog="python -m tinyflux.run.export", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
