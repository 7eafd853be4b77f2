"""The whole system on a laptop, offline, in minutes: precache, train, interrupt, resume, sample.

python -m launch.demo [--out demo]
"""

import json
import math
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw

from tinyflux.model.tiny.shapes import COLOURS, SHAPES, caption, draw

LAUNCH = Path(__file__).parent
CONFIG = LAUNCH / "configs" / "demo.toml"
SIZE = 64

CELLS = [  # colour, shape, background; the rest of the grid are patterns
    ("red", "circle", "blue"), ("blue", "circle", "red"), ("green", "square", "white"),
    ("yellow", "triangle", "black"), ("white", "star", "purple"), ("purple", "ring", "yellow"),
    ("orange", "square", "blue"), ("black", "star", "white"), ("red", "triangle", "green"),
    ("blue", "ring", "orange"), ("yellow", "circle", "purple"), ("green", "star", "black"),
]  # fmt: skip
PATTERNS = ("vertical stripes", "horizontal stripes", "a checkerboard")
PATTERN_CELLS = [
    "vertical stripes in red and yellow",
    "horizontal stripes in blue and white",
    "a checkerboard in green and black",
    "a checkerboard in purple and orange",
]


def pattern(kind: str, first: str, second: str, period: int) -> Image.Image:
    """A SIZE x SIZE picture of stripes or a checkerboard in two colours."""
    image = Image.new("RGB", (SIZE, SIZE), COLOURS[first])
    pen = ImageDraw.Draw(image)
    for y in range(0, SIZE, period):
        for x in range(0, SIZE, period):
            odd = {"vertical stripes": x, "horizontal stripes": y, "a checkerboard": x + y}[kind] // period % 2
            if odd:
                pen.rectangle((x, y, x + period - 1, y + period - 1), fill=COLOURS[second])
    return image


