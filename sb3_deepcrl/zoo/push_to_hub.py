"""
RL Zoo's ``push_to_hub`` for DeepCRL: ``python -m sb3_deepcrl.zoo.push_to_hub --help``.
"""

from sb3_deepcrl.zoo.launcher import run


def main() -> None:
    """Run the script with the arguments of the command line."""
    run("push_to_hub")


if __name__ == "__main__":
    main()
