"""
The command ``sb3-deepcrl``. It stands outside of the rooms, as it runs what is in ``zoo`` and in ``analysis``.
"""

import os
import sys
from collections.abc import Sequence


def _value_map(argv: Sequence[str]) -> None:
    from sb3_deepcrl.analysis.run_map import main

    main(argv)


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
    launcher.main({"value_map": ("draw what a trained agent has learned over its maze", _value_map)})


if __name__ == "__main__":
    main()
