"""PEFT's own CorDA entry point on this package's numerics; see `patch_peft`."""

from corda_kernels.integrations.peft.eigens import CordaEigens
from corda_kernels.integrations.peft.patch import TRIED_VERSIONS, PeftPatch, patch_peft
from corda_kernels.integrations.peft.preprocess import preprocess_corda
from corda_kernels.integrations.peft.saved import save_adapter

__all__ = [
    "TRIED_VERSIONS",
    "CordaEigens",
    "PeftPatch",
    "patch_peft",
    "preprocess_corda",
    "save_adapter",
]
