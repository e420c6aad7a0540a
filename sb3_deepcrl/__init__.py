from pathlib import Path

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from sb3_deepcrl.deepcrl import DeepCRL

__version__ = Path(__file__).with_name("version.txt").read_text().strip()

__all__ = ["ContrastiveReplayBuffer", "DeepCRL", "__version__"]
