from dataclasses import replace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from sb3_deepcrl import ContrastiveReplayBuffer, DeepCRL
from sb3_deepcrl.analysis import OfflineStudy
from sb3_deepcrl.envs import BatchVecEnv
from sb3_deepcrl.zoo.launcher import run
from sb3_deepcrl.zoo.runs import RunFolder
from tests.envs import GoalReachEnv
from tests.studies import TOY, check_files

minari = pytest.importorskip("minari")
LENGTHS = (10, 4, 7)


def make_episodes(env, lengths=LENGTHS):
    """Episodes of random actions, in the form of Minari."""
    env.action_space.seed(0)
    episodes = []
    for index, length in enumerate(lengths):
        observation, _ = env.reset(seed=index)
        observations, actions = [observation], []
        for _ in range(length):
            actions.append(env.action_space.sample())
            observation, *_ = env.step(actions[-1])
            observations.append(observation)
        truncated = index % 2 == 0
        episodes.append(
            minari.data_collector.EpisodeBuffer(
                observations={key: np.stack([o[key] for o in observations]) for key in observation},
                actions=np.stack(actions),
                rewards=np.arange(length, dtype=float),
                terminations=np.eye(length, dtype=bool)[-1] & (not truncated),
                truncations=np.eye(length, dtype=bool)[-1] & truncated,
            )
        )
    return episodes


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = GoalReachEnv(action_scale=2.0)
    return minari.create_dataset_from_buffers(
        "reach/random-v0", make_episodes(env), observation_space=env.observation_space, action_space=env.action_space
    )


def make_model(env=None, **kwargs) -> DeepCRL:
    env = make_vec_env(lambda: GoalReachEnv(action_scale=2.0), 2) if env is None else env
    settings = dict(depth=4, width=16, batch_size=16, buffer_size=1000, device="cpu", seed=0)
    return DeepCRL("MultiInputPolicy", env, **{**settings, **kwargs})


def stored_episodes(buffer):
    """Observations, actions and whether it terminated, of each episode that the buffer holds, by its length."""
    return {len(e.actions): (e.observations, e.actions, e.terminated) for e in buffer.episodes()}


@pytest.mark.parametrize("how", ["object", "id", "folder", "from_minari"])
def test_minari(dataset, how, tmp_path):
    source = {"id": "reach/random-v0", "folder": tmp_path / "reach" / "random-v0"}.get(how, dataset)
    if how == "from_minari":
        buffer = ContrastiveReplayBuffer.from_minari(source, device="cpu", gamma=0.9)
        assert buffer.gamma == 0.9
    else:
        model = make_model()
        model.load_dataset(source)
        buffer = model.replay_buffer
    found = stored_episodes(buffer)
    assert sorted(found) == sorted(LENGTHS)
    for episode in dataset.iterate_episodes():
        observations, actions, terminated = found[len(episode)]
        for key, values in observations.items():
            np.testing.assert_allclose(values, episode.observations[key], rtol=1e-5)
        # Stored in [-1, 1]
        np.testing.assert_allclose(actions, episode.actions / 2.0, rtol=1e-5)
        assert terminated == episode.terminations[-1]


def test_ogbench(tmp_path):
    path = tmp_path / "pointmaze-small-navigate-v0.npz"
    observations = np.arange(24, dtype=np.float32).reshape(8, 3)
    actions = np.linspace(-2.0, 2.0, 16, dtype=np.float32).reshape(8, 2)
    np.savez(path, observations=observations, actions=actions, terminals=np.isin(np.arange(8), (4, 7)))
    model = make_model()
    model.load_dataset(path, goal_indices=(1, 2))
    found = stored_episodes(model.replay_buffer)
    # The last state of an episode has no action
    assert sorted(found) == [2, 4]
    np.testing.assert_allclose(found[4][1], actions[:4] / 2.0, rtol=1e-5)
    np.testing.assert_allclose(found[2][0]["observation"], observations[5:])
    np.testing.assert_allclose(found[2][0]["achieved_goal"], observations[5:, 1:])
    model.load_dataset(path)
    assert (model.replay_buffer.observations["achieved_goal"] == observations[:, :2].min()).any()


def test_data_that_do_not_fit_replace_the_oldest(dataset):
    model = make_model(make_vec_env(lambda: GoalReachEnv(action_scale=2.0), 1), buffer_size=8)
    model.load_dataset(dataset)
    # The longest was divided
    assert sorted(stored_episodes(model.replay_buffer))[-1] == 7
    goals = model.replay_buffer.sample_contrastive(200)[0]["desired_goal"]
    last = list(dataset.iterate_episodes())[-1].observations["achieved_goal"].astype(np.float32)
    assert all((goal == last[1:]).all(axis=1).any() for goal in goals.numpy())


