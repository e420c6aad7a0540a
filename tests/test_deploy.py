import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.deploy import block_contributions, compare_policies, distill, export_policy, make_student, prune
from sb3_deepcrl.deploy.distillation import Distillation
from sb3_deepcrl.envs import BatchVecEnv

VECTOR = spaces.Box(-10.0, 10.0, (5,), np.float64)
IMAGE = spaces.Box(0, 255, (40, 36, 3), np.uint8)
MIXED = spaces.Dict(
    image=IMAGE, vector=VECTOR, bytes=spaces.Box(0, 255, (7,), np.uint8), kind=spaces.Discrete(4), bits=spaces.MultiBinary(3)
)
ASYMMETRIC = spaces.Box(np.array([-3.0, 0.5]), np.array([1.0, 2.5]), dtype=np.float64)
OFF_POLICY = dict(buffer_size=100)


class RandomEnv(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class StopHere(BaseCallback):
    def _on_step(self):
        raise KeyboardInterrupt


def sample(space, n):
    observations = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([observation[key] for observation in observations]) for key in space.spaces}
    return {"observation": np.stack(observations)}


def run_file(path, observations):
    session = onnxruntime.InferenceSession(path)
    return session.run(["action"], {value.name: observations[value.name] for value in session.get_inputs()})[0]


@pytest.mark.parametrize(
    "algorithm, policy, observation_space, action_space, normalized",
    [
        (SAC, "DeepMlpPolicy", VECTOR, ASYMMETRIC, True),
        (TD3, "DeepMlpPolicy", spaces.Box(0, 255, (7,), np.uint8), ASYMMETRIC, False),
        (DDPG, "DeepMlpPolicy", VECTOR, ASYMMETRIC, False),
        (TQC, "DeepCnnPolicy", IMAGE, ASYMMETRIC, False),
        (CrossQ, "DeepMlpPolicy", VECTOR, ASYMMETRIC, True),
        (PPO, "DeepMlpPolicy", VECTOR, ASYMMETRIC, True),
        (PPO, "DeepMultiInputPolicy", MIXED, spaces.MultiDiscrete([3, 4]), ["vector"]),
        (A2C, "DeepMlpPolicy", spaces.Discrete(6), spaces.MultiBinary(3), False),
        (TRPO, "DeepMlpPolicy", VECTOR, ASYMMETRIC, False),
        (DQN, "DeepCnnPolicy", spaces.Box(0, 255, (3, 40, 36), np.uint8), spaces.Discrete(4), False),
        (QRDQN, "DeepMlpPolicy", VECTOR, spaces.Discrete(4), True),
    ],
)
def test_exported_actions_are_those_of_predict(algorithm, policy, observation_space, action_space, normalized, tmp_path):
    env = DummyVecEnv([lambda: RandomEnv(observation_space, action_space)])
    if normalized:
        env = VecNormalize(env, norm_obs_keys=normalized if isinstance(normalized, list) else None)
        env.reset()
        for _ in range(20):
            env.step(np.stack([action_space.sample()]))
    arguments = {} if algorithm in (PPO, A2C, TRPO) else OFF_POLICY
    model = algorithm(policy, env, policy_kwargs=dict(depth=4, width=16), device="cpu", **arguments)
    raw = sample(observation_space, 50)
    observations = raw if isinstance(observation_space, spaces.Dict) else raw["observation"]
    wanted, _ = model.predict(env.normalize_obs(observations) if normalized else observations, deterministic=True)
    found = run_file(export_policy(model, tmp_path / "policy"), raw)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.fixture(scope="module")
def teacher():
    model = DeepCRL(
        "MultiInputPolicy",
        BatchVecEnv("PointUMaze-v0", 4),
        depth=16,
        width=16,
        batch_size=32,
        learning_starts=100,
        seed=0,
        learning_rate=1e-3,
    )
    return model.learn(400)


def test_exported_file_needs_no_env_and_says_what_it_is(teacher, tmp_path):
    teacher.save(tmp_path / "model")
    loaded = DeepCRL.load(tmp_path / "model")
    observations = sample(teacher.observation_space, 3)
    wanted, _ = teacher.predict(observations, deterministic=True)
    np.testing.assert_allclose(run_file(export_policy(loaded, tmp_path / "policy"), observations), wanted, atol=1e-5)
    facts = onnxruntime.InferenceSession(export_policy(teacher, tmp_path / "policy")).get_modelmeta().custom_metadata_map
    assert facts["env_id"] == "PointUMaze-v0" and facts["depth"] == "16" and facts["algorithm"] == "DeepCRL"
    program = th.export.load(export_policy(teacher, tmp_path / "policy", format="torch"))
    names = list(teacher.observation_space.spaces)
    actions = program.module()(*(th.as_tensor(observations[name]) for name in names))
    np.testing.assert_allclose(actions.detach().numpy(), wanted, atol=1e-6)
    assert not any("critic" in name for name in program.state_dict)


