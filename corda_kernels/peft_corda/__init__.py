"""PEFT's own CorDA entry point on this package's numerics; see `patch_peft`."""

from corda_kernels.peft_corda.cache import CordaEigens, save_adapter
from corda_kernels.peft_corda.patch import TRIED_VERSIONS, PeftPatch, patch_peft
from corda_kernels.peft_corda.preprocess import Options, preprocess_corda

__all__ = [
    "TRIED_VERSIONS",
    "CordaEigens",
    "Options",
    "PeftPatch",
    "patch_peft",
    "preprocess_corda",
    "save_adapter",
]