def test_offline_then_online(dataset, tmp_path):
    # One of the envs has no episode
    model = make_model(make_vec_env(lambda: GoalReachEnv(action_scale=2.0), 4), normalize_observations=True, bc_coef=0.1)
    model.load_dataset(dataset)
    assert model.actor.normalizer.count == sum(LENGTHS) + len(LENGTHS)
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).clone()
    model.learn_offline(150, log_interval=100)
    assert (model._n_updates, model.num_timesteps) == (150, 0)
    assert not th.equal(before, th.nn.utils.parameters_to_vector(model.policy.parameters()))
    # It goes on with its own policy, in other files too
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DeepCRL.load(tmp_path / "model", env=model.env, device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    for one in (model, loaded):
        one.set_random_seed(0)
        one.learn(40)
        assert one.learning_starts == 0 and one._n_updates > 150
        # The data are still there
        assert np.count_nonzero(one.replay_buffer.remaining) == sum(LENGTHS) + 40
    for parameter, other in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert th.isfinite(parameter).all() and parameter.shape == other.shape


def test_schedules_run_over_the_updates(dataset):
    """Also after a ``learn()`` at whose end nothing was left of the learning rate."""
    rates = []
    model = make_model(learning_rate=lambda remaining: rates.append(remaining) or 3e-4 * remaining, learning_starts=10)
    model.learn(40)
    model.load_dataset(dataset)
    rates.clear()
    dumps = []
    model.set_logger(configure(None, []))
    model.logger.dump = dumps.append
    n_updates = model._n_updates
    model.learn_offline(250)
    assert dumps == [n_updates + 250]
    assert sorted({*rates}) == pytest.approx([0.2, 0.6, 1.0])


@pytest.mark.parametrize("itself", [True, False])
def test_replay_buffer_of_other_envs(itself, tmp_path):
    source = make_model(make_vec_env(lambda: GoalReachEnv(max_steps=7, action_scale=2.0), 3), buffer_size=60)
    source.learn(90)
    source.save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"There is no data set .*buffer' here.*Did you mean '.*buffer\.pkl'\?"):
        make_model().load_dataset(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"The replay buffer has `observation_space=.*but the model has"):
        make_model(BitFlippingEnv(n_bits=4)).load_dataset(source.replay_buffer)
    normalized = make_model(make_vec_env(lambda: GoalReachEnv(max_steps=7, action_scale=2.0), 3), normalize_observations=True)
    # The statistics of a model that has seen nothing else
    normalized.load_replay_buffer(tmp_path / "buffer")
    known = [len(episode.observations["achieved_goal"]) for episode in normalized.replay_buffer.episodes()]
    assert normalized.actor.normalizer.count == sum(known)
    normalized.load_replay_buffer(tmp_path / "buffer")
    assert normalized.actor.normalizer.count == sum(known)
    model = make_model()
    model.load_dataset(source.replay_buffer if itself else tmp_path / "buffer.pkl")
    # What is left of the oldest of each env, two whole ones, and the running one
    lengths = [len(episode.actions) for episode in model.replay_buffer.episodes()]
    assert sorted(lengths) == sorted(len(episode.actions) for episode in source.replay_buffer.episodes())
    assert sum(lengths) == np.count_nonzero(source.replay_buffer.remaining) and lengths.count(7) == 6
    stored = {tuple(row) for row in source.replay_buffer.actions.reshape(-1, 2)}
    assert {tuple(row) for e in model.replay_buffer.episodes() for row in e.actions} >= stored


@pytest.mark.parametrize("env", [lambda: GoalReachEnv(action_scale=2.0), lambda: BitFlippingEnv(n_bits=4)])
def test_behavior_cloning(env):
    """With a large coefficient the deterministic action is the one of the data."""
    model = make_model(make_vec_env(env, 1), bc_coef=1000.0, random_goals=0.0, learning_rate=3e-3, batch_size=64)
    model.replay_buffer.gamma = 0.0
    rng = np.random.default_rng(0)
    is_discrete = isinstance(model.action_space, spaces.Discrete)
    observation = model.env.reset()
    for _ in range(100):
        # What the data do depends on nothing
        action = np.array([[2]]) if is_discrete else np.array([[0.5, -0.5]])
        following, reward, done, infos = model.env.step(
            np.array([rng.integers(4)]) if is_discrete else rng.uniform(-2, 2, (1, 2))
        )
        model.replay_buffer.add(observation, following, action, reward, done, infos)
        observation = following
    model.learn_offline(300)
    action, _ = model.predict(model.env.reset(), deterministic=True)
    np.testing.assert_allclose(action, [2] if is_discrete else [[1.0, -1.0]], atol=0.2)
    # Online nothing is cloned
    assert model._bc_coef == 0.0


