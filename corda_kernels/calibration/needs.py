"""What a calibration needs, before it runs: memory for covariances and hidden states, and work.

Everything here also works on a model on the meta device, which has no weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.flop_counter import FlopCounterMode

from corda_kernels.calibration.blocks import hidden_states
from corda_kernels.calibration.passes import CalibrationRun, evaluating
from corda_kernels.errors import CalibrationError, LeftOutWarning, ModelError
from corda_kernels.linears import linear_shape
from corda_kernels.models import decoder_blocks

_TRIED_TOKENS = 2

# Attention masks for a number of tokens: a finished one, one of ones, or none.
_Mask = Callable[[int], Tensor] | None
_MASKS: tuple[_Mask, ...] = (
    lambda tokens: torch.zeros(1, 1, tokens, tokens, dtype=torch.bool),
    lambda tokens: torch.ones(1, tokens, dtype=torch.int64),
    None,
)
# Channels of an input, and the layers that read it.
_Input = tuple[int, list[str]]


@dataclass(frozen=True)
class CalibrationNeeds:
    """Needs of calibrating one model.

    Attributes:
        groups: for each covariance its channels and the layers that share it.
        block_bytes: size of all covariances of each decoder block, by name; None where the model
            cannot run block by block.
        obstacle: why it cannot; empty where it can.
        weight_bytes: size of the model.
        hidden_bytes: size of one token's hidden state between two blocks.
        forward_flops: of one token's way through the model without its head, in a sequence of
            `seq_len`; a product and a sum count as two.
        positions: the most tokens of a sequence; None where nothing bounds them.
    """

    groups: list[tuple[int, list[str]]]
    block_bytes: dict[str, int] | None
    obstacle: str
    weight_bytes: int
    hidden_bytes: int
    forward_flops: float
    positions: int | None

    @property
    def covariance_bytes(self) -> int:
        """Size of all covariances together, in float32."""
        return sum(4 * channels**2 for channels, _ in self.groups)

    @property
    def covariance_flops(self) -> int:
        """Operations that one token adds to all covariances: of a symmetric matrix, one half."""
        return sum(channels * (channels + 1) for channels, _ in self.groups)


def calibration_needs(
    model: nn.Module, targets: str | Sequence[str] = "all-linear", *, seq_len: int = 2048
) -> CalibrationNeeds:
    """Finds out what calibrating `model` needs; with a model on the meta device, without weights.

    Args:
        model: see `calibrate`.
        targets: see `calibrate`.
        seq_len: tokens in each sequence.

    Raises:
        TargetError: no layer matches.
        ModelError: the model does not run without weights.
    """
    run = CalibrationRun(model, targets)
    mask = _fitting_mask(run)
    inputs, outputs = _seen(run, mask)
    sizes, obstacle = _block_bytes(run, inputs)
    try:
        for output in outputs:
            hidden_states(output)
    except CalibrationError:
        obstacle = obstacle or "the model's blocks return more than hidden states"
    parameters = list(model.parameters())
    length = min(seq_len, run.positions or seq_len)
    with FlopCounterMode(display=False) as counter:
        _run(run, length, mask)
    return CalibrationNeeds(
        inputs,
        None if obstacle else sizes,
        obstacle,
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        getattr(_text_config(model), "hidden_size", 0) * parameters[0].element_size(),
        float(counter.get_total_flops()) / length,
        run.positions,
    )


def covariance_bytes(
    model: nn.Module, targets: str | Sequence[str] = "all-linear"
) -> tuple[int, int]:
    """Sizes of the target layers' covariances, in float32, by a run over two tokens.

    Returns:
        Of all together, and of those of the largest decoder block, 0 in a model without blocks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)  # the calibration will say so
        run = CalibrationRun(model, targets)
    inputs, _ = _seen(run, _fitting_mask(run))
    sizes, _ = _block_bytes(run, inputs)
    return sum(4 * channels**2 for channels, _ in inputs), max(sizes.values(), default=0)


def _block_bytes(run: CalibrationRun, inputs: list[_Input]) -> tuple[dict[str, int], str]:
    """Size of all covariances of each decoder block, and why these are not all; "" if they are."""
    try:
        sizes = dict.fromkeys(decoder_blocks(run.model), 0)
    except ModelError:
        return {}, "the model has no list of decoder blocks"
    obstacle = ""
    for channels, names in inputs:
        block = next((block for block in sizes if names[0].startswith(f"{block}.")), None)
        if block is None:
            obstacle = "targets lie outside of the decoder's blocks"
        else:
            sizes[block] += 4 * channels**2
    return sizes, obstacle


def _text_config(model: nn.Module) -> Any:
    """The config of the language model within a transformers model; None for other models."""
    find = getattr(getattr(model, "config", None), "get_text_config", None)
    return find() if callable(find) else None


def _seen(run: CalibrationRun, mask: _Mask) -> tuple[list[_Input], list[Any]]:
    """Each distinct input with the layers that read it, and what the decoder's blocks return.

    Layers that are never called stand alone.
    """
    layers = {module: name for name, module in run.linears.items()}
    blocks: Collection[nn.Module] = ()
    with contextlib.suppress(ModelError):
        blocks = decoder_blocks(run.model).values()
    readers: dict[int, list[str]] = {}
    alive: list[Tensor] = []  # so that no address is used twice
    outputs: list[Any] = []

    def note_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module in layers:
            alive.append(args[0])
            readers.setdefault(id(args[0]), []).append(layers[module])

    def note_output(module: nn.Module, args: object, output: object) -> None:
        if module in blocks:
            outputs.append(output)

    read = register_module_forward_pre_hook(note_input)
    with read, register_module_forward_hook(note_output):
        _run(run, _TRIED_TOKENS, mask)
    seen = {name for names in readers.values() for name in names}
    groups = [*readers.values(), *([name] for name in run.linears if name not in seen)]
    return [(linear_shape(run.linears[group[0]])[1], group) for group in groups], outputs


def _fitting_mask(run: CalibrationRun) -> _Mask:
    """The attention mask with which a model without weights runs; none where it has some.

    To make a mask, transformers would look at values, which there are none of. Most models take a
    finished one, some only one of ones, or none.

    Raises:
        ModelError: it runs with none of them.
    """
    if run.device.type != "meta":
        return None
    reason = ""
    for mask in _MASKS:
        try:
            _run(run, _TRIED_TOKENS, mask)
            return mask
        except Exception as error:  # a model's own code: it may raise anything
            reason = reason or str(error).strip().partition("\n")[0] or type(error).__name__
    raise ModelError(
        f"{type(run.model).__name__} does not run without its weights ({reason}): what it "
        "needs cannot be told in advance, calibrate it with a --memory-limit"
    )


def _run(run: CalibrationRun, tokens: int, mask: _Mask) -> None:
    inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}
    if mask is not None:
        inputs["attention_mask"] = mask(tokens)
    with evaluating(run.model), _experts_by_shape(run):
        run.forward(inputs)


@contextlib.contextmanager
def _experts_by_shape(run: CalibrationRun) -> Iterator[None]:
    """Inside the block, routed experts without weights run as products of known sizes.

    The default looks at how many tokens each expert gets, or has no float32.
    """
    experts, config = "_experts_implementation", _text_config(run.model)
    before = getattr(config, experts, None)
    routed = before is not None and run.device.type == "meta"
    if routed:
        setattr(config, experts, "batched_mm")
    try:
        yield
    finally:
        if routed:
            setattr(config, experts, before)
