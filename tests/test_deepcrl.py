import contextlib
import copy
import csv
import subprocess
import sys
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecCheckNan, VecEnv, VecEnvWrapper, VecNormalize
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_deepcrl import ContrastiveReplayBuffer, DeepCRL
from sb3_deepcrl.common.callbacks import TrainingDisplay
from sb3_deepcrl.deepcrl.deepcrl import UPDATE_METRICS
from tests.envs import EpisodeCounterEnv, GoalReachEnv, add_package

# Small networks, so that the tests are fast
SMALL = dict(depth=4, width=16, batch_size=16, learning_starts=20, device="cpu", seed=0)


def make_model(env=None, **kwargs) -> DeepCRL:
    env = make_vec_env(GoalReachEnv, 2) if env is None else env
    return DeepCRL("MultiInputPolicy", env, **{**SMALL, "policy_kwargs": dict(repr_dim=8), **kwargs})


def parameters_of(module: th.nn.Module) -> dict[str, th.Tensor]:
    return {name: values.clone() for name, values in module.state_dict().items()}


def changed(before: dict[str, th.Tensor], module: th.nn.Module) -> list[str]:
    return [name for name, values in module.state_dict().items() if not th.equal(values, before[name])]


def test_env():
    check_env(GoalReachEnv())


@pytest.mark.parametrize("env_id", ["PointMaze_UMaze-v3", "FetchReach-v4"])
def test_id_of_gymnasium_robotics(env_id):
    # In a process where nobody has imported it yet
    code = (
        "from sb3_deepcrl import DeepCRL; "
        f"DeepCRL('MultiInputPolicy', '{env_id}', depth=4, width=16, learning_starts=2, batch_size=2).learn(20)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_ids(tmp_path, monkeypatch):
    add_package(tmp_path, monkeypatch)
    with pytest.raises(gym.error.NameNotFound, match=r"`ElsewhereReach` doesn't exist\..* Name the package that registers it"):
        make_model("ElsewhereReach-v0")
    assert make_model("elsewhere:ElsewhereReach-v0").env.get_attr("spec")[0].id == "ElsewhereReach-v0"
    # The latest version, as `gym.make` does
    assert make_model("ElsewhereReach").env.get_attr("spec")[0].id == "ElsewhereReach-v0"
    for env_id, message in {
        "PointMaz_UMaze-v3": "Did you mean: `PointMaze_UMaze`",
        "FetchReach-v9": r"provides versioned environments: \[ `v1`, `v4` \]",
        "nowhere:Reach-v0": "'nowhere:Reach-v0' cannot be found, as the module 'nowhere' cannot be imported",
        ":Reach-v0": "names no module before the colon",
    }.items():
        with pytest.raises(gym.error.Error, match=message):
            make_model(env_id)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(train_freq=4, gradient_steps=3),
        dict(train_freq=(3, "step"), gradient_steps=-1),
        dict(learning_starts=0),
        dict(ent_coef=0.2),
        dict(ent_coef="auto", target_entropy=-3.0),
        dict(policy_kwargs=dict(energy="dot"), contrastive_loss="symmetric"),
        dict(policy_kwargs=dict(energy="cosine"), contrastive_loss="backward", random_goals=1.0),
        dict(policy_kwargs=dict(energy="squared"), random_goals=0.0, logsumexp_coef=0.0),
        dict(policy_kwargs=dict(actor_depth=8, critic_depth=12)),
        dict(action_noise=NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))),
        dict(
            learning_rate=lambda progress: 1e-3 * progress, critic_learning_rate=np.float32(1e-4), ent_coef_learning_rate=1e-2
        ),
        dict(policy_kwargs=dict(norm="none", residual=False, activation_fn=th.nn.ReLU, residual_scale="learnable")),
    ],
)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_learn(kwargs, n_envs):
    model = make_model(make_vec_env(GoalReachEnv, n_envs), **kwargs).learn(100)
    assert model.num_timesteps >= 100
    assert model._n_updates > 0
    assert all(th.isfinite(values).all() for values in model.policy.parameters())


def test_train_freq_in_episodes():
    callback = Progress()
    model = make_model(GoalReachEnv(), train_freq=(2, "episode"), gradient_steps=5).learn(90, callback=callback)
    # 10 steps an episode, training starts after 20 steps
    assert model._n_updates == 5 * 4
    # Whole episodes
    assert model.num_timesteps == 100
    assert min(callback.progress) == 0.0 == model._current_progress_remaining


class Progress(BaseCallback):
    """Notes the remaining progress in each step, and the learning rate in each update."""

    def _init_callback(self):
        self.progress, self.rates = [], []
        train, (group,) = self.model.train, self.model.actor.optimizer.param_groups
        self.model.train = lambda **kwargs: (train(**kwargs), self.rates.append(group["lr"]))

    def _on_step(self):
        self.progress.append(self.model._current_progress_remaining)
        return True


@pytest.mark.parametrize(
    ("n_envs", "total_timesteps", "num_timesteps"),
    [(1, 1, 1), (1, 40, 40), (3, 40, 42), (3, 2, 3), (16, 64, 64), (32, 40, 64)],
)
def test_learn_ends_at_total_timesteps(n_envs, total_timesteps, num_timesteps):
    model, callback = make_model(make_vec_env(GoalReachEnv, n_envs), learning_starts=0), Progress()
    model.learn(total_timesteps, callback=callback)
    assert model.num_timesteps == num_timesteps
    # One for 16 steps, as near as it goes
    assert model._n_updates == int(num_timesteps / 16 + 0.5)
    assert min(callback.progress) >= 0.0 == model._current_progress_remaining
    model.learn(total_timesteps, reset_num_timesteps=False)
    assert model.num_timesteps >= num_timesteps + total_timesteps
    assert model.num_timesteps - num_timesteps - total_timesteps < n_envs


