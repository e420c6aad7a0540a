import io
import itertools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from rich.console import Console
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import EvalCallback, EveryNTimesteps, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from sb3_deepcrl import GoalEvalCallback, evaluate_goals
from sb3_deepcrl.common.callbacks import ResumableEvalCallback, TrainingDisplay
from sb3_deepcrl.common.evaluation import mean_of_episodes
from tests.envs import GoalReachEnv
from tests.test_deepcrl import make_model


class ScriptedEnv(GoalReachEnv):
    """At the goal in steps 3, 4 and 5 of 10, at a distance of the step number otherwise."""

    def __init__(self, key: str = "is_success", rename: bool = False):
        super().__init__()
        self.key, self.rename = key, rename

    def step(self, action):
        self.steps += 1
        at_goal = self.steps in (3, 4, 5)
        self.position = self.goal + np.array([0.0 if at_goal else self.steps / 5, 0.0])
        return self._observation(), float(at_goal), False, self.steps == 10, {self.key: np.float32(at_goal)}


class WithoutLastObservation(VecEnvWrapper):
    """Does not tell how an episode ended, as some simulators."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards.tolist(), dones.astype(np.float32), [{**info, "terminal_observation": None} for info in infos]


class Still:
    """A policy that does nothing."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.zeros((len(observation["observation"]), 2)), state


