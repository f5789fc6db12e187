"""Context-oriented LoRA initialisation: CorDA and CorDA++.

Importing this starts no CUDA and loads no other library: every name is imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corda_kernels import errors, kernels
    from corda_kernels.adapter import (
        AdapterFactors,
        CordaLinear,
        adapter_factors,
        export_lora,
        load_for_training,
        merge,
        published_factors,
        residual,
        save_adapter,
    )
    from corda_kernels.calibration import (
        CalibrationCheckpoint,
        Covariance,
        CovarianceSet,
        calibrate,
        calibrate_blocks,
    )
    from corda_kernels.init import CordaConfig, init_corda
    from corda_kernels.linalg import (
        CoSVD,
        RegularizedInverse,
        co_svd,
        co_svd_layers,
        extreme_eigenvalues,
        regularized_inverse,
        singular_values,
    )
    from corda_kernels.models import load_model, load_tokenizer
    from corda_kernels.planning import (
        Stability,
        allocate_ranks,
        compactness,
        mix_covariances,
        select_covariance,
        subspace_stability,
    )
    from corda_kernels.text import token_batches
    from corda_kernels.training import (
        CompactnessPenalty,
        DriftPenalty,
        RankSchedule,
        compactness_penalty,
        drift_penalty,
    )

__version__ = "0.1.0"

# The module in which each public name lives.
_HOMES = {
    "CalibrationCheckpoint": "calibration",
    "Covariance": "calibration",
    "CovarianceSet": "calibration",
    "calibrate": "calibration",
    "calibrate_blocks": "calibration",
    "token_batches": "text",
    "CoSVD": "linalg",
    "RegularizedInverse": "linalg",
    "co_svd": "linalg",
    "co_svd_layers": "linalg",
    "extreme_eigenvalues": "linalg",
    "regularized_inverse": "linalg",
    "singular_values": "linalg",
    "AdapterFactors": "adapter",
    "CordaLinear": "adapter",
    "adapter_factors": "adapter",
    "export_lora": "adapter",
    "load_for_training": "adapter",
    "merge": "adapter",
    "published_factors": "adapter",
    "residual": "adapter",
    "save_adapter": "adapter",
    "load_model": "models",
    "load_tokenizer": "models",
    "CordaConfig": "init",
    "init_corda": "init",
    "Stability": "planning",
    "allocate_ranks": "planning",
    "compactness": "planning",
    "mix_covariances": "planning",
    "select_covariance": "planning",
    "subspace_stability": "planning",
    "CompactnessPenalty": "training",
    "DriftPenalty": "training",
    "RankSchedule": "training",
    "compactness_penalty": "training",
    "drift_penalty": "training",
}

__all__ = [
    "AdapterFactors",
    "CalibrationCheckpoint",
    "CoSVD",
    "CompactnessPenalty",
    "CordaConfig",
    "CordaLinear",
    "Covariance",
    "CovarianceSet",
    "DriftPenalty",
    "RankSchedule",
    "RegularizedInverse",
    "Stability",
    "__version__",
    "adapter_factors",
    "allocate_ranks",
    "calibrate",
    "calibrate_blocks",
    "co_svd",
    "co_svd_layers",
    "compactness",
    "compactness_penalty",
    "drift_penalty",
    "errors",
    "export_lora",
    "extreme_eigenvalues",
    "init_corda",
    "kernels",
    "load_for_training",
    "load_model",
    "load_tokenizer",
    "merge",
    "mix_covariances",
    "published_factors",
    "regularized_inverse",
    "residual",
    "save_adapter",
    "select_covariance",
    "singular_values",
    "subspace_stability",
    "token_batches",
]


def __getattr__(name: str) -> Any:
    if name in ("errors", "kernels"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
