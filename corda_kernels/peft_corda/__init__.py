"""PEFT's own CorDA entry point on this package's numerics; see `patch_peft`."""

from corda_kernels.peft_corda.eigens import CordaEigens
from corda_kernels.peft_corda.patch import TRIED_VERSIONS, PeftPatch, patch_peft
from corda_kernels.peft_corda.preprocess import preprocess_corda
from corda_kernels.peft_corda.saved import save_adapter

__all__ = [
    "TRIED_VERSIONS",
    "CordaEigens",
    "PeftPatch",
    "patch_peft",
    "preprocess_corda",
    "save_adapter",
]
