import runpy
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).parent.parent / "examples"
# Steps that end after the first updates, and what is written
TOY = {
    "train": (1100, "point_umaze/evaluations.npz"),
    "load_and_continue": (200, "point_umaze/model.zip"),
    "value_map": (0, "point_umaze/value.png"),
    "export": (0, "point_umaze/policy.onnx"),
    "own_maze": (1100, "own_maze.png"),
    "own_env": (1100, None),
    "deep_sac": (210, "deep_sac.zip"),
}


def run_example(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, str(TOY[name][0])])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With what the first example saves, which others load."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_example("train")
    return folder


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    plt.switch_backend("Agg")
    if name != "train":
        run_example(name)
    assert (folder / (TOY[name][1] or ".")).exists()
