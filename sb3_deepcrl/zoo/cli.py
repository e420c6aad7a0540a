"""
The command ``sb3-deepcrl``: RL Zoo's scripts by name.
"""

import sys

import sb3_deepcrl
from sb3_deepcrl.common.startup import end_start
from sb3_deepcrl.zoo.launcher import SCRIPTS, run


def main() -> None:
    """Run the script that the first argument names."""
    end_start()
    known = (*SCRIPTS, "value_map")
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: sb3-deepcrl {{{','.join(known)}}} ...\n\nEach has its own --help.")
    elif sys.argv[1] == "--version":
        print(f"sb3-deepcrl {sb3_deepcrl.__version__}")
    elif sys.argv[1] == "value_map":
        from sb3_deepcrl.zoo.value_map import main as value_map

        value_map(sys.argv[2:])
    elif sys.argv[1] in SCRIPTS:
        run(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(f"sb3-deepcrl: error: there is no {sys.argv[1]!r}, only {', '.join(known)}")
