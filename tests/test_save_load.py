import io
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.common.utils import atomic_path
from sb3_deepcrl.deepcrl import MultiInputPolicy
from sb3_deepcrl.deepcrl.policies import GaussianActor
from tests.envs import EpisodeCounterEnv, GoalReachEnv
from tests.test_deepcrl import SMALL, check_goals, counter_model, make_model


@pytest.fixture(scope="module")
def trained() -> DeepCRL:
    return make_model(
        policy_kwargs=dict(repr_dim=8, activation_fn=th.nn.ReLU), learning_rate=lambda progress: 1e-3 * progress
    ).learn(100)


def observations(n: int = 5) -> dict[str, np.ndarray]:
    space = GoalReachEnv().observation_space
    space.seed(0)
    samples = [space.sample() for _ in range(n)]
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


def same_predictions(model, other) -> bool:
    return np.allclose(*(policy.predict(observations(), deterministic=True)[0] for policy in (model, other)))


def test_load_without_env(trained, tmp_path):
    trained.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    for path in (tmp_path / "model", str(tmp_path / "model.zip")):
        model = DeepCRL.load(path)
        assert model.env is None
        assert same_predictions(model, trained)


def test_save_to_a_file_object(trained):
    file = io.BytesIO()
    trained.save(file)
    file.seek(0)
    assert same_predictions(DeepCRL.load(file), trained)


@pytest.mark.parametrize("n_envs", [1, 5])
def test_load_with_another_number_of_envs(trained, tmp_path, n_envs):
    trained.save(tmp_path / "model")
    model = DeepCRL.load(tmp_path / "model", env=make_vec_env(GoalReachEnv, n_envs))
    n_updates = model._n_updates
    model.learn(100, reset_num_timesteps=False)
    assert model.replay_buffer.n_envs == n_envs
    # Still one update for 16 transitions
    assert 16 * model.gradient_steps == model.train_freq.frequency * n_envs
    assert model.num_timesteps >= trained.num_timesteps + 100
    assert model._n_updates > n_updates


def test_files_of_an_earlier_version_go_on():
    # Saved before the first release, by a model of depth 4 with critics of depth 8, after 100 steps of two envs
    folder = Path(__file__).with_name("data")
    model = DeepCRL.load(folder / "model.zip", env=make_vec_env(GoalReachEnv, 2), device="cpu")
    model.load_replay_buffer(folder / "replay_buffer.pkl")
    predictions = dict(np.load(folder / "predictions.npz"))
    actions = predictions.pop("actions")
    np.testing.assert_allclose(model.predict(predictions, deterministic=True)[0], actions, rtol=1e-5)
    assert [len(tower.blocks) for tower in (model.actor.tower, model.critic.sa_encoder, model.critic.g_encoder)] == [1, 2, 2]
    assert (model.critic.energy, model.critic.repr_dim, model.policy.tower_kwargs["width"]) == ("dot", 4, 8)
    assert model.num_timesteps == 100
    assert model.replay_buffer.size() == 37
    n_updates = model._n_updates
    # It owes six steps of each env for its last one, and makes half of the next ones
    model.learn(2 * (6 + 8 + 4), reset_num_timesteps=False)
    assert model._n_updates == n_updates + 2


def test_everything_is_restored(trained, tmp_path):
    trained.save(tmp_path / "model")
    model = DeepCRL.load(tmp_path / "model", env=make_vec_env(GoalReachEnv, 2))
    for name, state in trained.get_parameters().items():
        th.testing.assert_close(model.get_parameters()[name], state, rtol=0, atol=0)
    assert th.equal(model.log_ent_coef, trained.log_ent_coef)
    for name in ("num_timesteps", "_n_updates", "target_entropy", "gradient_steps", "depth", "width", "ent_coef"):
        assert getattr(model, name) == getattr(trained, name), name
    assert model.train_freq == trained.train_freq
    assert model.lr_schedule(0.5) == 5e-4
    # The optimizers go on where they stopped
    steps = {state["step"].item() for state in model.critic.optimizer.state.values()}
    assert steps == {trained._n_updates}


