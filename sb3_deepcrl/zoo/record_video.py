"""
RL Zoo's ``record_video`` for DeepCRL: ``python -m sb3_deepcrl.zoo.record_video --help``.
"""

from sb3_deepcrl.zoo.launcher import run


def main() -> None:
    """Run the script with the arguments of the command line."""
    run("record_video")


if __name__ == "__main__":
    main()
