"""
The command ``sb3-deepcrl``. It is in no subpackage, as it runs what is in ``zoo`` and in ``analysis``.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial


def _value_map(argv: Sequence[str]) -> None:
    from sb3_deepcrl.analysis.run_map import main

    main(argv)


def _deploy(command: str, argv: Sequence[str]) -> None:
    from sb3_deepcrl.zoo.deployment import main

    main(command, argv)


def main() -> None:
    """Run the command, or say in one line that RL Zoo is missing."""
    # As with `python -m`: the user's envs and `custom_envs.py` are found in the current folder
    sys.path.insert(0, os.getcwd())
    try:
        from sb3_deepcrl.zoo import launcher
    except ImportError as error:
        if error.name != "sb3_deepcrl.zoo":
            raise
        sys.exit(f"sb3-deepcrl: error: {error}")
    launcher.main(
        {
            "value_map": ("draw what a trained agent has learned over its maze", _value_map),
            "export": ("write the policy of a trained agent to an ONNX file", partial(_deploy, "export")),
            "distill": ("let a shallow agent learn from a deep one", partial(_deploy, "distill")),
            "prune": ("drop layers of a trained agent that contribute little", partial(_deploy, "prune")),
        }
    )


if __name__ == "__main__":
    main()
