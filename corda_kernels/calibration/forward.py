"""A batch through the model, or through as much of it as has the target layers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from corda_kernels import structure
from corda_kernels.calibration.batches import (
    Batch,
    Piece,
    check_masks,
    check_tokens,
    inputs_of,
    is_text,
    unpadded,
)
from corda_kernels.calibration.gradients import (
    LABELS,
    Labels,
    Sides,
    backward_pass,
    check_labels,
    with_labels,
)
from corda_kernels.errors import BatchError, CordaError, CordaWarning, warn
from corda_kernels.linears import kept_unpacked


@dataclass(eq=False)
class Forward:
    """A model as calibration runs it: as much of it as has the target layers.

    Attributes:
        model: the whole.
        targets: the target layers.
        sides: see `calibrate`, as for `labels`.
        device: where inputs go.
        positions: the most tokens of a sequence; None where nothing bounds them.
    """

    model: nn.Module
    targets: Collection[nn.Module]
    sides: Sides
    labels: Labels

    def __post_init__(self) -> None:
        """Looks at the model."""
        model = self.model
        base = structure.decoder(model)
        # Models with a head of Longformer's choose the tokens of global attention for their base.
        prepared = "global_attention_mask" in structure.arguments(base)
        inside = set(self.targets) <= set(base.modules())
        # What FSDP2 has sharded it gathers where the outermost module is called.
        outermost = model in structure.fsdp_modules(model)
        self._base = base if inside and not prepared and not outermost else model
        self.device = structure.input_device(model)
        self.positions = structure.position_count(model)
        self._vocabulary = structure.vocabulary_size(model)
        self._trained = structure.trained_positions(model)
        self._multiple = structure.padding_multiple(model)

    def pieces(self, batch: Batch, index: int, span: tuple[int, int]) -> Iterator[Piece]:
        """Takes a batch apart: text into sequences without padding, see `unpadded`; anything else
        stays as it is.

        Args:
            batch: what is given.
            index: its number.
            span: range of its tokens in the text.

        Raises:
            BatchError: it holds what the model's forward does not take, masks that do not tell
                padding, tokens or labels that the model does not have, or more tokens than it has
                positions.
        """
        padding = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        inputs, text = inputs_of(batch), self._is_text(batch)
        taken = structure.arguments(self.model)
        of_text = {"attention_mask", "token_mask"} if text else set()
        others = inputs.keys() - taken.keys() - of_text - {"labels"}
        if taken and others:
            says = f"holds {min(others)}, which {type(self.model).__name__} does not take"
            raise BatchError(index, f"{says}: leave it out; it takes {', '.join(taken)}")
        if self.sides == "both":
            if not text:
                says = 'holds more than text, of which alone sides="both" takes gradients'
                raise BatchError(index, f"{says}: give token ids, masks and labels")
            batch = with_labels(batch, index)
        if not text:
            check_masks(inputs, index, padding)
        parts = unpadded(batch, index, pad_token_id=padding) if text else [inputs]
        for part in parts:
            self._check_ids(part.get("input_ids"), text, index)
            check_labels(part, structure.output_head(self.model), index)
            yield Piece(index, span, part, text)

    def _is_text(self, batch: Batch) -> bool:
        """Whether a batch can be taken apart: the sequences of an encoder–decoder come in pairs."""
        return is_text(batch) and not structure.is_encoder_decoder(self.model)

    def __call__(
        self, inputs: Mapping[str, Any], batches: Sequence[int] = (0,), *, follow: bool = True
    ) -> None:
        """Runs the model, or its part that has the targets where that takes all that is given.

        Args:
            inputs: what `together` gave, without a `token_mask`.
            batches: numbers of the batches that the rows come from.
            follow: whether a backward pass follows where gradients are taken.

        Raises:
            BatchError: the model's forward refuses what it is given.
        """
        text = self._is_text(inputs)
        runner, given = self.model, dict(inputs)
        if not structure.is_encoder_decoder(self.model):
            given.pop("labels", None)  # the loss needs no computing
            if text or given.keys() <= structure.arguments(self._base).keys():
                runner = self._base
        taken = structure.arguments(runner)
        if taken and "labels" not in taken:
            given.pop("labels", None)
        if "use_cache" in taken:
            given["use_cache"] = False
        dtype = getattr(self.model, "dtype", None)

        def there(value: Tensor) -> Tensor:
            return value.to(self.device, dtype if value.is_floating_point() else None)

        moved = tree_map_only(Tensor, there, given)
        try:
            if self.sides == "both" and follow:
                runner = self.model
                backward_pass(runner, moved, self.labels, batches, self.device)
                return
            moved.pop(LABELS, None)
            runner(**moved)
        except (TypeError, ValueError) as error:
            if isinstance(error, CordaError):
                raise
            kind, names = type(runner).__name__, ", ".join(inputs)
            says = f"cannot be run by {kind}, which was given {names} ({error})"
            pairs = structure.is_encoder_decoder(runner)
            missing = ", such as labels or decoder_input_ids" if pairs else ""
            raise BatchError(batches[0], f"{says}: give all that it needs{missing}") from error

    def _check_ids(self, ids: Tensor | None, text: bool, batch: int) -> None:
        """Refuses token ids that the model does not have, and too many of a text."""
        if ids is None:
            return
        length = ids.shape[-1] if text else 0  # several texts may be packed, each with positions
        if self.positions is not None and length > self.positions:
            says = f"has sequences of {length} tokens, but the model has {self.positions} positions"
            raise BatchError(batch, f"{says}: lower --seq-len to {self.positions}, or cut them")
        if ids.shape[-1] % self._multiple:
            kind, most = type(self.model).__name__, self._multiple
            says = f"has sequences of {ids.shape[-1]} tokens, which {kind} pads to multiples of"
            remedy = "give sequences of such a length, as packing does, since its padding counts"
            raise BatchError(batch, f"{says} {most} by itself: {remedy}")
        if self._trained is not None and length > self._trained:
            says = f"a batch has {length} tokens, but the model's max_position_embeddings is"
            remedy = "use sequences of that length (--seq-len): it was not trained on longer text"
            warn(f"{says} {self._trained}: {remedy}", CordaWarning)
            self._trained = None  # once is enough
        # On a GPU this would wait for it; ids that are read from a file are on the host.
        if self._vocabulary is not None and ids.device.type == "cpu" and ids.numel():
            remedy = "the tokenizer is another model's, take its own"
            check_tokens("holds token", ids, self._vocabulary, batch, remedy)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; afterwards every module's mode is as before,
    and what FSDP2 has sharded is sharded again.

    Quantised weights stay in the layout in which they can be read and trained on.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), kept_unpacked(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module in structure.fsdp_modules(model):
            module.reshard()
