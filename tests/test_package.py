import configparser
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_deepcrl

ROOT = Path(__file__).parent.parent


def test_import_adds_nothing_heavy_to_stable_baselines3():
    code = (
        "import sys, stable_baselines3; before = set(sys.modules); import sb3_deepcrl; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'mujoco', 'gymnasium_robotics', 'matplotlib', 'rl_zoo3', 'pandas', 'sb3_contrib'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_rooms_import_downwards_only():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sb3_deepcrl.__version__)
    assert f"## Release {sb3_deepcrl.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_public_is_documented():
    missing = []
    for info in pkgutil.walk_packages(sb3_deepcrl.__path__, "sb3_deepcrl."):
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(thing) and not thing.__doc__:
                missing.append(f"{info.name}.{name}")
            if inspect.isclass(thing):
                if not vars(thing).get("__doc__"):
                    missing.append(f"{info.name}.{name}")
                for method_name, method in vars(thing).items():
                    if not method_name.startswith("_") and inspect.isfunction(method) and not inspect.getdoc(method):
                        missing.append(f"{info.name}.{name}.{method_name}")
    assert missing == []


def test_ci_runs_the_test_command_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -E '(.*)' README.md", ci).group(1)  # type: ignore[union-attr]
    commands = re.findall(pattern, (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert commands == ['pip install torch==2.13.0 && pip install -e ".[tests]" && python -m pytest']
    assert 'eval "$command"' in ci


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "sb3_deepcrl"]])
def test_style(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_package_data():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert {"py.typed", "version.txt"} <= set(config["options.package_data"]["sb3_deepcrl"].split())
    assert {"tests", "plots", "zoo"} <= set(config["options.extras_require"])
