from sb3_deepcrl.analysis.ablation import AblationStudy
from sb3_deepcrl.analysis.baselines import BaselinesStudy
from sb3_deepcrl.analysis.depth import DepthStudy
from sb3_deepcrl.analysis.grid import GridStudy
from sb3_deepcrl.analysis.scale import ScaleStudy
from sb3_deepcrl.analysis.value_map import MazeMap, plot_value_map, value_map

__all__ = [
    "AblationStudy",
    "BaselinesStudy",
    "DepthStudy",
    "GridStudy",
    "MazeMap",
    "ScaleStudy",
    "plot_value_map",
    "value_map",
]
