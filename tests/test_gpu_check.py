import json
import sys
from pathlib import Path

import pytest
import torch as th

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(BENCHMARKS.parent)
    import gpu_check

    return gpu_check


@pytest.mark.parametrize(
    ("name", "n_rows"),
    [
        ("ceilings", 5),
        ("update", 7),
        ("equality", 6),
        ("gpu_tests", 1),
        ("learn", 2),
        ("training", 1),
        ("profile", 16),
        ("envs", 3),
        ("tensor_envs", 1),
    ],
)
def test_sections_run_on_a_cpu(gpu_check, capsys, name, n_rows):
    """Nothing but slips of the pen is found here, before they cost time on a GPU."""
    if name == "tensor_envs":
        pytest.importorskip("mujoco_warp")
    gpu_check.run_section(name, "cpu")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(rows) == n_rows and not any("failed" in row for row in rows), rows
    assert len(gpu_check.table(rows)) == n_rows + 2
    if name == "equality":
        assert all(row["relative difference"] < 1e-6 for row in rows)
    if name == "tensor_envs":
        assert rows[0]["error"] < 1e-5 and rows[0]["diverged"] == 0
    if name == "gpu_tests":
        assert rows[0]["exit status"] == 0
    assert name in {section.__name__ for section in gpu_check.SECTIONS}
    assert sum(gpu_check.SECTIONS.values()) < 720
    assert th.get_float32_matmul_precision() == "highest"


def test_report_keeps_what_there_is(gpu_check, monkeypatch, capsys, tmp_path):
    """A section that takes too long, or fails, is told of, and those before and after it are there."""

    def good(gpu):
        """First."""

    def slow(gpu):
        """Second."""

    def broken(gpu):
        """Third."""
        yield dict(number=3.0)
        raise ValueError("no good")

    # In place of the script, which takes longer to start
    (tmp_path / "worker.py").write_text(
        "import sys, time\nprint('{\"number\": 1.23456}', flush=True)\nif sys.argv[-1] == 'slow': time.sleep(60)"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "worker.py"))
    monkeypatch.setattr(gpu_check, "SECTIONS", {slow: 5, good: 60, broken: 60})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--output", str(tmp_path / "gpu.md")])
    gpu_check.main()
    report = (tmp_path / "gpu.md").read_text()
    second, first = (report.split(f"## {name}")[1].split("##")[0] for name in ("slow", "good"))
    assert "no GPU" in report.splitlines()[2] and report.strip() == capsys.readouterr().out.strip()
    assert "| 1.235 |" in second and "Ended early: TimeoutExpired" in second
    assert "| 1.235 |" in first and "Ended early" not in first
    gpu_check.run_section("broken", "cpu")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"number": 3.0},
        {"failed": "ValueError: no good"},
    ]
