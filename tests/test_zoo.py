import csv
import errno
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
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3
import torch
import yaml
from gymnasium.envs.registration import EnvSpec
from rl_zoo3.callbacks import TrialEvalCallback
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_deepcrl import DeepCRL, GoalEvalCallback
from sb3_deepcrl.analysis import plot_value_map
from sb3_deepcrl.common.utils import STOP_SIGNALS, whole_number
from sb3_deepcrl.zoo import cli
from sb3_deepcrl.zoo.callbacks import make_trial_callback
from sb3_deepcrl.zoo.checkpoints import find_model, num_timesteps, read_run_file, sibling
from sb3_deepcrl.zoo.config import ConfigError, check_hyperparams, config_folder, find_config
from sb3_deepcrl.zoo.exp_manager import GoalExperimentManager
from sb3_deepcrl.zoo.hyperparams_opt import TRANSITIONS_PER_UPDATE, convert_deepcrl_params, sample_deepcrl_params
from sb3_deepcrl.zoo.launcher import SCRIPTS, PredictionDeepCRL, at_least_one, run
from sb3_deepcrl.zoo.value_map import env_of_run
from tests.envs import GoalReachEnv, add_package

ROOT = Path(__file__).parent.parent
ENV = "PointUMaze-v0"
N_ENVS = 4
TINY = "-params n_envs:4 width:16 depth:4 batch_size:16 learning_starts:100 train_freq:'auto' gradient_steps:'auto'".split()
# The run that most tests look at: evaluated and saved twice
N_STEPS, EVERY = 1600, 800


