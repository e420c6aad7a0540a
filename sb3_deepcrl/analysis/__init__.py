from sb3_deepcrl.analysis.collector import CollectorStudy
from sb3_deepcrl.analysis.depth import DepthStudy
from sb3_deepcrl.analysis.value_map import MazeMap, plot_value_map, value_map

__all__ = ["CollectorStudy", "DepthStudy", "MazeMap", "plot_value_map", "value_map"]
