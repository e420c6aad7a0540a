import os
import re
import signal
import subprocess
import sys
import time

import pytest

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.__main__ import main


def test_main_trains_evaluates_and_saves(tmp_path, capsys):
    args = "--steps 1200 --n-envs 2 --depth 4 --batch-size 16 --eval-episodes 2".split()
    main([*args, "--output", str(tmp_path)])
    output = capsys.readouterr().out
    assert re.search(r"success.*time at goal.*contrastive accuracy.*steps/s", output)
    assert "2 evaluation episodes after 1200 env steps" in output
    assert DeepCRL.load(tmp_path / "PointMaze_UMaze-v3.zip").num_timesteps == 1200
    assert (tmp_path / "PointMaze_UMaze-v3-value.png").stat().st_size > 10_000


@pytest.mark.parametrize(("env_id", "has_picture"), [("HumanoidUMaze-v0", True), ("ArmPushEasy-v0", False)])
def test_main_on_other_envs(env_id, has_picture, tmp_path, capsys):
    args = "--steps 1100 --n-envs 2 --depth 4 --batch-size 16 --eval-episodes 1".split()
    main(["--env", env_id, *args, "--output", str(tmp_path)])
    assert (tmp_path / f"{env_id}.zip").exists()
    assert (tmp_path / f"{env_id}-value.png").exists() == has_picture
    assert ("No picture: " in capsys.readouterr().out) != has_picture


def test_interrupted_main_saves_what_it_has(tmp_path):
    args = ["--steps", "1000000", "--n-envs", "2", "--depth", "4", "--batch-size", "16", "--eval-episodes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sb3_deepcrl", *args, "--output", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    # Says so before it starts
    assert "DeepCRL of depth 4" in process.stdout.readline()
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Interrupted: the model is saved as it is now" in output
    assert 0 < DeepCRL.load(tmp_path / "PointMaze_UMaze-v3.zip").num_timesteps < 1_000_000
    assert os.path.exists(tmp_path / "PointMaze_UMaze-v3-value.png")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "many"], "argument --steps: must be a positive integer, got 'many'"),
        (["--n-envs", "0"], "argument --n-envs: must be a positive integer, got '0'"),
        (["--depth", "6"], "`depth` must be a positive multiple of 4"),
        (["--env", "PointMaze_UMaz-v3"], "PointMaze_UMaz"),
        (["--env", "Pendulum-v1"], "`achieved_goal`, `desired_goal` missing"),
    ],
)
def test_wrong_arguments_end_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    assert message in f"{exit_info.value}{capsys.readouterr().err}"