def has_gl() -> bool:
    if os.environ.get("MUJOCO_GL", "") == "" and os.environ.get("DISPLAY", "") == "":
        return False
    code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def train(folder: Path, *args: str) -> None:
    run("train", ["-f", str(folder), "--num-threads", "1", *args])


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    args = f"--env {ENV} --vec-env batch -n {N_STEPS} --eval-freq {EVERY} --eval-episodes 4 --n-eval-envs 4".split()
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
    evaluations = np.load(run_folder / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [EVERY, N_STEPS]
    assert evaluations["successes"].shape == (2, 4)
    with (run_folder / "episodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {"success_any", "time_at_goal"} <= set(rows[0])
    with (run_folder / "0.monitor.csv").open() as file:
        assert file.readlines()[1].strip() == "r,l,t,is_success"
    assert yaml.load((run_folder / ENV / "args.yml").read_text(), Loader=yaml.UnsafeLoader)["vec_env"] == "batch"
    assert list((logs / "tb" / ENV / "DeepCRL_1").iterdir())


def test_a_run_goes_on_as_if_it_had_not_stopped(logs, run_folder, tmp_path):
    model = DeepCRL.load(run_folder / f"{ENV}.zip")
    # All that the command line does not tell is as it was. The checkpoint's buffer is gone, the final model has one
    train(tmp_path, "-i", str(run_folder), "-n", "8e2")
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
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3 * (1 - 2400 / 2400), abs=1e-3 * 20 / 2400)
    assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == [EVERY, N_STEPS, 2400]
    with (folder / "episodes.csv").open() as file:
        assert [int(row["timesteps"]) for row in csv.DictReader(file)] == [EVERY] * 4 + [N_STEPS] * 4 + [2400] * 4
    assert (folder / "best_model.zip").is_file()
    with pytest.raises(SystemExit, match=r"was trained for 2400 steps already, of 2400 in all"):
        train(tmp_path, "-i", str(folder))
    assert not (tmp_path / "deepcrl" / f"{ENV}_2").exists()
    # What is left of the run that was continued, whose number of steps holds for its checkpoints too
    shutil.copy(run_folder / f"{ENV}.zip", folder / f"rl_model_{N_STEPS}_steps.zip")
    train(tmp_path, "-i", str(folder / f"rl_model_{N_STEPS}_steps.zip"), "-params", "learning_starts:800")
    assert DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_2" / f"{ENV}.zip").num_timesteps == 2400


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
    assert DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_3" / f"{ENV}.zip").learning_starts == steps - 128 + 100
    with (path.parent / "episodes.csv").open() as file:
        assert [row["timesteps"] for row in csv.DictReader(file)] == [str(EVERY)] * 4


def test_the_best_model_does_not_take_the_final_replay_buffer(run_folder, tmp_path, capsys):
    steps = DeepCRL.load(run_folder / "best_model.zip").num_timesteps
    train(tmp_path, "-i", str(run_folder / "best_model.zip"), "-n", "16")
    assert "No replay buffer of best_model.zip: collecting 100 steps" in capsys.readouterr().out
    longer = DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_1" / f"{ENV}.zip")
    assert (longer.num_timesteps, longer.learning_starts) == (steps + 16, steps + 100)


@pytest.mark.parametrize("is_broken", [False, True])
def test_the_best_model_goes_on(is_broken, run_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    best = np.load(folder / "evaluations.npz")["results"].mean(axis=1).max()
    if is_broken:
        (folder / "evaluations.npz").write_bytes(b"PK")
    (folder / ENV / "vecnormalize.pkl").write_bytes(b"statistics")
    seen = []

    class Manager(GoalExperimentManager):
        def _maybe_normalize(self, env, eval_env):
            return env

        def learn(self, model):
            (callback,) = (callback for callback in self.callbacks if isinstance(callback, EvalCallback))
            seen.append(callback.best_mean_reward)
            super().learn(model)

    monkeypatch.setattr("sb3_deepcrl.zoo.exp_manager.GoalExperimentManager", Manager)
    # No evaluation before the end
    train(tmp_path, "-i", str(folder), "-n", "16", "--eval-episodes", "3")
    message = "cannot be read" if is_broken else "have another number of episodes"
    assert message in capsys.readouterr().out
    assert seen == [-np.inf if is_broken else best]
    new = tmp_path / "deepcrl" / f"{ENV}_1"
    assert (new / "best_model.zip").read_bytes() == (folder / "best_model.zip").read_bytes()
    assert (new / ENV / "vecnormalize.pkl").read_bytes() == b"statistics"


def test_episodes_of_a_killed_run_go_on(run_folder, tmp_path):
    lines = (run_folder / "episodes.csv").read_text().splitlines(keepends=True)
    old = tmp_path / "old.csv"

    def continued() -> list[list[str]] | None:
        callback = GoalEvalCallback(make_vec_env(GoalReachEnv), log_path=str(tmp_path))
        callback.continue_episodes(old, N_STEPS)
        path = tmp_path / "episodes.csv"
        return list(csv.reader(path.read_text().splitlines())) if path.is_file() else None

    # There is none, or its columns are others
    assert continued() is None
    old.write_text("timesteps,reward\n800,1.0\n")
    assert continued() is None
    # Killed in the middle of the last line
    old.write_text("".join(lines)[:-3])
    assert continued() == list(csv.reader(lines[:-1]))


def test_killed_while_saving(tmp_path):
    command = [sys.executable, "-m", "sb3_deepcrl.zoo.train", "-f", str(tmp_path), "--env", ENV, "--vec-env", "batch"]
    command += "-n 1000000 --eval-freq -1 --save-freq 8 --save-replay-buffer --num-threads 1".split()
    with subprocess.Popen([*command, *TINY, "buffer_size:200000"], stdout=subprocess.DEVNULL, cwd=tmp_path) as process:
        folder = tmp_path / "deepcrl" / f"{ENV}_1"
        deadline = time.monotonic() + 60
        # In the middle of writing a file, but not the first one
        while len(list(folder.glob("rl_model_*_steps.zip"))) < 3 or not list(folder.glob(".*.tmp")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    models = {path: DeepCRL.load(path).num_timesteps for path in folder.glob("rl_model_*_steps.zip")}
    chosen = Path(find_model(str(folder)))
    assert models[chosen] == max(models.values())
    assert sibling(chosen, "replay_buffer").is_file()
    # Not written as a whole, and not needed
    (folder / "evaluations.npz").write_bytes(b"PK")
    train(tmp_path, "-i", str(folder), "-n", "80")
    assert DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_2" / f"{ENV}.zip").num_timesteps == models[chosen] + 80


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
    args = ["--env", ENV, "--vec-env", "batch", "-n", "10000", "--eval-freq", "-1"]
    with pytest.raises(SystemExit) as exit_info:
        train(tmp_path, *args, *TINY, "callback:'tests.test_zoo.Signals'")
    assert exit_info.value.code == 128 + numbers[0]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    folder = tmp_path / "deepcrl" / f"{ENV}_1"
    assert DeepCRL.load(folder / f"{ENV}.zip").num_timesteps == 200
    (command,) = re.findall(r"200 env steps\. To go on from there: sb3-deepcrl train (.*)", capsys.readouterr().out)
    train(tmp_path, *shlex.split(command), "-n", "400", "-params", "callback:[]")
    assert DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_2" / f"{ENV}.zip").num_timesteps >= 400


def test_ignored_signals_stay_ignored(tmp_path, monkeypatch):
    # As `nohup` does
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(Signals, "numbers", [signal.SIGHUP])
    try:
        args = ["--env", ENV, "--vec-env", "batch", "-n", "320", "--eval-freq", "-1"]
        train(tmp_path, *args, *TINY, "callback:'tests.test_zoo.Signals'")
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_1" / f"{ENV}.zip").num_timesteps == 320


def test_a_closed_terminal_stops_all_processes_of_a_run(tmp_path):
    command = [sys.executable, "-m", "sb3_deepcrl.zoo.train", "-f", str(tmp_path), "--env", ENV, "--vec-env", "subproc"]
    command += "-n 1000000 --eval-freq -1 --num-threads 1".split()
    with subprocess.Popen([*command, *TINY], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        # The first line of the training
        assert any(line.startswith("0/1,000,000 env steps") for line in process.stdout)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGHUP)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert "To go on from there: sb3-deepcrl train -i" in output
    assert DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_1" / f"{ENV}.zip").num_timesteps > 0


@pytest.mark.parametrize("output", ["terminal", "pipe"])
def test_output_that_nobody_reads_any_more(output, tmp_path):
    if output == "terminal":
        reader, writer = pty.openpty()
    else:
        reader, writer = os.pipe()
    command = [sys.executable, "-m", "sb3_deepcrl.zoo.train", "-f", str(tmp_path), "--env", ENV, "--vec-env", "batch"]
    command += "-n 1000000 --eval-freq 4000 --num-threads 1".split()
    with subprocess.Popen([*command, *TINY], stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        read = b""
        while b"env steps" not in read:
            read += os.read(reader, 1000)
        time.sleep(1)
        os.close(reader)
        if output == "terminal":
            process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=60)
    assert DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_1" / f"{ENV}.zip").num_timesteps > 0
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
    args = ["--algo", algo, "--env", ENV, "-n", "10000", "--eval-freq", "-1"]
    small = TINY if algo == "deepcrl" else ["-params", "n_envs:4", "policy_kwargs:dict(net_arch=[16])", "learning_starts:1000"]
    with pytest.raises(ZeroDivisionError, match="a bug of the env") as error_info:
        train(tmp_path, *args, *small, "env_wrapper:'tests.test_zoo.FailingEnv'")
    assert error_info.traceback[-1].name == "step"
    (note,) = error_info.value.__notes__
    (command,) = re.findall(r"saved after 200 env steps. To go on from there: sb3-deepcrl train (.*)", note)
    train(tmp_path, *shlex.split(command), "-n", "400", *small, "env_wrapper:None")
    assert num_timesteps(tmp_path / algo / f"{ENV}_2" / f"{ENV}.zip") >= 400


def test_what_cannot_be_saved_is_told(tmp_path, monkeypatch):
    def fail(model, path):
        raise OSError("No space left on device")

    args = ["--env", ENV, "--vec-env", "batch", "-n", "10000", "--eval-freq", "-1", *TINY]
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
    arguments = ["--env", ENV, "--vec-env", "batch", "-n", "640", "--eval-freq", "320", "--eval-episodes", "2"]
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
    args = f"--env {ENV} --vec-env batch -n 10000 --progress --eval-freq -1".split()
    args += ["-i", str(run_folder)] if resume else []
    train(tmp_path, *args, *TINY, "callback:'tests.test_zoo.Interrupter'")
    model = DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_1" / f"{ENV}.zip")
    # A run that is continued counts its calls from the start
    assert model.num_timesteps == (N_STEPS + 4 if resume else 200)


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
    class Manager(GoalExperimentManager):
        def read_hyperparameters(self):
            Path(self.save_path).mkdir(parents=True)
            (Path(self.save_path) / "theirs").touch()
            return super().read_hyperparameters()

    monkeypatch.setattr("sb3_deepcrl.zoo.exp_manager.GoalExperimentManager", Manager)
    args = ["--env", ENV, "--vec-env", "batch", "-n", "16", "--eval-freq", "-1", *TINY, f"depth:{depth}"]
    if depth == 6:
        with pytest.raises(SystemExit, match="`depth` must be a positive multiple of 4"):
            train(tmp_path, *args)
    else:
        train(tmp_path, *args)
        assert (tmp_path / "deepcrl" / f"{ENV}_2" / f"{ENV}.zip").is_file()
    assert [path.name for path in (tmp_path / "deepcrl" / f"{ENV}_1").iterdir()] == ["theirs"]
    assert (tmp_path / "deepcrl" / f"{ENV}_2").exists() == (depth == 4)


def test_newest_complete_checkpoint(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    final, buffer = folder / f"{ENV}.zip", folder / "replay_buffer.pkl"
    assert find_model(str(folder)) == str(final)
    # Killed after the final buffer was written, before the final model was
    final.unlink()
    older, newer = (folder / f"rl_model_{steps}_steps.zip" for steps in (EVERY, N_STEPS))
    shutil.copy(buffer, sibling(newer, "replay_buffer"))
    assert find_model(str(folder)) == str(newer)
    # Of another tool that does not save atomically
    newer.write_bytes(newer.read_bytes()[:1000])
    assert find_model(str(folder)) == str(older)
    buffer.unlink()
    sibling(newer, "replay_buffer").rename(sibling(older, "replay_buffer"))
    assert find_model(str(folder)) == str(older)
    older.unlink()
    with pytest.raises(ConfigError, match="there is no model"):
        find_model(str(folder))


@pytest.mark.parametrize("which", ["", "--load-best", f"--load-checkpoint {EVERY}", "--load-last-checkpoint"])
def test_enjoy(which, logs, capsys):
    run("enjoy", ["--env", ENV, "-f", str(logs), "-n", "301", "--no-render", *which.split()])
    output = capsys.readouterr().out
    assert re.search(r"Success at any step: \d+\.\d+%, at the last step: \d+\.\d+%", output)
    assert "Success rate" not in output
    name = {"": ENV, "--load-best": "best_model", "--load-last-checkpoint": f"rl_model_{N_STEPS}_steps"}
    assert f"{name.get(which, f'rl_model_{EVERY}_steps')}.zip" in output


def test_a_watched_model_has_no_replay_memory(run_folder):
    model = PredictionDeepCRL.load(run_folder / f"{ENV}.zip")
    assert type(model) is DeepCRL
    assert model.replay_buffer.n_slots * model.replay_buffer.n_envs < 10 * N_ENVS
    assert PredictionDeepCRL.__name__ == "DeepCRL"
    assert ALGOS["deepcrl"] is DeepCRL


@pytest.mark.skipif(not has_gl(), reason="no OpenGL: set MUJOCO_GL=egl (Debian: libegl1) or MUJOCO_GL=osmesa (libosmesa6)")
def test_record_video(logs, tmp_path):
    run("record_video", ["--env", ENV, "-f", str(logs), "-n", "5", "-o", str(tmp_path)])
    (video,) = tmp_path.glob("*.mp4")
    assert video.stat().st_size > 1000


def test_plots(logs, tmp_path, capsys, monkeypatch):
    common = ["-a", "deepcrl", "-e", ENV, "-f", str(tmp_path)]
    # RL Zoo's plots of several runs need two
    for number in (1, 2):
        shutil.copytree(logs / "deepcrl" / f"{ENV}_1", tmp_path / "deepcrl" / f"{ENV}_{number}")
    run("plot_train", [*common, "-y", "success", "-w", "2", "--figure", str(tmp_path / "train.png")])
    run("all_plots", [*common, "-k", "successes", "-o", str(tmp_path / "all"), "--figure", str(tmp_path / "all.png")])
    run("plot_from_file", ["-i", str(tmp_path / "all.pkl"), "--figure", str(tmp_path / "file.png")])
    for name in ("train", "all", "file"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert "No data available" not in capsys.readouterr().out
    cli_main("value_map", "--env", ENV, "-f", str(logs), "-o", str(tmp_path / "new" / "value.png"))
    assert (tmp_path / "new" / "value.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        cli_main("value_map", "--env", ENV, "-f", str(logs), "--goal", "0", "0")
    assert "value_map: error: The goal [0. 0.] lies in a wall" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli_main("value_map", "--env", ENV, "-f", str(logs), "-o", str(tmp_path / "all.pkl" / "value.png"))
    assert f"choose another place than {tmp_path / 'all.pkl' / 'value.png'}" in capsys.readouterr().err

    def fail(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr("sb3_deepcrl.zoo.value_map.plot_value_map", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli_main("value_map", "--env", ENV, "-f", str(logs))


def test_env_of_a_value_map_is_that_of_the_run(tmp_path):
    (tmp_path / "config.yml").write_text("env_wrapper: gymnasium.wrappers.ClipAction\n")
    (tmp_path / "args.yml").write_text("env_kwargs: {maze: u4}\n")
    vec_env, env = env_of_run(tmp_path, ENV)
    assert vec_env.num_envs == 1
    assert env.unwrapped.task_kwargs["maze"] == "u4"
    assert "ClipAction" in str(env)
    (tmp_path / "config.yml").write_text("frame_stack: 4\n")
    with pytest.raises(ValueError, match="the run has `frame_stack: 4`"):
        env_of_run(tmp_path, ENV)


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
    assert DeepCRL.load(tmp_path / "uploaded" / f"deepcrl-{ENV}.zip").num_timesteps == N_STEPS


def cli_main(*args: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sb3-deepcrl", *args])
        cli.main()


def test_command(capsys):
    cli_main("--help")
    output = capsys.readouterr().out
    assert all(script in output for script in (*SCRIPTS, "value_map"))
    with pytest.raises(SystemExit, match="there is no 'fly', only train, enjoy"):
        cli_main("fly")
    for script in SCRIPTS:
        with pytest.raises(SystemExit) as exit_info:
            cli_main(script, "--help")
        assert exit_info.value.code == 0
        assert f"usage: sb3-deepcrl {script}" in capsys.readouterr().out


def test_optimize_and_train_a_trial(tmp_path, capsys):
    # Few updates, as a trial may have 64 layers
    storage = ["--storage", str(tmp_path / "study.log"), "--study-name", "maze", "--eval-episodes", "1", "--env", ENV]
    tiny = [*storage, "--vec-env", "batch", "-n", "48", "-params", "n_envs:4", "learning_starts:44"]
    train(tmp_path, "-optimize", "--n-trials", "2", "--n-evaluations", "1", "--no-optim-plots", *tiny)
    (report,) = (tmp_path / "deepcrl").glob("report_*.csv")
    with report.open() as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert all(0.0 <= float(trial["value"]) <= 1.0 for trial in trials)
    # A search is no run: enjoy does not take it for the latest one
    assert not list((tmp_path / "deepcrl").glob(f"{ENV}_*"))
    train(tmp_path, "--trial-id", "0", "--eval-freq", "-1", *tiny)
    model = DeepCRL.load(tmp_path / "deepcrl" / f"{ENV}_1" / f"{ENV}.zip")
    assert model.depth == 2 ** int(trials[0]["params_depth_pow"])
    assert model.energy == trials[0]["params_energy"]
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
        transitions = hyperparams["train_freq"] * n_envs / hyperparams["gradient_steps"]
        assert TRANSITIONS_PER_UPDATE[0] <= transitions <= TRANSITIONS_PER_UPDATE[1]
        assert transitions == trial.user_attrs["transitions_per_update"]
        check_hyperparams({**hyperparams, "n_timesteps": 1, "policy": "MultiInputPolicy"}, DeepCRL)


def read(config: Path) -> dict:
    hyperparams: dict = {}
    if config.suffix == ".py":
        exec(config.read_text(), hyperparams)
        return hyperparams["hyperparams"]
    return yaml.safe_load(config.read_text())


CONFIGS = sorted(path.name for path in config_folder().glob("*.*") if path.suffix in (".yml", ".py"))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_entry_trains(config, tmp_path, capsys):
    algo = re.split(r"[-_.]", config)[0].replace("depth", "deepcrl")
    entries = read(config_folder() / config)
    seen = set()
    for env_id, entry in entries.items():
        checked = check_hyperparams(dict(entry), ALGOS[algo])
        if env_id == "default":
            continue
        # One env of each kind and of each set of hyperparameters; all of them for DeepCRL
        kind = re.sub(r"U\d?Maze|Big|Hardest|Push|Slide|PickAndPlace|Binpick|Easy|Hard|_.*|Maze", "", env_id)
        if config != "deepcrl.yml" and kind in seen:
            continue
        seen.add(kind)
        small: dict = {"n_envs": 2, "learning_starts": 2, "batch_size": 4, "buffer_size": 2000}
        if algo == "deepcrl":
            small |= {"depth": 4, "width": 16, "train_freq": 1, "gradient_steps": 1}
        else:
            # HerReplayBuffer has nothing to sample before the end of an episode
            small |= {"policy_kwargs": {"net_arch": [16]}, "gradient_steps": 0 if "replay_buffer_class" in checked else 1}
        args = ["--algo", algo, "-conf", config.removesuffix(".yml"), "--env", env_id, "-n", "10", "--eval-freq", "-1"]
        if "_" not in env_id and "Fetch" not in env_id:
            args += ["--vec-env", "batch"]
        train(tmp_path, *args, "-params", *(f"{key}:{value!r}" for key, value in small.items()))
        (model_path,) = (tmp_path / algo / f"{env_id}_1").glob(f"{env_id}.zip")
        with zipfile.ZipFile(model_path) as archive:
            data = json.loads(archive.read("data"))
        assert data["num_timesteps"] == 10
        assert data["_n_updates"] > 0 or small.get("gradient_steps") == 0
    capsys.readouterr()


def test_configs_say_what_was_run():
    robots = ("Point", "Ant", "Humanoid")
    mazes = {f"{robot}{maze}Maze-v0" for robot in robots for maze in ("U", "U4", "U5", "Big", "Hardest")}
    others = {"HumanoidGoal-v0", "AntGoal-v0", "ArmPushEasy-v0", "ArmPushHard-v0", "ArmBinpickHard-v0", "default"}
    robotics = {"PointMaze_UMaze-v3", "PointMaze_Large-v3", "AntMaze_UMaze-v5", "FetchReach-v4", "FetchPickAndPlace-v4"}
    assert mazes | others | robotics <= set(read(config_folder() / "deepcrl.yml"))
    paper = read(config_folder() / "deepcrl-paper.yml")
    assert {(entry["n_envs"], entry["batch_size"], entry["depth"]) for entry in paper.values()} == {(512, 512, 64)}
    for config in CONFIGS:
        if config.endswith(".yml"):
            lines = (config_folder() / config).read_text().splitlines()
            for index, line in enumerate(lines):
                if re.match(r"\S.*:( &\S+)?$", line) and not line.startswith("#"):
                    comment = ""
                    while lines[index - 1].startswith("# "):
                        index -= 1
                        comment = lines[index][2:] + " " + comment
                    said = re.search(r"[Nn]ot run here|[Rr]un .* seed", comment)
                    assert said, f"{config}: {line} has no comment that says what was run: {comment!r}"
                    for result in re.findall(r"docs/results/\S+\.md", comment):
                        is_file = (config_folder().parent / result).is_file()
                        assert is_file, f"{config}: {line} names {result}, which is not there"


@pytest.mark.parametrize("algo", sorted(set(ALGOS) - {"deepcrl"}))
def test_rl_zoos_own_configs_pass(algo):
    entries = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml").read_text())
    failures = {}
    for env_id, entry in entries.items():
        try:
            check_hyperparams(dict(entry), ALGOS[algo])
        except ConfigError as error:
            failures[env_id] = str(error)
    if algo == "ppo_lstm":
        # RecurrentPPO does not know it either
        assert failures.pop("default") == "`policy: MlpPolicy` is unknown, did you mean `MlpLstmPolicy`?"
        assert "MlpPolicy" not in ALGOS[algo].policy_aliases
    # Wrappers of packages that are not installed
    assert all("cannot be imported: No module named" in message for message in failures.values()), failures
    assert len(failures) < len(entries)


@pytest.mark.parametrize(("algo", "key"), [("ppo", "clip_range"), ("ppo", "clip_range_vf"), ("ars", "delta_std")])
def test_schedules_of_other_algorithms(algo, key):
    entry = {"n_timesteps": 10, "policy": "MlpPolicy"}
    assert check_hyperparams({**entry, key: "lin_0.2"}, ALGOS[algo])[key] == "lin_0.2"
    with pytest.raises(ConfigError, match=f"`{key}: 2e-1` is text: write `!!float 2e-1`"):
        check_hyperparams({**entry, key: "2e-1"}, ALGOS[algo])


def test_depth_of_a_sweep(monkeypatch):
    monkeypatch.setenv("DEPTH", "64")
    assert read(config_folder() / "depth_sweep.py")["AntUMaze-v0"]["depth"] == 64


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
    assert "Success at any step: " in capsys.readouterr().out
    # The statistics of VecNormalize go on too
    train(tmp_path, "-i", str(folder), "-n", "10")
    assert f"Loading VecNormalize stats: {folder / env_id / 'vecnormalize.pkl'}" in capsys.readouterr().out
    models = []

    def plot(model, *args, **kwargs):
        models.append(model)
        return plot_value_map(model, *args, **kwargs)

    monkeypatch.setattr("sb3_deepcrl.zoo.value_map.plot_value_map", plot)
    cli_main("value_map", "--env", env_id, "-f", str(tmp_path), "--exp-id", "1", "-o", str(tmp_path / "new" / "value.png"))
    assert (tmp_path / "new" / "value.png").stat().st_size > 5000
    saved = pickle.loads((folder / env_id / "vecnormalize.pkl").read_bytes()).obs_rms["observation"]
    assert models[0].get_vec_normalize_env().obs_rms["observation"].mean == pytest.approx(saved.mean)
    (folder / env_id / "vecnormalize.pkl").unlink()
    with pytest.raises(SystemExit, match=r"-i: .*vecnormalize\.pkl is missing"):
        train(tmp_path, "-i", str(folder), "-n", "10")
    with pytest.raises(SystemExit):
        cli_main("value_map", "--env", env_id, "-f", str(tmp_path), "--exp-id", "1")
    assert "vecnormalize.pkl not found" in capsys.readouterr().err


def run_plain_zoo(folder: Path, path: Path, *args: str) -> str:
    (folder / "custom_envs.py").write_text("import sb3_deepcrl.zoo\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", *args]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("conf, config", [([], "deepcrl"), (["-conf", "depth_sweep"], "depth_sweep")])
def test_plain_zoo_with_custom_envs(conf, config, tmp_path):
    args = f"--algo deepcrl --env {ENV} -f logs".split()
    train_args = [*conf, *"-n 128 --eval-freq -1 --num-threads 1".split()]
    output = run_plain_zoo(tmp_path, ROOT, "rl_zoo3.train", *args, *train_args, *TINY)
    assert f"Loading hyperparameters from: {config_folder() / config}." in output
    assert DeepCRL.load(tmp_path / "logs" / "deepcrl" / f"{ENV}_1" / f"{ENV}.zip").num_timesteps == 128
    if not conf:
        assert "Success rate: " in run_plain_zoo(tmp_path, ROOT, "rl_zoo3.enjoy", *args, "-n", "301", "--no-render")
        # Reads the command line before it makes an env
        run_plain_zoo(tmp_path, ROOT, "rl_zoo3.record_video", *args, "--help")


def test_rl_zoos_own_algorithms_keep_their_configs():
    args = ("sac", "Pendulum-v1", "logs")
    assert ExperimentManager(None, *args).config == str(Path(rl_zoo3.__file__).parent / "hyperparams" / "sac.yml")
    assert ExperimentManager(None, *args, config="json").config == "json"


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
    command = [sys.executable, str(site / "bin" / "sb3-deepcrl"), "train", "--env", ENV, "--vec-env", "batch", "-n", "120"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [*command, "--eval-freq", "-1", *TINY], cwd=work, env=environment, check=True, capture_output=True, text=True
    )
    loading = f"Loading hyperparameters from: {site / 'sb3_deepcrl' / 'zoo_configs' / 'deepcrl.yml'}"
    assert loading in result.stdout
    plain = f"rl_zoo3.train --algo deepcrl --env {ENV} -n 16 --eval-freq -1".split()
    assert loading in run_plain_zoo(work, site, *plain, *TINY)
    assert (work / "logs" / "deepcrl" / f"{ENV}_1" / f"{ENV}.zip").is_file()


def test_default_configs():
    assert find_config(None, "deepcrl", "Any-v0") == str(config_folder() / "deepcrl.yml")
    assert find_config(None, "sac", "AntU4Maze-v0") == str(config_folder() / "sac.yml")
    # RL Zoo's own file
    assert find_config(None, "sac", "Pendulum-v1") is None
    assert find_config("deepcrl-paper", "deepcrl", ENV) == str(config_folder() / "deepcrl-paper.yml")
    assert find_config("json.decoder", "deepcrl", ENV) == "json.decoder"


BAD = [
    ("--env PointUMaz-v0", "--env: Environment `PointUMaz` doesn't exist. Did you mean: `PointUMaze`?"),
    ("--env nowhere:Reach-v0", "--env: 'nowhere:Reach-v0' cannot be found, as the module 'nowhere' cannot be imported"),
    ("--env Pendulum-v1", "`achieved_goal`, `desired_goal` missing"),
    ("--env FetchReach-v4 --vec-env batch", "--vec-env batch: FetchReach-v4 is no task of this package"),
    ("--env PointMaze_UMaze-v3 --vec-env batch", "--vec-env batch: PointMaze_UMaze-v3 is no task of this package"),
    ("-n -5", "argument -n/--n-timesteps: must be at least 1, got -5"),
    ("-n 0.5", "argument -n/--n-timesteps: expected a whole number such as 4 or 1e6, got '0.5'"),
    ("-n inf", "argument -n/--n-timesteps: expected a whole number such as 4 or 1e6, got 'inf'"),
    ("--save-freq often", "argument --save-freq: expected a whole number such as 4 or 1e6, got 'often'"),
    ("--eval-episodes 0", "argument --eval-episodes: must be at least 1, got 0"),
    ("--n-eval-envs -1", "argument --n-eval-envs: must be at least 1, got -1"),
    ("-params dept:4", "`dept` is no hyperparameter, did you mean `depth`?"),
    ("-params depth:6", "`depth` must be a positive multiple of 4"),
    ("-params policy:'MultiInputPolcy'", "`policy: MultiInputPolcy` is unknown, did you mean `MultiInputPolicy`?"),
    ("-params policy:'nowhere.Policy'", "`policy: nowhere.Policy` cannot be imported"),
    ("-params policy:MultiInputPolicy", "'policy:MultiInputPolicy' is not `key:value` with a Python value"),
    ("-params learning_rate:'5e-4'", "`learning_rate: 5e-4` is text: write `!!float 5e-4`"),
    ("-params gamma:'1e-1'", "`gamma` must be a number, got '1e-1': write `!!float 1e-1`"),
    ("-params buffer_size:1e6", "`buffer_size` must be an integer, got 1000000.0"),
    ("-params n_envs:0", "`n_envs` must be at least 1, got 0"),
    ("-params policy_kwargs:dict(residual_scal=1)", "`policy_kwargs` has no `residual_scal`, did you mean `residual_scale`?"),
    ("-params policy_kwargs:'dict(activation_fn=nn.Rleu)'", "`policy_kwargs: dict(activation_fn=nn.Rleu)` is no valid Python"),
    ("-params policy_kwargs:{'activation_fn':'nn.ReLU'}", "`activation_fn: nn.ReLU` is text"),
    ("-params replay_buffer_kwargs:dict(n_sampled_goals=4)", "`replay_buffer_kwargs` has no `n_sampled_goals`"),
    ("-params env_wrapper:'nowhere.Wrapper'", "`env_wrapper: nowhere.Wrapper` cannot be imported"),
    ("-params seed:3", "`seed` cannot be in a config: use the flag --seed"),
    ("-params noise_type:'normal'", "`noise_type` needs `noise_std`"),
    ("-params noise_type:'norm' noise_std:0.1", "`noise_type: norm` is unknown, there are normal and ornstein-uhlenbeck"),
    ("-params normalize:dict(norm_obss=True)", "`normalize` has no `norm_obss`, did you mean `norm_obs`?"),
    (
        "-params monitor_kwargs:dict(info_keyword=('l',))",
        "`monitor_kwargs` has no `info_keyword`, did you mean `info_keywords`?",
    ),
    (
        "-params replay_buffer_class:'HerReplayBuffer' replay_buffer_kwargs:dict(online_sampling=True)",
        "`replay_buffer_kwargs` has no `online_sampling`",
    ),
    (
        "--algo sac -params replay_buffer_kwargs:dict(online_sampling=True)",
        "`replay_buffer_kwargs` has no `online_sampling`",
    ),
    ("--algo sac -params policy_kwargs:dict(net_archh=[8])", "`policy_kwargs` has no `net_archh`, did you mean `net_arch`?"),
    (
        "--env FetchReach-v4 -params env_wrapper:{'gymnasium.wrappers.TimeLimit':{'max_step':3}}",
        "`env_wrapper: gymnasium.wrappers.TimeLimit` has no `max_step`, did you mean `max_episode_steps`?",
    ),
    ("--env-kwargs maez:'u'", "it has no argument 'maez'. Did you mean 'maze'?"),
    ("--env PointMaze_UMaze-v3 --env-kwargs mazemap:'u'", "it has no argument 'mazemap'. Did you mean 'maze_map'?"),
    ("-conf nowhere.yml", "-conf: nowhere.yml is neither a file nor a Python module, nor one of the configs of this package"),
    ("-conf depcrl", "which are deepcrl, deepcrl-paper, depth_sweep, sac, sac-dense, td3, tqc, did you mean `deepcrl`?"),
    ("-conf no.where", "-conf: no.where is neither a file nor a Python module"),
    ("-params callback:'subprocess.Popen'", "`callback: subprocess.Popen` is no callback"),
    ("-i nowhere.zip", "-i: nowhere.zip is neither a model (.zip) nor the folder of a run"),
    ("--gym-packages nowhere", "the module 'nowhere' cannot be imported: No module named 'nowhere'"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_ends_in_one_line(args, message, tmp_path, capsys):
    args = args if "--env " in args else f"--env {ENV} --vec-env batch {args}"
    with pytest.raises(SystemExit) as exit_info:
        train(tmp_path, *args.split())
    assert exit_info.value.code not in (0, None)
    # What Python prints for a SystemExit with a message
    line = exit_info.value.code if isinstance(exit_info.value.code, str) else capsys.readouterr().err
    assert message in line
    assert line.startswith("sb3-deepcrl train: error: ")
    assert line.strip().count("\n") == 0
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("number", ["1e2", "100", "1E2", "+100.0"])
def test_whole_numbers_may_be_floats(number):
    assert at_least_one(None)(number) == 100
    assert at_least_one(-1)("-1") == -1
    assert whole_number("9007199254740993") == 9007199254740993


@pytest.mark.parametrize(
    "args, message",
    [
        ("enjoy --env PointUMaze-v0", "there is no screen to show PointUMaze-v0 on: add --no-render"),
        ("record_video --env PointUMaze-v0", "without a screen the pictures of PointUMaze-v0 need MUJOCO_GL=egl"),
        ("push_to_hub --env PointUMaze-v0 -orga me", "without a screen the pictures of PointUMaze-v0 need MUJOCO_GL=egl"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a screen")
def test_without_a_screen(args, message, logs, monkeypatch, capsys):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    script, *flags = args.split()
    with pytest.raises(SystemExit):
        run(script, [*flags, "-f", str(logs)])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"sb3-deepcrl {script}: error: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DISPLAY", ":987", f"without a screen the pictures of {ENV} need MUJOCO_GL=egl"),
        ("MUJOCO_GL", "elg", "MUJOCO_GL=elg does not work here (RuntimeError: "),
        ("MUJOCO_GL", "off", "MUJOCO_GL=off does not work here (AttributeError: "),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a screen")
def test_a_screen_or_library_that_is_not_there(name, value, message, logs):
    variables = {key: text for key, text in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}
    command = [sys.executable, "-m", "sb3_deepcrl", "record_video", "--env", ENV, "-f", str(logs), "-n", "5"]
    result = subprocess.run(command, env={**variables, name: value}, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert f"error: {message}" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "args, message",
    [
        ("all_plots", "the following arguments are required: -a/--algos, -e/--env, -f/--exp-folders"),
        ("plot_from_file --figure all.foo", "argument --figure: must be the name of a picture, such as all.png, got all.foo"),
        ("plot_from_file --figure {file}/all.png", "argument --figure: [Errno "),
        ("value_map -o {folder}/value", "argument -o/--output: must be the name of a picture, such as value.png, got "),
    ],
)
def test_bad_arguments_of_plots(args, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit):
        cli_main(*args.format(file=file, folder=tmp_path).split())
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_nowhere_to_write(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    args = ["--env", ENV, "--vec-env", "batch", "-n", "16", "--eval-freq", "-1", *TINY]
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


@pytest.mark.parametrize("command", ["sb3_deepcrl", "sb3_deepcrl.zoo.train"])
def test_without_rl_zoo(command, tmp_path):
    (tmp_path / "rl_zoo3.py").write_text("raise ModuleNotFoundError(\"No module named 'rl_zoo3'\")\n")
    result = subprocess.run([sys.executable, "-m", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert """(No module named 'rl_zoo3'): install the extra "zoo", in a clone by `pip install -e ".[zoo]"`""" in line


UNSAFE = [
    ("args.yml", "env_kwargs: !!python/object/apply:os.mkdir [{}]", "`!!python/object/apply:os.mkdir`"),
    ("args.yml", "env_kwargs: !!python/object/new:os.mkdir [{}]", "`!!python/object/new:os.mkdir`"),
    ("config.yml", "policy_kwargs: !!python/object/apply:os.mkdir [{}]", "`!!python/object/apply:os.mkdir`"),
    ("config.yml", "policy_kwargs: {{activation_fn: !!python/name:os.mkdir ''}}", "`os.mkdir`"),
    ("config.yml", "policy_kwargs: {{activation_fn: !!python/name:this.s ''}}", "`this.s`"),
    ("config.yml", "normalize: __import__('os').mkdir('{}')", "`normalize: __import__('os').mkdir('"),
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
    path.write_text(yaml.safe_dump(read_run_file(path)) + line.format(target) + "\n")
    with pytest.raises(SystemExit) as exit_info:
        if script == "train":
            train(tmp_path, "-i", str(folder), "-n", "16")
        else:
            cli_main(script, "--env", ENV, "-f", str(tmp_path), *(["--no-render"] if script == "enjoy" else []))
    assert exit_info.value.code not in (0, None)
    message = f"{exit_info.value.code}{capsys.readouterr().err}"
    assert f"{path} holds {told}" in message
    assert "which is more than data" in message
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
    assert read_run_file(path) == data
    for text, message in {"a: [": "while parsing", "- 1": "must hold keys and values, got [1]"}.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(message)):
            read_run_file(path)


def test_env_of_another_package(tmp_path, monkeypatch, capsys):
    add_package(tmp_path, monkeypatch)
    args = ["--env", "elsewhere:ElsewhereReach-v0", "-n", "32", "--eval-freq", "-1"]
    train(tmp_path, *args, *TINY[:-2], "learning_starts:16", "buffer_size:4000")
    folder = tmp_path / "deepcrl" / "ElsewhereReach-v0_1"
    # As from a process that has not imported the package
    add_package(tmp_path, monkeypatch)
    train(tmp_path, "-i", str(folder), "-n", "16")
    assert DeepCRL.load(tmp_path / "deepcrl" / "ElsewhereReach-v0_2" / "ElsewhereReach-v0.zip").num_timesteps == 48
    add_package(tmp_path, monkeypatch)
    run("enjoy", ["--env", "elsewhere:ElsewhereReach-v0", "-f", str(tmp_path), "-n", "21", "--no-render"])
    assert "Success at any step: " in capsys.readouterr().out


def test_bad_config_has_no_traceback(tmp_path):
    config = tmp_path / "my.yml"
    config.write_text(f"{ENV}:\n  n_timesteps: 10\n  policy: 'MultiInputPolicy'\n  depht: 8\n")
    command = [sys.executable, "-m", "sb3_deepcrl.zoo.train", "--env", ENV, "-conf", str(config), "-f", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    *_, line = result.stderr.strip().splitlines()
    assert line == (f"sb3-deepcrl train: error: {config}, {ENV}: `depht` is no hyperparameter, did you mean `depth`?")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ENV}: 3", "must have keys"),
        (f"{ENV}:\n  policy: 'MultiInputPolicy'", "`n_timesteps` is missing"),
        (f"{ENV}:\n  n_timesteps: 10", "`policy` is missing"),
        ("Other-v0:\n  n_timesteps: 10", f"not found for deepcrl-{ENV}"),
        (f"{ENV}: [", "while parsing"),
    ],
)
def test_bad_config_file(text, message, tmp_path):
    config = tmp_path / "my.yml"
    config.write_text(text)
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, "--env", ENV, "-conf", str(config))


def test_an_error_inside_of_a_python_config_keeps_its_traceback(tmp_path):
    config = tmp_path / "my.py"
    config.write_text("hyperparams = dict(n_timesteps=1 + '1')\n")
    with pytest.raises(TypeError, match="unsupported operand"):
        train(tmp_path, "--env", ENV, "-conf", str(config))


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


def test_a_bug_in_a_module_of_a_config_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import nowhere_else\n")
    monkeypatch.syspath_prepend(tmp_path)
    for key, value in (("policy", "broken_module.Policy"), ("env_wrapper", {"broken_module.Wrapper": {}})):
        entry = {"n_timesteps": 10, "policy": "MultiInputPolicy", key: value}
        with pytest.raises(ModuleNotFoundError, match="nowhere_else"):
            check_hyperparams(entry, DeepCRL)


def test_missing_model_ends_in_one_line(tmp_path, capsys):
    for script in ("enjoy", "record_video"):
        with pytest.raises(SystemExit):
            run(script, ["--env", ENV, "-f", str(tmp_path)])
        assert f"--env {ENV}: The " in capsys.readouterr().err


def test_env_kwargs_of_a_config_hold_for_evaluation_and_videos(tmp_path):
    config = tmp_path / "my.yml"
    config.write_text(
        f"{ENV}:\n  n_timesteps: 10\n  policy: 'MultiInputPolicy'\n  depth: 4\n  width: 16\n  env_kwargs:\n    maze: 'u4'\n"
    )
    seen = []

    class Manager(GoalExperimentManager):
        def create_envs(self, *args, **kwargs):
            env = super().create_envs(*args, **kwargs)
            task_kwargs = env.get_attr("unwrapped")[0].task_kwargs
            seen.append((kwargs.get("eval_env", False), task_kwargs["maze"], task_kwargs.get("goal_set")))
            assert type(env) is DummyVecEnv
            return env

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_deepcrl.zoo.exp_manager.GoalExperimentManager", Manager)
        train(tmp_path, "--env", ENV, "-conf", str(config), "--eval-env-kwargs", "goal_set:'eval'")
    assert sorted(seen) == [(False, "u4", None), (True, "u4", "eval")]
    args = (tmp_path / "deepcrl" / f"{ENV}_1" / ENV / "args.yml").read_text()
    assert yaml.load(args, Loader=yaml.UnsafeLoader)["env_kwargs"] == {"maze": "u4"}
