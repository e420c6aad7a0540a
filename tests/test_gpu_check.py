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
        ("capture_failure", 2),
        ("gpu_tests", 1),
        ("learn", 2),
        ("training", 1),
        ("profile", 16),
        ("envs", 3),
    ],
)
def test_sections_run_on_a_cpu(gpu_check, capsys, name, n_rows):
    """Nothing but slips of the pen is found here, before they cost time on a GPU."""
    gpu_check.run_section(name, "cpu")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(rows) == n_rows and not any("failed" in row for row in rows), rows
    assert len(gpu_check.table(rows)) == n_rows + 2
    if name == "equality":
        assert all(row["relative difference"] < 1e-6 for row in rows)
    if name == "gpu_tests":
        assert rows[0]["exit status"] == 0
    assert name in {section.__name__ for section in gpu_check.SECTIONS}
    assert sum(gpu_check.SECTIONS.values()) < 500
    assert th.get_float32_matmul_precision() == "highest"


def test_report_keeps_what_there_is(gpu_check, monkeypatch, tmp_path):
    """A section that takes too long, or fails, is told of, and those before and after it are there."""
    script = tmp_path / "check.py"
    source = (BENCHMARKS / "gpu_check.py").read_text()
    ending = source.index('if __name__ == "__main__":')
    script.write_text(
        source[:ending]
        + f"""
def good(gpu):
    'First.'
    yield dict(number=1.23456)

def slow(gpu):
    'Second.'
    yield dict(number=2.0)
    time.sleep(60)

def broken(gpu):
    'Third.'
    yield dict(number=3.0)
    raise ValueError("no good")

SECTIONS = {{good: 60, slow: 12, broken: 60}}
sys.argv[1:] = sys.argv[1:] or ["--device", "cpu", "--output", {str(tmp_path / "gpu.md")!r}]
main()
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    import subprocess

    subprocess.run([sys.executable, "-W", "ignore", str(script)], check=True, timeout=120)
    report = (tmp_path / "gpu.md").read_text()
    first, second, third = (report.split(f"## {name}")[1] for name in ("good", "slow", "broken"))
    assert "no GPU" in report.splitlines()[2] and "| 1.235 |" in first
    assert "| 2 |" in second and "Ended early: TimeoutExpired" in second
    assert "| 3 |" in third and "ValueError: no good" in third
