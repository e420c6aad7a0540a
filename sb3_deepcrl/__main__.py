"""
The command ``sb3-deepcrl``. It stands outside of the rooms, as it runs what is in ``zoo`` and in ``analysis``.
"""

import sys


def main() -> None:
    """Run the command, or say in one line that RL Zoo is missing."""
    try:
        from sb3_deepcrl.zoo import launcher
    except ImportError as error:
        if error.name != "sb3_deepcrl.zoo":
            raise
        sys.exit(f"sb3-deepcrl: error: {error}")
    if sys.argv[1:2] == ["value_map"]:
        from sb3_deepcrl.analysis.run_map import main as value_map

        value_map(sys.argv[2:])
    else:
        launcher.main()


if __name__ == "__main__":
    main()