@pytest.mark.parametrize("kwargs", [{}, dict(ent_coef=0.2), dict(normalize_observations=True)])
def test_continuing_after_load_is_the_same_as_never_having_stopped(tmp_path, kwargs):
    model = make_model(make_vec_env(GoalReachEnv, 2, seed=3), train_freq=5, **kwargs).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DeepCRL.load(tmp_path / "model", env=make_vec_env(GoalReachEnv, 2))
    loaded.load_replay_buffer(tmp_path / "buffer")
    for one in (model, loaded):
        one.env.seed(9)
        one.action_space.seed(9)
        th.manual_seed(9)
        np.random.seed(9)
        # Both start new episodes
        one._last_obs = None
        one.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps == 120
    for name, state in model.get_parameters().items():
        th.testing.assert_close(loaded.get_parameters()[name], state, rtol=0, atol=0)


def test_load_with_other_settings(trained, tmp_path):
    trained.save(tmp_path / "model")
    model = DeepCRL.load(tmp_path / "model", learning_rate=0.5, gamma=0.9, depth=4, policy_kwargs=dict(width=16, norm="layer"))
    assert (model.gamma, model.lr_schedule(1.0)) == (0.9, 0.5)
    # What was given to the constructor may be given again
    DeepCRL.load(tmp_path / "model", policy_kwargs=dict(repr_dim=8, activation_fn=th.nn.ReLU))
    model = DeepCRL.load(tmp_path / "model", transitions_per_update=40, policy_kwargs=None)
    assert (model.train_freq.frequency, model.gradient_steps) == (20, 1)


def test_train_freq_of_a_loaded_model_is_kept(trained, tmp_path):
    trained.save(tmp_path / "model")
    DeepCRL.load(tmp_path / "model", train_freq=3).save(tmp_path / "again")
    model = DeepCRL.load(tmp_path / "again", env=make_vec_env(GoalReachEnv, 4))
    assert (model.train_freq.frequency, model.gradient_steps) == (3, 1)
    # Unless another ratio is asked for
    model = DeepCRL.load(tmp_path / "again", env=make_vec_env(GoalReachEnv, 4), transitions_per_update=2)
    assert (model.train_freq.frequency, model.gradient_steps) == (1, 2)


def saved_names(path) -> set[str]:
    with zipfile.ZipFile(path) as file:
        return set(json.loads(file.read("data")))


# What RL Zoo gives to load models of another version of Python
NO_SCHEDULES = dict(learning_rate=0.0, lr_schedule=lambda _: 0.0, clip_range=lambda _: 0.0)


def test_schedule_that_cannot_be_unpickled(tmp_path, monkeypatch):
    module = types.ModuleType("gone")
    exec("def schedule(progress): return 1e-3 * progress", module.__dict__)
    monkeypatch.setitem(sys.modules, "gone", module)
    model = make_model(learning_rate=module.schedule)
    model.save(tmp_path / "model")
    assert DeepCRL.load(tmp_path / "model").lr_schedule(0.5) == 5e-4
    monkeypatch.delitem(sys.modules, "gone")
    with pytest.raises(ModuleNotFoundError):
        DeepCRL.load(tmp_path / "model")
    for custom_objects in (NO_SCHEDULES, dict(learning_rate=0.0)):
        loaded = DeepCRL.load(tmp_path / "model", env=make_vec_env(GoalReachEnv, 2), custom_objects=custom_objects)
        assert same_predictions(loaded, model)
        loaded.learn(60)
        assert [optimizer.param_groups[0]["lr"] for optimizer in loaded._optimizers()] == [0.0] * 3
        assert same_predictions(loaded, model)


def test_what_is_given_in_custom_objects_is_used(tmp_path):
    make_model(train_freq=5).save(tmp_path / "model")
    custom_objects = dict(policy_kwargs=dict(repr_dim=8, activation_fn=th.nn.Tanh), train_freq=3)
    model = DeepCRL.load(tmp_path / "model", custom_objects=custom_objects)
    assert isinstance(model.actor.tower.stem[2], th.nn.Tanh)
    assert model.train_freq.frequency == 3


