"""What is calibrated and how: the options, and what all calibrations of a model do alike."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from corda_kernels.arguments import flag, instance_of, one_of
from corda_kernels.calibration.batches import Batch, Piece, TextSum, together, token_count
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.covariance import Gradient
from corda_kernels.calibration.covariance_set import CovarianceSet
from corda_kernels.calibration.distributed import Ranks, check_sharded, layers_given, text_given
from corda_kernels.calibration.experts import Experts, Reader, expert_inputs
from corda_kernels.calibration.forward import Forward
from corda_kernels.calibration.gradients import GradientCapture, Labels, Sides, check_model
from corda_kernels.calibration.journal import CalibrationCheckpoint, Journal
from corda_kernels.calibration.masks import RowMasks
from corda_kernels.calibration.shrinkage import shrunk, warn_unseen_experts
from corda_kernels.errors import (
    CalibrationError,
    ConfigError,
    LeftOutWarning,
    OutOfMemoryWarning,
    warn,
)
from corda_kernels.kernels import check_threshold
from corda_kernels.linears import AdaptedLayer
from corda_kernels.memory import has_own_memory
from corda_kernels.progress import progress_bar
from corda_kernels.structure import is_sharded
from corda_kernels.targets import target_layers, unreached_weights
from corda_kernels.versions import library_versions

Normalize = Literal["tokens", "peft"]
Targets = str | Sequence[str] | None
OnUnseen = Literal["error", "skip"]
T = TypeVar("T")

# So many tokens of several batches run together: on a device with memory of its own, and where that
# is the host's or has to hold what a backward pass needs.
_TOGETHER = {True: 8192, False: 2048}
_UNSEEN = "never called during calibration"


@dataclass(eq=False)
class CalibrationRun:
    """A model as calibration runs it: its target layers, and as much of it as has them.

    Warns of weights left out. See `calibrate` for all that it is made of.

    Attributes:
        linears: the target layers by name.
        experts_modules: those of the target experts.
        readers: the same and the inputs of fused experts, by the names of the covariances.
        left_out: weights that cannot be reached, by name with the reason.
        ranks: that share the text.
        shown: whether this process shows progress bars.
        device: where inputs go.
        forward: runs a batch.
        max_rows: the most sequences that run together; None for as many as a batch has. It sinks
            when memory runs out.
        on_host: whether inputs are copied to the host, and summed up there.

    Raises:
        TargetError: no layer matches.
        CalibrationError: the model carries an adapter.
        ConfigError: an option is not allowed, or ranks are asked for without a process group.
    """

    model: nn.Module
    targets: Targets = None
    experts: Experts | None = None
    outlier_threshold: float = 6.0
    normalize: Normalize = "tokens"
    on_unseen: OnUnseen = "error"
    checkpoint: CalibrationCheckpoint | None = None
    distributed: bool = False
    progress: bool = True
    sides: Sides = "inputs"
    labels: Labels = "given"
    max_rows: int | None = field(default=None, init=False)
    on_host: bool = field(default=False, init=False)
    _rows: int = field(default=0, init=False)  # the most sequences that have run together

    def __post_init__(self) -> None:
        """Refuses values that are not possible, and looks at the model."""
        check_threshold(self.outlier_threshold)
        one_of("normalize", self.normalize, ("tokens", "peft"))
        one_of("on_unseen", self.on_unseen, ("error", "skip"))
        one_of("experts", self.experts, (None, "shared", "each"))
        one_of("sides", self.sides, ("inputs", "both"))
        one_of("labels", self.labels, ("given", "sampled"))
        if self.sides == "both" and self.normalize != "tokens":
            raise ConfigError('sides="both" averages over tokens: leave normalize at "tokens"')
        instance_of("checkpoint", self.checkpoint, (CalibrationCheckpoint, type(None)))
        flag("distributed", self.distributed)
        flag("progress", self.progress)
        model = self.model
        self.linears, fused = target_layers(model, self.targets, experts=self.experts is not None)
        self.ranks = Ranks.of(self.distributed, in_step=is_sharded(model))
        self.shown = self.progress and self.ranks.rank == 0
        self.experts_modules = {parameter.module for parameter in fused.values()}
        self.readers: dict[str, Reader] = {
            **self.linears,
            **expert_inputs(fused, self.experts or "shared"),
        }
        if getattr(model, "peft_config", None):
            remedy = "calibrate the base model (model.unload() takes the adapter off)"
            raise CalibrationError(f"the model carries a PEFT adapter already: {remedy}")
        for name, module in model.named_modules():
            if isinstance(module, AdaptedLayer):
                says = f"layer {name} carries an adapter already ({type(module).__name__})"
                raise CalibrationError(f"{says}: calibrate the base model, loaded anew")
        every = self.targets in (None, "all-linear")
        left_out = unreached_weights(model, self.targets) if every else {}
        self.left_out = {name: left_out[name] for name in left_out if name not in fused}
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            says = f"{len(self.left_out)} weight(s) get no covariance and no adapter, among them "
            warn(f"{says}{name}: {reason}; all are named in left_out", LeftOutWarning)
        if self.sides == "both":
            check_model(model)
            if fused and self.experts != "each":
                raise ConfigError(
                    'sides="both" needs a covariance of each fused expert: give experts="each", '
                    f"or leave {min(fused)} and the like out"
                )
        self.forward = Forward(model, self.linears.values(), self.sides, self.labels)
        self.device = self.forward.device

    def agree(self, step: str, batches: Iterable[Batch], **more: object) -> None:
        """Makes sure that there are batches, and that all ranks calibrate the same.

        A checkpoint's path may be another on every rank, each of which has files of its own.

        Args:
            step: the call that begins.
            batches: the text.
            more: what else must be the same, by name.

        Raises:
            CalibrationError: the batches are none.
            ConfigError: the model is sharded, and an option does not go with that.
            DistributedError: something differs, or a rank has ended.
        """
        kept_sums, gradients = self.checkpoint is not None, self.sides == "both"
        check_sharded(
            self.model, self.distributed, {"a checkpoint": kept_sums, 'sides="both"': gradients}
        )
        remedy = "give a list of (batch, seq) tensors"
        instance_of("batches", batches, Iterable, CalibrationError, remedy=remedy)
        kept = "none"
        if self.checkpoint is not None:
            kept = "resumed" if self.checkpoint.resume else "kept"
        about = {"on_unseen": self.on_unseen, "checkpoint": kept}
        self.ranks.agree(step, lambda: {**self._given(), **text_given(batches), **more, **about})

    def _given(self) -> dict[str, object]:
        """What sums depend on besides the text, by the name under which it is reported."""
        return {
            **layers_given({"": self.model}, self.readers),
            "device": self.device.type,
            "outlier_threshold": self.outlier_threshold,
            "normalize": self.normalize,
            "sides": f"{self.sides}, labels {self.labels}" if self.sides == "both" else self.sides,
        }

    def journal(self) -> Journal:
        """Of this rank's sums."""
        return Journal(self.checkpoint, self._given, self.device, self.ranks)

    def capture(self, readers: Mapping[str, Reader], masks: RowMasks | None = None) -> InputCapture:
        """Fresh sums of the inputs of some layers; see `InputCapture`."""
        options: dict[str, Any] = {
            "deterministic": self.checkpoint is not None,
            "on_host": self.on_host,
            "masks": masks,
        }
        if self.sides == "both":
            return GradientCapture(readers, self.outlier_threshold, model=self.model, **options)
        return InputCapture(readers, self.outlier_threshold, self.normalize, **options)

    def read(
        self, batches: Iterable[Batch], text: TextSum, parts: int = 1
    ) -> Generator[tuple[int, Batch, bool]]:
        """Yields each batch, taken into `text`, with its number and whether this rank runs it.

        The ranks take turns within each of the `parts` of the text. A bar counts tokens.
        """
        total = sum(map(token_count, batches)) if isinstance(batches, Sequence) else None
        summed = self.ranks.size > 1 or self.checkpoint is not None
        with progress_bar(
            description="calibrating", unit="tokens", shown=self.shown, total=total, scaled=True
        ) as bar:
            for index, batch in enumerate(batches):
                own = self.ranks.owns(index // parts)
                text.add(batch, own=own, summed=summed)
                yield index, batch, own
                bar.update(text.counts[-1])

    def tokens_together(self, batches: Iterable[Batch]) -> int:
        """How many tokens of several batches run together; 0 where each batch runs by itself.

        That is where sums are averaged over calls, and where memory may run out on a text that
        cannot be started again, or on one rank of several that run in step.
        """
        own_memory = has_own_memory(self.device)
        once = own_memory and (self.ranks.in_step or not isinstance(batches, Sequence | Tensor))
        if once or self.normalize == "peft":
            return 0
        return _TOGETHER[own_memory and self.sides == "inputs"]

    def windows(
        self, batches: Iterable[tuple[int, Batch, bool]], text: TextSum, most: int
    ) -> Iterator[list[Piece]]:
        """Yields what runs together: consecutive batches of this rank, until another like the last
        would make it too many tokens.

        Args:
            batches: from `read`.
            text: into which they were taken.
            most: so many tokens.
        """
        window: list[Piece] = []
        size = 0.0
        for index, batch, own in batches:
            pieces = list(self.forward.pieces(batch, index, text.span)) if own else []
            added = sum(piece.size for piece in pieces)
            window, size = window + pieces, size + added
            if size + added > most:
                yield window
                window, size = [], 0.0
        if window:
            yield window

    def together(self, pieces: Iterable[Piece]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yields inputs of forward passes, see `batches.together`, within the bounds of memory."""
        for inputs, batches in together(pieces, self.max_rows):
            self._rows = max(self._rows, len(batches))
            yield inputs, batches

    def retry(
        self, batches: Iterable[Batch], attempt: Callable[[], T], again: str, summing: bool = True
    ) -> T:
        """Makes an attempt on the batches again with less memory until that suffices. Warns.

        Sequences that run together are halved; once it is one, the host sums up, which is slow.

        Args:
            batches: that are run.
            attempt: what may run out of memory.
            again: what is done then, for the warning.
            summing: whether covariances are summed up.

        Raises:
            CalibrationError: nothing is left to be done, or the batches cannot be read a second
                time.
        """
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError as error:
                spared = self._tighten(batches, summing, error)
            warn(f"memory ran out while calibrating: {again} with {spared}", OutOfMemoryWarning)

    def _tighten(self, batches: Iterable[Batch], summing: bool, error: Exception) -> str:
        if self.ranks.in_step or not isinstance(batches, Sequence | Tensor):
            remedy = "give smaller batches, or a list of batches, which can be started again"
            if self.ranks.in_step:
                remedy = "give smaller batches, for ranks of FSDP2 cannot start again one by one"
            raise CalibrationError(f"memory ran out while calibrating: {remedy}") from error
        rows = self.max_rows or self._rows
        if rows > 1:
            self.max_rows = rows // 2
            return f"at most {self.max_rows} sequence(s) at a time"
        if not summing or self.on_host or not has_own_memory(self.device):
            raise CalibrationError(
                "memory does not suffice for a single sequence, or a batch of more than text: use "
                "shorter ones (--seq-len) or smaller batches, go block by block (--memory-limit), "
                "or run on the CPU (--device cpu)"
            ) from error
        # Then activations may have had room enough: as many sequences as at first.
        self.on_host, self.max_rows = True, None
        return "covariances that the CPU sums up, which takes longer"

    def result(self, capture: InputCapture, tokens: int) -> CovarianceSet:
        """The covariances with notes on where they come from.

        Args:
            capture: the sums over the whole text.
            tokens: of the text.

        Raises:
            CalibrationError: there were no tokens, or a layer received none.
        """
        if not tokens:
            reason = "the batches are empty or masked throughout"
            raise CalibrationError(f"there were no tokens to calibrate on: {reason}")
        covariances = shrunk(capture.covariances(), capture.modules)
        missed = [name for name in capture.modules if name not in covariances]
        if self.on_unseen == "error":
            refuse_unseen(missed)
            warn_unseen_experts(covariances)
        name = str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)
        provenance = {"model": name, "tokens": tokens, "versions": library_versions()}
        gradients: Mapping[str, Gradient] = {}
        if isinstance(capture, GradientCapture):
            gradients = capture.means(covariances)
            provenance["labels"] = self.labels
        return CovarianceSet(
            covariances,
            normalize=self.normalize,
            left_out=self.left_out | dict.fromkeys(missed, _UNSEEN),
            provenance=provenance,
            gradients=gradients,
        )


def unseen(covariances: CovarianceSet) -> list[str]:
    """Names of the layers that were left out because they never received a token."""
    return [name for name, reason in covariances.left_out.items() if reason == _UNSEEN]


def refuse_unseen(names: Sequence[str]) -> None:
    """Raises a CalibrationError if there are layers that never received a token."""
    if names:
        shown = ", ".join([*names[:5], "…"] if names[5:] else names)
        raise CalibrationError(
            f"{len(names)} target layer(s) never received a token: {shown}; leave them out of the "
            'targets, use more text for routed experts, or calibrate(..., on_unseen="skip")'
        )
