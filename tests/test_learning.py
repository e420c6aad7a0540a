from stable_baselines3.common.env_util import make_vec_env

from sb3_deepcrl import DeepCRL, evaluate_goals
from sb3_deepcrl.common.evaluation import mean_of_episodes
from tests.envs import GoalReachEnv


def success_rate(model: DeepCRL) -> float:
    return mean_of_episodes(evaluate_goals(model, make_vec_env(GoalReachEnv, 5, seed=100), 100))["success_last"]


def test_learns_to_reach_goals():
    env = make_vec_env(GoalReachEnv, 4, seed=0)
    model = DeepCRL("MultiInputPolicy", env, batch_size=128, transitions_per_update=8, depth=8, width=64, seed=0, device="cpu")
    assert success_rate(model) < 0.4
    model.learn(4000)
    assert success_rate(model) > 0.9
