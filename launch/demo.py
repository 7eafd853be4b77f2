"""The whole system on a laptop, offline, in minutes: precache, train, interrupt, resume, sample and judge.

python -m launch.demo [--out demo]
"""

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from tinyflux.run.records import read_metrics
from tinyflux.util import cli

LAUNCH = Path(__file__).parent
CONFIG = LAUNCH / "configs" / "demo.toml"
HELD_OUT = 24  # combinations of shape and colours that are never trained on
ENOUGH, ENOUGH_NEW = 0.98, 0.9  # least share of right pictures of all prompts, and of those with new combinations
GRID = (  # prompts of the picture that is shown at the end
    "a red circle on a blue background", "a blue circle on a red background", "a green square on a white background",
    "a yellow triangle on a black background", "a white star on a purple background",
    "a purple ring on a yellow background", "an orange square on a blue background",
    "a black star on a white background", "a red triangle on a green background", "a blue ring on an orange background",
    "a yellow circle on a purple background", "a green star on a black background",
    "vertical stripes in red and yellow", "horizontal stripes in blue and white",
    "a checkerboard in green and black", "a checkerboard in purple and orange",
)  # fmt: skip


def run(*commands: list[str | Path], **environment: str) -> None:
    """Run commands as a user would type them, at the same time. Ends the demo if one fails."""
    processes = []
    for command in commands:
        print(f"\n$ {' '.join(map(str, command))}", flush=True)
        processes.append(subprocess.Popen([str(word) for word in command], env=os.environ | environment))
    for status in [process.wait() for process in processes]:
        if status:
            sys.exit(f"demo: the command above failed with exit status {status}")


def steps_in(metrics: Path) -> int:
    """Number of steps that a running training has recorded."""
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def interrupt(command: list[str], metrics: Path, at_step: int, log: Path) -> None:
    """Start a training and send it SIGTERM, as a cluster does, after `at_step` steps.

    log: file for stderr, where torchrun prints long messages about the signal.
    """
    print(f"\n$ {' '.join(command)}      # to be interrupted at about step {at_step}", flush=True)
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    while process.poll() is None and steps_in(metrics) < at_step:
        time.sleep(0.2)
    if process.poll() is not None:
        sys.exit(f"demo: the training ended early with exit status {process.returncode}, see {log}")
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    print(f"interrupted after {steps_in(metrics)} steps; the same command resumes it", flush=True)


def score(run_dir: Path, out: Path, grid: Path) -> list[str]:
    """Draw every prompt of both sources, judge the pictures, print the table. Returns the scores that are too low.

    grid: file for the pictures of `GRID`, put together.
    """
    import numpy as np
    import torch
    from PIL import Image

    from tinyflux.model.tiny import judge, shapes
    from tinyflux.trainer.sampling import save_samples
    from tinyflux.util.pixels import to_pixels

    names = [prompt.text for prompt in judge.prompts()]
    folder, half, commands = out / "pictures", len(names) // 2, []
    folder.mkdir()
    for first in (0, half):  # two processes: two threads of one are hardly faster than one
        prompts = out / f"prompts-{first}.txt"
        prompts.write_text("\n".join(names[first : first + half]))
        commands.append([
            sys.executable, LAUNCH / "sample.py", "--checkpoint", run_dir, "--prompt-file", prompts,
            "--first", str(first), "--no-grid", "--out", folder / "of.png", "--batch-size", "16", "--seed", "1",
            "--solver", "ab2", "--steps", "10",
        ])  # fmt: skip
    run(*commands, OMP_NUM_THREADS="1")
    images = [np.asarray(Image.open(folder / f"of-{k}.png")) for k in range(len(names))]
    shown = torch.from_numpy(np.stack([images[names.index(text)] for text in GRID]))
    save_samples(to_pixels(shown), grid)
    scores = judge.score(images, shapes.held_out(HELD_OUT))
    rows = [("prompts", "", "colours right", "form and colours right", "")]
    rows += [(name.removeprefix("a "), *counts, f"{counts.share:.1%}") for name, counts in scores.items()]
    print("\n" + cli.table(rows, right=True))
    least = {judge.ALL: ENOUGH, judge.NEW: ENOUGH_NEW}
    return [f"{scores[row].share:.1%} of {row}" for row, share in least.items() if scores[row].share < share]


def main(out: Path = Path("demo"), shapes: int = 1280, images: int = 168) -> int:
    """Build two sources, train on both, interrupt and resume, sample, judge, and say where everything is.

    Args:
        out: folder for everything; must be empty or new.
        shapes: number of rendered images of shapes.
        images: number of images of patterns, written to a folder first; 168 is each pattern in each pair of colours.
    """
    from tinyflux.model.tiny import patterns

    start = time.monotonic()
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; remove it or choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    print(f"1/4  Precache: images and captions become shards of tensors, in {out / 'data'}")
    patterns.write_folder(out / "images", images)
    sources = out / "sources.toml"
    sources.write_text(
        f'[shapes]\nkind = "shapes"\ndataset_id = 0\ncount = {shapes}\nheld_out = {HELD_OUT}\n\n'
        '[patterns]\nkind = "imagefolder"\nlocation = "images"\ndataset_id = 1\n'
    )
    for name in ("shapes", "patterns"):
        run([*ranks, "-m", "sharding.build", "--source", name, "--sources", sources, "--zoo", "tiny",
             "--shard-size", "64", "--out", out / "data" / name])  # fmt: skip

    print("\n2/4  Train: two ranks stream both sources, 70% shapes and 30% patterns")
    run_dir, metrics = out / "run", out / "run" / "metrics.jsonl"
    train = [*ranks, str(LAUNCH / "train.py"), "--config", "demo", "--run-dir", str(run_dir),
             "--data.sources", str(out / "data" / "shapes"), str(out / "data" / "patterns"),
             "--data.weights", "0.7", "0.3"]  # fmt: skip
    total = tomllib.loads(CONFIG.read_text())["trainer"]["total_steps"]
    interrupt(train, metrics, total // 2, out / "interrupted.log")
    print("\n3/4  Resume: the very same command")
    run(train)
    records = read_metrics(run_dir)
    if [record["step"] for record in records] != list(range(1, total + 1)):
        sys.exit(f"demo: {metrics} does not have each step once")
    print("\n  step    loss    main    lune     sol")
    for record in [*records[:: total // 8], records[-1]]:
        print("{step:6d}  {loss:.4f}  {main:.4f}  {lune:.4f}  {sol:.4f}".format(**record))

    print("\n4/4  Sample: prompts become pictures; the teachers are no longer needed")
    grid = out / "grid.png"
    missed = score(run_dir, out, grid)
    print(f"""
Done in {(time.monotonic() - start) / 60:.1f} minutes.

Pictures          {grid}; one picture per prompt in {out / "pictures"}
Checkpoints       {run_dir / "checkpoints"}
Report            {run_dir / "report.html"}
TensorBoard       tensorboard --logdir {run_dir}
Losses, each step {metrics}

What to try next:
  python launch/sample.py --checkpoint {run_dir} --prompt "a white ring on a red background" --out ring.png
  tar tf {out / "data" / "shapes" / "shapes-000000.tar"} | head
  python -m sharding.build --list       shows the known sources
  ./torchrun.sh --help                  shows how to train on more devices and machines""")
    if missed:
        print(f"error: too few pictures are right: {', '.join(missed)}", file=sys.stderr)
        return cli.FAILED
    return cli.DONE


if __name__ == "__main__":
    import tyro

    sys.exit(cli.report(lambda: tyro.cli(main, description=__doc__)))
