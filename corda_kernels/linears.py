"""Linear layers and their weights, plain, transposed, quantised or kept elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from corda_kernels.errors import CordaWarning, TargetError, warn


@contextlib.contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Inside the block, weights that accelerate keeps on the disk or the host are there to read."""
    if getattr(module, "_hf_hook", None) is None:
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


class AdaptedLayer(nn.Module):
    """A layer that carries an adapter of this package."""


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by one matrix: nn.Linear, also packed, or transformers' Conv1D.

    A subclass with a plain weight and another forward, such as a router, is none, but for Falcon's,
    which adds the bias by itself; nor is that of nn.MultiheadAttention, which takes the weight and
    never calls it.
    """
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    unlike = not isinstance(module, nn.Linear | Conv1D)
    if unlike or type(module) is NonDynamicallyQuantizableLinear:
        return False
    own = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    own = own or type(module).__name__ == "FalconLinear"
    return own or is_quantised(module) or not _is_plain(getattr(module, "weight", None))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers of a model by name, in its order."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer's weight is packed in a way that PEFT can unpack: by bitsandbytes, in
    4 or 8 bits, or by torchao."""
    kind = type(getattr(module, "weight", None))
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def is_packed(module: nn.Module) -> bool:
    """Whether bitsandbytes has laid a 4-bit weight out anew for inference.

    It does so on CPUs with AVX512-BF16, in a layer's first forward pass in eval mode. No gradient
    passes through such a layer, and to PEFT's way of unpacking it is another matrix.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def unpack(modules: Mapping[str, nn.Module]) -> None:
    """Puts 4-bit weights that are laid out for inference back, in place, and says so.

    The layout keeps the scales in bfloat16, and they stay so: each weight is off by 0.17 % RMS.
    """
    packed = [name for name, module in modules.items() if is_packed(module)]
    for name in packed:
        _unpack(modules[name])
    if packed:
        warn(
            f"bitsandbytes had packed the weights of {len(packed)} layer(s) for inference, among "
            f"them {packed[0]}, which rounded their scales to bfloat16: they are unpacked again, "
            "and the adapter is made of what is left; make it before the model is run",
            CordaWarning,
        )


def _unpack(module: nn.Module) -> None:
    """Puts one packed weight back, in place."""
    module.state_dict()  # bitsandbytes unpacks what it saves
    state: Any = module.weight.quant_state  # type: ignore[union-attr]
    if state.absmax.ndim == 2:
        # It leaves scales that are not quantised themselves as they are packed, by block and row.
        state.absmax = state.absmax.T.reshape(-1).float()


@contextlib.contextmanager
def kept_unpacked(model: nn.Module) -> Iterator[None]:
    """Inside the block no forward pass packs 4-bit weights; see `is_packed`."""
    option = "support_avx512bf16_for_cpu"
    modules = [module for module in model.modules() if getattr(module, option, False)]
    for module in modules:
        setattr(module, option, False)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, option, True)


def linear_weight(module: nn.Module, name: str = "") -> Tensor:
    """The weight of a linear layer as (out, in): a view, for Conv1D stores it the other way round,
    or of a quantised layer what it stands for, made anew at every call.

    Args:
        module: the layer.
        name: what messages call it.

    Raises:
        TargetError: the weight is packed in another way, or not a matrix of floating numbers.
    """
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ == "Int8Params":
        # PEFT's way to do this leaves a layer on a CPU without its scales. The weight keeps them
        # until the first call, the layer's state from then on.
        state: Any = module.state
        scales = weight.SCB if state.SCB is None else state.SCB
        unpacked: Tensor = weight.data
        if scales is not None:  # with has_fp16_weights they are packed for a product only
            unpacked = unpacked.float() * (scales.to(weight.device) / 127)[:, None]
        return unpacked
    if is_quantised(module):
        from peft.utils.integrations import dequantize_module_weight

        if is_packed(module):
            _unpack(module)  # the next pass in eval mode packs it again
        unpacked = dequantize_module_weight(module)
        return unpacked.detach()
    if not _is_plain(weight):
        raise TargetError(
            f"{f'layer {name}' if name else 'a layer'} of class {type(module).__name__} holds a "
            "packed weight that cannot be read; load the model with load_model or with "
            "CompressedTensorsConfig(dequantize=True), FineGrainedFP8Config or Mxfp4Config as its "
            "quantization_config, or quantised by bitsandbytes or torchao"
        )
    matrix: Tensor = weight if isinstance(module, nn.Linear) else weight.T
    return matrix


def _is_plain(weight: Any) -> bool:
    """Whether a weight is a matrix of numbers that stand for themselves: those of eight bits mean
    nothing without the scales that are kept beside them."""
    found = isinstance(weight, Tensor) and weight.is_floating_point()
    return found and bool(weight.ndim == 2 and weight.itemsize >= 2)


def linear_shape(module: nn.Module, name: str = "") -> tuple[int, int]:
    """(out, in) of a linear layer, without unpacking it; the arguments are as in `linear_weight`.

    Raises:
        TargetError: see `linear_weight`.
    """
    if is_quantised(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    outputs, inputs = linear_weight(module, name).shape
    return outputs, inputs


def plain_layer(weight: Tensor) -> nn.Linear:
    """A frozen linear layer without a bias that holds this weight (out, in), and no copy of it."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


def whole(tensor: Tensor) -> Tensor:
    """The tensor, or all of one that is sharded over ranks (a DTensor), every one of which has to
    call this."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def whole_layer(module: nn.Module) -> nn.Module:
    """The layer, or one that holds all of its weight where that is sharded; see `whole`."""
    if not hasattr(getattr(module, "weight", None), "full_tensor"):
        return module
    return plain_layer(whole(linear_weight(module).detach()))


class LinearWeights(Mapping[str, Tensor]):
    """The weights of linear layers by name, (out, in) each; a quantised one as often as it is asked
    for, so that not all of them are unpacked at a time."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> Tensor:
        return linear_weight(self._modules[name]).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def check_writable(modules: Mapping[str, nn.Module], purpose: str, remedy: str) -> None:
    """Refuses quantised layers where weights are to be written.

    Raises:
        TargetError: there is one.
    """
    for name, module in modules.items():
        if is_quantised(module):
            raise TargetError(
                f"the weight of layer {name} is quantised ({type(module.weight).__name__}), and "
                f"{purpose}: {remedy}"
            )
