"""An adapter that PEFT made from this package's components, saved so that it can be loaded.

PEFT's own folder of such an adapter fits the residual W − B·A alone. On the base it does not load,
for the components that it would be made of are gone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from corda_kernels.adapter import (
    Adapter,
    AdapterFactors,
    AdapterRecord,
    LayerAdapter,
    write_adapter,
)
from corda_kernels.adapter.record import target_modules
from corda_kernels.errors import AdapterError
from corda_kernels.peft_corda.files import is_written, read_components
from corda_kernels.versions import library_versions

if TYPE_CHECKING:
    from peft import PeftModel


def save_adapter(model: PeftModel, path: str | os.PathLike[str]) -> None:
    """Writes a CorDA adapter of PEFT's making in this package's layout, fresh or trained.

    `corda_kernels.load_for_training(base, path)` then attaches it to the untouched base, and
    `export_lora(path, out)` makes a plain LoRA of it.

    Args:
        model: from `get_peft_model`, after `preprocess_corda` with a `cache_file`, which must still
            be there: it holds the initial factors.
        path: a folder.

    Raises:
        AdapterError: the model's active adapter is not CorDA's, or trains more than A and B; or its
            cache is gone, of PEFT's own making, or another layer's.
        CacheError: the cache is damaged.
        OutputError: the folder cannot be written.
    """
    active = model.active_adapter
    config = model.peft_config[active]
    options = getattr(config, "corda_config", None)
    if options is None or not is_written(options.cache_file):
        raise AdapterError(
            f"adapter {active!r} has no CorDA cache file to take its initial factors from: set "
            "CordaConfig(cache_file=…) before preprocess_corda, and keep the file"
        )
    _check_all_is_kept(active, config)
    eigens, notes = read_components(options.cache_file)
    if not notes:
        raise AdapterError(
            f"{options.cache_file} was written by PEFT, which does not note the base it belongs "
            "to: make it again with this package's preprocess_corda"
        )
    layers = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, module in model.get_base_model().named_modules():
        lora: Any = module
        if active not in getattr(module, "lora_A", {}):
            continue
        scaling = lora.scaling[active]
        A, B = (part[active].weight.detach().float().cpu() for part in (lora.lora_A, lora.lora_B))
        found = eigens.get(name)
        if found is None or found.U_WC.shape != B.shape or found.V_WC.shape != A.T.shape:
            raise AdapterError(
                f"{options.cache_file} does not fit layer {name}: it belongs to another adapter"
            )
        root = (found.S_WC / scaling).sqrt()
        A0, B0 = found.V_WC.mT * root[:, None], found.U_WC * root
        layers[name] = LayerAdapter(
            AdapterFactors(A, B, scaling),
            AdapterFactors(A0.contiguous(), B0.contiguous(), scaling),
        )
        entries[name] = {
            "rank": len(root),
            "tokens": 0,
            "sigma_max": float(found.S_WC[0]),
            "sigma_min": float(found.S_WC[-1]),
            "residual": 0.0,
        }
    record = AdapterRecord(
        mode=notes["corda_method"],
        rank=max(layer.trained.rank for layer in layers.values()),
        hold=None,
        residual="weight",
        damping=notes["damping"],
        base=notes["base"] | {"target_modules": target_modules(model.get_base_model(), entries)},
        calibration={},
        layers=entries,
        versions=library_versions(),
    )
    write_adapter(Adapter(layers, record), path)


def _check_all_is_kept(active: str, config: Any) -> None:
    """Refuses adapters of which more is trained than the A and B that are written."""
    for option, nothing in (
        ("use_dora", False),
        ("modules_to_save", None),
        ("trainable_token_indices", None),
        ("bias", "none"),
    ):
        value = getattr(config, option, nothing)
        if value and value != nothing:
            raise AdapterError(
                f"adapter {active!r} trains more than A and B ({option}={value!r}), which would be "
                "lost here: save it with PEFT's save_pretrained, or train without that option"
            )
