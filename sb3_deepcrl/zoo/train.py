"""
RL Zoo's ``train`` for DeepCRL: ``python -m sb3_deepcrl.zoo.train --help``.
"""

from sb3_deepcrl.zoo.launcher import run


def main() -> None:
    """Run the script with the arguments of the command line."""
    run("train")


if __name__ == "__main__":
    main()
