"""Read the records of a run, the lines of metrics.jsonl. Does not import torch."""

import json
from pathlib import Path


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of RUN_DIR/metrics.jsonl, oldest first. Raises ValueError with the number of a damaged line."""
    path = Path(run_dir) / "metrics.jsonl"
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        records.append(parse(line))
        if records[-1] is None:
            raise ValueError(f"{path}: line {number} is damaged ({line[:20]!r}): delete it to use the other lines")
    return records


def parse(line: bytes) -> dict | None:
    """A line of metrics.jsonl; None if it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:  # a machine crash may leave zeros
        return None
    return record if isinstance(record, dict) and "step" in record else None


def data_lines(report: dict) -> list[str]:
    """A `metrics.data_report` as text: one line per source and one for the rest."""
    lines = [
        f"source {name}: {s['samples']:,} samples since the last start, share {s['share']:.4f} of"
        f" {s['requested']:.4f} requested, {s['passes']:.2f} passes since step 0"
        for name, s in report["sources"].items()
    ]
    rest = f"data: {report['bad_samples']} bad samples, {report['replaced_samples']} replacements"
    cached, late, fetched = (report[name] for name in ("cache_hits", "late_shards", "fetched_bytes"))
    if cached or late or fetched:
        rest += f"; {cached} shards found in the cache, {late} waited for, {fetched / 1e6:,.1f} MB downloaded"
    return [*lines, rest]
