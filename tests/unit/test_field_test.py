"""python -m tinyflux.test_training: from pictures to falling losses, and its output if they do not fall."""

import pytest

from tinyflux import test_training as field_test

pytestmark = pytest.mark.usefixtures("one_thread")


def test_passes(tmp_path, capsys):
    assert field_test.main(["--zoo", "tiny", "--device", "cpu", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "PASSED" in out and out.count("fell\n") == 4
    assert (tmp_path / "cache" / "manifest.json").is_file() and (tmp_path / "run" / "report.html").is_file()


def test_fails_with_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(field_test, "LIMIT", 0.1)
    assert field_test.main(["--zoo", "tiny", "--device", "cpu", "--steps", "20"]) == 1
    out = capsys.readouterr().out
    assert "the last losses are not below 0.1" in out and out.rstrip().endswith("FAILED")
    assert field_test.main(["--zoo", "nowhere"]) == 2
    assert 'error: nowhere: a zoo is "flux", "tiny" or a folder' in capsys.readouterr().err
