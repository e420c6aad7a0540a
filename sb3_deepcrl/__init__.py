from pathlib import Path

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from sb3_deepcrl.common.evaluation import GoalEvalCallback, evaluate_goals, mean_of_episodes
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.envs.registration import register_envs
from sb3_deepcrl.envs.wrappers import SuccessInfoWrapper

__version__ = Path(__file__).with_name("version.txt").read_text().strip()

register_envs()

__all__ = [
    "ContrastiveReplayBuffer",
    "DeepCRL",
    "GoalEvalCallback",
    "SuccessInfoWrapper",
    "__version__",
    "evaluate_goals",
    "mean_of_episodes",
]
