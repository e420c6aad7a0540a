from sb3_deepcrl.analysis.depth import DepthStudy
from sb3_deepcrl.analysis.representation import RepresentationStudy
from sb3_deepcrl.analysis.stitching import StitchingStudy
from sb3_deepcrl.analysis.value_map import MazeMap, plot_value_map, value_map
from sb3_deepcrl.analysis.value_study import ValueCorrelation, ValueMapStudy, value_correlations

__all__ = [
    "DepthStudy",
    "MazeMap",
    "RepresentationStudy",
    "StitchingStudy",
    "ValueCorrelation",
    "ValueMapStudy",
    "plot_value_map",
    "value_correlations",
    "value_map",
]
