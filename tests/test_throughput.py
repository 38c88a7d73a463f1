"""benchmarks/throughput.py as a rehearsal."""

import json
import subprocess
import sys

import pytest
from test_report import ROOT, files


def test_throughput_rehearsal(tmp_path):
    words = ["--quick", "--only", "buffer", "--device", "cpu", "--repeats", 2, "--json", tmp_path / "table.json"]
    command = [sys.executable, "-B", "benchmarks/throughput.py", *map(str, words)]
    before, done = files(ROOT / "benchmarks"), subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    (row,) = table["rows"]
    assert row["unit"] == "ms/batch" and 0 < row["value"] < 10_000 and row["ratio"] is None
    assert row["per_second"] == pytest.approx(1e3 / row["value"])
    assert table["calibration_s"] > 0 and table["quick"] and table["versions"]["torch"] in done.stdout
    assert all(text in done.stdout for text in ("REHEARSAL", "calibration:", "Zen 5", "torch threads"))
    assert files(ROOT / "benchmarks") == before
