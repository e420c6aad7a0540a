"""
The command ``sb3-deepcrl``. It stands outside of :mod:`sb3_deepcrl.zoo`, which cannot be imported without RL Zoo.
"""

import sys


def main() -> None:
    """Run the command, or say in one line that RL Zoo is missing."""
    try:
        from sb3_deepcrl.zoo.cli import main as run
    except ImportError as error:
        if error.name != "sb3_deepcrl.zoo":
            raise
        sys.exit(f"sb3-deepcrl: error: {error}")
    run()


if __name__ == "__main__":
    main()
