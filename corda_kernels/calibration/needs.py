"""What a calibration needs, before it runs: memory for covariances and hidden states, and work.

Everything here also works on a model on the meta device, which has no weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from corda_kernels.calibration.subject import Subject, evaluating
from corda_kernels.errors import LeftOutWarning
from corda_kernels.models import decoder_blocks, linear_weight

_TRIED_TOKENS = 2


@dataclass(frozen=True)
class CalibrationNeeds:
    """Needs of calibrating one model.

    Attributes:
        groups: for each covariance its channels and the layers that share it.
        block_bytes: size of all covariances of each decoder block, by name; None where the model
            has no such blocks, or targets outside of them.
        weight_bytes: size of the model.
        hidden_bytes: size of one token's hidden state between two blocks.
        forward_flops: of one token's way through the model without its head, in a sequence of
            `seq_len`; a product and a sum count as two.
        positions: the most tokens of a sequence; None where nothing bounds them.
    """

    groups: list[tuple[int, list[str]]]
    block_bytes: dict[str, int] | None
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
    """
    subject = Subject.of(model, targets)
    groups = _input_groups(subject)
    hidden = getattr(getattr(model, "config", None), "hidden_size", 0)
    parameters = list(model.parameters())
    return CalibrationNeeds(
        groups,
        _block_bytes(model, groups),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        hidden * parameters[0].element_size(),
        _forward_flops(subject, min(seq_len, subject.positions or seq_len)),
        subject.positions,
    )


def covariance_bytes(model: nn.Module, targets: str | Sequence[str] = "all-linear") -> int:
    """Size of all covariances of the target layers, in float32, by a run over two tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)  # the calibration will say so
        subject = Subject.of(model, targets)
    return sum(4 * channels**2 for channels, _ in _input_groups(subject))


def _input_groups(subject: Subject) -> list[tuple[int, list[str]]]:
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
        _run(subject, _TRIED_TOKENS)
    finally:
        for handle in handles:
            handle.remove()
    seen = {name for group in names.values() for name in group}
    groups = list(names.values()) + [[name] for name in subject.linears if name not in seen]
    return [(linear_weight(subject.linears[group[0]]).shape[1], group) for group in groups]


def _run(subject: Subject, tokens: int) -> None:
    inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}
    if subject.device.type == "meta":
        # A finished mask: to make one, transformers would look at values, which there are none of.
        inputs["attention_mask"] = torch.zeros(1, 1, tokens, tokens, dtype=torch.bool)
    with evaluating(subject.model):
        subject.run(inputs)


def _block_bytes(model: nn.Module, groups: list[tuple[int, list[str]]]) -> dict[str, int] | None:
    sizes = dict.fromkeys(decoder_blocks(model), 0)
    for channels, names in groups:
        block = next((block for block in sizes if names[0].startswith(f"{block}.")), None)
        if block is None:
            return None
        sizes[block] += 4 * channels**2
    return sizes


def _forward_flops(subject: Subject, seq_len: int) -> float:
    with FlopCounterMode(display=False) as counter:
        _run(subject, seq_len)
    return float(counter.get_total_flops()) / seq_len