@pytest.mark.parametrize("reset_num_timesteps", [False, True])
@pytest.mark.parametrize("kwargs", [dict(), dict(train_freq=25, gradient_steps=5), dict(train_freq=7, gradient_steps=-1)])
def test_update_ratio_does_not_depend_on_how_a_training_is_divided(kwargs, reset_num_timesteps):
    model = make_model(GoalReachEnv(), learning_starts=0, learning_rate=lambda progress: 1e-3 * progress, **kwargs)
    rates = []
    for _ in range(20):
        callback = Progress()
        model.learn(10, callback=callback, reset_num_timesteps=reset_num_timesteps)
        del model.train
        assert min(callback.progress) >= 0.0
        rates += callback.rates
    per_step = 1.0 if kwargs.get("gradient_steps") == -1 else model.gradient_steps / model.train_freq.frequency
    assert abs(model._n_updates - 200 * per_step) <= max(model.gradient_steps, 1) / 2
    assert min(rates) >= 0.0


def test_rollouts_before_learning_starts_owe_no_updates():
    model = make_model(learning_starts=100)
    for _ in range(20):
        model.learn(10, reset_num_timesteps=False)
    assert model._n_updates == make_model(learning_starts=100).learn(200)._n_updates


def test_the_last_rollout_has_no_more_updates_than_its_steps():
    # 63 updates for 40 steps of 63 envs, of which the last rollout has one
    model = make_model(make_vec_env(GoalReachEnv, 63), learning_starts=1000, transitions_per_update=40, width=8, batch_size=2)
    assert model.learn(2583)._n_updates == 63
    # They are made up for
    assert model.learn(2520 - 63, reset_num_timesteps=False)._n_updates == 126


def test_shorter_rollouts_make_up_for_no_longer_ones(tmp_path):
    # Nine steps have the update of 16
    make_model(learning_starts=0, batch_size=2).learn(9).save(tmp_path / "model")
    model = DeepCRL.load(tmp_path / "model", env=make_vec_env(GoalReachEnv, 16)).learn(160)
    assert model._n_updates == 11
    model.train_freq = 1000
    model.learn(16 * 600)
    model.train_freq = 1
    model.learn(160)
    assert model._n_updates == 22


def test_rollouts_outside_of_learn_are_as_long_as_asked_for():
    model = make_model().learn(41)
    callback = Progress()
    callback.init_callback(model)
    rollout = model.collect_rollouts(model.env, callback, TrainFreq(20, TrainFrequencyUnit.STEP), model.replay_buffer)
    assert rollout.episode_timesteps == 40


def test_train_freq_by_hand():
    model = make_model()
    model.train_freq = 4
    model.learn(80)
    assert model._n_updates == 8
    model.train_freq = 0
    with pytest.raises(ValueError, match="`train_freq` must be a positive integer"):
        model.learn(10)


@pytest.mark.parametrize(
    ("n_envs", "kwargs", "train_freq", "gradient_steps"),
    [
        # One update for 16 transitions, whatever the number of envs
        (1, {}, 16, 1),
        (4, {}, 4, 1),
        (16, {}, 1, 1),
        (64, {}, 1, 4),
        (10, {}, 8, 5),
        (24, {}, 2, 3),
        (8, dict(transitions_per_update=np.int64(40)), 5, 1),
        # As in SAC
        (1, dict(train_freq=40, gradient_steps=1), 40, 1),
        (2, dict(gradient_steps=3), 1, 3),
        (2, dict(train_freq=32), 32, 1),
        (2, dict(train_freq=(5, "step"), gradient_steps=-1, ent_coef="0.5", target_entropy="-1"), 5, -1),
        (1, dict(train_freq=(1, "episode")), 1, 1),
    ],
)
def test_update_ratio(n_envs, kwargs, train_freq, gradient_steps):
    model = make_model(make_vec_env(GoalReachEnv, n_envs), **kwargs)
    assert model.train_freq.frequency == train_freq
    assert model.gradient_steps == gradient_steps


def test_gradient_steps_zero_and_train_alone():
    model = make_model(gradient_steps=0).learn(100)
    assert model._n_updates == 0
    model.train(gradient_steps=1)
    model.train(gradient_steps=3, batch_size=5)
    assert model._n_updates == 4


def test_gradient_reaches_every_parameter():
    model = make_model(policy_kwargs=dict(critic_depth=8, residual_scale="learnable")).learn(50)
    before = parameters_of(model.policy)
    model.train(gradient_steps=1, batch_size=16)
    assert set(changed(before, model.policy)) == set(before)
    assert all(parameter.grad is not None for parameter in model.policy.parameters())


def test_each_update_leaves_the_other_networks_alone():
    model = make_model().learn(50)
    before = {name: parameters_of(getattr(model, name)) for name in ("actor", "critic")}
    step = model.critic.optimizer.step
    seen = []

    def critic_step() -> None:
        # Between the two updates: the actor has moved, the critic has not
        seen.append((changed(before["actor"], model.actor), changed(before["critic"], model.critic)))
        before["actor"] = parameters_of(model.actor)
        step()

    model.critic.optimizer.step = critic_step
    model._update(*model.replay_buffer.sample_contrastive(16))
    (moved, unmoved), after = seen[0], parameters_of(model.actor)
    assert set(moved) == set(after)
    assert unmoved == []
    assert changed(before["actor"], model.actor) == []
    assert set(changed(before["critic"], model.critic)) == set(before["critic"])