def write_images(folder: Path, count: int) -> None:
    """An image folder as a user would have one: name.png beside name.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    rng = np.random.default_rng(0)
    for i in range(count):
        kind = PATTERNS[i % len(PATTERNS)]
        first, second = rng.choice(len(names), 2, replace=False)
        image = pattern(kind, names[first], names[second], int(rng.choice([8, 16])))
        image.save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(f"{kind} in {names[first]} and {names[second]}\n")


def run(*command: str | Path) -> None:
    """Run a command as a user would type it; ends the demo where it fails."""
    print(f"\n$ {' '.join(map(str, command))}", flush=True)
    done = subprocess.run([str(word) for word in command], check=False)
    if done.returncode:
        sys.exit(f"demo: that command failed with exit status {done.returncode}")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that are whole; none where the file isn't there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def interrupt(command: list[str], metrics: Path, at_step: int, log: Path) -> None:
    """Start a training and send it SIGTERM, as a cluster does, once it has done `at_step` steps.

    log: takes stderr, where torchrun says at length that it was told to stop.
    """
    print(f"\n$ {' '.join(command)}      # interrupted at about step {at_step}", flush=True)
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    while process.poll() is None and len(read_metrics(metrics)) < at_step:
        time.sleep(0.2)
    if process.poll() is not None:
        sys.exit(f"demo: the training ended early with exit status {process.returncode}, see {log}")
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    print(f"interrupted after {len(read_metrics(metrics))} steps; the same command goes on from there", flush=True)


def foreground(image: np.ndarray, colour: str, background: str) -> np.ndarray:
    """Pixels nearer to one named colour than to the other, bool [H, W]."""
    distance = [np.abs(image.astype(int) - COLOURS[name]).sum(-1) for name in (colour, background)]
    return distance[0] < distance[1]


def nearest_colour(pixels: np.ndarray) -> str:
    """The name of the colour that the median of pixels [N, 3] is nearest to."""
    median = np.median(pixels, axis=0)
    return min(COLOURS, key=lambda name: np.abs(median - COLOURS[name]).sum())


def has_colours(image: np.ndarray, colour: str, background: str) -> bool:
    """Does a picture uint8 [H, W, 3] show something of one colour on a background of the other?"""
    inside = foreground(image, colour, background)
    if not 0.03 < inside.mean() < 0.9:
        return False
    return (nearest_colour(image[inside]), nearest_colour(image[~inside])) == (colour, background)


def nearest_shape(image: np.ndarray, colour: str, background: str) -> str:
    """The shape whose template overlaps best with the foreground of a picture uint8 [H, W, 3]."""
    inside, overlap = foreground(image, colour, background), dict.fromkeys(SHAPES, 0.0)
    for name in SHAPES:
        for radius in (0.26, 0.3, 0.34):
            template = foreground(np.asarray(draw("white", name, "black", SIZE, radius=radius)), "white", "black")
            for dy in range(-6, 7, 2):
                for dx in range(-6, 7, 2):
                    moved = np.roll(template, (dy, dx), (0, 1))
                    overlap[name] = max(overlap[name], (moved & inside).sum() / (moved | inside).sum())
    return max(overlap, key=overlap.get)


def cut_cells(grid: np.ndarray, count: int) -> list[np.ndarray]:
    """The SIZE x SIZE pictures of a sample grid, row by row."""
    columns = math.ceil(math.sqrt(count))
    pitch = (grid.shape[1] - SIZE) // (columns - 1)
    corners = [(i // columns * pitch, i % columns * pitch) for i in range(count)]
    return [grid[y : y + SIZE, x : x + SIZE] for y, x in corners]


def main(out: Path = Path("demo"), shapes: int = 1600, images: int = 400) -> None:
    """Build two sources, train on both, interrupt and resume, sample, and say where everything is.

    Args:
        out: folder for all of it; a second run starts over in an empty one.
        shapes: rendered images of captioned shapes.
        images: images of an image folder that is written first.
    """
    start = time.monotonic()
    if out.exists() and any(out.iterdir()):
        sys.exit(f"demo: {out} is not empty; remove it or choose another with --out")
    out.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    ranks = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    print(f"1/4  Precache: images and captions become shards of tensors, in {out / 'data'}")
    write_images(out / "images", images)
    sources = out / "sources.toml"
    sources.write_text(
        f'[shapes]\nkind = "shapes"\ndataset_id = 0\ncount = {shapes}\n\n'
        '[patterns]\nkind = "imagefolder"\nlocation = "images"\ndataset_id = 1\n'
    )
    for name in ("shapes", "patterns"):
        run(*ranks, "-m", "sharding.build", "--source", name, "--sources", sources, "--zoo", "tiny",
            "--out", out / "data" / name)  # fmt: skip

    print("\n2/4  Train: two ranks stream both sources, 90% shapes and 10% patterns")
    run_dir, metrics = out / "run", out / "run" / "metrics.jsonl"
    train = [*ranks, str(LAUNCH / "train.py"), "--config", str(CONFIG), "--run-dir", str(run_dir),
             "--data.sources", str(out / "data" / "shapes"), str(out / "data" / "patterns"),
             "--data.weights", "0.9", "0.1"]  # fmt: skip
    total = tomllib.loads(CONFIG.read_text())["trainer"]["total_steps"]
    interrupt(train, metrics, total // 2, out / "interrupted.log")
    print("\n3/4  Resume: the very same command")
    run(*train)

    print("\n4/4  Sample: prompts become pictures; the teachers are not needed any more")
    prompts = [caption(*cell) for cell in CELLS] + PATTERN_CELLS
    grid = out / "grid.png"
    run(python, LAUNCH / "sample.py", "--checkpoint", run_dir, "--zoo", "tiny", "--out", grid,
        "--shift", "1", "--guidance", "3", "--prompt", *prompts)  # fmt: skip

    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.")
    records = read_metrics(metrics)
    if [record["step"] for record in records] != list(range(1, total + 1)):
        sys.exit(f"demo: {metrics} does not have each step once")
    print("\n  step    loss    main    lune     sol")
    for record in [*records[:: total // 8], records[-1]]:
        print("{step:6d}  {loss:.4f}  {main:.4f}  {lune:.4f}  {sol:.4f}".format(**record))
    cells = cut_cells(np.asarray(Image.open(grid)), len(prompts))
    coloured = shaped = 0
    print()
    for cell, (colour, shape, background) in zip(cells, CELLS, strict=False):
        colours, seen = has_colours(cell, colour, background), nearest_shape(cell, colour, background)
        coloured, shaped = coloured + colours, shaped + (colours and seen == shape)
        verdict = "colours right, " if colours else "colours wrong, "
        print(f"  {caption(colour, shape, background):42s} {verdict}looks most like a {seen}")
    print(f"right in both colours: {coloured} of {len(CELLS)}; in shape as well: {shaped}")
    print(f"""
The pictures      {grid}
The checkpoint    {run_dir / "checkpoints"}
TensorBoard       tensorboard --logdir {run_dir}
Losses, each step {metrics}

What to try next:
  python launch/sample.py --checkpoint {run_dir} --zoo tiny --prompt "a white ring on a red background" --out ring.png
  tar tf {out / "data" / "shapes" / "shapes-000000.tar"} | head
  python -m sharding.build --list       the sources that are known, and how to describe your own
  ./torchrun.sh --help                  the same training on more devices and machines""")
    if min(coloured, shaped) <= len(CELLS) / 2:
        sys.exit("demo: most pictures should have had the colours and the shape that were asked for")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
