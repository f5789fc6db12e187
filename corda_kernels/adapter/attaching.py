"""Attaching an adapter to its base, from its folder or from plain data, ready to train."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from corda_kernels.adapter import folder, record
from corda_kernels.adapter.base import sampled, target_modules
from corda_kernels.adapter.experts import expert_shape, peft_layout, wrapped_layers
from corda_kernels.adapter.factors import AdapterFactors, LayerAdapter
from corda_kernels.adapter.linear import CordaLinear
from corda_kernels.adapter.lora import Lora, check_only_factors, fits_residual, layer_of, read_lora
from corda_kernels.adapter.model import TRAINED, live_adapter, residual_marker
from corda_kernels.adapter.published import residual
from corda_kernels.adapter.record import Adapter, AdapterRecord, initial_factors
from corda_kernels.arguments import flag, instance_of, readable_path
from corda_kernels.errors import AdapterError, ModelError
from corda_kernels.experts import expert_parameters
from corda_kernels.linears import check_writable, is_linear, linear_shape, linear_weight, unpack


def load_for_training(
    base_model: nn.Module, path: str | os.PathLike[str], *, use_peft: bool = True
) -> PeftModel | nn.Module:
    """Attaches an adapter from its folder, ready to train or to run.

    This is PEFT's own `PeftModel.from_pretrained(base_model, path, is_trainable=True)`, after a
    check that the base is the right one if the folder has corda.json. PEFT also restores what else
    is in the folder, such as trained embeddings. Only an adapter with `residual="weight"` needs
    this function.


    Args:
        base_model: the untouched base that the adapter was made for, or with `residual="weight"`
            the one that `--save-base` stored. It is wrapped in place.
        path: folder written by `save_adapter`, `corda-kernels init`, PEFT or Trainer.
        use_peft: False for CordaLinear layers in place of a PeftModel.

    Returns:
        A PeftModel, or `base_model` itself with its layers replaced.

    Raises:
        AdapterError: the folder is incomplete or altered, or belongs to another base.
        ModelError: the base is no model.
        TargetError: the adapter has `residual="weight"`, and the base is quantised.

    """
    instance_of("the base", base_model, nn.Module, ModelError)
    flag("use_peft", use_peft)
    place = readable_path(path, AdapterError)
    recorded = (place / folder.RECORD_FILE).is_file()
    lora = read_lora(place)
    if not use_peft:
        check_only_factors(lora.tensors, f"load {place} with PEFT, which restores that")
    made = folder.read_record(place) if recorded or not use_peft else None
    layers: dict[str, LayerAdapter] = {}
    # Of another LoRA of PEFT's, which may adapt more than linear layers, PEFT takes care itself.
    if made or fits_residual(lora.config) or (place / folder.INITIAL_FILE).is_file():
        layers = folder.layer_adapters(lora, made)
    if made and not use_peft:
        return attach(base_model, Adapter(layers, made), use_peft=False, copy=False)
    described, adapted = _described(base_model, lora)
    initial = initial_factors(layers)
    if initial is not None:
        # PEFT would take A0 and B0 out itself.
        described["init_lora_weights"] = True
    with _on_base(base_model, layers, made):
        try:
            config = PeftConfig.from_peft_type(**described)
            with _quiet_peft():
                # They would start at random.
                warnings.filterwarnings("error", ".*missing adapter keys")
                wrapped = PeftModel.from_pretrained(
                    base_model, place, is_trainable=True, config=config
                )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # an altered configuration may lead PEFT to any
            raise AdapterError(f"PEFT cannot load {place}: {error}") from error
        _check_wrapped(base_model, adapted, alone=recorded)
    return _carrying(wrapped, made, initial)


def _described(base_model: nn.Module, lora: Lora) -> tuple[dict[str, Any], set[str]]:
    """What a LoRA's folder says to PEFT, and the model's layers that it has tensors of.

    Names stand in place of any regular expression that selects layers.

    Raises:
        AdapterError: the folder was made for layers that the model does not have.
    """
    config = dict(lora.config)
    config.pop("runtime_config", None)  # PEFT ignores it too
    named = {layer_of(key, config) for key in lora.tensors if ".lora_" in key}
    adapted = named & {
        name for name, module in base_model.named_modules() if hasattr(module, "weight")
    }
    linear = set(adapted)
    adapted |= named & expert_parameters(base_model).keys()
    selections = [config.get(name) for name in ("target_modules", "exclude_modules")]
    if not config.get("layers_pattern") and not any(
        isinstance(selection, str) and selection != "all-linear" for selection in selections
    ):
        return config, adapted
    if adapted != named or not adapted:
        raise AdapterError(
            f"{lora.folder} selects layers by a regular expression, which is not run when it is in "
            "a file, and not all of its tensors are of layers of this model "
            f"({min(named - adapted, default='none')}): load it with PEFT if you trust it"
        )
    unset = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return config | unset | {"target_modules": target_modules(base_model, linear)}, adapted


def attach(
    base_model: nn.Module, adapter: Adapter, *, use_peft: bool = True, copy: bool = True
) -> PeftModel | nn.Module:
    """Attaches `adapter` to its base, in place; see `load_for_training`.

    With `copy=False` the model may take over the adapter's tensors, which training then changes.
    """
    experts = next((name for name, layer in adapter.layers.items() if layer.A.ndim == 3), None)
    if experts and not use_peft:
        raise AdapterError(
            f"{experts} is a parameter of fused experts, which CordaLinear cannot adapt: attach "
            "with use_peft=True"
        )
    with _on_base(base_model, adapter.layers, adapter.record):
        if use_peft:
            wrapped = _attach_peft(base_model, adapter, copy=copy)
        else:
            wrapped = base_model.requires_grad_(False)
            for name, layer in adapter.layers.items():
                linear = CordaLinear(base_model.get_submodule(name), layer, copy=copy)
                base_model.set_submodule(name, linear)
    return _carrying(wrapped, adapter.record, adapter.initial)


def _attach_peft(model: nn.Module, adapter: Adapter, *, copy: bool) -> PeftModel:
    config = record.lora_config(adapter)
    # PEFT's own start would be thrown away, but for what it derives from the model.
    derived = bool(config.use_dora or config.modules_to_save)
    source = config.base_model_name_or_path
    config.base_model_name_or_path = None  # PEFT sets it, and warns of any other
    with _quiet_peft():
        wrapped = get_peft_model(model, config, adapter_name=TRAINED, low_cpu_mem_usage=not derived)
    config.base_model_name_or_path = source
    _check_wrapped(model, adapter.layers.keys(), alone=True)
    loras = wrapped_layers(model)
    for name, layer in adapter.layers.items():
        lora = loras[name]
        device = next(lora.get_base_layer().parameters()).device
        A, B = peft_layout(layer)
        # In the adapter's own dtype, for PEFT gives adapters of a float64 base its dtype.
        lora.lora_A[TRAINED].weight = nn.Parameter(A.to(device, copy=copy))
        lora.lora_B[TRAINED].weight = nn.Parameter(B.to(device, copy=copy))
    return wrapped


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Inside the block PEFT does not warn of what its user cannot change: that it ignores ranks of
    parameters, which it follows (its check looks among modules only), and that it uses a name of
    transformers that is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
        yield


def _carrying(
    model: Any, made: AdapterRecord | None, initial: dict[str, AdapterFactors] | None
) -> PeftModel | nn.Module:
    """Notes on a model how its adapter was made, and what it has taken out of the base.

    What is not to be trained is frozen.
    """
    model.corda_record, model.corda_initial = made, initial
    if isinstance(model, PeftModel):
        model.corda_config = model.peft_config[TRAINED]
    if made is not None and made.freeze_a:
        for layer in live_adapter(model, variants=True).layers.values():
            layer.A.requires_grad_(False)
    return model


@contextmanager
def _on_base(
    base_model: nn.Module, layers: Mapping[str, LayerAdapter], made: AdapterRecord | None
) -> Iterator[None]:
    """Checks that layers belong to this base, which the block wraps. Afterwards it is made their
    residual where they have initial factors, unless it is that already.

    A block that fails leaves the base as it was. Without a record it goes by names and shapes.

    Raises:
        AdapterError: they do not, or the base is the residual of another adapter.
        TargetError: a part of a quantised weight would have to be taken out.
    """
    base = "its base" if made is None else made.base_name
    linears = {n: m for n, m in base_model.named_modules() if n in layers and is_linear(m)}
    experts = {n: p for n, p in expert_parameters(base_model).items() if n in layers}
    shapes: dict[str, tuple[int, ...]] = {n: linear_shape(m) for n, m in linears.items()}
    shapes |= {n: expert_shape(p) for n, p in experts.items()}
    for name, layer in layers.items():
        found = shapes.get(name, "no linear layer")
        expected = *layer.B.shape[:-1], layer.A.shape[-1]
        if found != expected:
            raise AdapterError(
                f"{name} of this model is {found}, but the adapter is for {expected}: load {base} "
                "without another adapter"
            )
    modules = sampled(linears, experts)
    check_at_hand(modules)
    unpack(modules)
    marker, initial = residual_marker(base_model), initial_factors(layers)
    if marker is None:
        if made is not None:
            record.check_base(made, modules)
    elif initial is None or marker != record.initial_checksum(initial):
        raise AdapterError(
            "this model is the residual of another adapter: load the untouched base, or the base "
            "that was saved with this adapter"
        )
    lost = initial if initial is not None and marker is None else {}
    _check_subtractable({name: modules[name] for name in lost})
    with _unwrapped_on_error(base_model):
        yield
        if lost:
            _subtract(base_model, modules, lost)


@contextmanager
def _unwrapped_on_error(model: nn.Module) -> Iterator[None]:
    """Takes back what a block that fails has done to a model: wrapped layers, frozen parameters."""
    children = {module: dict(module.named_children()) for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    attributes = set(vars(model))
    try:
        yield
    except BaseException:
        for module, own in children.items():
            for name, child in own.items():
                setattr(module, name, child)
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        for name in vars(model).keys() - attributes:
            delattr(model, name)
        raise


def check_at_hand(modules: Mapping[str, nn.Module]) -> None:
    """Refuses to attach to layers whose weights accelerate keeps elsewhere, and would put back.

    Raises:
        AdapterError: there is one.
    """
    for name, module in modules.items():
        if module.weight.is_meta:
            raise AdapterError(
                f"the weight of layer {name} is offloaded, and no adapter can be trained on it: "
                "make a folder (corda_adapter, write_adapter), and load it where the model fits"
            )


def subtract_initial(model: nn.Module, initial: dict[str, AdapterFactors]) -> None:
    """Writes W' = W − s·B0·A0 into an untouched base, in place, and marks its config with it.

    Raises:
        TargetError: a layer is quantised.
    """
    modules = {name: model.get_submodule(name) for name in initial}
    _check_subtractable(modules)
    _subtract(model, modules, initial)


def _check_subtractable(modules: Mapping[str, nn.Module]) -> None:
    check_writable(
        modules,
        "this adapter has taken a part of it over",
        "load the base in a floating dtype, or the residual that was saved with the adapter",
    )


@torch.no_grad()
def _subtract(
    model: nn.Module, modules: Mapping[str, nn.Module], initial: dict[str, AdapterFactors]
) -> None:
    """As `subtract_initial`, of layers that may be wrapped by now: of all of them, or of none where
    a device's memory runs out."""
    weights = {name: linear_weight(modules[name]) for name in initial}
    by_size = sorted(weights, key=lambda name: weights[name].numel())
    # The largest of each device, before any weight changes: it takes the most memory of all.
    for name in {weights[name].device: name for name in by_size}.values():
        residual(weights[name], initial[name])
    for name, weight in weights.items():
        weight.copy_(residual(weight, initial[name]))
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.corda_residual = record.initial_checksum(initial)


def _check_wrapped(model: nn.Module, names: Set[str], *, alone: bool) -> None:
    """Makes sure that PEFT, which finds layers by the ends of their names, found these of the base,
    and none but these if they are to be `alone`."""
    found = wrapped_layers(model).keys()
    odd = found ^ names if alone else names - found
    if odd:
        raise AdapterError(
            f"PEFT and the adapter disagree on {min(odd)}: load the base that the adapter was made "
            "for, or attach with use_peft=False"
        )
