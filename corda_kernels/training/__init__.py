"""What one does with an adapter after it is made: penalties for training, ranks for generation."""

from corda_kernels.training.penalty import CompactnessPenalty, DriftPenalty
from corda_kernels.training.rank_schedule import RankSchedule

__all__ = ["CompactnessPenalty", "DriftPenalty", "RankSchedule"]
