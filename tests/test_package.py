import ast
import configparser
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sb3_deepcrl
from sb3_deepcrl.analysis import STUDIES
from sb3_deepcrl.common.startup import is_command

ROOT = Path(__file__).parent.parent


def test_import_adds_nothing_heavy_to_stable_baselines3():
    code = (
        "import sys, stable_baselines3; before = set(sys.modules); import sb3_deepcrl; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'mujoco', 'gymnasium_robotics', 'matplotlib', 'rl_zoo3', 'pandas'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    names = {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"}
    variables = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**variables, **environment}, capture_output=True, text=True, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what libgomp says, which PyTorch has on Linux")
@pytest.mark.parametrize(
    ("arguments", "environment", "found"),
    [
        (("-m", "sb3_deepcrl.analysis", "--help"), {}, "1000"),
        (("-msb3_deepcrl.zoo", "train", "--help"), {}, "1000"),
        (("-m", "sb3_deepcrl", "--version"), {}, "1000"),
        (("-m", "sb3_deepcrl.zoo", "train", "--help"), {"GOMP_SPINCOUNT": "7"}, "7"),
        (("-m", "sb3_deepcrl.analysis", "--help"), {"OMP_WAIT_POLICY": "active"}, "30000000000"),
        # The user's own program
        (("-c", "import sb3_deepcrl"), {}, None),
    ],
)
def test_threads_of_commands_spin_briefly(arguments, environment, found):
    environment |= {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "2"}
    (count,) = set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", run_python(*arguments, **environment).stderr))
    if found is None:
        found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", run_python("-c", "import torch", **environment).stderr).group(1)
    assert count == found


def test_ctrl_c_while_a_command_starts_has_no_traceback():
    module = "import os, signal, sb3_deepcrl; os.kill(os.getpid(), signal.SIGINT)"
    code = f"import sys; sys.argv = ['sb3-deepcrl']; {module}"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")
    # Of the user's own program, and after the start, it is an exception
    end = "sb3_deepcrl.common.startup.end_start(); os.kill"
    for code in (module, command[-1].replace("os.kill", end)):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.stderr.endswith("KeyboardInterrupt\n")


def test_console_script_is_a_command(monkeypatch):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for line in config["options.entry_points"]["console_scripts"].split("\n")[1:]:
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{line.split()[0]}", "--help"])
        assert is_command()
    # While Python looks for the module of `python -m pytest tests`
    monkeypatch.setattr(sys, "argv", ["-m", "tests"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest", "tests"])
    assert not is_command()
    for argv in ([], [""], ["-c"], ["script.py"]):
        monkeypatch.setattr(sys, "argv", argv)
        assert not is_command()


@pytest.mark.parametrize("notice", ["AdroitHandDoorDense-v1 was updated", "FetchReach-v4 was updated"])
def test_of_the_notices_of_gymnasium_robotics_only_that_on_adroit_is_left_out(notice):
    version = importlib.metadata.version("gymnasium-robotics")
    code = (
        "from farama_notifications import notifications; from sb3_deepcrl.env_ids import import_gymnasium_robotics; "
        f"notifications['gymnasium_robotics'] = {{{version!r}: {notice!r}}}; import_gymnasium_robotics()"
    )
    assert run_python("-c", code).stderr.strip() == ("" if notice.startswith("Adroit") else notice)


def test_version_of_the_command():
    result = run_python("-m", "sb3_deepcrl", "--version")
    assert (result.stdout, result.stderr) == (f"sb3-deepcrl {sb3_deepcrl.__version__}\n", "")


def test_rooms_named_in_strings_are_below():
    """import-linter does not see them, such as an entry point of Gymnasium."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    levels = {room: level for level, rooms in enumerate(contracts[0]["layers"]) for room in rooms.split(" | ")}
    package = ROOT / "sb3_deepcrl"
    for path in package.rglob("*.py"):
        level = levels.get(f"sb3_deepcrl.{path.relative_to(package).parts[0]}", -1)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for room in re.findall(r"^sb3_deepcrl\.\w+", node.value):
                    own = path.is_relative_to(ROOT / room.replace(".", "/"))
                    assert own or levels.get(room, len(levels)) > level, f"{path} names {node.value}"


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sb3_deepcrl.__version__)
    assert f"## Release {sb3_deepcrl.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {sb3_deepcrl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


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


def test_pages_name_all_there_is_once():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    common = {path.name for path in (ROOT / "sb3_deepcrl" / "common").iterdir() if path.suffix in (".py", ".cpp")}
    for page, names in {
        "guide/studies.md": STUDIES,
        "guide/rl_zoo.md": {path.stem for path in (ROOT / "zoo_configs").glob("*.yml")},
        "guide/install.md": config["options.extras_require"],
        "guide/architecture.md": common - {"__init__.py"},
    }.items():
        first_cells = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
        named = re.findall(r"`([\w.-]+)`", " ".join(first_cells))
        assert {name: named.count(name) for name in names} == dict.fromkeys(names, 1), page
    api = (ROOT / "docs" / "modules" / "analysis.md").read_text().splitlines()
    assert [study for study in STUDIES.values() if api.count(f".. autoclass:: {study.__name__}") != 1] == []


def test_ci_runs_the_test_command_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -E '(.*)' README.md", ci).group(1)
    (command,) = re.findall(pattern, (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    *install, test = command.split(" && ")
    assert install == ["pip install torch==2.13.0", 'pip install -e ".[tests]"']
    assert f"\t{test}" in (ROOT / "Makefile").read_text()
    assert re.findall('eval "(.*)"', ci) == ["${command% && *}", "${command##* && }"]


def test_package_data():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert {"py.typed", "version.txt"} <= set(config["options.package_data"]["sb3_deepcrl"].split())
    assert {"tests", "plots", "zoo"} <= set(config["options.extras_require"])
    assert [path for path in (ROOT / "sb3_deepcrl").rglob("*") if path.stat().st_size > 2e6] == []
