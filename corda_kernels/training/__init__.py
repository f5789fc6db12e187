"""What one does with an adapter after it is made: penalties for training, ranks for generation."""

from corda_kernels.training.penalty import (
    CompactnessPenalty,
    DriftPenalty,
    compactness_penalty,
    drift_penalty,
)
from corda_kernels.training.rank_schedule import RankSchedule

__all__ = [
    "CompactnessPenalty",
    "DriftPenalty",
    "RankSchedule",
    "compactness_penalty",
    "drift_penalty",
]
