import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_deepcrl

ROOT = Path(__file__).parent.parent


def test_import_is_light():
    code = (
        "import sys, sb3_deepcrl; "
        "heavy = {'mujoco', 'gymnasium_robotics', 'matplotlib', 'rl_zoo3', 'pandas', 'sb3_contrib'} & set(sys.modules); "
        "print(sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Stable-Baselines3 itself imports these two where they are installed
    assert result.stdout.strip() in ("[]", "['matplotlib']", "['matplotlib', 'pandas']", "['pandas']")


def test_import_adds_nothing_heavy_to_stable_baselines3():
    code = (
        "import sys, stable_baselines3; before = set(sys.modules); import sb3_deepcrl; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'mujoco', 'gymnasium_robotics', 'matplotlib', 'rl_zoo3', 'pandas', 'sb3_contrib'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_rooms_import_downwards_only():
    result = subprocess.run(["lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sb3_deepcrl.__version__)
    assert f"## Release {sb3_deepcrl.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_exist_and_are_documented():
    for name in sb3_deepcrl.__all__:
        assert name == "__version__" or getattr(sb3_deepcrl, name).__doc__


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^.*pytest.*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "sb3_deepcrl"]])
def test_style(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_package_data():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert {"py.typed", "version.txt"} <= set(config["options.package_data"]["sb3_deepcrl"].split())
    assert {"tests", "plots", "zoo"} <= set(config["options.extras_require"])
