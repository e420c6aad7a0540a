"""
RL Zoo's ``all_plots`` for DeepCRL: ``python -m sb3_deepcrl.zoo.all_plots --help``.
"""

from sb3_deepcrl.zoo.launcher import run


def main() -> None:
    """Run the script with the arguments of the command line."""
    run("all_plots")


if __name__ == "__main__":
    main()
