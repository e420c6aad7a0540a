import csv
import errno
import importlib.util
import inspect
import json
import os
import pickle
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3.exp_manager
import rl_zoo3.train
import torch
import yaml
from gymnasium.envs.registration import EnvSpec
from rl_zoo3.callbacks import TrialEvalCallback
from rl_zoo3.utils import ALGOS
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.__main__ import main
from sb3_deepcrl.common.distributed import Ranks
from sb3_deepcrl.common.evaluation import evaluate_goals, mean_of_episodes
from sb3_deepcrl.common.utils import STOP_SIGNALS
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs import BatchVecEnv
from sb3_deepcrl.tensor_envs import WarpVecEnv
from sb3_deepcrl.zoo.callbacks import make_trial_callback
from sb3_deepcrl.zoo.config import config_folder, find_config
from sb3_deepcrl.zoo.exp_manager import GoalExperimentManager
from sb3_deepcrl.zoo.hyperparams_opt import convert_deepcrl_params, sample_deepcrl_params
from sb3_deepcrl.zoo.launcher import SCRIPTS, run
from sb3_deepcrl.zoo.provenance import made_with
from sb3_deepcrl.zoo.runs import AGENTS, RunFolder, RunLoader, num_timesteps
from tests.envs import GoalReachEnv, add_package

ROOT = Path(__file__).parent.parent
ENV = "PointUMaze-v0"
N_ENVS = 4
TINY = "-params n_envs:4 width:16 depth:4 batch_size:16 learning_starts:100 train_freq:4 gradient_steps:1".split()
TINY_SAC = "-params n_envs:4 policy_kwargs:dict(net_arch=[16]) learning_starts:604 train_freq:4 gradient_steps:1".split()
TINY_SAC += "batch_size:16 buffer_size:4000".split()
# The run that most tests look at: evaluated and saved twice
N_STEPS, EVERY = 1600, 800


def has_gl() -> bool:
    if os.environ.get("MUJOCO_GL", "") == "" and os.environ.get("DISPLAY", "") == "":
        return False
    code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def train(folder: Path, *args: str) -> None:
    # Of two flags the last one counts, and a run that is continued has its own
    defaults = () if "-i" in args else ("--env", ENV, "--eval-freq", "-1")
    run("train", ["-f", str(folder), "--num-threads", "1", *defaults, *args])


@contextmanager
def start(folder: Path, *args: str, **kwargs: Any) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "sb3_deepcrl.zoo", "train", "-f", str(folder), "--env", ENV, "--num-threads", "1"]
    with subprocess.Popen([*command, "-n", "1000000", "--eval-freq", "-1", *TINY, *args], **kwargs) as process:
        try:
            yield process
        finally:
            # Where the test has failed, nothing else ends it
            process.kill()


def final_model(folder: Path, number: int = 1, algo: str = "deepcrl") -> Path:
    return folder / algo / f"{ENV}_{number}" / f"{ENV}.zip"


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    args = f"-n {N_STEPS / 1e3}e3 --eval-freq {EVERY} --eval-episodes 4 --n-eval-envs 4 --eval-env PointUMazeEval-v0".split()
    args += f"--save-freq {EVERY} --save-replay-buffer --seed 3 -tb {folder / 'tb'}".split()
    train(folder, *args, *TINY, "learning_rate:'lin_1e-3'", "critic_learning_rate:'lin_1e-3'")
    return folder


@pytest.fixture
def run_folder(logs) -> Path:
    return logs / "deepcrl" / f"{ENV}_1"


def test_train_logs_what_the_zoo_reads(logs, run_folder):
    assert {path.name for path in run_folder.iterdir()} >= {
        f"{ENV}.zip",
        "best_model.zip",
        "replay_buffer.pkl",
        f"rl_model_{EVERY}_steps.zip",
        f"rl_model_{N_STEPS}_steps.zip",
    }
    # The final one takes the place of those of the checkpoints
    assert not list(run_folder.glob("rl_model_replay_buffer_*"))
    with (run_folder / "0.monitor.csv").open() as file:
        assert file.readlines()[1].strip() == "r,l,t,is_success"
    assert list((logs / "tb" / ENV / "DeepCRL_1").iterdir())


def test_what_the_folder_of_a_run_tells(logs):
    run_folder = RunFolder.newest(logs, "deepcrl", ENV)
    assert RunFolder.newest(logs, "sac", ENV) is None
    assert run_folder.num_timesteps == N_STEPS
    assert (run_folder.config()["width"], run_folder.args()["eval_env"]) == (16, "PointUMazeEval-v0")
    evaluations = run_folder.evaluations()
    assert evaluations["timesteps"].tolist() == [EVERY, N_STEPS]
    assert evaluations["successes"].shape == evaluations["time_at_goal"].shape == (2, 4)
    assert (np.diff(evaluations["seconds"]) > 0).all()
    (record,) = run_folder.made_with()
    assert record["num_timesteps"] == 0
    assert record["threads"] == 1 and record["packages"]["torch"] == torch.__version__
    assert len(record["source"]) == 10
    arguments = record["arguments"]
    # What was given, what it is by default, and what follows from it
    assert (arguments["learning_rate"], arguments["gamma"], arguments["n_envs"]) == ("lin_1e-3", 0.95, N_ENVS)
    assert (arguments["tau"], arguments["policy_kwargs.norm"], arguments["target_entropy"]) == (0.005, "layer", -1.0)
    assert (arguments["env.goal"], arguments["eval_env.goal_set"]) == ("continuing", "eval")
    assert arguments["env.vec_env"] == "BatchVecEnv"
    model = run_folder.load_model()
    assert (model.num_timesteps, model.buffer_size) == (N_STEPS, 1)
    model.precision = "float32"
    model._setup_acceleration(None)
    assert made_with(model, {}, {})["precision"] == "float32"
    # As on a GPU
    model._runner._tf32 = True
    assert made_with(model, {}, {})["precision"] == "tf32"


def save_as(path: Path, steps: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", json.dumps({"num_timesteps": steps}))


def test_newest_complete_checkpoint(tmp_path):
    run_folder = RunFolder(tmp_path)
    assert (run_folder.model_path, run_folder.num_timesteps, run_folder.evaluations()) == (None, 0, {})
    with pytest.raises(ValueError, match="There is no model"):
        run_folder.load_model()
    with pytest.raises(ValueError, match="is no folder of a run"):
        run_folder.config()
    (tmp_path / ENV).mkdir()
    for name in ("args.yml", "config.yml"):
        (tmp_path / ENV / name).write_text("a: 1\n")
    final, older, newer = (tmp_path / f"{name}.zip" for name in (ENV, "rl_model_9_steps", "rl_model_16_steps"))
    buffers = [run_folder.sibling(path, "replay_buffer") for path in (final, older, newer)]
    assert [path.name for path in buffers] == [
        "replay_buffer.pkl",
        *(f"rl_model_replay_buffer_{n}_steps.pkl" for n in (9, 16)),
    ]
    for path, steps in ((final, 20), (older, 9), (newer, 16)):
        save_as(path, steps)
    assert (run_folder.model_path, run_folder.num_timesteps) == (final, 20)
    assert run_folder.find_model(before=20) == newer
    # Killed after the final buffer was written, before the final model was
    final.unlink()
    buffers[0].touch()
    assert run_folder.model_path == newer
    # Older, but with a buffer: no longer what the run has learned
    buffers[1].touch()
    assert run_folder.model_path == newer
    # Of another tool that does not save atomically
    newer.write_bytes(newer.read_bytes()[:50])
    assert run_folder.model_path == older
    assert run_folder.find_model(before=9) is None


def test_a_run_goes_on_as_if_it_had_not_stopped(logs, run_folder, tmp_path):
    model = DeepCRL.load(run_folder / f"{ENV}.zip")
    # All that the command line does not tell is as it was. The checkpoint's buffer is gone, the final model has one
    train(tmp_path, "-i", str(run_folder), "-n", "800")
    folder = tmp_path / "deepcrl" / f"{ENV}_1"
    longer = DeepCRL.load(folder / f"{ENV}.zip")
    longer.load_replay_buffer(folder / "replay_buffer.pkl")
    assert longer.num_timesteps == 2400
    assert longer.learning_starts == model.learning_starts == 100
    assert longer._n_updates == model._n_updates + 800 // 16
    assert longer._episode_num >= model._episode_num > 0
    # A step is not stored when a callback saves it
    assert longer.replay_buffer.size() * N_ENVS >= 2400 - 3 * N_ENVS
    # The schedule ends at the end of the whole run: at the last update 16 steps are left
    for optimizer in (longer.actor.optimizer, longer.critic.optimizer):
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0, abs=1e-3 * 20 / 2400)
    evaluations = RunFolder(folder).evaluations()
    assert evaluations["timesteps"].tolist() == [EVERY, N_STEPS, 2400]
    assert evaluations["time_at_goal"].shape == (3, 4)
    assert [record["num_timesteps"] for record in RunFolder(folder).made_with()] == [0, N_STEPS]
    assert (folder / "best_model.zip").is_file()
    with pytest.raises(SystemExit, match=r"was trained for 2400 steps already, of 2400 in all"):
        train(tmp_path, "-i", str(folder))
    assert not (tmp_path / "deepcrl" / f"{ENV}_2").exists()
    # What is left of the run that was continued, whose number of steps holds for its checkpoints too
    shutil.copy(run_folder / f"{ENV}.zip", folder / f"rl_model_{N_STEPS}_steps.zip")
    train(tmp_path, "-i", str(folder / f"rl_model_{N_STEPS}_steps.zip"))
    assert num_timesteps(final_model(tmp_path, 2)) == 2400


