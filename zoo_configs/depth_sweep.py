"""
DeepCRL at one depth after another: the entries of ``deepcrl.yml``, with the depth of the environment variable DEPTH.

    for depth in 4 16 64; do
        DEPTH=$depth sb3-deepcrl train -conf depth_sweep --env PointU4Maze-v0 --vec-env batch -f logs/depth$depth \\
            --eval-env-kwargs goal_set:"'eval'" goal:"'resample'" random_start:False
    done
    sb3-deepcrl all_plots -a deepcrl -e PointU4Maze-v0 -f logs/depth4 logs/depth16 logs/depth64 -k successes
"""

import os

import yaml

from sb3_deepcrl.zoo.config import config_folder

depth = int(os.environ.get("DEPTH", "16"))
hyperparams = yaml.safe_load((config_folder() / "deepcrl.yml").read_text())
for entry in hyperparams.values():
    entry["depth"] = depth
    # Saves a fifth of the memory from here on, and nothing below depth 64 (docs/results/update.md)
    entry["checkpoint_activations"] = depth >= 256
