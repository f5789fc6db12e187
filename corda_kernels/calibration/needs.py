"""What a calibration needs, before it runs: memory for covariances and hidden states, and work.

Everything here also works on a model on the meta device, which has no weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from corda_kernels.calibration.recorder import hidden_states
from corda_kernels.calibration.subject import Subject, evaluating
from corda_kernels.errors import CalibrationError, LeftOutWarning, ModelError
from corda_kernels.linears import linear_shape
from corda_kernels.models import decoder_blocks

_TRIED_TOKENS = 2

_Mask = Callable[[int], Tensor] | None


def _finished_mask(tokens: int) -> Tensor:
    return torch.zeros(1, 1, tokens, tokens, dtype=torch.bool)


def _mask_of_ones(tokens: int) -> Tensor:
    return torch.ones(1, tokens, dtype=torch.int64)


_MASKS: tuple[_Mask, ...] = (_finished_mask, _mask_of_ones, None)


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
    subject = Subject.of(model, targets)
    mask = _fitting_mask(subject)
    groups = _input_groups(subject, mask)
    obstacle = _obstacle(subject, groups, mask)
    find = getattr(getattr(model, "config", None), "get_text_config", None)
    hidden = getattr(find(), "hidden_size", 0) if callable(find) else 0
    parameters = list(model.parameters())
    return CalibrationNeeds(
        groups,
        None if obstacle else _block_bytes(model, groups),
        obstacle,
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        hidden * parameters[0].element_size(),
        _forward_flops(subject, min(seq_len, subject.positions or seq_len), mask),
        subject.positions,
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
        subject = Subject.of(model, targets)
    sizes: dict[str, int] = {}
    with contextlib.suppress(ModelError):
        sizes = dict.fromkeys(decoder_blocks(model), 0)
    total = 0
    for channels, names in _input_groups(subject, _fitting_mask(subject)):
        total += 4 * channels**2
        block = _block_of(names[0], sizes)
        if block is not None:
            sizes[block] += 4 * channels**2
    return total, max(sizes.values(), default=0)


def _input_groups(subject: Subject, mask: _Mask) -> list[tuple[int, list[str]]]:
    """Channels of each distinct input and the layers that read it; unseen layers stand alone."""
    names: dict[int, list[str]] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            names.setdefault(id(args[0]), []).append(name)

        return hook

    handles = [
        module.register_forward_pre_hook(note(name)) for name, module in subject.linears.items()
    ]
    try:
        _run(subject, _TRIED_TOKENS, mask)
    finally:
        for handle in handles:
            handle.remove()
    seen = {name for group in names.values() for name in group}
    groups = list(names.values()) + [[name] for name in subject.linears if name not in seen]
    return [(linear_shape(subject.linears[group[0]])[1], group) for group in groups]


def _fitting_mask(subject: Subject) -> _Mask:
    """The attention mask with which a model without weights runs; none where it has some.

    To make a mask, transformers would look at values, which there are none of. Most models take a
    finished one, some only one of ones, or none.

    Raises:
        ModelError: it runs with none of them.
    """
    if subject.device.type != "meta":
        return None
    reason = ""
    for mask in _MASKS:
        try:
            _run(subject, _TRIED_TOKENS, mask)
            return mask
        except Exception as error:  # a model's own code: it may raise anything
            reason = reason or str(error).strip().partition("\n")[0] or type(error).__name__
    raise ModelError(
        f"{type(subject.model).__name__} does not run without its weights ({reason}): what it "
        "needs cannot be told in advance, calibrate it with a --memory-limit"
    )


def _run(subject: Subject, tokens: int, mask: _Mask) -> None:
    inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}
    if mask is not None:
        inputs["attention_mask"] = mask(tokens)
    with evaluating(subject.model), _experts_by_shape(subject):
        subject.run(inputs)


@contextlib.contextmanager
def _experts_by_shape(subject: Subject) -> Iterator[None]:
    """Inside the block, routed experts without weights run as products of known sizes.

    The default looks at how many tokens each expert gets, or has no float32.
    """
    experts = "_experts_implementation"
    find = getattr(getattr(subject.model, "config", None), "get_text_config", None)
    before = getattr(find(), experts, None) if callable(find) else None
    if find is None or before is None or subject.device.type != "meta":
        yield
        return
    setattr(find(), experts, "batched_mm")
    try:
        yield
    finally:
        setattr(find(), experts, before)


def _obstacle(subject: Subject, groups: list[tuple[int, list[str]]], mask: _Mask) -> str:
    """Why the model cannot be calibrated block by block; empty where it can."""
    try:
        blocks = decoder_blocks(subject.model)
    except ModelError:
        return "the model has no list of decoder blocks"
    if any(_block_of(names[0], blocks) is None for _, names in groups):
        return "targets lie outside of the decoder's blocks"
    outputs: list[Any] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
        for block in blocks.values()
    ]
    try:
        _run(subject, _TRIED_TOKENS, mask)
        for output in outputs:
            hidden_states(output)
    except CalibrationError:
        return "the model's blocks return more than hidden states"
    finally:
        for handle in handles:
            handle.remove()
    return ""


def _block_of(name: str, blocks: Iterable[str]) -> str | None:
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def _block_bytes(model: nn.Module, groups: list[tuple[int, list[str]]]) -> dict[str, int]:
    sizes = dict.fromkeys(decoder_blocks(model), 0)
    for channels, names in groups:
        block = _block_of(names[0], sizes)
        assert block is not None  # or there would be an obstacle
        sizes[block] += 4 * channels**2
    return sizes


def _forward_flops(subject: Subject, seq_len: int, mask: _Mask) -> float:
    with FlopCounterMode(display=False) as counter:
        _run(subject, seq_len, mask)
    return float(counter.get_total_flops()) / seq_len