@pytest.mark.parametrize("algo, small", [("deepcrl", TINY), ("sac", TINY_SAC)])
def test_resume_goes_on_in_the_same_folder(algo, small, tmp_path, capsys):
    args = f"--algo {algo} --seed 1 --eval-freq 400 --eval-episodes 2 --n-eval-envs 2 --resume".split()
    args += ["--save-freq", "400", "--save-replay-buffer", *small]
    # There is nothing to go on with yet. The first folder is that of a run that was killed before it had a model
    (tmp_path / algo / f"{ENV}_1").mkdir(parents=True)
    folder = RunFolder(tmp_path / algo / f"{ENV}_1")
    train(tmp_path, "-n", "800", *args)
    (folder.path / ".model.zip.1.tmp").touch()
    first = folder.load_model()
    assert {path.name for path in folder.path.glob("*replay_buffer*")} == {"replay_buffer.pkl"}
    train(tmp_path, "-n", "1200", *args)
    assert [path.name for path in (tmp_path / algo).iterdir()] == [f"{ENV}_1"]
    model = folder.load_model()
    assert model.num_timesteps == folder.num_timesteps == 1200
    assert model._n_updates == first._n_updates + 400 // 16
    model = ALGOS[algo].load(folder.model_path, make_vec_env(ENV, N_ENVS))
    model.load_replay_buffer(folder.path / "replay_buffer.pkl")
    assert 1200 - 3 * N_ENVS <= model.replay_buffer.size() * N_ENVS <= 1200
    evaluations = folder.evaluations()
    assert evaluations["timesteps"].tolist() == [400, 800, 1200]
    assert (np.diff(evaluations["seconds"]) > 0).all() and (np.diff(evaluations["n_updates"]) > 0).any()
    assert [record["num_timesteps"] for record in folder.made_with()] == [0, 800]
    # The episodes before and after the stop
    assert len((folder.path / "0.monitor.csv").read_text().splitlines()) == 2 + 800 // N_ENVS // 150 + 400 // N_ENVS // 150
    assert not list(folder.path.glob("**/.*.tmp"))
    before = folder.model_path.stat().st_mtime_ns
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        train(tmp_path, "-n", "1200", *args)
    assert not exit_info.value.code
    assert f"{folder.path} is complete: 1,200 of 1,200 env steps" in capsys.readouterr().out
    assert folder.model_path.stat().st_mtime_ns == before


@pytest.mark.parametrize("n_steps", [400, 800])
def test_stopped_in_the_middle_of_an_evaluation(n_steps, tmp_path, monkeypatch):
    args = ["-n", str(n_steps), "--eval-freq", "400", "--eval-episodes", "1", "--resume", *TINY]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stable_baselines3.common.callbacks.evaluate_policy", stop)
        train(tmp_path, *args)
    folder = RunFolder.newest(tmp_path, "deepcrl", ENV)
    assert (folder.num_timesteps, folder.evaluations()) == (400, {})
    train(tmp_path, *args)
    assert folder.evaluations()["timesteps"].tolist() == [*range(400, n_steps + 1, 400)]
    with pytest.raises(SystemExit):
        train(tmp_path, *args)


@pytest.mark.parametrize("algo, small", [("deepcrl", TINY), ("sac", TINY_SAC)])
def test_resume_with_more_envs(algo, small, tmp_path):
    args = f"--algo {algo} --eval-freq 800 --eval-episodes 2 --save-replay-buffer --resume".split() + small
    train(tmp_path, "-n", "800", *args)
    folder = tmp_path / algo / f"{ENV}_1"
    config, monitor = ((folder / name).read_text() for name in (f"{ENV}/config.yml", "0.monitor.csv"))
    args += ["n_envs:5"]
    with pytest.raises(SystemExit, match="have 2 episodes each"):
        train(tmp_path, "-n", "1600", *args, "--eval-episodes", "3")
    if algo == "sac":
        with pytest.raises(SystemExit, match=r"n_envs: the replay buffer .* is that of 4 envs, sac cannot fill it with 5"):
            train(tmp_path, "-n", "1600", *args)
    # As it was before what is refused
    assert (folder / ENV / "config.yml").read_text() == config
    if algo == "deepcrl":
        train(tmp_path, "-n", "1600", *args)
        assert RunFolder(folder).config()["n_envs"] == 5
    assert (folder / "0.monitor.csv").read_text().startswith(monitor)
    assert len(load_results(folder)) == 4 * (800 // N_ENVS // 150) + 5 * (800 // 5 // 150) * (algo == "deepcrl")


def test_evaluations_of_another_env_are_not_taken_over(run_folder, tmp_path):
    for args in (["--env", "PointU4Maze"], ["--eval-env-kwargs", "max_episode_steps:9"], ["--eval-env", ENV]):
        train(tmp_path, "-i", str(run_folder), "-n", "16", "--eval-freq", "16", *args)
    runs = [RunFolder(path) for path in sorted((tmp_path / "deepcrl").iterdir())]
    assert [run.args()["eval_env"] for run in runs] == [None, "PointUMazeEval-v0", ENV]
    # Where the run was continued, and at the end
    assert [run.evaluations()["timesteps"].tolist() for run in runs] == [[N_STEPS, N_STEPS + 16]] * 3
    # The same env without its version has the same ones
    train(tmp_path / "same", "-i", str(run_folder), "-n", "16", "--env", "PointUMaze", "--eval-freq", "-1")
    assert RunFolder.newest(tmp_path / "same", "deepcrl", ENV).args()["eval_env"] == "PointUMazeEval-v0"


def test_seeds_share_no_envs(tmp_path):
    starts = []
    for seed in ("0", "1"):
        args = ["-n", "100", "--save-replay-buffer", "--seed", seed, *TINY]
        train(tmp_path / seed, *args)
        buffer = pickle.loads((tmp_path / seed / "deepcrl" / f"{ENV}_1" / "replay_buffer.pkl").read_bytes())
        starts += list(buffer.observations["achieved_goal"][0])
    assert len(np.unique(starts, axis=0)) == 2 * N_ENVS


def test_a_run_without_replay_buffer_collects_one_first(run_folder, tmp_path, capsys):
    path, steps = run_folder / f"rl_model_{EVERY}_steps.zip", EVERY
    for number in (1, 2):
        before = DeepCRL.load(path)._n_updates
        train(tmp_path, "-i", str(path), "-n", "128")
        assert f"No replay buffer of {path.name}: collecting 100 steps of random actions" in capsys.readouterr().out
        path = tmp_path / "deepcrl" / f"{ENV}_{number}" / f"{ENV}.zip"
        longer = DeepCRL.load(path)
        assert longer.num_timesteps == steps + 128
        assert longer.learning_starts == steps + 100
        assert before < longer._n_updates <= before + 2
        steps += 128
        if number == 1:
            (path.parent / "replay_buffer.pkl").unlink()
    # With its replay buffer, a run that stopped in the warm-up would go on with it
    train(tmp_path, "-i", str(path.parent), "-n", "16")
    assert DeepCRL.load(final_model(tmp_path, 3)).learning_starts == steps - 128 + 100
    assert RunFolder(path.parent).evaluations()["timesteps"].tolist() == [EVERY]


def test_the_best_model_does_not_take_the_final_replay_buffer(run_folder, tmp_path, capsys):
    steps = DeepCRL.load(run_folder / "best_model.zip").num_timesteps
    train(tmp_path, "-i", str(run_folder / "best_model.zip"), "-n", "16")
    assert "No replay buffer of best_model.zip: collecting 100 steps" in capsys.readouterr().out
    longer = DeepCRL.load(final_model(tmp_path))
    assert (longer.num_timesteps, longer.learning_starts) == (steps + 16, steps + 100)


def test_the_best_model_goes_on(run_folder, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / ENV / "vecnormalize.pkl").write_bytes(b"statistics")
    monkeypatch.setattr(GoalExperimentManager, "_maybe_normalize", lambda manager, env, eval_env: env)
    # No evaluation before the end
    train(tmp_path, "-i", str(folder), "-n", "16")
    new = tmp_path / "deepcrl" / f"{ENV}_1"
    assert (new / "best_model.zip").read_bytes() == (folder / "best_model.zip").read_bytes()
    assert (new / ENV / "vecnormalize.pkl").read_bytes() == b"statistics"
    # Another number of episodes begins another curve
    train(tmp_path, "-i", str(folder), "-n", "16", "--eval-episodes", "3")
    assert RunFolder.newest(tmp_path, "deepcrl", ENV).evaluations()["results"].shape == (1, 3)


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    args = ["--resume", "--save-freq", "8", "--save-replay-buffer"]
    with start(tmp_path, *args, stdout=subprocess.DEVNULL) as process:
        folder = RunFolder(tmp_path / "deepcrl" / f"{ENV}_1")
        deadline = time.monotonic() + 60
        # In the middle of writing a file, but not the first one
        while len(list(folder.path.glob("rl_model_*_steps.zip"))) < 3 or not list(folder.path.glob(".*.tmp")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    models = {path: DeepCRL.load(path).num_timesteps for path in folder.path.glob("rl_model_*_steps.zip")}
    steps = models[folder.model_path]
    assert steps == max(models.values())
    assert folder.sibling(folder.model_path, "replay_buffer").is_file()
    train(tmp_path, "-n", str(steps + 80), *args)
    assert (folder.num_timesteps, folder.model_path.name) == (steps + 80, f"{ENV}.zip")


class Interrupter(BaseCallback):
    def _on_step(self) -> bool:
        if self.n_calls >= 50:
            raise KeyboardInterrupt
        return True


class Signals(BaseCallback):
    """Sends a signal to this process."""

    numbers: ClassVar[list[int]] = []

    def _on_step(self) -> bool:
        if self.n_calls == 50:
            os.kill(os.getpid(), self.numbers[0])
        return True


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGTERM], [signal.SIGINT] * 3])
def test_signals_save_and_tell_how_to_go_on(numbers, tmp_path, monkeypatch, capsys):
    def save_and_hear(model, path):
        for number in numbers[1:]:
            os.kill(os.getpid(), number)
        save(model, path)

    save = DeepCRL.save
    monkeypatch.setattr(DeepCRL, "save", save_and_hear)
    monkeypatch.setattr(Signals, "numbers", numbers)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(SystemExit) as exit_info:
        train(tmp_path, "-n", "10000", *TINY, "callback:'tests.test_zoo.Signals'")
    assert exit_info.value.code == 128 + numbers[0]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    folder = tmp_path / "deepcrl" / f"{ENV}_1"
    assert DeepCRL.load(folder / f"{ENV}.zip").num_timesteps == 200
    (command,) = re.findall(r"200 env steps\. To go on from there: sb3-deepcrl train (.*)", capsys.readouterr().out)
    train(tmp_path, *shlex.split(command), "-n", "400", "-params", "callback:[]")
    assert num_timesteps(final_model(tmp_path, 2)) >= 400


