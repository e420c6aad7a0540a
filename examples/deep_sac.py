"""SAC with hindsight goals and a deep residual policy: python deep_sac.py [STEPS]"""

import sys

from stable_baselines3 import SAC, HerReplayBuffer

import sb3_deepcrl

n_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000

# Importing sb3_deepcrl has registered the policy and the env
model = SAC(
    "DeepMultiInputPolicy",
    "PointUMaze-v0",
    policy_kwargs=dict(depth=8, width=64),
    replay_buffer_class=HerReplayBuffer,
    # HER samples finished episodes only, of 150 steps here
    learning_starts=200,
    verbose=1,
)
# A C++ kernel or torch.compile for the towers, which pays for long runs
sb3_deepcrl.compile_blocks(model.policy)
model.learn(n_steps)
model.save("deep_sac")
