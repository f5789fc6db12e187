"""The former address of `corda_kernels.peft_corda`."""

from corda_kernels.peft_corda import *  # noqa: F403
from corda_kernels.peft_corda import __all__ as __all__