def test_ignored_signals_stay_ignored(tmp_path, monkeypatch):
    # As `nohup` does
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(Signals, "numbers", [signal.SIGHUP])
    try:
        train(tmp_path, "-n", "320", *TINY, "callback:'tests.test_zoo.Signals'")
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert num_timesteps(final_model(tmp_path)) == 320


@pytest.mark.slow
def test_a_closed_terminal_stops_all_processes_of_a_run(tmp_path):
    pipe = subprocess.PIPE
    with start(tmp_path, "n_envs:2", "--vec-env", "subproc", stdout=pipe, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        # The first line of the training
        assert any(line.startswith("0/1,000,000 env steps") for line in process.stdout)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGHUP)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert "To go on from there: sb3-deepcrl train -i" in output
    assert num_timesteps(final_model(tmp_path)) > 0


@pytest.mark.parametrize("output", ["terminal", "pipe"])
@pytest.mark.slow
def test_output_that_nobody_reads_any_more(output, tmp_path):
    if output == "terminal":
        reader, writer = pty.openpty()
    else:
        reader, writer = os.pipe()
    with start(tmp_path, "--eval-freq", "4000", stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        read = b""
        while b"env steps" not in read:
            new = os.read(reader, 1000)
            # A pipe without a writer gives nothing, again and again
            assert new, process.communicate()[1]
            read += new
        time.sleep(1)
        os.close(reader)
        if output == "terminal":
            process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=60)
    assert num_timesteps(final_model(tmp_path)) > 0
    if output == "terminal":
        assert process.returncode == 128 + signal.SIGHUP
    else:
        assert "BrokenPipeError" in errors and "To go on from there: sb3-deepcrl train -i" in errors


class FailingEnv(gym.Wrapper):
    """An env with a bug that shows late."""

    n_steps = 0

    def step(self, action):
        self.n_steps += 1
        if self.n_steps > 50:
            raise ZeroDivisionError("a bug of the env")
        return super().step(action)


@pytest.mark.parametrize("algo", ["deepcrl", "sac"])
def test_an_error_of_the_env_saves_and_keeps_its_traceback(algo, tmp_path):
    args = ["--algo", algo, "-n", "10000"]
    small = TINY if algo == "deepcrl" else TINY_SAC
    with pytest.raises(ZeroDivisionError, match="a bug of the env") as error_info:
        train(tmp_path, *args, *small, "env_wrapper:'tests.test_zoo.FailingEnv'")
    assert error_info.traceback[-1].name == "step"
    (note,) = error_info.value.__notes__
    (command,) = re.findall(r"saved after 200 env steps. To go on from there: sb3-deepcrl train (.*)", note)
    train(tmp_path, *shlex.split(command), "-n", "400", *small, "env_wrapper:None")
    assert num_timesteps(final_model(tmp_path, 2, algo)) >= 400