def test_large_file_has_its_weights_beside_it(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    observations = sample(teacher.observation_space, 3)
    path = export_policy(teacher, tmp_path / "policy.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["policy.onnx", "policy.onnx.data"]
    wanted, _ = teacher.predict(observations, deterministic=True)
    np.testing.assert_allclose(run_file(path, observations), wanted, atol=1e-5)


def test_normalization_of_the_policy_is_exported(tmp_path):
    settings = dict(depth=8, width=32, batch_size=32, learning_starts=100, learning_rate=1e-3, seed=0)
    model = DeepCRL("MultiInputPolicy", BatchVecEnv("AntUMaze-v0", 4), normalize_observations=True, **settings)
    path = export_policy(model, tmp_path / "before")
    observations = sample(model.observation_space, 1000)
    np.testing.assert_allclose(run_file(path, observations), model.predict(observations, deterministic=True)[0], atol=1e-5)
    # Some of them are clipped
    model.learn(400)
    path = export_policy(model, tmp_path / "after")
    np.testing.assert_allclose(run_file(path, observations), model.predict(observations, deterministic=True)[0], atol=1e-5)


def test_export_is_float32_and_changes_nothing(tmp_path):
    model = DeepCRL("MultiInputPolicy", "PointUMaze-v0", depth=4, width=32, compile=True, precision="bfloat16")
    observations = sample(model.observation_space, 3)
    before, _ = model.predict(observations, deterministic=True)
    found = run_file(export_policy(model, tmp_path / "policy"), observations)
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], before)
    model.precision = "float32"
    model._setup_acceleration(None)
    np.testing.assert_allclose(found, model.predict(observations, deterministic=True)[0], atol=1e-5)


