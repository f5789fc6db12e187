"""The former address of `corda_kernels.peft_corda`."""

from corda_kernels.peft_corda import (
    TRIED_VERSIONS,
    CordaEigens,
    PeftPatch,
    patch_peft,
    preprocess_corda,
    save_adapter,
)

__all__ = [
    "TRIED_VERSIONS",
    "CordaEigens",
    "PeftPatch",
    "patch_peft",
    "preprocess_corda",
    "save_adapter",
]