def test_load_what_was_saved_in_part(tmp_path):
    model = make_model(depth=8, policy_kwargs=dict(critic_depth=4))
    model.save(tmp_path / "model")
    # Those are needed, as in Stable-Baselines3
    needed = {"observation_space", "action_space", "policy_class", "policy_kwargs", "n_envs"}
    for name in saved_names(tmp_path / "model.zip") - needed:
        model.save(tmp_path / "part", exclude=[name])
        assert same_predictions(DeepCRL.load(tmp_path / "part"), model), name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depth=8), r"saved with `depth=4`.*cannot be loaded with `depth=8`: leave `depth` out"),
        (dict(width=32), r"`width=16`.*`width=32`"),
        (dict(policy_kwargs=dict(actor_depth=8)), r"`actor_depth=None`.*`actor_depth=8`"),
        (dict(actor_depth=8), r"`actor_depth=None`.*`actor_depth=8`"),
        (dict(ent_coef=0.1), "`ent_coef=0.1` is not learned, that of the saved model is: use one of the same kind"),
        (dict(policy_kwargs=dict(repr_dim=3)), r"`repr_dim=8`.*`repr_dim=3`"),
        (dict(policy_kwargs=dict(norm="none")), r"`norm='layer'`.*`norm='none'`"),
    ],
)
def test_load_into_other_networks(trained, tmp_path, kwargs, message):
    trained.save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        DeepCRL.load(tmp_path / "model", **kwargs)


def test_load_with_another_entropy_coefficient(tmp_path):
    make_model(ent_coef=0.2).save(tmp_path / "model")
    model = DeepCRL.load(tmp_path / "model", ent_coef="0.5")
    assert float(model.ent_coef_tensor) == 0.5
    with pytest.raises(ValueError, match="`ent_coef='auto'` is learned, that of the saved model is not"):
        DeepCRL.load(tmp_path / "model", ent_coef="auto")


def test_load_the_zip_of_another_algorithm(tmp_path):
    SAC("MultiInputPolicy", GoalReachEnv(), buffer_size=100, policy_kwargs=dict(net_arch=[4])).save(tmp_path / "sac")
    with pytest.raises(
        ValueError, match=r"`policy` must be DeepCRLPolicy.*sac.policies.*load a model with the algorithm that saved it"
    ):
        DeepCRL.load(tmp_path / "sac")


def test_load_what_is_no_model(tmp_path):
    (tmp_path / "text.zip").write_text("no zip file")
    with pytest.raises(ValueError, match="wasn't a zip-file"):
        DeepCRL.load(tmp_path / "text.zip", depth=8)
    with pytest.raises(FileNotFoundError):
        DeepCRL.load(tmp_path / "missing")


def test_set_parameters(trained):
    model = make_model(policy_kwargs=dict(repr_dim=8, activation_fn=th.nn.ReLU), seed=7)
    assert not same_predictions(model, trained)
    model.set_parameters(trained.get_parameters())
    assert same_predictions(model, trained)
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        model.set_parameters({"policy": trained.policy.state_dict()})


def test_policy_and_actor_alone(trained, tmp_path):
    trained.policy.save(tmp_path / "policy.pkl")
    trained.actor.save(tmp_path / "actor.pkl")
    policy, actor = MultiInputPolicy.load(tmp_path / "policy.pkl"), GaussianActor.load(tmp_path / "actor.pkl")
    assert same_predictions(policy, trained)
    assert same_predictions(actor, trained)
    tensors = policy.obs_to_tensor(observations())[0]
    th.testing.assert_close(policy.critic(tensors, th.zeros(5, 2)), trained.critic(tensors, th.zeros(5, 2)))


@pytest.mark.slow
def test_a_thousand_layers(tmp_path):
    model = make_model(GoalReachEnv(), depth=1024, learning_starts=10, train_freq=12, gradient_steps=2).learn(12)
    assert model._n_updates == 2
    assert all(th.isfinite(values).all() for values in model.policy.parameters())
    model.save(tmp_path / "model")
    assert same_predictions(DeepCRL.load(tmp_path / "model"), model)


def test_state_dict_holds_floats_only(trained):
    # Code that perturbs all entries with noise relies on it
    assert all(values.is_floating_point() for values in trained.policy.state_dict().values())


def test_replay_buffer_round_trip(tmp_path):
    model = counter_model().learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    model.save(tmp_path / "model")
    # No env is needed
    without_env = DeepCRL.load(tmp_path / "model")
    without_env.n_envs = 2
    without_env.load_replay_buffer(tmp_path / "buffer")
    env = DummyVecEnv([lambda index=index: EpisodeCounterEnv(index + 10) for index in range(2)])
    loaded = DeepCRL.load(tmp_path / "model", env=env)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert loaded.replay_buffer.size() == model.replay_buffer.size()
    check_goals(loaded)
    loaded.learn(30, reset_num_timesteps=False)
    check_goals(loaded)


