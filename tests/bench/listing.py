"""Memory and time of listing a source: a real folder tree, and made-up names through the same code.

    python tests/bench/listing.py --files 200000 --names 10000000

Prints the peak of the resident memory, which must not grow with the number of names, and the rate.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds.base import ImageSource, Input
from tinyflux.precache.kinds.imagefolder import ImageFolder
from tinyflux.precache.listing import Counted


@dataclass(frozen=True, kw_only=True)
class Names(ImageSource):
    """Names like those of a folder, with a caption each."""

    count: int

    def inputs(self, size: int, seed: int) -> Iterator[Input]:
        for i in range(self.count):
            name, stamp = f"class-{i % 1000:04d}/image-{i:09d}.jpg", f"{i} 1700000000000000000"
            yield Input(name, stamp, i, [f"caption number {i}"])

    def read_image(self, item: Input) -> bytes:
        raise Rejected("there is only a name")


def measure(source: ImageSource, folder: Path) -> None:
    listing, start = Counted(folder, source, 0, part_size=256), time.perf_counter()
    listing.begin()
    listed = time.perf_counter() - start
    last = listing.rows(listing.parts - 1)[-1]
    start = time.perf_counter()
    changes = listing.changes(lambda *_: False)
    compared = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        json.dumps(
            {
                "kind": source.kind, "inputs": listing.total, "parts": listing.parts, "last": last[1].origin,
                "changed": bool(changes), "listed_s": round(listed, 1), "compared_s": round(compared, 1),
                "notes_MB": round(size / 1e6, 1),
                "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        ),
        flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000, help="images of a real folder, a caption file each")
    parser.add_argument("--names", type=int, nargs="+", default=[10**6, 10**7])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for i in range(args.files):
            below = root / "images" / f"{i % 200:03d}"
            if i < 200:
                below.mkdir(parents=True)
            (below / f"{i:07d}.jpg").touch()
            (below / f"{i:07d}.txt").touch()
        if args.files:
            folder = ImageFolder(name="a", kind="imagefolder", base=root, dataset_id=1, location="images")
            measure(folder, root / "notes")
        for count in args.names:
            names = Names(name="a", kind="names", base=root, dataset_id=1, count=count)
            measure(names, root / f"notes-{count}")


if __name__ == "__main__":
    main()