def test_frozen_features_extractor():
    class Frozen(CombinedExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.scale = th.nn.Parameter(th.ones(1), requires_grad=False)

        def forward(self, observations):
            return self.scale * super().forward(observations)

    model = make_model(policy_kwargs=dict(features_extractor_class=Frozen)).learn(60)
    assert model._n_updates > 0
    assert model.actor.features_extractor.scale.item() == 1.0


def test_losses_get_no_foreign_gradient():
    model = make_model(random_goals=0.5).learn(50)
    observations, actions = model.replay_buffer.sample_contrastive(16)
    # The critic's gradient after an update is the one of its own loss alone
    expected = copy.deepcopy(model.critic)
    state_action = expected.encode_state_action(expected.extract_state_features(observations), actions)
    distances = th.cdist(state_action, expected.encode_goal(observations), compute_mode="donot_use_mm_for_euclid_dist")
    logsumexp = th.logsumexp(-distances, dim=1)
    (distances.diagonal() + logsumexp + 0.1 * logsumexp.square()).mean().backward()
    model._update(observations, actions)
    for (name, parameter), reference in zip(model.critic.named_parameters(), expected.parameters(), strict=True):
        th.testing.assert_close(parameter.grad, reference.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_actor_is_updated_before_the_critic():
    model = make_model(random_goals=0.0, ent_coef=0.3).learn(50)
    observations, actions = model.replay_buffer.sample_contrastive(16)
    policy = copy.deepcopy(model.policy)
    th.manual_seed(3)
    model._update(observations, actions)
    # The same gradient with the critic as it was before
    th.manual_seed(3)
    actions_pi, log_prob = policy.actor.action_log_prob(observations)
    (0.3 * log_prob - policy.critic(observations, actions_pi).squeeze(1)).mean().backward()
    for parameter, reference in zip(model.actor.parameters(), policy.actor.parameters(), strict=True):
        th.testing.assert_close(parameter.grad, reference.grad, rtol=1e-3, atol=1e-6)


def test_random_goals_are_goals_of_other_transitions():
    model = make_model(random_goals=0.5).learn(50)
    observations, _ = model.replay_buffer.sample_contrastive(16)
    seen = {}
    model.actor.get_action_dist_params = lambda obs: (seen.update(obs), (th.zeros(16, 2), th.zeros(16, 2)))[1]
    model._actor_loss(
        observations, model.critic.extract_state_features(observations), model.critic.encode_goal(observations), None
    )
    goals = observations["desired_goal"]
    assert th.equal(seen["desired_goal"][:8], goals[1:9])
    assert th.equal(seen["desired_goal"][8:], goals[8:])
    assert th.equal(seen["achieved_goal"], observations["achieved_goal"])


def test_temperature_follows_the_entropy():
    # A wish that no policy can fulfil makes the coefficient grow, and the other way round
    high, low = (make_model(target_entropy=target).learn(200) for target in (50.0, -50.0))
    assert high.log_ent_coef.item() > np.log(0.1) > low.log_ent_coef.item()


def test_learning_rates_follow_their_schedules():
    model = make_model(learning_rate=lambda progress: progress, critic_learning_rate=0.5, ent_coef_learning_rate=None)
    model.learn(20)
    model._current_progress_remaining = 0.25
    model.train(gradient_steps=1, batch_size=4)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (model.actor.optimizer, model.critic.optimizer)]
    assert rates == [0.25, 0.5]
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("own", [{}, dict(critic_learning_rate=0.5), dict(ent_coef_learning_rate=lambda progress: 0.5)])
def test_replaced_schedule_is_that_of_all_optimizers_without_a_rate_of_their_own(own):
    model = make_model(learning_rate=1e-3, **own).learn(20)
    names = ["learning_rate", "critic_learning_rate", "ent_coef_learning_rate"]
    for rate in (0.0, 0.25):
        model.lr_schedule = lambda progress, rate=rate: rate
        model.train(gradient_steps=1, batch_size=4)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in model._optimizers()]
        assert rates == [0.5 if name in own else rate for name in names]


def test_gamma_can_be_changed_between_trainings():
    model = make_model(EpisodeCounterEnv(lengths=(50,)), gamma=0.7)
    assert model.replay_buffer.gamma == 0.7
    model.learn(60)
    seen = []
    sample = model.replay_buffer.sample_contrastive
    model.replay_buffer.sample_contrastive = lambda *args, **kwargs: (seen.append(sample(*args, **kwargs)), seen[-1])[1]
    for gamma in (0.0, 0.99):
        model.gamma = gamma
        model.train(gradient_steps=1, batch_size=100)
    steps_to_goal = [(obs["desired_goal"] - obs["achieved_goal"])[:, 2] for obs, _ in seen]
    assert (steps_to_goal[0] == 1).all()
    assert steps_to_goal[1].mean() > 5


def test_metrics_are_logged(tmp_path):
    model = make_model(learning_rate=3e-3)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(600, log_interval=4)
    text = (tmp_path / "progress.csv").read_text()
    header, last = text.splitlines()[0].split(","), text.splitlines()[-1].split(",")
    values = dict(zip(header, last, strict=True))
    for name in (*UPDATE_METRICS, "ent_coef_loss", "n_updates", "learning_rate"):
        assert np.isfinite(float(values[f"train/{name}"])), name
    assert 0 <= float(values["train/categorical_accuracy"]) <= 1
    assert float(values["train/logits_pos"]) > float(values["train/logits_neg"])
    assert {"rollout/success_rate", "rollout/ep_rew_mean", "time/fps", "time/total_timesteps"} <= set(header)


def test_episodes_that_end_together_are_logged_once(tmp_path):
    model = make_model(make_vec_env(GoalReachEnv, 8))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    # All episodes have ten steps
    model.learn(400, log_interval=4)
    rows = list(csv.DictReader((tmp_path / "progress.csv").open()))
    assert [int(row["time/total_timesteps"]) for row in rows] == [80, 160, 240, 320, 400]
    # What is new is written at the same step too
    model.logger.record("mine", 1)
    model.dump_logs()
    assert len((tmp_path / "progress.csv").read_text().splitlines()) == 7


def test_tensorboard(tmp_path):
    make_model(tensorboard_log=str(tmp_path)).learn(50)
    assert list((tmp_path / "DeepCRL_1").glob("events.out.tfevents.*"))


def test_same_seed_same_result():
    results = []
    for seed in (1, 1, 2):
        model = make_model(make_vec_env(GoalReachEnv, 2, seed=seed), seed=seed).learn(150)
        results.append((parameters_of(model.policy), model.replay_buffer.rewards.copy()))
    assert all(th.equal(values, results[1][0][name]) for name, values in results[0][0].items())
    assert (results[0][1] == results[1][1]).all()
    assert not all(th.equal(values, results[2][0][name]) for name, values in results[0][0].items())


def test_predict():
    model = make_model(make_vec_env(GoalReachEnv, 3, env_kwargs=dict(action_scale=5.0)))
    obs = model.env.reset()
    actions, _ = model.predict(obs, deterministic=True)
    assert actions.shape == (3, 2)
    assert np.array_equal(actions, model.predict(obs, deterministic=True)[0])
    assert not np.array_equal(*(model.predict(obs, deterministic=False)[0] for _ in range(2)))
    single = {key: values[1] for key, values in obs.items()}
    np.testing.assert_allclose(model.predict(single, deterministic=True)[0], actions[1], rtol=1e-4, atol=1e-5)
    model.actor.mu.bias.data += 100.0
    np.testing.assert_allclose(model.predict(single, deterministic=True)[0], [5.0, 5.0])


