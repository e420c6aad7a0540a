"""
RL Zoo's ``enjoy`` for DeepCRL: ``python -m sb3_deepcrl.zoo.enjoy --help``.
"""

from sb3_deepcrl.zoo.launcher import run


def main() -> None:
    """Run the script with the arguments of the command line."""
    run("enjoy")


if __name__ == "__main__":
    main()
