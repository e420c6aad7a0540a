from sb3_deepcrl.deploy.comparison import compare_policies
from sb3_deepcrl.deploy.distillation import Distillation, distill, make_student, prune
from sb3_deepcrl.deploy.export import describe_policy, export_policy
from sb3_deepcrl.deploy.pruning import block_contributions, prune_blocks

__all__ = [
    "Distillation",
    "block_contributions",
    "compare_policies",
    "describe_policy",
    "distill",
    "export_policy",
    "make_student",
    "prune",
    "prune_blocks",
]