def batch_of(observation: dict[str, np.ndarray], key: str, value: float) -> dict[str, np.ndarray]:
    batch = {name: values.copy() for name, values in observation.items()}
    batch[key][1, 0] = value
    return batch


@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_in_predict(deterministic):
    model = make_model()
    observation = model.env.reset()
    for policy in (model, model.policy, model.actor):
        for value in (np.nan, np.inf):
            with pytest.raises(ValueError, match=rf"`desired_goal` of the observation is {value} at \(1, 0\)"):
                policy.predict(batch_of(observation, "desired_goal", value), deterministic=deterministic)
    with pytest.raises(ValueError, match="weights and the observation are finite"):
        model.predict(batch_of(observation, "observation", 3e38), deterministic=deterministic)
    model.critic.sa_encoder.head.weight.data[0] = np.nan
    model.predict(observation, deterministic=deterministic)
    model.actor.tower.stem[0].weight.data[0] = np.nan
    for policy in (model, model.policy, model.actor):
        with pytest.raises(ValueError, match=r"the weights `tower.stem.0.weight` are not finite") as error:
            policy.predict({key: values[0] for key, values in observation.items()}, deterministic=deterministic)
        assert "of the observation" not in str(error.value)
    with pytest.raises(ValueError, match=r"the weights `tower.stem.0.weight`.* and `observation` of the observation is nan"):
        model.predict(batch_of(observation, "observation", np.nan), deterministic=deterministic)
    # The env does not see such actions
    model.learning_starts = 0
    with pytest.raises(ValueError, match="the weights `tower"):
        model.learn(20)


def test_nan_in_predict_of_other_algorithms():
    model = TD3("DeepMultiInputPolicy", GoalReachEnv(), buffer_size=10, policy_kwargs=dict(depth=4, width=8), device="cpu")
    next(model.actor.parameters()).data[0] = np.nan
    with pytest.raises(ValueError, match=r"the weights `.*` are not finite"):
        model.predict(model.env.reset())


def test_actions_are_stored_scaled():
    model = make_model(make_vec_env(GoalReachEnv, 2, env_kwargs=dict(action_scale=5.0))).learn(100)
    assert 0.5 < np.abs(model.replay_buffer.actions).max() <= 1.0


def test_goal_is_not_in_the_state():
    model = make_model()
    obs, _ = model.policy.obs_to_tensor(model.env.reset())
    other = {**obs, "desired_goal": obs["desired_goal"] + 1.0}
    assert th.equal(model.critic.extract_state_features(obs), model.critic.extract_state_features(other))
    # Both position and observation are in it
    assert model.critic.extract_state_features(obs).shape == (2, 5)
    assert model.critic.goal_features_extractor.features_dim == 2
    assert model.critic(obs, th.zeros(2, 2)).shape == (2, 1)
    assert not th.equal(model.critic(obs, th.zeros(2, 2)), model.critic(other, th.zeros(2, 2)))


class ImageGoalEnv(gym.Env):
    """The goal is an image."""

    def __init__(self):
        image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        self.observation_space = spaces.Dict(observation=image, achieved_goal=image, desired_goal=image)
        self.action_space = spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 0.0, False, self.steps == 5, {"is_success": False}


class RandomGoalEnv(ImageGoalEnv):
    """Goals of any two spaces."""

    def __init__(self, achieved: spaces.Space, desired: spaces.Space):
        super().__init__()
        self.observation_space = spaces.Dict(observation=spaces.Box(-1, 1, (2,)), achieved_goal=achieved, desired_goal=desired)


@pytest.mark.parametrize(
    "env",
    [
        lambda: BitFlippingEnv(n_bits=4, continuous=True),
        lambda: BitFlippingEnv(n_bits=4, continuous=True, discrete_obs_space=True),
        ImageGoalEnv,
        lambda: GoalReachEnv(obs_dtype=np.float32),
        lambda: RandomGoalEnv(spaces.Box(0, 9, (2,), np.uint8), spaces.Box(0, 9, (2,), np.int64)),
        lambda: RandomGoalEnv(spaces.Box(0, 9, (2,), np.float32), spaces.Box(0, 9, (2,), np.int32)),
        lambda: RandomGoalEnv(spaces.Box(0, 9, (2,), np.int8), spaces.Box(0, 9, (2,), np.float64)),
        lambda: RandomGoalEnv(spaces.MultiBinary(3), spaces.Box(0, 1, (3,), np.uint8)),
        lambda: RandomGoalEnv(spaces.MultiDiscrete([2, 3], dtype=np.int32), spaces.MultiDiscrete([2, 3])),
    ],
)
def test_other_observation_spaces(env):
    model = make_model(env(), learning_starts=5, train_freq=5).learn(25)
    assert model._n_updates > 0
    model.predict(model.env.reset())


def test_env_id():
    gym.register("DeepCRLTest-v0", GoalReachEnv, max_episode_steps=10)
    try:
        assert make_model("DeepCRLTest-v0").learn(48).num_timesteps == 48
    finally:
        del gym.registry["DeepCRLTest-v0"]


def test_vec_normalize():
    env = VecNormalize(make_vec_env(GoalReachEnv, 2))
    model = make_model(env).learn(200)
    assert model.get_vec_normalize_env() is env
    # Stored as they came from the env
    assert np.abs(model.replay_buffer.observations["achieved_goal"]).max() <= 5.0
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)


def test_vec_normalize_that_clips_the_goals():
    class FixedGoalEnv(GoalReachEnv):
        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.goal = np.zeros(2)
            return self._observation(), {}

    with pytest.warns(UserWarning, match="VecNormalize clips most of the relabeled goals") as record:
        make_model(VecNormalize(make_vec_env(FixedGoalEnv, 2))).learn(200)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model(VecNormalize(make_vec_env(FixedGoalEnv, 2), norm_obs_keys=["observation"])).learn(100)


