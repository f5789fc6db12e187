"""U, Σ and W → a LoRA; adapted models, their folders and the ways out of them."""

from corda_kernels.adapter.attaching import attach, load_for_training
from corda_kernels.adapter.export import export_lora, merge
from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter, adapter_factors
from corda_kernels.adapter.folder import read_adapter, write_adapter
from corda_kernels.adapter.linear import CordaLinear
from corda_kernels.adapter.model import adapter_of, live_adapter, save_adapter
from corda_kernels.adapter.published import published_factors
from corda_kernels.adapter.record import Adapter, AdapterRecord

__all__ = [
    "Adapter",
    "AdapterFactors",
    "AdapterRecord",
    "CordaLinear",
    "LayerAdapter",
    "adapter_factors",
    "adapter_of",
    "attach",
    "export_lora",
    "live_adapter",
    "load_for_training",
    "merge",
    "published_factors",
    "read_adapter",
    "save_adapter",
    "write_adapter",
]
