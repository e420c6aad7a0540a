"""
RL Zoo's ``plot_from_file`` for DeepCRL: ``python -m sb3_deepcrl.zoo.plot_from_file --help``.
"""

from sb3_deepcrl.zoo.launcher import run


def main() -> None:
    """Run the script with the arguments of the command line."""
    run("plot_from_file")


if __name__ == "__main__":
    main()
