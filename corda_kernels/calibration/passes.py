"""Model and tokens in, covariances out, in one pass; and a model as any calibration runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from corda_kernels import structure
from corda_kernels.arguments import flag, instance_of, one_of
from corda_kernels.calibration.batches import (
    Batch,
    TextSum,
    check_masks,
    inputs_of,
    is_text,
    row_count,
    token_count,
    unpadded,
)
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.covariance import CovarianceSet
from corda_kernels.calibration.distributed import Ranks, layers_given, text_given
from corda_kernels.calibration.experts import (
    Experts,
    Reader,
    expert_inputs,
    shrunk,
    warn_unseen_experts,
)
from corda_kernels.calibration.gradients import (
    GradientCapture,
    Labels,
    Sides,
    backward_pass,
    check_model,
    with_labels,
)
from corda_kernels.calibration.journal import CalibrationCheckpoint, Journal, foreign
from corda_kernels.calibration.masks import RowMasks
from corda_kernels.errors import (
    BatchError,
    CalibrationError,
    ConfigError,
    CordaError,
    CordaWarning,
    LeftOutWarning,
    OutOfMemoryWarning,
    warn,
)
from corda_kernels.kernels import check_threshold
from corda_kernels.linears import kept_unpacked
from corda_kernels.memory import has_own_memory
from corda_kernels.progress import progress_bar
from corda_kernels.targets import target_layers, unreached_weights
from corda_kernels.versions import library_versions

Normalize = Literal["tokens", "peft"]
Targets = str | Sequence[str] | None
OnUnseen = Literal["error", "skip"]
T = TypeVar("T")

_UNSEEN = "never called during calibration"


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch] | Callable[[], object],
    *,
    targets: Targets = None,
    experts: Experts | None = None,
    outlier_threshold: float = 6.0,
    normalize: Normalize = "tokens",
    on_unseen: OnUnseen = "error",
    checkpoint: CalibrationCheckpoint | None = None,
    distributed: bool = False,
    progress: bool = True,
    sides: Sides = "inputs",
    labels: Labels = "given",
) -> CovarianceSet:
    """Runs the model over calibration data: the covariance of every target layer's inputs.

    The model runs in eval mode, on text without its output head; its hooks, modes and weights are
    as before afterwards, whatever happens. Layers that read the same tensor share one covariance.
    Sums are kept in float32 or better. Where a device's memory runs out, it starts again with
    smaller batches, in the end with sums on the host, and warns.

    Args:
        model: a transformers model, or any other module.
        batches: what the model takes: token ids (batch, seq), or mappings of its forward's
            arguments, such as `input_ids`, `attention_mask`, `pixel_values` or `labels`. Padding
            never counts: where it is, masks say, and labels of -100 of a decoder's sequence. Where
            text has a `token_mask` (batch, seq) of ones and zeros, such as `labels != -100`, the
            model reads the tokens with a zero, and they do not count either.
            Alternatively a function without arguments that runs the model, as it likes.
        targets: see `corda_kernels.targets.target_layers`.
        experts: of fused experts. "shared" adds all of them to "all-linear", with one covariance a
            layer of the hidden states that they read, under the name of the parameter
            ("model.layers.0.mlp.experts.gate_up_proj"), and one an expert of what its down
            projection reads, under that name and the expert's number ("….experts.down_proj.5").
            "each" has one an expert of the hidden states as well, of the tokens that are routed to
            it. An expert's own are drawn towards the mean of its layer, which an expert without
            tokens has alone, with a warning; see `calibration.experts.shrunk`. None leaves experts
            out of "all-linear", and is "shared" for those that `targets` names.
        outlier_threshold: |x| above which an activation is counted as an outlier, in units of x.
        normalize: "tokens" for the mean over tokens; "peft" divides each call's input by |max x|
            and takes the mean over calls, as PEFT's own CorDA does.
        on_unseen: what to do about targets that were never called: "error", or "skip" to leave them
            out, and not to name experts without tokens.
        checkpoint: where to keep what has been summed up so far, and whether to go on from it after
            a kill. The result is the same to the last bit, interrupted or not. Each of several
            ranks keeps a file of its own, and must find it where as many ranks go on.
        distributed: whether the ranks of torch.distributed, which must all be given the same, run
            a share of the batches each; all get the same result. They compare model, batches and
            options before the first forward pass, batches that can be read but once at their end.
        progress: whether to show a progress bar with tokens per second.
        sides: "both" also takes gradients, by one backward pass through the activations after each
            forward pass, here with the output head: D = (1/n) Σ g gᵀ (out, out) and
            Ḡ = (1/n) Σ g xᵀ (out, in) of every layer by its name, in `gradients` of the result. g
            (out,) is the gradient of the summed token losses at one token's output. The sum goes
            over the same n tokens as in C: padding does not count; a token whose own label is
            masked does, since later losses depend on it. So Ḡ is the layer's weight gradient of the
            summed losses, over n; where a trainer takes the mean over tokens with a label, that
            gradient times their share.
        labels: of the losses. "given": `labels` of a batch, (batch, seq) int64 as in transformers
            (a token's loss is that of its successor, -100 for none), the text itself where there
            are none. "sampled": for each token whose successor counts in that way, all of them
            where there are no labels, a token drawn from the model's own distribution (seeded by
            the batch's number); then D and C are the Kronecker factors of the Fisher matrix, and
            ½ tr(D ΔW C ΔWᵀ) estimates the mean KL divergence to the base.

    Returns:
        Covariances by module name, C = (1/n) Σ x xᵀ with x (in,) one token's input.

    Raises:
        ModelError: the model is none, or sides is "both" and it has no head.
        TargetError: no layer matches.
        CalibrationError: there were no tokens, a batch is malformed or holds what the model does
            not take, or a target was never called.
        NonFiniteActivationError: a layer received NaN or Inf.
        CheckpointError: the checkpoint to go on from is damaged, or of another run.
        DistributedError: another rank has ended, or was given something else.
        ConfigError: an option has a value that is not allowed; or `distributed` without a process
            group.

    Source: the covariance C = XXᵀ of CorDA (arXiv:2406.05223, section 3.2), scaled by 1/n; D of
    sampled labels as in K-FAC (arXiv:1503.05671, section 3).
    """
    run = CalibrationRun(
        model,
        targets,
        experts,
        outlier_threshold,
        normalize,
        on_unseen,
        checkpoint,
        distributed,
        progress,
        sides,
        labels,
    )
    if callable(batches) and not isinstance(batches, Iterable):
        return _watched(run, batches)
    run.agree("calibrate", batches)
    capture, text = run.retry(batches, lambda: _accumulate(run, batches), "starting again")
    run.ranks.agree("the end of the text", text.given)
    run.ranks.add_up(capture, run.device)
    return run.result(capture, sum(text.counts))


def _watched(run: CalibrationRun, run_model: Callable[[], object]) -> CovarianceSet:
    """The covariances of what `run_model` lets the model read."""
    if run.distributed or run.checkpoint is not None:
        raise ConfigError(
            "a function that runs the model can be neither shared out over ranks nor resumed: give "
            "batches, or leave distributed and checkpoint out"
        )
    capture, calls, tokens = run.capture(run.readers, RowMasks(run.model)), 0, 0

    def end(*_: object) -> None:
        nonlocal calls, tokens
        before, tokens = tokens, max((each.tokens for each, _ in capture.sums()), default=0)
        capture.end_pass(calls, (before, tokens))
        calls += 1

    with evaluating(run.model), capture:
        ending = run.model.register_forward_hook(end)
        try:
            run_model()
        finally:
            ending.remove()
        end()  # of what ran parts of the model alone
    return run.result(capture, tokens)


def _accumulate(run: CalibrationRun, batches: Iterable[Batch]) -> tuple[InputCapture, TextSum]:
    """The sums of this rank's batches, those from a checkpoint included; and the whole text."""
    capture = run.capture(run.readers, RowMasks(run.model))
    journal, text = run.journal(), TextSum()
    # Batches whose sums come from a checkpoint, those of other ranks included.
    restored, restored_text = journal.restore([capture]) if journal.holds() else (0, "")
    kept_tokens = 0
    reads = contextlib.closing(run.read(batches, text))
    with evaluating(run.model), capture, reads as numbered:
        for index, batch, own in numbered:
            done, tokens = index + 1, text.span[1]
            if done == restored and text.own() != restored_text:
                raise foreign(journal.file(), "data")
            if done <= restored:
                kept_tokens = tokens
                continue
            if own:
                for inputs in run.sequences(batch, index):
                    capture.begin_rows(inputs.pop("token_mask", None))
                    run.forward(inputs, index)
                capture.end_pass(index, text.span)
            if tokens - kept_tokens >= journal.interval([capture]):
                journal.keep([capture], done, text.own())
                kept_tokens = tokens
    if len(text.counts) < restored:
        raise foreign(journal.file(), "data")
    return capture, text


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
        positions: the most tokens of a sequence; None where nothing bounds them.
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
        self.ranks = Ranks.of(self.distributed)
        self.shown = self.progress and self.ranks.rank == 0
        self.linears, fused = target_layers(model, self.targets, experts=self.experts is not None)
        self.experts_modules = {parameter.module for parameter in fused.values()}
        self.readers: dict[str, Reader] = {
            **self.linears,
            **expert_inputs(fused, self.experts or "shared"),
        }
        if getattr(model, "peft_config", None):
            remedy = "calibrate the base model (model.unload() takes the adapter off)"
            raise CalibrationError(f"the model carries a PEFT adapter already: {remedy}")
        every = self.targets in (None, "all-linear")
        left_out = unreached_weights(model, self.targets) if every else {}
        self.left_out = {name: left_out[name] for name in left_out if name not in fused}
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            says = f"{len(self.left_out)} weight(s) get no covariance and no adapter, among them "
            warn(f"{says}{name}: {reason}; all are named in left_out", LeftOutWarning)
        base = structure.decoder(model)
        inside = set(self.linears.values()) <= set(base.modules())
        self._base = base if inside else model
        if self.sides == "both":
            check_model(model)
            if fused:
                raise ConfigError(
                    'sides="both" takes gradients at linear layers, not of fused experts: leave '
                    f'{min(fused)} and the like out, or take sides="inputs"'
                )
        self.device = structure.input_device(model)
        self.positions = structure.position_count(model)
        self._vocabulary = structure.vocabulary_size(model)
        self._trained = structure.trained_positions(model)
        self._multiple = structure.padding_multiple(model)

    def agree(self, step: str, batches: Iterable[Batch], **more: object) -> None:
        """Makes sure that there are batches, and that all ranks calibrate the same.

        A checkpoint's path may be another on every rank, each of which has files of its own.

        Args:
            step: the call that begins.
            batches: the text.
            more: what else must be the same, by name.

        Raises:
            CalibrationError: the batches are none.
            DistributedError: something differs, or a rank has ended.
        """
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

    def sequences(self, batch: Batch, index: int) -> Iterator[dict[str, Any]]:
        """What `forward` takes of a batch: of text sequences without padding, see `unpadded`; of
        anything else the batch as it is.

        Raises:
            BatchError: it holds what the model's forward does not take, or masks that do not tell
                padding.
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
        if text:
            yield from unpadded(batch, index, pad_token_id=padding, max_rows=self.max_rows)
            return
        check_masks(inputs, index, padding)
        yield inputs

    def _is_text(self, batch: Batch) -> bool:
        """Whether a batch can be taken apart: the sequences of an encoder–decoder come in pairs."""
        return is_text(batch) and not structure.is_encoder_decoder(self.model)

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
        if not isinstance(batches, Sequence | Tensor):
            remedy = "give smaller batches, or a list of batches, which can be started again"
            raise CalibrationError(f"memory ran out while calibrating: {remedy}") from error
        rows = self.max_rows or max(map(row_count, batches))
        if rows > 1:
            self.max_rows = rows // 2
            return f"at most {self.max_rows} sequence(s) at a time"
        if not summing or self.on_host or not has_own_memory(self.device):
            raise CalibrationError(
                "memory does not suffice for a single sequence: use shorter ones (--seq-len), go "
                "block by block (--memory-limit), or run on the CPU (--device cpu)"
            ) from error
        # Then activations may have had room enough: as many sequences as at first.
        self.on_host, self.max_rows = True, None
        return "covariances that the CPU sums up, which takes longer"

    def forward(self, inputs: Mapping[str, Any], batch: int = 0) -> None:
        """Runs the model, or its part that has the targets where that takes all that is given.

        Args:
            inputs: what `sequences` gave.
            batch: number of the batch that they come from, for messages.

        Raises:
            BatchError: the model has no such token, or not as many positions; or its forward
                refuses what it is given.
        """
        text = self._is_text(inputs)
        self._check_ids(inputs.get("input_ids"), text, batch)
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
        if self.sides == "both":
            backward_pass(self.model, moved, self.labels, batch, self.device)
            return
        try:
            runner(**moved)
        except (TypeError, ValueError) as error:
            if isinstance(error, CordaError):
                raise
            kind, names = type(runner).__name__, ", ".join(inputs)
            says = f"cannot be run by {kind}, which was given {names} ({error})"
            pairs = structure.is_encoder_decoder(runner)
            missing = ", such as labels or decoder_input_ids" if pairs else ""
            raise BatchError(batch, f"{says}: give all that it needs{missing}") from error

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
            says = f"batch {batch} has {length} tokens, but the model's max_position_embeddings is"
            remedy = "lower --seq-len to that, since it was not trained on longer text"
            warn(f"{says} {self._trained}: {remedy}", CordaWarning)
            self._trained = None  # once is enough
        # On a GPU this would wait for it; ids that are read from a file are on the host.
        if self._vocabulary is not None and ids.device.type == "cpu" and ids.numel():
            least, most = (int(bound) for bound in torch.aminmax(ids))
            if least < 0 or most >= self._vocabulary:
                odd, last = (least if least < 0 else most), self._vocabulary - 1
                says = f"holds token {odd}, but the model's tokens are 0 to {last}"
                raise BatchError(batch, f"{says}: the tokenizer is another model's, take its own")

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
        noted = {}
        if isinstance(capture, GradientCapture):
            noted = {"gradients": capture.means(covariances)}
        provenance = {"model": name, "tokens": tokens, "versions": library_versions()}
        return CovarianceSet(
            covariances,
            normalize=self.normalize,
            left_out=self.left_out | dict.fromkeys(missed, _UNSEEN),
            provenance=provenance | ({"labels": self.labels} if noted else {}),
            **noted,
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; afterwards every module's mode is as before.

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
