"""U, Σ and W → A, B and the residual; adapted models, their folders and the ways out of them."""

from corda_kernels.initialization.adapter import (
    Adapter,
    AdapterRecord,
    LayerAdapter,
    describe_base,
)
from corda_kernels.initialization.checkpoint import (
    adapter_of,
    attach,
    check_adapter_folder,
    check_at_hand,
    has_adapter,
    load_for_training,
    read_adapter,
    residual_marker,
    save_adapter,
    subtract_initial,
    write_adapter,
)
from corda_kernels.initialization.export import export_lora, merge
from corda_kernels.initialization.factors import AdapterFactors, adapter_factors, residual
from corda_kernels.initialization.linear import CordaLinear
from corda_kernels.initialization.rounding import compensated

__all__ = [
    "Adapter",
    "AdapterFactors",
    "AdapterRecord",
    "CordaLinear",
    "LayerAdapter",
    "adapter_factors",
    "adapter_of",
    "attach",
    "check_adapter_folder",
    "check_at_hand",
    "compensated",
    "describe_base",
    "export_lora",
    "has_adapter",
    "load_for_training",
    "merge",
    "read_adapter",
    "residual",
    "residual_marker",
    "save_adapter",
    "subtract_initial",
    "write_adapter",
]
