"""U, Σ and W → a LoRA; adapted models, their folders and the ways out of them."""

from corda_kernels.adapter.attaching import (
    attach,
    check_at_hand,
    load_for_training,
    subtract_initial,
)
from corda_kernels.adapter.card import model_card
from corda_kernels.adapter.experts import not_selectable, oriented, rewritten_layers
from corda_kernels.adapter.export import LoraExport, export_lora, merge
from corda_kernels.adapter.factors import (
    AdapterFactors,
    LayerAdapter,
    adapter_factors,
    task_factors,
)
from corda_kernels.adapter.folder import (
    ADAPTER_FILES,
    check_adapter_folder,
    read_adapter,
    write_adapter,
)
from corda_kernels.adapter.linear import CordaLinear
from corda_kernels.adapter.model import (
    LiveAdapter,
    adapter_of,
    has_adapter,
    live_adapter,
    residual_marker,
    save_adapter,
)
from corda_kernels.adapter.published import published_factors, residual
from corda_kernels.adapter.record import Adapter, AdapterRecord, describe_base

__all__ = [
    "ADAPTER_FILES",
    "Adapter",
    "AdapterFactors",
    "AdapterRecord",
    "CordaLinear",
    "LayerAdapter",
    "LiveAdapter",
    "LoraExport",
    "adapter_factors",
    "adapter_of",
    "attach",
    "check_adapter_folder",
    "check_at_hand",
    "describe_base",
    "export_lora",
    "has_adapter",
    "live_adapter",
    "load_for_training",
    "merge",
    "model_card",
    "not_selectable",
    "oriented",
    "published_factors",
    "read_adapter",
    "residual",
    "residual_marker",
    "rewritten_layers",
    "save_adapter",
    "subtract_initial",
    "task_factors",
    "write_adapter",
]
