"""A run reads one commit of a Hub source, on all ranks and after every resume."""

import json
import re
from pathlib import Path

import pytest

from tests.dataset_hub import commit_id, dataset_hub
from tests.training import make_source, train
from tinyflux.shards.clients import VERSIONED, repo_of, without_revision
from tinyflux.shards.source import base_url

REPO = "user/repo"
URL = f"hf://datasets/{REPO}"


def recorded(run_dir: Path, step: int) -> dict[str, str]:
    text = (run_dir / "checkpoints" / f"step_{step}" / "metadata.json").read_text()
    return json.loads(text)["identity"]["revisions"]


def test_a_resume_stays_at_its_commit_until_told_otherwise(tmp_path, monkeypatch):
    commits = [
        {path.name: path.read_bytes() for path in make_source(tmp_path / str(n) / "a", 1, samples=n).iterdir()}
        for n in (24, 40)
    ]
    first, second = (commit_id(REPO, i) for i in range(2))
    run_dir, options = tmp_path / "run", ("--data.cache-dir", tmp_path / "cache", "--trainer.total-steps")
    with dataset_hub() as hub:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        hub.repos[REPO] = commits[:1]
        done = train(run_dir, [URL], *options, 2, ranks=2)
        assert done.returncode == 0 and recorded(run_dir, 2) == {URL: first}, done.stdout

        hub.repos[REPO].append(commits[1])
        done = train(run_dir, [URL], *options, 4, ranks=2)
        assert done.returncode == 0 and "resuming at step 2" in done.stdout, done.stdout
        warnings = [line for line in done.stdout.splitlines() if "WARNING" in line]
        assert recorded(run_dir, 4) == {URL: first}, done.stdout
        assert warnings == ["WARNING: since this checkpoint trainer.total_steps was 2, is now 4"], done.stdout
        assert {commit for commit, _ in hub.served} == {first}

        done = train(run_dir, [f"{URL}@{second}"], *options, 6, ranks=2)
        assert done.returncode == 0 and "WARNING: revisions was" in done.stdout, done.stdout
        assert recorded(run_dir, 6) == {f"{URL}@{second}": second}
        assert second in {commit for commit, _ in hub.served}


@pytest.mark.parametrize("repo", ["hf://datasets/user/repo", "vault://repo"])
def test_urls_of_a_scheme_with_revisions(monkeypatch, repo):
    monkeypatch.setitem(VERSIONED, "vault", re.compile(r"(vault://[^/@]+)(?:@([^/]+))?(?:/(.*?))?/?"))
    for url in (repo, f"{repo}@v1", f"{repo}/faces/lune", f"{repo}@v1/faces/lune/"):
        assert repo_of(url) == repo and without_revision(url) == url.replace("@v1", "").rstrip("/")
    assert base_url(f"{repo}@v1/faces/lune", "../base") == f"{repo}@v1/faces/base"
    with pytest.raises(ValueError, match="not a path inside the same"):
        base_url(f"{repo}@v1/lune", "../../other")
    for url in ("s3://bucket/repo@v1/lune", "data/repo@v1"):
        assert repo_of(url) is None and without_revision(url) == url
