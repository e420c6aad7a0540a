from sb3_deepcrl.analysis.ablation import AblationStudy
from sb3_deepcrl.analysis.baselines import BaselinesStudy
from sb3_deepcrl.analysis.collector import CollectorStudy
from sb3_deepcrl.analysis.depth import DepthStudy
from sb3_deepcrl.analysis.grid import GridStudy
from sb3_deepcrl.analysis.representation import RepresentationStudy
from sb3_deepcrl.analysis.scale import ScaleStudy
from sb3_deepcrl.analysis.stitching import StitchingStudy
from sb3_deepcrl.analysis.value_map import MazeMap, plot_value_map, value_map
from sb3_deepcrl.analysis.value_study import ValueCorrelation, ValueMapStudy, value_correlations
from sb3_deepcrl.analysis.walk import WalkStudy, record_trajectories, walk_episodes

__all__ = [
    "AblationStudy",
    "BaselinesStudy",
    "CollectorStudy",
    "DepthStudy",
    "GridStudy",
    "MazeMap",
    "RepresentationStudy",
    "ScaleStudy",
    "StitchingStudy",
    "ValueCorrelation",
    "ValueMapStudy",
    "WalkStudy",
    "plot_value_map",
    "record_trajectories",
    "value_correlations",
    "value_map",
    "walk_episodes",
]
