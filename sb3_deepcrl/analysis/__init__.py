from sb3_deepcrl.analysis.ablation import AblationStudy
from sb3_deepcrl.analysis.baselines import BaselinesStudy
from sb3_deepcrl.analysis.collector import CollectorStudy
from sb3_deepcrl.analysis.depth import DepthStudy
from sb3_deepcrl.analysis.distillation import DistillationStudy
from sb3_deepcrl.analysis.grid import GridStudy
from sb3_deepcrl.analysis.mazes import MazeMap
from sb3_deepcrl.analysis.offline import OfflineStudy
from sb3_deepcrl.analysis.representation import RepresentationStudy
from sb3_deepcrl.analysis.scale import ScaleStudy
from sb3_deepcrl.analysis.stitching import StitchingStudy
from sb3_deepcrl.analysis.study import Study
from sb3_deepcrl.analysis.value_map import (
    ValueCorrelation,
    ValueMapStudy,
    plot_value_map,
    value_correlations,
    value_map,
)
from sb3_deepcrl.analysis.walk import WalkStudy, walk_episodes

#: All studies by the name of their command
STUDIES: dict[str, type[Study]] = {
    study.name: study
    for study in (
        *(DepthStudy, ScaleStudy, GridStudy, AblationStudy, BaselinesStudy),
        *(ValueMapStudy, StitchingStudy, RepresentationStudy, CollectorStudy, WalkStudy),
        *(DistillationStudy, OfflineStudy),
    )
}

__all__ = [
    "STUDIES",
    "AblationStudy",
    "BaselinesStudy",
    "CollectorStudy",
    "DepthStudy",
    "DistillationStudy",
    "GridStudy",
    "MazeMap",
    "OfflineStudy",
    "RepresentationStudy",
    "ScaleStudy",
    "StitchingStudy",
    "Study",
    "ValueCorrelation",
    "ValueMapStudy",
    "WalkStudy",
    "plot_value_map",
    "value_correlations",
    "value_map",
    "walk_episodes",
]