def test_wrong_data(dataset, tmp_path):
    for source, message in {
        "nowhere-v0": r"There is no data set 'nowhere-v0' here",
        tmp_path / "no.npz": r"There is no file .*no\.npz",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_model().load_dataset(source)
    np.savez(tmp_path / "other.npz", observations=np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"is no data set of OGBench: it has no actions, terminals"):
        make_model().load_dataset(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"The env has `achieved_goal` of shape \(4,\), but the data set"):
        make_model(BitFlippingEnv(n_bits=4)).load_dataset(dataset)
    with pytest.raises(ValueError, match=r"Actions of the data set are outside of the env's Box"):
        make_model(GoalReachEnv(action_scale=1.0)).load_dataset(dataset)
    np.savez(tmp_path / "nan.npz", observations=np.full((3, 3), np.nan), actions=np.zeros((3, 2)), terminals=[0, 0, 1])
    with pytest.raises(ValueError, match=r"NaN or infinity in `observation` of step 0 of episode 0: \[nan nan nan\]"):
        make_model().load_dataset(tmp_path / "nan.npz")
    model = make_model(GoalReachEnv(action_scale=2.0))
    episodes = list(ContrastiveReplayBuffer.from_minari(dataset, device="cpu").episodes())
    episodes[2].actions[3] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in `action` of step 3 of episode 2"):
        model.replay_buffer.add_episodes(episodes)
    # What came before can be used
    assert model.replay_buffer.size() == sum(len(episode.actions) for episode in episodes[:2])
    with pytest.raises(ValueError, match=r"There is nothing to learn from"):
        make_model().learn_offline(10)
    with pytest.raises(ValueError, match=r"use `normalize_observations=True`"):
        make_model(VecNormalize(make_vec_env(GoalReachEnv, 1))).load_dataset(dataset)
    with pytest.raises(ValueError, match=r"`bc_coef` must not be negative, got -1"):
        make_model(bc_coef=-1)


def test_runs_with_data(tmp_path):
    """Learning offline, an evaluation before the first step, and going on online; interrupted in between."""
    source = DeepCRL("MultiInputPolicy", BatchVecEnv("PointUMaze-v0", 4), depth=4, width=16, learning_starts=900, device="cpu")
    source.learn(800).save_replay_buffer(tmp_path / "data")
    args = f"-f {tmp_path} --env PointUMaze-v0 --eval-freq 200 --eval-episodes 4 --n-eval-envs 4 --num-threads 1".split()
    args += f"--resume --save-replay-buffer --dataset {tmp_path / 'data.pkl'} --offline-updates 30".split()
    params = "-params n_envs:4 width:16 depth:4 batch_size:16 train_freq:4 gradient_steps:1 bc_coef:0.1".split()
    run("train", [*args, "-n", "0", *params])
    folder = RunFolder.newest(tmp_path, "deepcrl", "PointUMaze-v0")
    assert folder.num_timesteps == 0 and folder.load_model()._n_updates == 30
    run("train", [*args, "-n", "400", *params])
    model = folder.load_model()
    assert folder.evaluations()["timesteps"].tolist() == [0, 200, 400]
    assert folder.evaluations()["n_updates"].tolist()[0] == 30 and model._n_updates == 30 + 400 // 16
    # Nothing is learned a second time
    run("train", [*args, "-n", "800", *params])
    assert folder.load_model()._n_updates == 30 + 800 // 16
    assert folder.evaluations()["timesteps"].tolist() == [0, 200, 400, 600, 800]


def test_study(tmp_path):
    study = OfflineStudy(env="PointUMaze-v0", agent_steps=160, offline_updates=20, runs=tmp_path, **TOY)
    report = study.run()
    text = check_files(report)
    assert [row[""] for row in report.table] == ["agent that made the data", "offline", "then 160 steps online"]
    assert "20 " in text and [row["updates"] for row in report.table][1] == "20"
    # Of other data, another run
    learner = study.settings()["offline, then online"]
    other = replace(study, agent_steps=320).settings()["offline, then online"]
    assert learner.folder(tmp_path) != other.folder(tmp_path)
