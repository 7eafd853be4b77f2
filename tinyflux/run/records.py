"""The records of a run, read: the lines of metrics.jsonl. Needs no torch."""

import json
from pathlib import Path


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of RUN_DIR/metrics.jsonl, oldest first. Raises ValueError naming a line that is none."""
    path = Path(run_dir) / "metrics.jsonl"
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        records.append(parse(line))
        if records[-1] is None:
            raise ValueError(f"{path}: line {number} is damaged ({line[:20]!r}): delete it, the others are used then")
    return records


def parse(line: bytes) -> dict | None:
    """A line of metrics.jsonl; None where it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:  # a crash of the machine may leave zeros
        return None
    return record if isinstance(record, dict) and "step" in record else None


def data_lines(report: dict) -> list[str]:
    """A `metrics.data_report` to read, a line a source and one for the rest."""
    lines = [
        f"source {name}: {s['samples']:,} samples, share {s['share']:.4f} of {s['requested']:.4f} requested,"
        f" {s['passes']:.2f} passes in all"
        for name, s in report["sources"].items()
    ]
    rest = f"data: {report['bad_samples']} bad samples, {report['replaced_samples']} replacements"
    cached, late, fetched = (report[name] for name in ("cache_hits", "late_shards", "fetched_bytes"))
    if cached or late or fetched:
        rest += f"; {cached} shards found in the cache, {late} waited for, {fetched / 1e6:,.1f} MB fetched"
    return [*lines, rest]
