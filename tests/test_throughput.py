"""benchmarks/throughput.py as a rehearsal."""

import json

import pytest
from conftest import run_python


def test_throughput_rehearsal(tmp_path):
    words = ["--quick", "--only", "buffer", "--device", "cpu", "--repeats", 2, "--json", tmp_path / "table.json"]
    done = run_python("benchmarks/throughput.py", *words)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    (row,) = table["rows"]
    assert row["unit"] == "ms/batch" and row["ratio"] is None
    assert row["per_second"] == pytest.approx(1e3 / row["value"])
    assert table["quick"] and table["versions"]["torch"] in done.stdout
    assert all(text in done.stdout for text in ("REHEARSAL", "calibration:", "torch threads"))