def test_wrong_replay_buffers(tmp_path):
    model = counter_model()
    current = model.replay_buffer
    make_model().save_replay_buffer(tmp_path / "other_env")
    SAC("MultiInputPolicy", EpisodeCounterEnv(), buffer_size=10).save_replay_buffer(tmp_path / "sac")
    her = HerReplayBuffer(10, model.observation_space, model.action_space, env=model.env)
    (tmp_path / "her.pkl").write_bytes(pickle.dumps(her))
    (tmp_path / "dict.pkl").write_bytes(pickle.dumps({}))
    for name, message in (
        ("other_env", r"has `observation_space=Dict\(.*but the model has"),
        ("sac", "holds a DictReplayBuffer"),
        ("her", "holds a HerReplayBuffer"),
        ("dict", "holds a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_replay_buffer(tmp_path / name)
        assert model.replay_buffer is current


def test_compiled_policy(trained, tmp_path):
    model = make_model(policy_kwargs=dict(activation_fn=th.nn.ReLU))
    model.policy = th.compile(model.policy)
    model.save(tmp_path / "model")
    assert same_predictions(DeepCRL.load(tmp_path / "model"), model)


def test_checkpoints_in_the_middle_of_a_rollout(tmp_path):
    callback = CheckpointCallback(7, str(tmp_path), save_replay_buffer=True)
    make_model(train_freq=50).learn(100, callback=callback)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "rl_model_14_steps.zip" in names
    assert "rl_model_replay_buffer_14_steps.pkl" in names
    assert DeepCRL.load(tmp_path / "rl_model_14_steps").num_timesteps == 14


# Atomic saving


def test_error_while_saving_keeps_the_previous_file(trained, tmp_path, monkeypatch):
    path = tmp_path / "model.zip"
    trained.save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(th, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        trained.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


KILLED_WHILE_SAVING = """
import os, signal, sys
import torch as th
from tests.test_deepcrl import make_model

model = make_model()
model.save(sys.argv[1])
model.num_timesteps = 1
th.save = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
model.save(sys.argv[1])
"""


def test_kill_while_saving_keeps_the_previous_file(tmp_path):
    path = tmp_path / "model.zip"
    result = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(path)], check=False)
    assert result.returncode == -9
    assert zipfile.is_zipfile(path)
    assert DeepCRL.load(path).num_timesteps == 0
    assert len(list(tmp_path.iterdir())) == 2
    # What the kill left behind is in nobody's way
    make_model().save(path)
    assert DeepCRL.load(path).num_timesteps == 0


def test_two_saves_of_the_same_file_at_once(tmp_path):
    path = tmp_path / "model.zip"
    with atomic_path(path, ".zip") as first, atomic_path(path, ".zip") as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_names(tmp_path):
    def write(path) -> None:
        with atomic_path(path, ".zip") as temporary:
            temporary.write_text("x")

    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "real.zip").write_text("old")
    os.symlink(tmp_path / "real.zip", tmp_path / "link.zip")
    for name in ("plain", "with.suffix", "new/folder/file", "folder", "link"):
        write(tmp_path / name)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"plain.zip", "with.suffix", "new/folder/file.zip", "folder.zip_2", "real.zip", "link.zip"}
    assert (tmp_path / "link.zip").is_symlink()
    assert (tmp_path / "real.zip").read_text() == "x"


def test_model_of_a_gpu_is_loaded_on_a_cpu(tmp_path):
    model = counter_model()
    model.cuda_graph = True
    model.save(tmp_path / "model")
    loaded = DeepCRL.load(tmp_path / "model", env=model.env, device="cpu")
    loaded.learn(4)
    assert loaded.cuda_graph is True


@pytest.mark.gpu
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_devices(tmp_path):
    model = make_model(**{**SMALL, "device": "cuda"}).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    on_cpu = DeepCRL.load(tmp_path / "model", env=make_vec_env(GoalReachEnv, 2), device="cpu")
    on_cpu.load_replay_buffer(tmp_path / "buffer")
    assert on_cpu.replay_buffer.device == th.device("cpu")
    on_cpu.learn(60, reset_num_timesteps=False)