def test_what_cannot_be_saved_is_told(tmp_path, monkeypatch):
    def fail(model, path):
        raise OSError("No space left on device")

    args = ["-n", "10000", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(DeepCRL, "save", fail)
        patch.setattr(DeepCRL, "train", lambda *args, **kwargs: 1 // 0)
        with pytest.raises(ZeroDivisionError) as error_info:
            train(tmp_path, *args)
    assert error_info.value.__notes__ == ["The model could not be saved: OSError: No space left on device"]

    def diverge(model, *args, **kwargs):
        next(model.policy.parameters()).data.fill_(np.nan)
        raise ZeroDivisionError

    monkeypatch.setattr(DeepCRL, "train", diverge)
    with pytest.raises(ZeroDivisionError) as error_info:
        train(tmp_path, *args)
    assert error_info.value.__notes__ == ["The model is not saved: its parameters are no finite numbers"]
    assert not list(tmp_path.glob("*/*/*.zip"))


@pytest.mark.parametrize("args", ["", "--log-interval 4", "--verbose 0"])
def test_output_of_a_training_in_a_log_file(args, tmp_path, capsys):
    arguments = ["-n", "640", "--eval-freq", "320", "--eval-episodes", "2"]
    train(tmp_path, *arguments, *args.split(), *TINY)
    output = capsys.readouterr().out
    lines = re.findall(r"^([\d,]+)/640 env steps, success at any step .* left .*$", output, flags=re.MULTILINE)
    if args:
        assert lines == []
        assert ("rollout/" in output) == ("interval" in args)
    else:
        # Every tenth part
        assert [int(line) for line in lines] == [*range(0, 640, 64), 640]
        assert "| rollout/" not in output
        assert re.search(r"categorical accuracy \d+ % \(chance 6\.2 %\)", output)
    evaluations = re.findall(r"Eval num_timesteps=(\d+): success \d+ % at any step, \d+ % at the last step, time at", output)
    assert evaluations == ["320", "640"]
    assert "Success rate" not in output


@pytest.mark.parametrize("resume", [False, True])
def test_interrupted_run_saves_what_it_has(resume, run_folder, tmp_path):
    args = ["-n", "10000", "--progress"]
    args += ["-i", str(run_folder)] if resume else []
    train(tmp_path, *args, *TINY, "callback:'tests.test_zoo.Interrupter'")
    # A run that is continued counts its calls from the start
    assert num_timesteps(final_model(tmp_path)) == (N_STEPS + 4 if resume else 200)


class RecordedBar(ProgressBarCallback):
    bars: ClassVar[list] = []

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self.bars.append(self.pbar)


def test_interrupted_progress_bar_is_closed(run_folder, tmp_path):
    callbacks = "callback:['tests.test_zoo.RecordedBar','tests.test_zoo.Interrupter']"
    train(tmp_path, "-i", str(run_folder), "-n", "10000", "-params", callbacks)
    (bar,) = RecordedBar.bars
    # What tqdm is after close()
    assert bar.disable


@pytest.mark.parametrize("depth", [4, 6])
def test_two_runs_that_start_at_the_same_moment(depth, tmp_path, monkeypatch):
    read = GoalExperimentManager.read_hyperparameters

    def read_slowly(manager):
        Path(manager.save_path).mkdir(parents=True)
        (Path(manager.save_path) / "theirs").touch()
        return read(manager)

    monkeypatch.setattr(GoalExperimentManager, "read_hyperparameters", read_slowly)
    args = ["-n", "16", *TINY, f"depth:{depth}"]
    if depth == 6:
        with pytest.raises(SystemExit, match="`depth` must be a positive multiple of 4"):
            train(tmp_path, *args)
    else:
        train(tmp_path, *args)
        assert (final_model(tmp_path, 2)).is_file()
    assert [path.name for path in (tmp_path / "deepcrl" / f"{ENV}_1").iterdir()] == ["theirs"]
    assert (tmp_path / "deepcrl" / f"{ENV}_2").exists() == (depth == 4)


@pytest.mark.parametrize("which", ["", "--load-best", f"--load-checkpoint {EVERY}", "--load-last-checkpoint"])
def test_enjoy(which, logs, capsys):
    run("enjoy", ["--env", ENV, "-f", str(logs), "-n", "301", "--no-render", *which.split()])
    output = capsys.readouterr().out
    assert "Success rate: " in output
    name = {"": ENV, "--load-best": "best_model", "--load-last-checkpoint": f"rl_model_{N_STEPS}_steps"}
    assert f"{name.get(which, f'rl_model_{EVERY}_steps')}.zip" in output


@pytest.mark.skipif(not has_gl(), reason="no OpenGL: set MUJOCO_GL=egl (Debian: libegl1) or MUJOCO_GL=osmesa (libosmesa6)")
def test_record_video(logs, tmp_path):
    run("record_video", ["--env", ENV, "-f", str(logs), "-n", "5", "-o", str(tmp_path)])
    (video,) = tmp_path.glob("*.mp4")
    assert video.stat().st_size > 1000


def command(*args: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sb3-deepcrl", *args])
        main()


@pytest.mark.slow
def test_plots(logs, tmp_path, capsys):
    common = ["-a", "deepcrl", "-e", ENV, "-f", str(tmp_path)]
    # RL Zoo's plots of several runs need two
    for number in (1, 2):
        shutil.copytree(logs / "deepcrl" / f"{ENV}_1", tmp_path / "deepcrl" / f"{ENV}_{number}")
    run("plot_train", [*common, "-y", "success", "-w", "2", "--figure", str(tmp_path / "new" / "train.png")])
    run(
        "all_plots",
        [*common, "-k", "time_at_goal", "-o", str(tmp_path / "all"), "--figure", str(tmp_path / "new" / "all.png")],
    )
    run("plot_from_file", ["-i", str(tmp_path / "all.pkl"), "--figure", str(tmp_path / "new" / "file.png")])
    for name in ("train", "all", "file"):
        assert (tmp_path / "new" / f"{name}.png").stat().st_size > 5000
    assert "No data available" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="choose another place than"):
        run("plot_from_file", ["-i", str(tmp_path / "all.pkl"), "--figure", str(tmp_path / "all.pkl" / "all.png")])


def test_value_map(logs, tmp_path, capsys, monkeypatch):
    args = ["value_map", "--env", ENV, "-f", str(logs)]
    command(*args, "-o", str(tmp_path / "new" / "value.png"))
    assert (tmp_path / "new" / "value.png").stat().st_size > 5000
    capsys.readouterr()
    for output in (tmp_path / "value", tmp_path):
        command(*args, "-o", str(output))
        path = Path(capsys.readouterr().out.strip().rpartition(": ")[2])
        assert path.suffix == ".png" and path.is_file()
    (tmp_path / "file").touch()
    for more, message in {
        ("-o", "value.xyz"): "value.xyz has the suffix of no picture: use one of ",
        ("--goal", "0", "0"): "lies in a wall",
        ("-o", str(tmp_path / "file" / "value.png")): f"choose another place than {tmp_path / 'file' / 'value.png'}",
        ("-f", str(tmp_path)): f"there is no run of {ENV}",
    }.items():
        with pytest.raises(SystemExit):
            command(*args, *more)
        assert message in capsys.readouterr().err

    def fail(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("sb3_deepcrl.analysis.run_map.plot_value_map", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        command(*args)


def test_agents_that_come_with_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in AGENTS.rglob("*")}
    args = ["--env", "PointU4Maze-v0", "--pretrained"]
    command("enjoy", *args, "--no-render", "-n", "450")
    assert float(re.search(r"Success rate: (.*)%", capsys.readouterr().out).group(1)) > 50
    command("value_map", *args)
    assert [path.name for path in tmp_path.iterdir()] == ["value.png"]
    assert {path: path.stat().st_mtime_ns for path in AGENTS.rglob("*")} == before
    message = (
        "no deepcrl agent for PointU5Maze-v0 comes with this package, only deepcrl's for AntHardestMaze-v0, FetchReach-v4"
    )
    with pytest.raises(SystemExit, match=f"^sb3-deepcrl enjoy: error: {message}"):
        command("enjoy", "--env", "PointU5Maze-v0", "--pretrained")
    with pytest.raises(SystemExit):
        command("value_map", "--env", "PointU5Maze-v0", "--pretrained")
    assert message in capsys.readouterr().err
    sizes = [path.stat().st_size for path in before if path.is_file()]
    assert max(sizes) < 2e6 and sum(sizes) < 10e6


@pytest.mark.parametrize("env_id", sorted(path.stem for path in AGENTS.glob("*/*/*.zip")))
def test_agents_are_what_their_card_says(env_id):
    run_folder = RunFolder.pretrained("deepcrl", env_id)
    _, _, success, time_at_goal, *_ = re.search(rf"\| `{env_id}` \|(.*)\|", (AGENTS / "README.md").read_text())[1].split("|")
    evaluations = run_folder.evaluations()
    assert float(success) == pytest.approx(evaluations["success_any"][-1].mean(), abs=0.005)
    assert float(time_at_goal) == pytest.approx(evaluations["time_at_goal"][-1].mean(), abs=0.5)
    env = gym.make(run_folder.args()["eval_env"] or env_id)
    env.reset(seed=0)
    found = mean_of_episodes(evaluate_goals(run_folder.load_model(), env, n_eval_episodes=20))
    assert found["success_any"] == pytest.approx(float(success), abs=0.3)


def test_model_without_the_state_of_its_optimizers(logs, run_folder, tmp_path, capsys):
    args = "export", str(run_folder), str(tmp_path / "small"), "--format", "sb3"
    command(*args)
    assert capsys.readouterr().out.startswith(f"Model of {final_model(logs)}: {tmp_path / 'small.zip'}, 0.")
    assert (tmp_path / "small.zip").stat().st_size < 0.6 * final_model(logs).stat().st_size
    whole, small = (DeepCRL.load(path, BatchVecEnv(ENV, 4)) for path in (final_model(logs), tmp_path / "small.zip"))
    torch.testing.assert_close(small.policy.state_dict(), whole.policy.state_dict(), rtol=0, atol=0)
    assert small.log_ent_coef == whole.log_ent_coef and small.num_timesteps == whole.num_timesteps == N_STEPS
    assert whole.actor.optimizer.state and not small.actor.optimizer.state
    assert small.buffer_size == whole.buffer_size and small.replay_buffer_kwargs == whole.replay_buffer_kwargs
    small.learn(400, reset_num_timesteps=False)
    for name, values in small.policy.state_dict().items():
        assert (values != whole.policy.state_dict()[name]).any(), name
    with pytest.raises(SystemExit):
        command(*args, "--env", ENV)
    assert "leave --algo, --env and --vec-normalize out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("export", str(run_folder), str(tmp_path / "small.onnx"), "--format", "sb3")
    assert "small.onnx has the suffix of another format, that of a model is .zip" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill", "prune"])
def test_student_of_a_run(name, tmp_path, capsys):
    kwargs = {"max_episode_steps": 40}
    words = ("-n", "400", "--save-replay-buffer", "--env-kwargs", "max_episode_steps:40")
    train(tmp_path, *words, *TINY, "depth:8", "normalize:True")
    teacher = RunFolder.newest(tmp_path, "deepcrl", ENV)
    # As its teacher, but for its size
    args = ["--depth", "4", "-n", "160", "-f", str(tmp_path / name), "--eval-freq", "-1", "--num-threads", "1"]
    command(name, str(teacher.path), *args, "-uuid", "--eval-env", "PointU4MazeEval-v0")
    (folder,) = (tmp_path / name / "deepcrl").iterdir()
    student = RunFolder(folder)
    assert (student.args()["env_kwargs"], student.config()["width"], student.load_model().depth) == (kwargs, 16, 4)
    statistics = [run.make_env().obs_rms["observation"].mean for run in (teacher, student)]
    np.testing.assert_array_equal(*statistics)
    output = capsys.readouterr().out
    assert "32 episodes of PointU4MazeEval-v0" in output
    assert re.search(r"teacher.* 8 .* 16 .*\n.*student.* 4 .* 16 ", output)
    command("export", str(student.path), str(tmp_path / "policy.pt2"), "--format", "torch")
    env = student.make_env()
    obs = env.reset()
    raw = [torch.as_tensor(value) for value in env.get_original_obs().values()]
    found = torch.export.load(tmp_path / "policy.pt2").module()(*raw).detach().numpy()
    model = student.load_model()
    model.precision = "float32"
    model._setup_acceleration(None)
    np.testing.assert_allclose(found, model.predict(obs, deterministic=True)[0], atol=1e-5)


def test_env_of_a_run(tmp_path):
    (tmp_path / ENV).mkdir()
    (tmp_path / ENV / "config.yml").write_text("env_wrapper: gymnasium.wrappers.ClipAction\n")
    (tmp_path / ENV / "args.yml").write_text(f"env: {ENV}\nenv_kwargs: {{maze: u4}}\n")
    vec_env = RunFolder(tmp_path).make_env()
    assert vec_env.num_envs == 1
    assert vec_env.get_attr("task_kwargs")[0]["maze"] == "u4"
    assert "ClipAction" in str(vec_env.envs[0])


def test_push_to_hub(logs, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return f"hub/{repo_id}"

        def snapshot_download(self, repo_id, local_dir):
            Path(local_dir).mkdir(parents=True)

        def upload_folder(self, repo_id, folder_path, commit_message):
            assert repo_id == f"me/deepcrl-{ENV}"
            shutil.copytree(folder_path, tmp_path / "uploaded")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda **kwargs: Hub())
    monkeypatch.chdir(tmp_path)
    run("push_to_hub", ["--env", ENV, "-f", str(logs), "-orga", "me", "--no-render"])
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert f"**DeepCRL** Agent playing **{ENV}**" in card
    assert "mean_reward" in card
    assert 'pip install "sb3-deepcrl[zoo]"' in card
    assert f"sb3-deepcrl enjoy --algo deepcrl --env {ENV}  -f logs/" in card and "python -m rl_zoo3" not in card
    assert DeepCRL.load(tmp_path / "uploaded" / f"deepcrl-{ENV}.zip").num_timesteps == N_STEPS


def test_command(capsys):
    with pytest.raises(SystemExit):
        command("--help")
    output = capsys.readouterr().out
    lines = {line.split()[0]: line for line in output.partition("\ncommands:\n")[2].splitlines()}
    assert list(lines) == [*SCRIPTS, "value_map", "export", "distill", "prune"]
    assert all(len(line.split()) > 3 and len(line) < 80 for line in lines.values())
    with pytest.raises(SystemExit):
        command("fly")
    assert "invalid choice: 'fly'" in capsys.readouterr().err
    for script in SCRIPTS:
        with pytest.raises(SystemExit) as exit_info:
            command(script, "--help")
        assert exit_info.value.code == 0
        output = capsys.readouterr().out
        assert ("--resume" in output) == (script == "train")
        assert ("--figure" in output) == ("plot" in script)
        assert ("--pretrained" in output) == (script in ("enjoy", "record_video", "push_to_hub"))


def test_optimize_and_train_a_trial(tmp_path, capsys):
    # Few updates, as a trial may have 64 layers
    storage = ["--storage", str(tmp_path / "study.log"), "--study-name", "maze", "--eval-episodes", "1"]
    tiny = [*storage, "-n", "48", "-params", "n_envs:4", "learning_starts:44"]
    train(tmp_path, "-optimize", "--n-trials", "2", "--n-evaluations", "1", "--no-optim-plots", *tiny)
    (report,) = (tmp_path / "deepcrl").glob("report_*.csv")
    with report.open() as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert all(0.0 <= float(trial["value"]) <= 1.0 for trial in trials)
    # A search is no run: enjoy does not take it for the latest one
    assert not list((tmp_path / "deepcrl").glob(f"{ENV}_*"))
    train(tmp_path, "--trial-id", "0", *tiny)
    model = DeepCRL.load(final_model(tmp_path))
    assert model.depth == 2 ** int(trials[0]["params_depth_pow"])
    assert model.policy_kwargs["energy"] == trials[0]["params_energy"]
    with pytest.raises(SystemExit, match="no trial 7 of study 'maze'"):
        train(tmp_path, "--trial-id", "7", *tiny)


class RecordingTrial:
    """A trial that is pruned after its second evaluation."""

    def __init__(self):
        self.reports: list[tuple[float, int]] = []

    def report(self, value: float, step: int) -> None:
        self.reports.append((value, step))

    def should_prune(self) -> bool:
        return len(self.reports) == 2


def test_trials_are_pruned_by_time_at_goal():
    trial = RecordingTrial()
    callback = make_trial_callback(make_vec_env(GoalReachEnv, 2), trial, n_eval_episodes=4, eval_freq=5)
    model = DeepCRL("MultiInputPolicy", make_vec_env(GoalReachEnv, 2), depth=4, width=16, batch_size=4, learning_starts=100)
    model.learn(40, callback=callback)
    assert model.num_timesteps == 20
    assert callback.is_pruned
    assert [step for _, step in trial.reports] == [1, 2]
    assert trial.reports[-1][0] == callback.last_mean_reward == callback.last_means["time_at_goal_fraction"]
    # Where nothing tells of goals, the reward counts
    assert type(make_trial_callback(make_vec_env("Pendulum-v1"), trial)) is TrialEvalCallback


@pytest.mark.parametrize("n_envs", [1, 16, 512])
def test_sampler_and_converter_agree(n_envs):
    study = optuna.create_study()
    for _ in range(20):
        trial = study.ask()
        hyperparams = sample_deepcrl_params(trial, n_actions=2, n_envs=n_envs, additional_args={})
        assert convert_deepcrl_params(trial.params) == hyperparams
        assert 4 <= hyperparams["transitions_per_update"] <= 64
        DeepCRL("MultiInputPolicy", make_vec_env(GoalReachEnv, 2), **hyperparams, _init_setup_model=False)


# Registered by a package that only its extra installs
PANDA = ("PandaReach-v3", "PandaPush-v3", "PandaPickAndPlace-v3")
CONFIGS = sorted(path.stem for path in config_folder().glob("*.yml"))


def entries(config: str) -> dict[str, dict]:
    return yaml.safe_load((config_folder() / f"{config}.yml").read_text())


@pytest.mark.parametrize("config", CONFIGS)
def test_every_entry_trains(config, tmp_path):
    algo = config.partition("-")[0]
    seen = set()
    for env_id, entry in entries(config).items():
        # One env of each kind and each set of hyperparameters
        kind = re.sub(r"U\d?Maze|Big|Hardest|Push|Slide|PickAndPlace|Binpick|Easy|Hard|_.*|Maze", "", env_id)
        if env_id == "default" or kind in seen:
            continue
        seen.add(kind)
        small: dict = {"n_envs": 2, "learning_starts": 2, "batch_size": 4, "buffer_size": 2000}
        if algo == "deepcrl":
            small |= {"depth": 4, "width": 16, "transitions_per_update": 2}
        else:
            # HerReplayBuffer has nothing to sample before the end of an episode
            small |= {"policy_kwargs": {"net_arch": [16]}, "train_freq": 1}
            small |= {"gradient_steps": 0 if "replay_buffer_class" in entry else 1}
        module = "panda_gym:" if env_id in PANDA else ""
        if module and importlib.util.find_spec("panda_gym") is None:
            continue
        args = ["--algo", algo, "-conf", config, "--env", module + env_id, "-n", "10"]
        train(tmp_path, *args, "-params", *(f"{key}:{value!r}" for key, value in small.items()))
        with zipfile.ZipFile(tmp_path / algo / f"{env_id}_1" / f"{env_id}.zip") as archive:
            data = json.loads(archive.read("data"))
        assert data["num_timesteps"] == 10
        assert data["_n_updates"] > 0 or small.get("gradient_steps") == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_have_what_their_algorithm_knows(config):
    algo = ALGOS[config.partition("-")[0]]
    zoo = {"env_kwargs", "monitor_kwargs", "n_envs", "n_timesteps", "noise_std", "noise_type", "normalize"}
    for env_id, entry in entries(config).items():
        unknown = set(entry) - zoo - set(inspect.signature(algo).parameters)
        assert not unknown, f"{env_id} has {unknown}"
        assert env_id == "default" or env_id in gym.registry or env_id in PANDA


@pytest.mark.skipif(importlib.util.find_spec("panda_gym") is None, reason="needs the extra panda")
def test_panda_entries_name_its_envs():
    assert [find_spec(env_id, ["panda_gym"]).id for env_id in PANDA] == list(PANDA)


def test_configs_say_what_was_run():
    robots = ("Point", "Ant", "Humanoid")
    mazes = {f"{robot}{maze}Maze-v0" for robot in robots for maze in ("U", "U4", "U5", "Big", "Hardest")}
    others = {"HumanoidGoal-v0", "AntGoal-v0", "ArmPushEasy-v0", "ArmPushHard-v0", "ArmBinpickHard-v0", "default"}
    robotics = {"PointMaze_UMaze-v3", "PointMaze_Large-v3", "AntMaze_UMaze-v5", "FetchReach-v4", "FetchPickAndPlace-v4"}
    assert mazes | others | robotics | set(PANDA) <= set(entries("deepcrl"))
    paper = entries("deepcrl-paper").values()
    assert {(entry["n_envs"], entry["batch_size"], entry["depth"]) for entry in paper} == {(512, 512, 64)}
    for config in CONFIGS:
        # Groups of entries with a comment above
        for group in (config_folder() / f"{config}.yml").read_text().split("\n\n"):
            comment = " ".join(line[2:] for line in group.splitlines() if line.startswith("# "))
            if re.search(r"^[^#\s].*:", group, re.MULTILINE):
                said = re.search(r"[Nn]ot run here|[Rr]un .* seed", comment)
                assert said, f"{config}: {group} has no comment that says what was run"
                for result in re.findall(r"docs/results/\S+\.md", comment):
                    assert (config_folder().parent / result).is_file(), f"{config}: {group} names a file that is not there"


HER_ENTRY = """
  n_timesteps: !!float 20000
  policy: 'MultiInputPolicy'
  buffer_size: 1000000
  ent_coef: 'auto'
  batch_size: 256
  gamma: 0.95
  learning_rate: 0.001
  learning_starts: 1000
  normalize: True
  replay_buffer_class: HerReplayBuffer
  replay_buffer_kwargs: "dict(
    goal_selection_strategy='future',
    n_sampled_goal=4
  )"
  policy_kwargs: "dict(net_arch=[64, 64])"
"""


def test_existing_her_config(tmp_path, capsys, monkeypatch):
    config = tmp_path / "sac.yml"
    config.write_text(f"FetchReach-v4: &fetch{HER_ENTRY}\nPointMaze_UMaze-v3:\n  <<: *fetch\n")
    for env_id in ("FetchReach-v4", "PointMaze_UMaze-v3"):
        args = ["--env", env_id, "-conf", str(config), "-n", "330", "--eval-freq", "160", "--eval-episodes", "1"]
        args += ["--save-freq", "160", "--save-replay-buffer"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(tmp_path, *args, "-params", "learning_starts:100", "depth:4", "width:16")
        assert any("ContrastiveReplayBuffer in place of HerReplayBuffer" in str(warning.message) for warning in caught)
        folder = tmp_path / "deepcrl" / f"{env_id}_1"
        assert (folder / "0.monitor.csv").read_text().splitlines()[1] == "r,l,t,is_success"
        assert (folder / "rl_model_vecnormalize_320_steps.pkl").is_file()
    run("enjoy", ["--env", env_id, "-f", str(tmp_path), "-n", "301", "--no-render"])
    # The statistics of VecNormalize go on too
    train(tmp_path, "-i", str(folder), "-n", "10")
    statistics = folder / env_id / "vecnormalize.pkl"
    assert f"Loading VecNormalize stats: {statistics}" in capsys.readouterr().out
    model = RunFolder(folder).load_model(RunFolder(folder).make_env())
    saved = pickle.loads(statistics.read_bytes()).obs_rms["observation"]
    assert model.get_vec_normalize_env().obs_rms["observation"].mean == pytest.approx(saved.mean)
    command("value_map", "--env", env_id, "-f", str(tmp_path), "-o", str(tmp_path / "value.png"))
    assert (tmp_path / "value.png").stat().st_size > 5000
    statistics.unlink()
    with pytest.raises(SystemExit, match=r"vecnormalize\.pkl is missing"):
        train(tmp_path, "-i", str(folder), "-n", "10")
    with pytest.raises(ValueError, match=r"vecnormalize.pkl not found"):
        RunFolder(folder).make_env()


def run_plain_zoo(folder: Path, path: Path, *args: str) -> str:
    (folder / "custom_envs.py").write_text("import sb3_deepcrl.zoo\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", *args]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_plain_zoo_with_custom_envs(logs, tmp_path):
    """Its `train`: see the wheel below."""
    args = ["--algo", "deepcrl", "--env", ENV, "-f", str(logs)]
    assert "Success rate: " in run_plain_zoo(tmp_path, ROOT, "rl_zoo3.enjoy", *args, "-n", "301", "--no-render")
    # Reads the command line before it makes an env
    run_plain_zoo(tmp_path, ROOT, "rl_zoo3.record_video", *args, "--help")


def test_rl_zoos_own_algorithms_keep_their_configs():
    # The name that RL Zoo's own `train` looks up
    manager_class = rl_zoo3.exp_manager.ExperimentManager
    assert manager_class is GoalExperimentManager
    args = (None, "sac", "Pendulum-v1", "logs")
    assert manager_class(*args).config == str(Path(rl_zoo3.__file__).parent / "hyperparams" / "sac.yml")
    assert manager_class(*args, config="json").config == "json"


@pytest.mark.slow
def test_installed_wheel_finds_its_configs(tmp_path):
    source, site, work = tmp_path / "source", tmp_path / "site", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    for name in ("sb3_deepcrl", "zoo_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "sb3_deepcrl").rglob("*.py")}
    assert {path.parent.relative_to(site) for path in (site / "sb3_deepcrl").rglob("*.py")} >= packages
    assert (site / "sb3_deepcrl" / "common" / "tower.cpp").is_file()
    agents = {path.relative_to(AGENTS) for path in AGENTS.rglob("*")}
    assert {
        path.relative_to(site / "sb3_deepcrl" / "agents") for path in (site / "sb3_deepcrl" / "agents").rglob("*")
    } == agents
    command = [sys.executable, str(site / "bin" / "sb3-deepcrl"), "train", "--env", ENV, "-n", "128"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [*command, "--eval-freq", "-1", *TINY], cwd=work, env=environment, check=True, capture_output=True, text=True
    )
    loading = f"Loading hyperparameters from: {site / 'sb3_deepcrl' / 'zoo_configs' / 'deepcrl.yml'}"
    assert loading in result.stdout
    plain = f"rl_zoo3.train --algo deepcrl --env {ENV} -n 128 --eval-freq -1 --num-threads 1".split()
    assert loading in run_plain_zoo(work, site, *plain, *TINY)
    assert [num_timesteps(final_model(work / "logs", number)) for number in (1, 2)] == [128, 128]


def test_default_configs():
    assert find_config(None, "deepcrl", "Any-v0") == str(config_folder() / "deepcrl.yml")
    assert find_config(None, "sac", "AntU4Maze-v0") == str(config_folder() / "sac.yml")
    # RL Zoo's own file
    assert find_config(None, "sac", "Pendulum-v1") is None
    assert find_config("deepcrl-paper", "deepcrl", ENV) == str(config_folder() / "deepcrl-paper.yml")
    assert find_config("json.decoder", "deepcrl", ENV) == "json.decoder"


@pytest.mark.parametrize(
    "args, vec_env_class",
    [
        (f"--env {ENV}", BatchVecEnv),
        (f"--env {ENV} --vec-env dummy", DummyVecEnv),
        ("--env PointMaze_UMaze-v3", DummyVecEnv),
        pytest.param(
            f"--env {ENV} --vec-env warp --eval-freq 100",
            WarpVecEnv,
            marks=[
                pytest.mark.skipif(importlib.util.find_spec("mujoco_warp") is None, reason="MuJoCo Warp is not installed"),
                pytest.mark.filterwarnings("ignore:WarpVecEnv simulates on the CPU"),
            ],
        ),
        (f"--env {ENV} -params env_wrapper:'gymnasium.wrappers.RecordEpisodeStatistics'", DummyVecEnv),
    ],
)
def test_envs_of_this_package_are_stepped_natively(args, vec_env_class, tmp_path, monkeypatch):
    seen = []

    def look(manager, model):
        seen.append(type(model.env.unwrapped))
        evaluated = [callback.eval_env for callback in manager.callbacks if isinstance(callback, EvalCallback)]
        assert vec_env_class is not WarpVecEnv or [type(env.unwrapped) for env in evaluated] == [BatchVecEnv]

    monkeypatch.setattr(GoalExperimentManager, "learn", look)
    train(tmp_path, *args.split())
    assert seen == [vec_env_class]


BAD = [
    ("--env PointUMaz-v0", "Environment `PointUMaz` doesn't exist. Did you mean: `PointUMaze`?"),
    ("--env nowhere:Reach-v0", "'nowhere:Reach-v0' cannot be found, as the module 'nowhere' cannot be imported"),
    ("--eval-env PointUMazEval-v0", "Environment `PointUMazEval` doesn't exist"),
    ("--env Pendulum-v1", "`achieved_goal`, `desired_goal` missing"),
    ("--env FetchReach-v4 --vec-env batch", "BatchVecEnv steps this package's GoalEnv only: use DummyVecEnv"),
    ("-n often", "argument -n/--n-timesteps: expected a whole number such as 4 or 1e6, got 'often'"),
    ("--eval-episodes 0", "`eval_episodes` must be a positive integer, got 0"),
    ("--n-eval-envs -1", "`n_eval_envs` must be a positive integer, got -1"),
    ("--resume -optimize", "--resume: a search of hyperparameters goes on by --storage"),
    ("-params dept:4", "error: --hyperparams dept:4: DeepCRL has no argument 'dept': did you mean 'depth'?"),
    ("-params n_env:4", "error: --hyperparams n_env:4: DeepCRL has no argument 'n_env': did you mean 'n_envs'?"),
    ("-params depth:6", "error: --hyperparams depth:6: `depth` must be a positive multiple of 4"),
    ("-params depth=8", "argument -params/--hyperparams: expected key:value, as in depth:8, got 'depth=8'"),
    ("--env-kwargs maze=u", "argument --env-kwargs: expected key:value, as in depth:8, got 'maze=u'"),
    ("-params policy:'MultiInputPolcy'", "Policy MultiInputPolcy unknown"),
    ("-params policy:'nowhere.Policy'", "No module named 'nowhere'"),
    ("-params policy:MultiInputPolicy", "name 'MultiInputPolicy' is not defined: values are Python"),
    ("-params learning_rate:'5e-4'", "`learning_rate: 5e-4` is text: write `!!float 5e-4`"),
    ("-params gamma:'1e-1'", "`gamma: 1e-1` is text: write `!!float 1e-1`"),
    ("-params buffer_size:1e6", "`buffer_size` must be a positive integer, got 1000000.0"),
    ("-params n_envs:0", "`n_envs` must be a positive integer, got 0"),
    ("-params policy_kwargs:dict(residual_scal=1)", "error: --hyperparams policy_kwargs:{'residual_scal': 1}: "),
    ("-params policy_kwargs:dict(activation_fn=nn.Rleu)", "has no attribute 'Rleu'"),
    ("-params replay_buffer_kwargs:dict(n_sampled_goals=4)", "'n_sampled_goals'"),
    ("-params env_wrapper:'nowhere.Wrapper'", f"deepcrl.yml with --hyperparams, {ENV}: No module named 'nowhere'"),
    ("-params env_wrapper:'collections.Wraper'", "has no attribute 'Wraper'"),
    ("-params env_wrapper:{'gymnasium.wrappers.TimeLimit':{'max_step':3}}", "unexpected keyword argument 'max_step'"),
    ("-params callback:'nowhere.Callback'", "No module named 'nowhere'"),
    ("-params seed:3", "multiple values for keyword argument 'seed'"),
    ("-params noise_type:'normal'", "'noise_std' is missing"),
    ("-params noise_type:'norm' noise_std:0.1", 'Unknown noise type "norm"'),
    ("-params normalize:dict(norm_obss=True)", "unexpected keyword argument 'norm_obss'"),
    ("-params monitor_kwargs:dict(info_keyword=('l',))", "unexpected keyword argument 'info_keyword'"),
    ("--algo sac -params policy_kwargs:dict(net_archh=[8])", "unexpected keyword argument 'net_archh'"),
    ("--algo sac -params replay_buffer_kwargs:dict(online_sampling=True)", "unexpected keyword argument 'online_sampling'"),
    ("--env-kwargs maez:'u'", "it has no argument 'maez'. Did you mean 'maze'?"),
    ("--env PointMaze_UMaze-v3 --env-kwargs mazemap:'u'", "it has no argument 'mazemap'. Did you mean 'maze_map'?"),
    ("-conf nowhere.yml", "-conf: nowhere.yml is neither a file nor a Python module, nor one of the configs of this package"),
    ("-conf depcrl", "which are deepcrl, deepcrl-paper, dqn, sac, sac-dense, td3, tqc"),
    ("-i nowhere.zip", "The trained_agent must be a valid path to a .zip file"),
    ("-i nowhere", "-i: nowhere is neither a model (.zip) nor the folder of a run"),
    ("-i nowhere.zip --resume", "-i: --resume goes on in the folder of the last run, leave one of both out"),
    ("-uuid --resume", "-uuid: --resume goes on in the folder of the last run"),
    ("--dataset nowhere.npz", "--dataset: "),
    ("--algo sac --dataset nowhere.npz", "error: --dataset: sac does not learn from data, only deepcrl does"),
    ("--gym-packages nowhere", "the module 'nowhere' cannot be imported: No module named 'nowhere'"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_ends_in_one_line(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train(tmp_path, *args.split())
    assert exit_info.value.code not in (0, None)
    # What Python prints for a SystemExit with a message
    line = exit_info.value.code if isinstance(exit_info.value.code, str) else capsys.readouterr().err
    assert message in line
    assert line.startswith("sb3-deepcrl train: error: ")
    assert line.strip().count("\n") == 0
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize(
    "args, message",
    [
        ("enjoy --env PointUMaze-v0", "there is no screen to show PointUMaze-v0 on: add --no-render"),
        ("record_video --env PointUMaze-v0", "there is no screen to show PointUMaze-v0 on: .*MUJOCO_GL=egl"),
        ("push_to_hub --env PointUMaze-v0 -orga me", "there is no screen"),
        ("enjoy --env PointBigMaze-v0 --pretrained", "there is no .* record_video --env PointBigMaze-v0 --pretrained`"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a screen")
def test_without_a_screen(args, message, logs, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    script, *flags = args.split()
    with pytest.raises(SystemExit, match=f"^sb3-deepcrl {script}: error: {message}"):
        run(script, [*flags, "-f", str(logs)])


def test_nowhere_to_write(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    args = ["-n", "16", *TINY]
    with pytest.raises(SystemExit, match=rf"^sb3-deepcrl train: error: .*: choose another place than {file}$"):
        train(file, *args)

    def fail(error):
        def save(*args):
            raise error

        monkeypatch.setattr(DeepCRL, "save", save)
        train(tmp_path, *args)

    with pytest.raises(SystemExit, match=r"^sb3-deepcrl train: error: .*No space left.*: free some space"):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    # Not of what the user gave: the traceback says where
    with pytest.raises(PermissionError):
        fail(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/dev/robot"))


@pytest.mark.parametrize("command", ["sb3_deepcrl", "sb3_deepcrl.zoo"])
def test_without_rl_zoo(command, tmp_path):
    (tmp_path / "rl_zoo3.py").write_text("raise ModuleNotFoundError(\"No module named 'rl_zoo3'\")\n")
    result = subprocess.run([sys.executable, "-m", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert """(No module named 'rl_zoo3'): install the extra "zoo", in a clone by `pip install -e ".[zoo]"`""" in line


def read_yaml(path: Path) -> dict:
    with path.open() as file:
        return yaml.load(file, Loader=RunLoader)


UNSAFE = [
    ("args.yml", "env_kwargs: !!python/object/apply:os.mkdir [{}]", "python/object/apply:os.mkdir"),
    ("args.yml", "env_kwargs: !!python/object/new:os.mkdir [{}]", "python/object/new:os.mkdir"),
    ("config.yml", "policy_kwargs: !!python/object/apply:os.mkdir [{}]", "python/object/apply:os.mkdir"),
    ("config.yml", "policy_kwargs: {{activation_fn: !!python/name:os.mkdir ''}}", "`os.mkdir`"),
    ("config.yml", "policy_kwargs: {{activation_fn: !!python/name:this.s ''}}", "`this.s`"),
    ("config.yml", "normalize: __import__('os').mkdir('{}')", "`normalize: __import__('os').mkdir('"),
    ("config.yml", "callback: {{subprocess.Popen: {{args: [mkdir, {}]}}}}", "`callback: {{'subprocess.Popen'"),
    ("config.yml", "policy_kwargs: 'dict(a=[os.mkdir(\"{}\") for _ in [1]])'", "`policy_kwargs: dict(a=[os.mkdir("),
]


@pytest.mark.parametrize("script", ["train", "enjoy", "value_map"])
@pytest.mark.parametrize("name, line, told", UNSAFE)
def test_the_files_of_a_run_execute_nothing(script, name, line, told, run_folder, tmp_path, capsys):
    folder = tmp_path / "deepcrl" / f"{ENV}_1"
    shutil.copytree(run_folder, folder)
    target = tmp_path / "executed"
    path = folder / ENV / name
    # Keys and values in place of RL Zoo's OrderedDict
    path.write_text(yaml.safe_dump(dict(read_yaml(path))) + line.format(target) + "\n")
    with pytest.raises(SystemExit) as exit_info:
        if script == "train":
            train(tmp_path, "-i", str(folder), "-n", "16")
        else:
            command(script, "--env", ENV, "-f", str(tmp_path), *(["--no-render"] if script == "enjoy" else []))
    assert exit_info.value.code not in (0, None)
    message = f"{exit_info.value.code}{capsys.readouterr().err}"
    assert str(path) in message and told.replace("{{", "{") in message
    assert not target.exists()


def test_files_of_a_run_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "config.yml"
    data = OrderedDict(
        policy_kwargs={"activation_fn": torch.nn.ReLU, "optimizer_class": torch.optim.SGD, "net_arch": [8, 8]},
        replay_buffer_class=HerReplayBuffer,
        train_freq=(1, "episode"),
        env_kwargs={"maze": ["#r#"], "nested": OrderedDict(a={"b": None, "c": (1.5, True)})},
        normalize="{'norm_obs': True, 'gamma': -1 + 2 ** 0.5}",
        monitor_kwargs="dict(info_keywords=('is_success',))",
    )
    path.write_text(yaml.dump(data))
    assert read_yaml(path) == data
    for text, message in {"a: [": "while parsing", "- 1": "must hold keys and values, got [1]"}.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_yaml(path)


def test_env_of_another_package(tmp_path, monkeypatch, capsys):
    add_package(tmp_path, monkeypatch)
    args = ["--env", "elsewhere:ElsewhereReach-v0", "-n", "32"]
    train(tmp_path, *args, *TINY[:-2], "learning_starts:16", "buffer_size:4000")
    folder = tmp_path / "deepcrl" / "ElsewhereReach-v0_1"
    # As from a process that has not imported the package
    add_package(tmp_path, monkeypatch)
    train(tmp_path, "-i", str(folder), "-n", "16")
    assert DeepCRL.load(tmp_path / "deepcrl" / "ElsewhereReach-v0_2" / "ElsewhereReach-v0.zip").num_timesteps == 48
    add_package(tmp_path, monkeypatch)
    run("enjoy", ["--env", "elsewhere:ElsewhereReach-v0", "-f", str(tmp_path), "-n", "21", "--no-render"])
    output = capsys.readouterr().out
    assert "Success rate: " in output and "--env ElsewhereReach-v0 --gym-packages elsewhere -f" in output
    add_package(tmp_path, monkeypatch)
    assert RunFolder(folder).make_env().get_attr("max_steps") == [10]
    add_package(tmp_path, monkeypatch)
    model = shutil.copy(folder / "ElsewhereReach-v0.zip", tmp_path)
    command("export", model, str(tmp_path / "policy.onnx"), "--env", "ElsewhereReach-v0", "--gym-packages", "elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ENV}: 3", f"my.yml, {ENV}: "),
        (f"{ENV}:\n  n_timesteps: 10\n  policy: 'MultiInputPolicy'\n  depht: 8", f"my.yml, {ENV}: .* argument 'depht'"),
        (f"{ENV}:\n  policy: 'MultiInputPolicy'", "'n_timesteps' is missing"),
        (f"{ENV}:\n  n_timesteps: 10", "missing 1 required positional argument: 'policy'"),
        ("Other-v0:\n  n_timesteps: 10", f"not found for deepcrl-{ENV}"),
        (f"{ENV}: [", "while parsing"),
    ],
)
def test_bad_config_file(text, message, tmp_path):
    config = tmp_path / "my.yml"
    config.write_text(text)
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, "-conf", str(config))


def test_an_error_inside_of_a_python_config_keeps_its_traceback(tmp_path):
    config = tmp_path / "my.py"
    config.write_text("hyperparams = dict(n_timesteps=1 + '1')\n")
    with pytest.raises(TypeError, match="unsupported operand"):
        train(tmp_path, "-conf", str(config))


@pytest.mark.parametrize("error", [TypeError, ValueError, AssertionError, RuntimeError, gym.error.ResetNeeded])
def test_a_bug_in_an_env_keeps_its_traceback(error, tmp_path, monkeypatch):
    def make_broken(size: int = 3):
        raise error("a bug")

    monkeypatch.setitem(gym.registry, "Broken-v0", EnvSpec("Broken-v0", make_broken))
    with pytest.raises(error, match="a bug"):
        train(tmp_path, "--env", "Broken-v0", "--env-kwargs", "size:2")
    # No folder of a run is left
    assert not list(tmp_path.glob("*/Broken-v0_*"))
    with pytest.raises(SystemExit, match=r"Broken-v0 cannot be made with .*'siez'. Did you mean 'size'\?"):
        train(tmp_path, "--env", "Broken-v0", "--env-kwargs", "siez:2")


@pytest.mark.parametrize("entry", ["policy:'broken_module.Policy'", "env_wrapper:{'broken_module.Wrapper':{}}"])
def test_a_bug_in_a_module_of_a_config_keeps_its_traceback(entry, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import nowhere_else\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_else"):
        train(tmp_path, "-params", entry)


def test_missing_model_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^sb3-deepcrl enjoy: error: The .* folder was not found$"):
        run("enjoy", ["--env", ENV, "-f", str(tmp_path), "--no-render"])


def test_env_kwargs_of_a_config_hold_for_evaluation_and_videos(tmp_path, monkeypatch):
    config = tmp_path / "my.yml"
    config.write_text(
        f"{ENV}:\n  n_timesteps: 10\n  policy: 'MultiInputPolicy'\n  depth: 4\n  width: 16\n  env_kwargs:\n    maze: 'u4'\n"
    )
    seen = []
    create_envs = GoalExperimentManager.create_envs

    def create_and_see(*args, **kwargs):
        env = create_envs(*args, **kwargs)
        task_kwargs = env.get_attr("task_kwargs")[0]
        seen.append((kwargs.get("eval_env", False), task_kwargs["maze"], task_kwargs.get("goal_set")))
        return env

    monkeypatch.setattr(GoalExperimentManager, "create_envs", create_and_see)
    train(tmp_path, "--vec-env", "dummy", "-conf", str(config), "--eval-env-kwargs", "goal_set:'eval'", "--eval-freq", "10")
    assert sorted(seen) == [(False, "u4", None), (True, "u4", "eval")]
    assert RunFolder.newest(tmp_path, "deepcrl", ENV).args()["env_kwargs"] == {"maze": "u4"}


def test_config_of_a_run_survives_an_interruption(tmp_path, monkeypatch):
    manager = object.__new__(GoalExperimentManager)
    manager.ranks, manager.params_path, manager.save_path, manager.args = Ranks(), str(tmp_path), str(tmp_path), Namespace(n=1)
    manager._save_config({"depth": 4})
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(yaml, "dump", interrupt)
    with pytest.raises(KeyboardInterrupt):
        manager._save_config({"depth": 8})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    assert {*before} == {"config.yml", "args.yml", "command.txt"} and manager.params_path == str(tmp_path)
