from sb3_deepcrl.analysis.collector import CollectorStudy
from sb3_deepcrl.analysis.depth import DepthStudy
from sb3_deepcrl.analysis.value_map import MazeMap, plot_value_map, value_map
from sb3_deepcrl.analysis.walk import WalkStudy, record_trajectories, walk_episodes

__all__ = [
    "CollectorStudy",
    "DepthStudy",
    "MazeMap",
    "WalkStudy",
    "plot_value_map",
    "record_trajectories",
    "value_map",
    "walk_episodes",
]
