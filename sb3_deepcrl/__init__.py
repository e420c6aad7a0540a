from pathlib import Path

from sb3_deepcrl.common.startup import is_command, start_command

if is_command():
    start_command()

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from sb3_deepcrl.common.callbacks import GoalEvalCallback
from sb3_deepcrl.common.compilation import compile_blocks, uncompile_blocks
from sb3_deepcrl.common.evaluation import evaluate_goals, mean_of_episodes
from sb3_deepcrl.deep_policies import DeepResidualExtractor, register_policies, unregister_policies
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.envs.compat import repair_gymnasium_robotics
from sb3_deepcrl.envs.registration import register_envs
from sb3_deepcrl.envs.wrappers import SuccessInfoWrapper

__version__ = Path(__file__).with_name("version.txt").read_text().strip()

register_envs()
register_policies()
repair_gymnasium_robotics()

__all__ = [
    "ContrastiveReplayBuffer",
    "DeepCRL",
    "DeepResidualExtractor",
    "GoalEvalCallback",
    "SuccessInfoWrapper",
    "__version__",
    "compile_blocks",
    "evaluate_goals",
    "mean_of_episodes",
    "register_policies",
    "uncompile_blocks",
    "unregister_policies",
]