def test_no_warning_of_goals_that_are_not_clipped():
    far = dict(clip_obs=0.01, norm_obs_keys=["observation"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Most goals are beyond the limit of what is normalized, but they are not
        make_model(VecNormalize(make_vec_env(GoalReachEnv, 3), **far)).learn(100)
        for keys in (None, ["desired_goal"]):
            off = dict(norm_obs=False, clip_obs=0.01, norm_obs_keys=keys)
            make_model(VecNormalize(make_vec_env(GoalReachEnv, 3), **off)).learn(100)
        # The statistics of the first episode hold a single goal
        make_model(VecNormalize(DummyVecEnv([lambda: GoalReachEnv(max_steps=100)]))).learn(90)


def test_train_waits_for_the_device_once():
    class CountReads(TorchDispatchMode):
        n_reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n_reads += func is th.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    n_reads = []
    for env in (make_vec_env(GoalReachEnv, 3), VecNormalize(make_vec_env(GoalReachEnv, 3))):
        model = make_model(env).learn(60)
        with CountReads() as count:
            model.train(gradient_steps=2, batch_size=16)
        n_reads.append(count.n_reads)
    assert n_reads[0] == n_reads[1]


def test_minibatch_larger_than_the_data():
    with pytest.warns(UserWarning, match=r"`batch_size=40` is more than the 32 .*larger `learning_starts` or") as record:
        model = make_model(batch_size=40).learn(100)
    assert len(record) == 1
    assert model._n_updates > 0
    # As after loading a model without its replay buffer
    model = make_model().learn(96)
    model.replay_buffer.reset()
    model.batch_size = 40
    with pytest.warns(UserWarning, match="than the 16 trans.*larger `learning_starts` or"):
        model.learn(32, reset_num_timesteps=False)
    with pytest.warns(UserWarning, match="than the 20 trans.*`buffer_size`, or"):
        make_model(batch_size=40, buffer_size=20, learning_starts=60).learn(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The first update is after 48 steps
        make_model(batch_size=48, learning_starts=40).learn(100)


class SimulatorVecEnv(VecEnvWrapper):
    """
    Returns rewards and dones in another form, and knows no attributes.

    :param venv: Envs
    :param convert: What makes the other form of an array
    :param error: What to raise, or return, when asked for an attribute
    """

    def __init__(self, venv, convert=lambda values: values, error=None):
        self.error = None
        super().__init__(venv)
        self.convert, self.error = convert, error

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, self.convert(rewards), self.convert(dones), infos

    def has_attr(self, attr_name):
        return VecEnv.has_attr(self, attr_name)

    def get_attr(self, attr_name, indices=None):
        if self.error is None:
            return super().get_attr(attr_name, indices)
        if isinstance(self.error, type):
            raise self.error(attr_name)
        return self.error


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, KeyError, AssertionError, 7, "", [np.inf], [None, None]])
def test_vec_env_that_does_not_tell_its_attributes(error):
    env = SimulatorVecEnv(make_vec_env(time_limited, 2), error=error)
    assert make_model(env, buffer_size=12).learn(40).num_timesteps >= 40


@pytest.mark.parametrize("lengths", [[np.int64(9), 10], th.tensor([9, 10]), (None, 10.0)])
def test_vec_env_that_tells_its_time_limit_in_another_form(lengths):
    with pytest.raises(ValueError, match="less than one episode of 10 steps"):
        make_model(SimulatorVecEnv(make_vec_env(time_limited, 2), error=lengths), buffer_size=18).learn(20)


@pytest.mark.parametrize(
    "convert",
    [
        lambda values: values.astype(np.float32),
        lambda values: values.astype(np.int64),
        lambda values: values.tolist(),
        lambda values: th.as_tensor(values),
        lambda values: th.as_tensor(values).float(),
    ],
)
def test_vec_env_that_returns_rewards_and_dones_in_another_form(convert):
    def make_env(convert):
        lengths = (7, 4)
        return SimulatorVecEnv(DummyVecEnv([lambda n=n: GoalReachEnv(max_steps=n) for n in lengths]), convert)

    results = []
    for form in (lambda values: values, convert):
        display = TrainingDisplay()
        env = make_env(form)
        env.seed(3)
        buffer = make_model(env).learn(60, callback=display).replay_buffer
        results.append((buffer.dones, buffer.rewards, buffer.remaining, list(display.successes), list(display.times_at_goal)))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_subprocesses():
    env = make_vec_env(time_limited, 2, vec_env_cls=SubprocVecEnv)
    with pytest.raises(ValueError, match="less than one episode of 10 steps"):
        make_model(env, buffer_size=18).learn(20)
    make_model(env).learn(60)
    env.close()


def test_large_samples_are_drawn_in_parts(monkeypatch):
    model = make_model().learn(40)
    sample, sizes = model.replay_buffer.sample_contrastive, []
    model.replay_buffer.sample_contrastive = lambda n, env: (sizes.append(n), sample(n, env))[1]
    # Observations of 3 + 2 + 2 float32
    monkeypatch.setattr("sb3_deepcrl.deepcrl.deepcrl.MAX_SAMPLE_BYTES", 2 * 16 * 7 * 4)
    model.train(gradient_steps=5, batch_size=16)
    assert sizes == [32, 32, 16]
    monkeypatch.undo()
    model.train(gradient_steps=5, batch_size=16)
    assert sizes[3:] == [80]
    model.train(gradient_steps=0)
    assert sizes[4:] == []


def test_eval_callback(tmp_path):
    model = make_model()
    callback = EvalCallback(make_vec_env(GoalReachEnv, 1), eval_freq=20, best_model_save_path=str(tmp_path), verbose=0)
    model.learn(100, callback=callback)
    assert (tmp_path / "best_model.zip").exists()
    assert DeepCRL.load(tmp_path / "best_model").num_timesteps > 0


@pytest.mark.parametrize("stop", [False, np.bool_(False)])
def test_callback_stops_at_once(stop):
    model = make_model()
    model.learn(100, callback=lambda *_: stop)
    assert model.num_timesteps == 2


# Episodes of the counter env, whose observations tell the episode and step they come from


def check_goals(model: DeepCRL) -> None:
    obs, _ = model.replay_buffer.sample_contrastive(3000)
    assert (obs["desired_goal"][:, :2] == obs["achieved_goal"][:, :2]).all()
    assert (obs["desired_goal"][:, 2] > obs["achieved_goal"][:, 2]).all()


def counter_model(**kwargs) -> DeepCRL:
    env = DummyVecEnv([lambda index=index: EpisodeCounterEnv(index, (7 + index, 4)) for index in range(2)])
    return make_model(env, learning_starts=4, **kwargs)


def test_goals_stay_in_the_episode_when_learning_twice():
    model = counter_model().learn(30)
    check_goals(model)
    model.learn(30)
    check_goals(model)
    model.learn(30, reset_num_timesteps=False)
    check_goals(model)
    model.set_env(DummyVecEnv([lambda index=index: EpisodeCounterEnv(index + 10) for index in range(2)]))
    model.learn(30, reset_num_timesteps=False)
    check_goals(model)


class StopIn(BaseCallback):
    """Stop or fail in some step of the rollout."""

    def __init__(self, step: int, error: type[BaseException] | None):
        super().__init__()
        self.step, self.error = step, error

    def _on_step(self) -> bool:
        if self.n_calls == self.step and self.error is not None:
            raise self.error
        return self.n_calls < self.step


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("resets", [True, False])
def test_goals_stay_in_the_episode_after_others_stepped_the_env(vec_env, resets):
    model = make_model(vec_env([partial(EpisodeCounterEnv, lengths=(50, 40))]), learning_starts=4).learn(30)
    if resets:
        model.env.reset()
    # No episode ends in between
    for _ in range(3):
        model.env.step(np.zeros((1, 1)))
    model.learn(30, reset_num_timesteps=False)
    samples = model.replay_buffer.sample(1000)
    steps = samples.next_observations["achieved_goal"] - samples.observations["achieved_goal"]
    assert (steps == th.tensor([0.0, 0.0, 1.0])).all()
    # Not reset without a reason
    n_episodes = sum(1 for _ in model.replay_buffer.episodes())
    model.learn(5, reset_num_timesteps=False)
    assert sum(1 for _ in model.replay_buffer.episodes()) == n_episodes
    model.env.close()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", [3, 4, 7, 8])
def test_goals_stay_in_the_episode_after_an_interruption(step, error):
    # Among the steps is the one in which an episode ends, and the one after
    model = counter_model(train_freq=100)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        model.learn(100, callback=StopIn(step, error))
    model.learn(30, reset_num_timesteps=False)
    check_goals(model)
    assert model.num_timesteps > 30


class NaNEnv(GoalReachEnv):
    """Gives NaN in one step of one episode, or in a reset."""

    def __init__(self, bad_call: int):
        super().__init__()
        self.bad_call, self.calls = bad_call, 0

    def _observation(self):
        observation = super()._observation()
        self.calls += 1
        if self.calls == self.bad_call:
            observation["observation"][1] = np.nan
        return observation


# Calls 1 and 12 are resets, 11 is the last step of an episode
@pytest.mark.parametrize("bad_call", [1, 5, 11, 12])
@pytest.mark.parametrize("wrappers", [[], [VecNormalize], [partial(VecCheckNan, raise_exception=True), VecNormalize]])
# With the latter, there is an update right after the reset
@pytest.mark.parametrize("train_freq", [None, 1])
def test_nan_from_the_env(bad_call, wrappers, train_freq):
    env = DummyVecEnv([lambda: NaNEnv(10**6), lambda: NaNEnv(bad_call)])
    for wrapper in wrappers:
        env = wrapper(env)
    model = make_model(env, train_freq=train_freq)
    message = "NaN or infinity in `observation` of env 1|found nan in observations.observation"
    with pytest.raises(ValueError, match=message):
        model.learn(100)
    if VecNormalize in wrappers:
        assert all(np.isfinite(statistics.mean).all() for statistics in env.obs_rms.values())
    # Nothing is lost
    model.learn(100, reset_num_timesteps=False)
    assert np.isfinite(model.replay_buffer.observations["observation"]).all()
    assert all(th.isfinite(values).all() for values in model.policy.parameters())


# What existing scripts pass


def test_reward_is_not_needed():
    class NaNRewardEnv(GoalReachEnv):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, np.nan, *rest

    for env in (make_vec_env(NaNRewardEnv, 2), VecNormalize(make_vec_env(NaNRewardEnv, 2))):
        model = make_model(env).learn(100)
        assert all(th.isfinite(values).all() for values in model.policy.parameters())


def test_her_replay_buffer_is_replaced_with_one_warning():
    kwargs = dict(
        replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="future")
    )
    with pytest.warns(
        UserWarning, match=r"in place of HerReplayBuffer.*`n_sampled_goal`, `goal_selection_strategy`"
    ) as record:
        model = make_model(**kwargs, tau=0.05, target_update_interval=2)
    # Others may come from what the garbage collector finds
    assert [warning.category for warning in record].count(UserWarning) == 1
    with pytest.warns(UserWarning, match="`n_sampled_goal` not used"):
        make_model(replay_buffer_kwargs=dict(n_sampled_goal=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(60)
    assert type(model.replay_buffer) is ContrastiveReplayBuffer


def test_sac_networks_are_not_used_with_a_warning():
    with pytest.warns(UserWarning, match=r"`net_arch=\[64, 64\]`, which DeepCRL does not use"):
        make_model(policy_kwargs=dict(net_arch=[64, 64]))
    with pytest.warns(UserWarning, match=r"`n_critics=2`, `log_std_init=-2`"):
        make_model(policy_kwargs=dict(n_critics=2, log_std_init=-2))
    with pytest.raises(TypeError, match=r"\['net_arhc'\], which neither DeepCRL nor SAC knows"):
        make_model(policy_kwargs=dict(net_arhc=[64]))


def test_policy_kwargs_may_hold_the_architecture():
    policy_kwargs = dict(depth=8, width=8)
    model = DeepCRL("MultiInputPolicy", GoalReachEnv(), policy_kwargs=policy_kwargs)
    assert (model.depth, model.width, len(model.actor.tower.blocks)) == (8, 8, 2)
    # The dict of the user stays as it was
    assert policy_kwargs == dict(depth=8, width=8)
    # Also a value that is the default
    with pytest.raises(ValueError, match=r"`depth=16` contradicts `policy_kwargs=.*: give it once"):
        DeepCRL("MultiInputPolicy", GoalReachEnv(), depth=16, policy_kwargs=policy_kwargs)


def test_policy_class_and_subclass_of_the_buffer():
    class MyBuffer(ContrastiveReplayBuffer):
        pass

    model = DeepCRL(DeepCRL.policy_aliases["MultiInputPolicy"], GoalReachEnv(), replay_buffer_class=MyBuffer, **SMALL)
    assert type(model.learn(40).replay_buffer) is MyBuffer


# Errors


def time_limited() -> gym.Env:
    return gym.wrappers.TimeLimit(GoalReachEnv(max_steps=1000), 10)


class BoxEnv(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Box(-1, 1, (2,))


def with_spaces(observation_space=None, action_space=None) -> gym.Env:
    env = GoalReachEnv()
    env.observation_space = observation_space or env.observation_space
    env.action_space = action_space or env.action_space
    return env


BOX2, BOX3 = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (3,))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (BoxEnv(), r"`achieved_goal`, `desired_goal` missing from Box"),
        (with_spaces(spaces.Dict(observation=BOX2, achieved_goal=BOX2)), r"but `desired_goal` missing"),
        (
            with_spaces(spaces.Dict(observation=BOX2, achieved_goal=BOX2, desired_goal=BOX3)),
            r"must be of the same space.*\(3,\)",
        ),
        (
            with_spaces(spaces.Dict(achieved_goal=spaces.Discrete(5), desired_goal=spaces.Discrete(4))),
            r"must be of the same space.*Discrete\(5\)",
        ),
        (
            with_spaces(spaces.Dict(achieved_goal=spaces.MultiDiscrete([2, 3]), desired_goal=spaces.MultiDiscrete([2, 4]))),
            r"must be of the same space.*\[2 4\]",
        ),
        (with_spaces(action_space=spaces.Text(4)), r"only supports .*Box.* as action spaces but Text\(1, 4"),
        (None, r"`achieved_goal`, `desired_goal` missing from None"),
    ],
)
def test_env_that_cannot_be_learned(env, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        DeepCRL("MultiInputPolicy", env)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depth=6), r"`depth` must be a positive multiple of 4.*got 6: use 4 or 8"),
        (dict(width=-1), r"`width` must be a positive integer, got -1"),
        (dict(energy="dot"), r"unexpected keyword argument 'energy'"),
        (dict(policy_kwargs=dict(critic_depth=0)), r"`critic_depth` must be.*got 0"),
        (dict(policy_kwargs=dict(actor_depth=-4)), r"`actor_depth` must be.*got -4"),
        (dict(policy_kwargs=dict(repr_dim=0)), r"`repr_dim` must be a positive integer, got 0"),
        (dict(policy_kwargs=dict(energy="l2")), r"`energy` must be one of 'norm'.*got 'l2'"),
        (dict(policy_kwargs=dict(norm="batch")), r"`norm` must be"),
        (dict(policy_kwargs="depth"), r"`policy_kwargs` must be a dict.*got 'depth'"),
        (dict(policy_kwargs=dict(activation_fn="relu")), r"`activation_fn` must be the class.*`th.nn.ReLU`, got 'relu'"),
        (dict(policy_kwargs=dict(activation_fn=th.nn.ReLU())), r"`activation_fn` must be the class.*got ReLU\(\)"),
        (dict(policy_kwargs=dict(activation_fn=th.relu)), r"`activation_fn` must be the class.*got <built-in"),
        (dict(policy_kwargs=dict(norm=lambda width: width)), r"`norm` must be.*got <function"),
        (dict(policy_kwargs=dict(residual="no")), r"`residual` must be one of True, False, got 'no'"),
        (dict(policy_kwargs=dict(residual_scale=float("inf"))), r"`residual_scale` must be a positive number.*got inf"),
        (dict(policy_kwargs=dict(optimizer_class="adam")), r"`optimizer_class` must be.*got 'adam'.*`th.optim.Adam`"),
        (dict(policy_kwargs=dict(optimizer_class=th.nn.Linear)), r"`optimizer_class` must be Optimizer.*Linear"),
        (dict(policy_kwargs=dict(optimizer_kwargs=dict(lr=0.1))), r"`optimizer_kwargs` has `lr=0.1`.*`learning_rate`"),
        (dict(policy_kwargs=dict(optimizer_kwargs="fused")), r"`optimizer_kwargs` must be a dict.*got 'fused'"),
        (dict(policy_kwargs=dict(features_extractor_class="flat")), r"`features_extractor_class` must be.*got 'flat'"),
        (dict(policy_kwargs=dict(features_extractor_class=FlattenExtractor)), r"FlattenExtractor` does not know Dict"),
        (dict(policy_kwargs=dict(features_extractor_kwargs=[1])), r"`features_extractor_kwargs` must be a dict.*got \[1\]"),
        (dict(policy_kwargs=dict(normalize_images="no")), r"`normalize_images` must be one of True, False, got 'no'"),
        (dict(normalize_observations="auto"), r"`normalize_observations` must be one of True, False, got 'auto'"),
        (
            dict(normalize_observations=False, policy_kwargs=dict(normalize_observations=True)),
            r"`normalize_observations=False` contradicts `policy_kwargs=.*: give it once",
        ),
        (dict(contrastive_loss="fwd"), r"`contrastive_loss` must be one of.*got 'fwd'"),
        (dict(transitions_per_update=0), r"`transitions_per_update` must be a positive integer, got 0"),
        (dict(gamma=1.5), r"`gamma` must be between 0 and 1, got 1.5"),
        (dict(gamma="0.9"), r"`gamma` must be between 0 and 1, got '0.9'"),
        (dict(random_goals=-0.5), r"`random_goals` must be between 0 and 1, got -0.5"),
        (dict(logsumexp_coef=-1.0), r"`logsumexp_coef` must not be negative, got -1.0"),
        (dict(logsumexp_coef=float("nan")), r"`logsumexp_coef` must be a number, got nan"),
        (dict(checkpoint_activations="no"), r"`checkpoint_activations` must be one of True, False, got 'no'"),
        (dict(buffer_size=1e6), r"`buffer_size` must be a positive integer, got 1000000.0: use 1000000"),
        (dict(buffer_size=0), r"`buffer_size` must be a positive integer, got 0"),
        (dict(batch_size="64"), r"`batch_size` must be a positive integer, got '64'"),
        (dict(learning_starts="soon"), r"`learning_starts` must be a number, got 'soon'"),
        (dict(batch_size=1), r"`batch_size` must be at least 2, got 1: there would be no negatives"),
        (dict(ent_coef="aut"), """`ent_coef` must be a number or "auto" or such as "auto_0.1", got 'aut'"""),
        (dict(ent_coef="auto_-1"), "`ent_coef` must not be negative, got -1.0"),
        (dict(ent_coef=-0.1), r"`ent_coef` must not be negative, got -0.1"),
        (dict(target_entropy="aut"), "`target_entropy` must be a number or \"auto\", got 'aut'"),
        (dict(target_entropy=float("nan")), "`target_entropy` must be a number, got nan"),
        (dict(ent_coef="auto_inf"), "`ent_coef` must be a number, got inf"),
        (dict(learning_rate="lin_3e-4"), "must be a float or a callable, not lin_3e-4"),
        (dict(learning_rate=-1e-3), "Invalid learning rate: -0.001"),
        (dict(learning_rate=lambda progress: -progress), "Invalid learning rate: -1.0"),
        (dict(critic_learning_rate=-1e-3), r"`critic_learning_rate` must not be negative, got -0.001"),
        (dict(critic_learning_rate=lambda _: "lin"), r"`critic_learning_rate` must be a number, got 'lin'"),
        (dict(ent_coef_learning_rate="fast"), r"`ent_coef_learning_rate` must be a number, got 'fast'"),
        (dict(ent_coef_learning_rate=lambda progress: 1 - progress), r"`ent_coef_learning_rate` must be positive, got 0.0"),
        (dict(gradient_steps="many"), r"`gradient_steps` must be a positive integer, got 'many'"),
        (dict(gradient_steps=-2), r"`gradient_steps` must be a positive integer, got -2"),
        (dict(train_freq="often"), "frequency of `train_freq` must be an integer and not often"),
        (dict(train_freq=(1, "epoch")), "unit of the `train_freq`"),
        (dict(n_steps=3), r"`n_steps` must be 1, got 3"),
        (dict(optimize_memory_usage=True), r"`optimize_memory_usage=True` is not supported.*leave it at False"),
        (dict(use_sde=True), r"`use_sde=True`.*not supported.*use"),
        (
            dict(replay_buffer_class=DictReplayBuffer),
            r"`replay_buffer_class` must be ContrastiveReplayBuffer.*DictReplayBuffer",
        ),
        (dict(replay_buffer_class="HerReplayBuffer"), r"`replay_buffer_class` must be.*got 'HerReplayBuffer': leave it out"),
        (dict(replay_buffer_kwargs=dict(gamma=0.5)), "has `gamma`, but the replay buffer takes that of the algorithm"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises((ValueError, AssertionError, TypeError), match=message):
        make_model(**kwargs)


def test_wrong_arguments_of_learn():
    for kwargs, message in (
        (dict(train_freq=0), "`train_freq` must be a positive integer, got 0"),
        (dict(train_freq=(1, "episode")), "only one env when doing episodic training"),
        (dict(batch_size=1), "`batch_size` must be at least 2, got 1.*negatives"),
        (dict(action_noise=0.1), "ActionNoise"),
    ):
        with pytest.raises((ValueError, AssertionError, TypeError), match=message):
            make_model(**kwargs).learn(100)


class SomeKeys(BaseFeaturesExtractor):
    """As that of the documentation of Stable-Baselines3, for the keys that it knows."""

    def __init__(self, observation_space, keys):
        self.keys = [key for key in keys if key in observation_space.spaces]
        super().__init__(observation_space, sum(observation_space[key].shape[0] for key in self.keys))

    def forward(self, observations):
        return th.cat([observations[key] for key in self.keys], dim=1)


def test_features_extractors_of_other_algorithms():
    every = ["observation", "achieved_goal", "desired_goal"]
    kwargs = dict(features_extractor_class=SomeKeys, features_extractor_kwargs=dict(keys=every[:2]))
    with pytest.raises(ValueError, match=r"`features_extractor_class=SomeKeys` fails.*desired_goal.*must take any subset"):
        make_model(policy_kwargs=kwargs)
    kwargs["features_extractor_kwargs"]["keys"] = every
    make_model(policy_kwargs=kwargs).learn(40)


def test_callback_that_freezes_vec_normalize():
    env = VecNormalize(make_vec_env(GoalReachEnv, 2), norm_obs_keys=["observation"])

    class Freeze(BaseCallback):
        def _on_step(self):
            self.training_env.training = self.num_timesteps < 20
            return True

    make_model(env).learn(60, callback=Freeze())
    assert env.training is False and env.obs_rms["observation"].count < 30


def test_wrong_policies():
    for policy in ("MlpPolicy", "CnnPolicy"):
        with pytest.raises(ValueError, match="must use `MultiInputPolicy`"):
            DeepCRL(policy, GoalReachEnv())
    with pytest.raises(ValueError, match="Policy MultiPolicy unknown"):
        DeepCRL("MultiPolicy", GoalReachEnv())
    for wrong in (None, SAC.policy_aliases["MultiInputPolicy"]):
        with pytest.raises(ValueError, match=r'`policy` must be DeepCRLPolicy or a subclass.*leave it at "MultiInputPolicy"'):
            DeepCRL(wrong, GoalReachEnv())


def test_buffer_smaller_than_an_episode():
    env = make_vec_env(time_limited, 2)
    with pytest.raises(ValueError, match=r"`buffer_size=19` leaves 9 transitions.*2 envs.*10 steps.*at least 20"):
        make_model(env, buffer_size=19).learn(20)
    assert make_model(env, buffer_size=20).learn(128).num_timesteps == 128
    # An env without a time limit, or that does not tell: its episodes are truncated
    assert make_model(GoalReachEnv(max_steps=10**6), buffer_size=20).learn(100)._n_updates > 0
