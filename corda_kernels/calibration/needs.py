"""What a calibration needs, before it runs: memory for covariances and hidden states, and work.

Everything here also works on a model on the meta device, which has no weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.flop_counter import FlopCounterMode

from corda_kernels.calibration.experts import ExpertInput, Experts, reader_shape
from corda_kernels.calibration.forward import evaluating
from corda_kernels.calibration.gradients import Sides
from corda_kernels.calibration.kept_text import hidden_states
from corda_kernels.calibration.run import CalibrationRun, Targets
from corda_kernels.errors import CalibrationError, LeftOutWarning, ModelError, first_line
from corda_kernels.experts import is_decorated
from corda_kernels.structure import arguments, decoder_blocks, is_encoder_decoder, text_config

# No usual number of labels, to which a mask of another shape might be stretched.
_TRIED_TOKENS = 7

# Attention masks for a number of tokens: a finished one, one of ones, or none. To make a mask for a
# model without weights, transformers would look at values, which there are none of. Most models
# take a finished one, some only one of ones, or none.
_Mask = Callable[[int], Tensor] | None
_MASKS: tuple[_Mask, ...] = (
    lambda tokens: torch.zeros(1, 1, tokens, tokens, dtype=torch.bool),
    lambda tokens: torch.ones(1, tokens, dtype=torch.int64),
    None,
)


@dataclass(frozen=True)
class CalibrationNeeds:
    """Needs of calibrating one model.

    Attributes:
        groups: for each covariance its channels and the layers that share it, or the names of
            inputs of fused experts.
        block_bytes: size of all covariances of each decoder block, by name; None where the model
            cannot run block by block.
        block_gradient_bytes: size of D and Ḡ of each block's layers, by name.
        obstacle: why it cannot; empty where it can.
        weight_bytes: size of the model.
        block_weight_bytes: size of the largest decoder block; 0 where there are none.
        hidden_bytes: size of one token's hidden state between two blocks.
        forward_flops: of one token's way through the model without its head, in a sequence of
            `seq_len`; a product and a sum count as two.
        covariance_flops: that one token adds to all covariances: of a symmetric matrix, one half;
            of an expert's own, in the experts that a token is routed to.
        positions: the most tokens of a sequence; None where nothing bounds them.
        gradient_bytes: size of D and Ḡ of all layers, in float32.
        gradient_flops: operations that one token adds to them.
    """

    groups: list[tuple[int, list[str]]]
    block_bytes: dict[str, int] | None
    block_gradient_bytes: dict[str, int]
    obstacle: str
    weight_bytes: int
    block_weight_bytes: int
    hidden_bytes: int
    forward_flops: float
    covariance_flops: int
    positions: int | None
    gradient_bytes: int
    gradient_flops: int

    @property
    def covariance_bytes(self) -> int:
        """Size of all covariances together, in float32."""
        return sum(4 * channels**2 for channels, _ in self.groups)

    def largest_block(self, sides: Sides = "inputs") -> tuple[int, int]:
        """Sizes of the covariances and of the gradients, where there are some, of the block in
        which both together are largest; 0 where the model cannot run block by block."""
        both = [
            (size, self.block_gradient_bytes[name] if sides == "both" else 0)
            for name, size in (self.block_bytes or {}).items()
        ]
        return max(both, key=sum, default=(0, 0))


def calibration_needs(
    model: nn.Module,
    targets: Targets = None,
    experts: Experts | None = None,
    *,
    seq_len: int = 2048,
) -> CalibrationNeeds:
    """Finds out what calibrating `model` needs; with a model on the meta device, without weights.

    Args:
        model: see `calibrate`.
        targets: see `calibrate`.
        experts: see `calibrate`.
        seq_len: tokens in each sequence; 0 to leave out the operations of the forward pass.

    Raises:
        TargetError: no layer matches.
        ModelError: the model does not run without weights.
    """
    taken = arguments(model)
    if taken and "input_ids" not in taken:
        kind = type(model).__name__
        raise ModelError(
            f"what calibration takes is known only for models of token ids, and {kind} takes "
            f"{next(iter(taken))}: calibrate it in one pass, without a memory limit"
        )
    run = CalibrationRun(model, targets, experts)
    length = min(seq_len, run.forward.positions or seq_len)
    groups, outputs, active, flops = _tried(run, length)
    sizes: dict[str, int] = {}
    obstacle = "the model is an encoder–decoder" if is_encoder_decoder(model) else ""
    try:
        sizes = dict.fromkeys(decoder_blocks(model), 0)
        for output in outputs:
            hidden_states(output)
    except ModelError:
        obstacle = "the model has no list of decoder blocks"
    except CalibrationError:
        obstacle = obstacle or "the model's blocks do not return hidden states first"
    for channels, names in groups:
        block = next((block for block in sizes if names[0].startswith(f"{block}.")), None)
        if block is None:
            obstacle = obstacle or "targets lie outside of the decoder's blocks"
        else:
            sizes[block] += 4 * channels**2
    # Of all tokens, those that a layer reads.
    share = dict.fromkeys(run.readers, 1.0)
    for name, reader in run.readers.items():
        if isinstance(reader, ExpertInput) and reader.expert is not None:
            share[name] = active / reader.parameter.experts
    shapes = {name: reader_shape(reader) for name, reader in run.readers.items()}
    gradients = {name: 4 * out * (out + channels) for name, (out, channels) in shapes.items()}
    return CalibrationNeeds(
        groups,
        None if obstacle else sizes,
        {
            block: sum(size for name, size in gradients.items() if name.startswith(f"{block}."))
            for block in sizes
        },
        obstacle,
        weight_bytes(model),
        max((weight_bytes(model.get_submodule(block)) for block in sizes), default=0),
        getattr(text_config(model), "hidden_size", 0) * next(model.parameters()).element_size(),
        flops,
        round(sum(share[names[0]] * channels * (channels + 1) for channels, names in groups)),
        run.forward.positions,
        sum(gradients.values()),
        round(
            sum(
                share[name] * (out * (out + 1) + 2 * out * channels)
                for name, (out, channels) in shapes.items()
            )
        ),
    )


def weight_bytes(module: nn.Module) -> int:
    """Size of the parameters of a module."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def covariance_bytes(
    model: nn.Module,
    targets: Targets = None,
    experts: Experts | None = None,
    sides: Sides = "inputs",
) -> tuple[int, int]:
    """Sizes of the target layers' covariances, and gradients, in float32, by a run over few tokens.

    Returns:
        Of all together, and of those of the largest decoder block, 0 in a model that cannot run
        block by block.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)  # the calibration will say so
        needs = calibration_needs(model, targets, experts, seq_len=0)
    gradients = needs.gradient_bytes if sides == "both" else 0
    return needs.covariance_bytes + gradients, sum(needs.largest_block(sides))


def _tried(
    run: CalibrationRun, length: int
) -> tuple[list[tuple[int, list[str]]], list[Any], int, float]:
    """What a pass over so many tokens shows of the model.

    Args:
        run: the model.
        length: of the sequence; 0 for a short one whose operations are not counted.

    Returns:
        The channels of each distinct input with the layers that read it, those that are never
        called alone; what the decoder's blocks return; how many experts a token is routed to; and
        the operations of one token.

    Raises:
        ModelError: it runs with none of the masks that a model without weights is tried with.
    """
    layers = {module: name for name, module in run.linears.items()}
    for name, reader in run.readers.items():
        if isinstance(reader, ExpertInput) and reader.expert is None:
            layers[reader.parameter.module] = name
    blocks: Collection[nn.Module] = ()
    with contextlib.suppress(ModelError):
        blocks = decoder_blocks(run.model).values()
    readers: dict[int, list[str]] = {}
    alive: list[Tensor] = []  # so that no address is used twice
    outputs: list[Any] = []
    active = [getattr(text_config(run.model), "num_experts_per_tok", 1)]  # as Llama 4 has it

    def note_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if is_decorated(module) and len(args) > 1:
            active.append(args[1].shape[-1])
        if module in layers and args:
            alive.append(args[0])
            readers.setdefault(id(args[0]), []).append(layers[module])

    def note_output(module: nn.Module, args: object, output: object) -> None:
        if module in blocks:
            outputs.append(output)

    skeleton, reason = run.device.type == "meta", ""
    for mask in _MASKS if skeleton else (None,):
        readers.clear()
        outputs.clear()
        counter = FlopCounterMode(display=False)
        counted: Any = counter if length else contextlib.nullcontext()
        reading = hooks.register_module_forward_pre_hook(note_input)
        try:
            with counted, reading, hooks.register_module_forward_hook(note_output):
                _run(run, length or _TRIED_TOKENS, mask)
        except Exception as error:  # a model's own code: it may raise anything
            if not skeleton:
                raise
            reason = reason or first_line(error)
        else:
            seen = {name for names in readers.values() for name in names}
            groups = [*readers.values(), *([name] for name in run.readers if name not in seen)]
            channels = [reader_shape(run.readers[names[0]])[1] for names in groups]
            flops = counter.get_total_flops() / max(length, 1)
            return list(zip(channels, groups, strict=True)), outputs, active[-1], flops
    says = f"{type(run.model).__name__} does not run without its weights ({reason})"
    raise ModelError(f"{says}: it cannot be planned: calibrate it with a --memory-limit")


def _run(run: CalibrationRun, tokens: int, mask: _Mask) -> None:
    inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}
    if mask is not None:
        inputs["attention_mask"] = mask(tokens)
    if is_encoder_decoder(run.model):
        inputs |= {f"decoder_{name}": value for name, value in inputs.items()}
    config = text_config(run.model)
    experts = getattr(config, "_experts_implementation", None)
    routed = experts is not None and run.device.type == "meta"
    try:
        if routed:
            # The default looks at how many tokens each expert gets, or has no float32.
            config._experts_implementation = "batched_mm"
        with evaluating(run.model):
            run.forward(inputs)
    finally:
        if routed:
            config._experts_implementation = experts