@pytest.mark.parametrize("key", ["is_success", "success"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_measures_by_hand(key, n_envs, normalize):
    env = make_vec_env(ScriptedEnv, n_envs, env_kwargs=dict(key=key))
    if normalize:
        # Clips most of what it gives
        env = VecNormalize(env, norm_reward=False, clip_obs=0.1)
    episodes = evaluate_goals(Still(), env, 7)
    assert len(episodes) == 7
    assert {episode.env_index for episode in episodes} == set(range(n_envs))
    for episode in episodes:
        assert episode.success_any
        assert not episode.success_last
        assert episode.time_at_goal == 3
        assert episode.time_at_goal_fraction == pytest.approx(0.3)
        assert episode.episode_length == 10
        assert episode.episode_reward == pytest.approx(3.0)
        # Steps 1, 2, 6, 7, 8, 9 and 10, a fifth of a metre each; with VecNormalize without the last one
        expected = 33 / 5 / 9 if normalize else 43 / 5 / 10
        assert episode.mean_distance == pytest.approx(expected, rel=1e-4)


def test_env_that_does_not_tell_how_an_episode_ended():
    for episode in evaluate_goals(Still(), WithoutLastObservation(make_vec_env(ScriptedEnv, 2)), 4):
        assert episode.episode_length == 10
        assert episode.mean_distance == pytest.approx(33 / 5 / 9, rel=1e-4)


class NextGoalEnv(GoalReachEnv):
    """Reaches its goal in each step, and then has another one."""

    def step(self, action):
        self.steps += 1
        self.position, self.goal = self.goal, -self.goal
        return self._observation(), 1.0, False, self.steps == 4, {"is_success": True}


@pytest.mark.parametrize("n_envs", [1, 2])
def test_distance_is_that_to_the_goal_of_the_step(n_envs):
    for episode in evaluate_goals(Still(), make_vec_env(NextGoalEnv, n_envs), 3):
        assert (episode.time_at_goal, episode.mean_distance) == (4, 0.0)


def test_single_env_without_monitor():
    means = mean_of_episodes(evaluate_goals(Still(), ScriptedEnv(), 2))
    assert means["success_any"] == 1.0
    assert means["success_last"] == 0.0
    assert means["episode_reward"] == 3.0


def test_evaluate_goals_errors():
    with pytest.raises(ValueError, match="`n_eval_episodes` must be at least 1, got 0"):
        evaluate_goals(Still(), ScriptedEnv(), 0)
    with pytest.raises(ValueError, match="neither `is_success` nor `success`"):
        evaluate_goals(Still(), ScriptedEnv(key="reached"), 1)


def test_wrong_arguments_of_the_callback():
    with pytest.raises(ValueError, match="`n_eval_episodes` must be a positive integer, got 0"):
        GoalEvalCallback(ScriptedEnv(), n_eval_episodes=0)
    with pytest.raises(ValueError, match=r"has no `desired_goal` but Box.*use `ResumableEvalCallback`"):
        GoalEvalCallback(gym.make("Pendulum-v1"))


@pytest.mark.parametrize("n_envs", [1, 2])
def test_nan_in_an_evaluation(n_envs):
    model = make_model()
    model.actor.mu.weight.data[:] = np.nan
    for tested in (model, model.policy):
        with pytest.raises(ValueError, match=r"the weights `mu.weight` are not finite"):
            evaluate_goals(tested, make_vec_env(ScriptedEnv, n_envs), 2)

    class NaNActions(Still):
        def predict(self, *args, **kwargs):
            actions, state = super().predict(*args, **kwargs)
            return np.full_like(actions, np.nan), state

    with pytest.raises(ValueError, match="The policy gives actions that are NaN or infinite"):
        evaluate_goals(NaNActions(), make_vec_env(ScriptedEnv, n_envs), 2)


class Wrapper(VecEnvWrapper):
    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


@pytest.mark.parametrize(
    "same",
    [
        lambda env: env,
        lambda env: VecNormalize(env),
        lambda env: Wrapper(VecMonitor(env)),
        lambda env: env.envs[1],
        lambda env: DummyVecEnv([ScriptedEnv, lambda: Monitor(env.envs[1].unwrapped)]),
    ],
)
def test_goal_eval_callback_in_the_training_env(same):
    env = make_vec_env(ScriptedEnv, 2)
    model = make_model(Wrapper(env))
    with pytest.raises(ValueError, match=r"`eval_env` is the env that the model is trained in.*Make another one"):
        model.learn(20, callback=GoalEvalCallback(same(env), eval_freq=10))
    assert model.num_timesteps == 0
    with pytest.warns(UserWarning, match="A callback evaluates in the env that the model is trained in"):
        model.learn(0, callback=[EveryNTimesteps(10, EvalCallback(same(env)))])


@pytest.mark.parametrize("key", ["is_success", "success"])
def test_goal_eval_callback(tmp_path, key, monkeypatch):
    model = make_model(make_vec_env(ScriptedEnv, 2))
    logged: list[tuple] = []
    logger = configure(None, [])
    record = logger.record

    def log(key, value, *args, **kwargs):
        logged.append((key, value))
        record(key, value, *args, **kwargs)

    monkeypatch.setattr(logger, "record", log)
    model.set_logger(logger)
    callback = GoalEvalCallback(
        make_vec_env(ScriptedEnv, 2, env_kwargs=dict(key=key)),
        n_eval_episodes=5,
        eval_freq=20,
        log_path=str(tmp_path),
        verbose=0,
    )
    model.learn(128, callback=callback)
    values = dict(logged)
    assert values["eval/success_any"] == 1.0
    assert values["eval/success_last"] == 0.0
    assert values["eval/time_at_goal"] == 3.0
    assert values["eval/time_at_goal_fraction"] == pytest.approx(0.3)
    assert values["eval/mean_distance"] == pytest.approx(0.86, rel=1e-4)
    assert values["eval/success_rate"] == 0.0
    keys = [key for key, _ in logged]
    # All in one table
    assert keys.index("eval/success_any") < keys.index("time/total_timesteps", keys.index("eval/success_any"))
    with np.load(tmp_path / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [40, 80, 120]
        assert file["successes"].tolist() == file["success_last"].tolist() == [[False] * 5] * 3
        assert file["time_at_goal"].tolist() == [[3] * 5] * 3
        assert 0 < file["n_updates"][0] < file["n_updates"][2] <= model._n_updates
        assert np.isfinite([file[name] for name in ("critic_loss", "categorical_accuracy", "ent_coef", "entropy")]).all()
    assert list(tmp_path.iterdir()) == [tmp_path / "evaluations.npz"]


def test_evaluations_of_a_training_that_stopped_go_on(tmp_path):
    def evaluations():
        with np.load(tmp_path / "evaluations.npz") as file:
            return dict(file)

    def callback(**kwargs):
        env = make_vec_env(ScriptedEnv, 2)
        settings = dict(n_eval_episodes=3, eval_freq=10, log_path=str(tmp_path), resume=True, verbose=0)
        return GoalEvalCallback(env, **settings, **kwargs)

    model = make_model(make_vec_env(ScriptedEnv, 2))
    model.learn(48, callback=callback())
    before = evaluations()
    assert before["timesteps"].tolist() == [20, 40]
    # It was saved after the first evaluation, and goes on from there, without what older versions did not write
    model.num_timesteps = 26
    np.savez(tmp_path / "evaluations.npz", **{name: values for name, values in before.items() if name != "actor_grad_norm"})
    resumed = callback(best_model_save_path=str(tmp_path))
    model.learn(40, callback=resumed, reset_num_timesteps=False)
    after = evaluations()
    assert after["timesteps"].tolist() == [20, 40, 60]
    assert {len(values) for values in after.values()} == {3}
    assert np.isnan(after["actor_grad_norm"][0]) and np.isfinite(after["actor_grad_norm"][2])
    assert (after["seconds"][0] == before["seconds"][0]) and (np.diff(after["seconds"]) > 0).all()
    assert (tmp_path / "best_model.zip").is_file()
    # The best one is there already
    (tmp_path / "best_model.zip").write_text("best")
    model.learn(20, callback=callback(best_model_save_path=str(tmp_path)), reset_num_timesteps=False)
    assert len(evaluations()["timesteps"]) == 4
    assert (tmp_path / "best_model.zip").read_text() == "best"
    with pytest.raises(ValueError, match="have 3 episodes each: use `n_eval_episodes=3`"):
        GoalEvalCallback(make_vec_env(ScriptedEnv), n_eval_episodes=2, log_path=str(tmp_path), resume=True)
    np.savez(tmp_path / "evaluations.npz", timesteps=[20], results=[[1.0] * 3], ep_lengths=[[10] * 3])
    with pytest.raises(ValueError, match="was written by another callback"):
        callback()
    (tmp_path / "evaluations.npz").unlink()
    model.learn(20, callback=callback())
    # A new training, of which nothing is there yet
    model.learn(2, callback=callback())
    assert len(evaluations()["timesteps"]) == 0
    model.learn(20, callback=callback())
    assert evaluations()["timesteps"].tolist() == [20]


def test_clock_of_the_evaluations_stands_still_meanwhile(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("sb3_deepcrl.common.callbacks.time", SimpleNamespace(process_time=lambda: clock.now))

    class Ticking(NextGoalEnv):
        def step(self, action):
            clock.now += 1.0
            return super().step(action)

    model = make_model(make_vec_env(Ticking))
    callback = GoalEvalCallback(make_vec_env(Ticking), eval_freq=8, n_eval_episodes=50, log_path=str(tmp_path), verbose=0)
    model.learn(24, callback=callback)
    with np.load(tmp_path / "evaluations.npz") as file:
        assert file["seconds"].tolist() == [8.0, 16.0, 24.0]


def test_evaluations_without_goals(tmp_path):
    callback = ResumableEvalCallback(make_vec_env("Pendulum-v1"), n_eval_episodes=2, eval_freq=30, log_path=str(tmp_path))
    SAC("MlpPolicy", make_vec_env("Pendulum-v1"), learning_starts=40).learn(60, callback=callback)
    with np.load(tmp_path / "evaluations.npz") as file:
        assert file["results"].shape == (2, 2)
        assert np.isnan(file["critic_loss"]).tolist() == [True, False]
        assert np.isnan(file["categorical_accuracy"]).all()


def test_printed_evaluation_says_which_success(capsys):
    model = make_model(make_vec_env(ScriptedEnv, 2), train_freq=5)
    model.learn(20, callback=GoalEvalCallback(make_vec_env(ScriptedEnv, 2), n_eval_episodes=4, eval_freq=5))
    first, second, *rest = capsys.readouterr().out.splitlines()
    measures = "success 100 % at any step, 0 % at the last step, time at goal 3.0 of 10 steps, episode reward 3.00"
    assert first == f"Eval num_timesteps=10: {measures} (new best)"
    assert second == f"Eval num_timesteps=20: {measures}"
    assert rest == []


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), width=40)
    monkeypatch.setattr("sb3_deepcrl.common.callbacks.get_console", lambda: console)
    return console


def test_training_display(monkeypatch):
    console = Console(file=io.StringIO(), width=160, highlight=False, force_interactive=True, force_terminal=True)
    monkeypatch.setattr("sb3_deepcrl.common.callbacks.get_console", lambda: console)
    display = TrainingDisplay()
    model = make_model(make_vec_env(ScriptedEnv, 2)).learn(96, callback=display)
    assert list(display.successes) == [True] * len(display.successes) != []
    # Once more does no harm, and before the start neither
    display.stop()
    TrainingDisplay().stop()
    assert display.times_at_goal[0] == pytest.approx(0.3)
    assert 0.0 < display.accuracy <= 1.0
    text = console.file.getvalue()
    for word in ("success at any step", "100 %", "time at goal", "30 %", "categorical accuracy", "steps/s", "left", "96/96"):
        assert word in text, word
    assert f"(chance {100 / model.batch_size:.2g} %)" in text


def test_display_in_a_log_file(monkeypatch, console):
    display = TrainingDisplay()
    model = make_model(make_vec_env(ScriptedEnv, 2), train_freq=1, gradient_steps=1, compile=False)
    model.learn(96, callback=display)
    display.stop()
    lines = console.file.getvalue().splitlines()
    # At the start, for every tenth of the steps and at the end; none of them broken
    assert [line.partition(" ")[0] for line in lines] == [f"{steps}/96" for steps in (*range(0, 96, 10), 96)]
    assert "success at any step 100 %, time at goal 30 %, categorical accuracy " in lines[-1]
    # In a long training, every minute: here each look at the clock takes ten seconds, and there are 100 rollouts
    console.file = io.StringIO()
    monkeypatch.setattr("sb3_deepcrl.common.callbacks.time", SimpleNamespace(monotonic=itertools.count(0, 10).__next__))
    model.learn(1_000_000, callback=[display, StopTrainingOnMaxEpisodes(10)])
    display.stop()
    assert 10 < len(console.file.getvalue().splitlines()) < 30


def test_display_in_place_of_the_tables(tmp_path, capsys):
    for replaces_tables in (False, True):
        model = make_model(make_vec_env(ScriptedEnv, 2), verbose=1, tensorboard_log=str(tmp_path))
        model.learn(96, callback=TrainingDisplay(replaces_tables=replaces_tables), log_interval=1)
        assert ("| rollout/" in capsys.readouterr().out) != replaces_tables
    assert len(list(tmp_path.glob("DeepCRL_*/events.out.tfevents.*"))) == 2


def test_display_of_another_algorithm(console):
    SAC("MultiInputPolicy", make_vec_env(ScriptedEnv, 2)).learn(40, callback=TrainingDisplay())
    lines = console.file.getvalue().splitlines()
    assert "success at any step 100 %, time at goal 30 %, updates 0, steps/s " in lines[-1]