def test_export_refuses_what_does_not_fit(teacher, tmp_path):
    with pytest.raises(ValueError, match="format"):
        export_policy(teacher, tmp_path / "policy", format="tflite")
    with pytest.raises(ValueError, match=r"policy.zip has the suffix of another format, that of 'onnx' is .onnx"):
        export_policy(teacher, tmp_path / "policy.zip")
    with pytest.raises(ValueError, match=r"policy.pt2 has the suffix of another format, that of 'onnx' is .onnx"):
        export_policy(teacher, tmp_path / "policy.pt2")
    with pytest.raises(ValueError, match="its own env"):
        export_policy(teacher, tmp_path / "policy", env=BatchVecEnv("AntUMaze-v0", 1))
    stacked = VecFrameStack(VecNormalize(DummyVecEnv([lambda: RandomEnv(VECTOR, ASYMMETRIC)])), 2)
    model = SAC("DeepMlpPolicy", stacked, policy_kwargs=dict(depth=4, width=16), **OFF_POLICY)
    with pytest.raises(ValueError, match="VecFrameStack"):
        export_policy(model, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def divergence(teacher, student, observations):
    with th.no_grad():
        (mean, log_std), (target, target_log_std) = (
            model.actor.get_action_dist_params(observations) for model in (student, teacher)
        )
    gaussians = [th.distributions.Normal(mean, log_std.exp()) for mean, log_std in ((target, target_log_std), (mean, log_std))]
    return float(th.distributions.kl_divergence(*gaussians).sum(dim=1).mean())


def test_student_learns_distribution_and_representations(teacher):
    student = distill(teacher, depth=4, width=32, steps=1600, callback=[])
    assert (student.depth, student.width, type(student)) == (4, 32, DeepCRL)
    # Its own states come after those of the teacher, whose buffer stays as it was
    assert student.replay_buffer.size() == 500 and teacher.replay_buffer.size() == 100
    observations, _ = student.replay_buffer.sample_contrastive(200)
    fresh = make_student(teacher, 4, 32)
    assert make_student(teacher, 4, normalize_observations=True).normalize_observations
    assert divergence(teacher, student, observations) < 0.5 * divergence(teacher, fresh, observations)
    with th.no_grad():
        of_teacher, *others = (model.critic.encode_goal(observations) for model in (teacher, student, fresh))
    learned, random = ((other - of_teacher).norm(dim=1).mean() for other in others)
    assert learned < 0.5 * random
    # It goes on as any model, with its own losses
    student.learn(200)
    assert student._runner.update == student._update


def test_teacher_without_buffer_acts_first(teacher, tmp_path):
    # It is in the middle of a rollout
    teacher._missing_steps = -4
    teacher.save(tmp_path / "teacher")
    teacher._missing_steps = 0
    student = make_student(teacher, 4)
    student.learn(200, callback=Distillation(tmp_path / "teacher", teacher_steps=400))
    assert student.replay_buffer.size() == 150 and student.num_timesteps == 200
    # Also in another number of envs
    student = distill(DeepCRL.load(tmp_path / "teacher"), 4, steps=40, env=BatchVecEnv("PointUMaze-v0", 2), teacher_steps=100)
    assert (student.n_envs, student.replay_buffer.size()) == (2, 70)


@pytest.mark.parametrize("has_buffer", [True, False])
def test_student_begins_with_the_statistics_of_its_teacher(has_buffer):
    settings = dict(depth=4, width=16, batch_size=32, learning_starts=100, seed=0)
    env = BatchVecEnv("PointUMaze-v0", 4)
    teacher = DeepCRL("MultiInputPolicy", env, normalize_observations=True, **settings).learn(400)
    if not has_buffer:
        teacher.replay_buffer.reset()
    student, distillation = make_student(teacher, 4), Distillation(teacher, teacher_steps=400)
    student.learn(160, callback=distillation)
    # The teacher is what it was, though it may have acted
    for name, value in teacher.actor.normalizer.state_dict().items():
        assert th.equal(distillation.teacher.actor.normalizer.state_dict()[name], value)
    assert student.actor.normalizer.count == 400 + 160


def test_statistics_of_vec_normalize_rest_while_a_student_is_taught():
    env = VecNormalize(BatchVecEnv("PointUMaze-v0", 4), norm_reward=False)
    teacher = DeepCRL("MultiInputPolicy", env, depth=4, width=16, batch_size=32, learning_starts=100).learn(200)
    count = env.obs_rms["observation"].count
    student = distill(teacher, depth=4, steps=80)
    assert env.obs_rms["observation"].count == count
    # On its own it learns them again, also if the training was stopped
    with pytest.raises(KeyboardInterrupt):
        student.learn(80, callback=[Distillation(teacher), EveryNTimesteps(40, StopHere())])
    assert env.obs_rms["observation"].count == count
    student.learn(80)
    assert env.obs_rms["observation"].count > count


def test_teacher_whose_observations_are_not_normalized(teacher, tmp_path):
    env = VecNormalize(BatchVecEnv("PointUMaze-v0", 4), norm_obs=False)
    env.save(str(tmp_path / "vecnormalize.pkl"))
    assert Distillation(teacher, vec_normalize=tmp_path / "vecnormalize.pkl").statistics is None


def test_blocks_that_do_nothing_are_pruned(teacher):
    deep = make_student(teacher, 16, seed=1)
    with th.no_grad():
        for index in (0, 2):
            for tower in (deep.actor.tower, deep.critic.sa_encoder, deep.critic.g_encoder):
                tower.blocks[index].scale.zero_()
    observations, actions = teacher.replay_buffer.sample_contrastive(64)
    contributions = block_contributions(deep, observations, actions)["actor.tower"]
    assert contributions[0] == contributions[2] == 0.0 < min(contributions[1], contributions[3])
    pruned = prune(deep, depth=8, steps=0, teacher_steps=200)
    for module in (deep, pruned):
        module.policy.set_training_mode(False)
    with th.no_grad():
        for outputs in zip(*(model.actor.get_action_dist_params(observations) for model in (deep, pruned)), strict=True):
            th.testing.assert_close(*outputs)
        th.testing.assert_close(*(model.critic(observations, actions) for model in (deep, pruned)))


def test_comparison_tells_size_and_cost(teacher):
    rows = compare_policies({"teacher": teacher, "student": make_student(teacher, 4)}, BatchVecEnv("PointUMaze-v0", 4), 4)
    assert [row["depth"] for row in rows] == [16, 4]
    assert rows[0]["parameters"] > rows[1]["parameters"] and all(row["ms_per_call"] > 0 for row in rows)
    assert len(compare_policies({"teacher": teacher}, gym.make("PointUMaze-v0"), 1)) == 1
    sac = SAC("MultiInputPolicy", gym.make("PointUMaze-v0"), **OFF_POLICY)
    with pytest.raises(ValueError, match="The model 'sac' is a SAC: only those of DeepCRL can be compared"):
        compare_policies({"sac": sac}, gym.make("PointUMaze-v0"))
    with pytest.raises(ValueError, match="Only DeepCRL has students, not SAC"):
        distill(sac)


def test_unfit_students_are_refused(teacher):
    with pytest.raises(ValueError, match="at most that of the model, 16, got 32"):
        prune(teacher, depth=32)
    plain = DeepCRL("MultiInputPolicy", "PointUMaze-v0", depth=8, width=16, policy_kwargs=dict(residual=False))
    with pytest.raises(ValueError, match="identity"):
        prune(plain, depth=4)
    with pytest.raises(ValueError, match="repr_dim"):
        make_student(teacher, 4, policy_kwargs=dict(repr_dim=8)).learn(100, callback=Distillation(teacher))
    with pytest.raises(ValueError, match="whose blocks are kept, 16, got 32"):
        make_student(teacher, 4, 32).learn(100, callback=Distillation(teacher, prune=True))
    with pytest.raises(ValueError, match="observation_space"):
        DeepCRL("MultiInputPolicy", "AntUMaze-v0", depth=4, width=16).learn(100, callback=Distillation(teacher))
