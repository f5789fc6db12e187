"""A model as calibration runs it: its target layers, and its decoder without the head."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.arguments import flag, instance_of, one_of
from corda_kernels.calibration.checkpoint import CalibrationCheckpoint
from corda_kernels.calibration.covariance import Covariance, CovarianceSet
from corda_kernels.errors import BatchError, CalibrationError, CordaWarning, LeftOutWarning
from corda_kernels.kernels import check_threshold
from corda_kernels.linears import kept_unpacked
from corda_kernels.models import (
    decoder,
    input_device,
    output_head,
    position_count,
    target_linears,
    trained_positions,
    unreached_weights,
    vocabulary_size,
)
from corda_kernels.versions import library_versions

OnUnseen = Literal["error", "skip"]
Normalize = Literal["tokens", "peft"]

_UNSEEN = "never called during calibration"


@dataclass(frozen=True, eq=False)
class Subject:
    """What a calibration runs, and what it looks at.

    Attributes:
        model: the whole model.
        linears: its target layers by name.
        left_out: weights that cannot be reached, by name with the reason.
        runner: the part that is called.
        options: keyword arguments that spare the pass what calibration does not use.
        device: where its inputs go.
        pad_token_id: of the model's config, if it has one.
        vocabulary: how many token ids there are; None where the model does not say.
        positions: the most tokens of a sequence; None where nothing bounds them.
        trained: the most tokens that the model was trained on at a time; None if it does not say.
        told: what has been warned of already.
    """

    model: nn.Module
    linears: dict[str, nn.Module]
    left_out: dict[str, str]
    runner: nn.Module
    options: dict[str, Any]
    device: torch.device
    pad_token_id: int | None
    vocabulary: int | None
    positions: int | None
    trained: int | None
    told: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module, targets: str | Sequence[str]) -> Subject:
        """The model with the layers that `targets` selects; warns of weights left out.

        Raises:
            TargetError: no layer matches.
            CalibrationError: the model carries an adapter.
        """
        linears = target_linears(model, targets)
        if getattr(model, "peft_config", None):
            raise CalibrationError(
                "the model carries a PEFT adapter already; calibrate the base model before "
                "attaching one (model.unload() takes it off)"
            )
        left_out = unreached_weights(model) if targets == "all-linear" else {}
        _warn_left_out(left_out)
        head = output_head(model)
        asked = head is not None and any(module is head for module in linears.values())
        runner = model if asked else decoder(model)
        accepted = inspect.signature(runner.forward).parameters
        return cls(
            model,
            linears,
            left_out,
            runner,
            {"use_cache": False} if "use_cache" in accepted else {},
            input_device(model),
            getattr(getattr(model, "config", None), "pad_token_id", None),
            vocabulary_size(model),
            position_count(model),
            trained_positions(model),
        )

    def run(self, inputs: Mapping[str, Tensor], batch: int = 0) -> None:
        """Runs sequences of equal length, without padding.

        Args:
            inputs: `input_ids` (batch, seq) and what else goes with them.
            batch: number of the batch that they come from, for messages.

        Raises:
            BatchError: the model has no such token, or not as many positions.
        """
        self._check(inputs["input_ids"], batch)
        self.runner(
            **{name: value.to(self.device) for name, value in inputs.items()}, **self.options
        )

    def _check(self, ids: Tensor, batch: int) -> None:
        """Makes sure that the model embeds the tokens and their positions."""
        if self.positions is not None and ids.shape[1] > self.positions:
            raise BatchError(
                batch,
                f"has sequences of {ids.shape[1]} tokens, but the model has {self.positions} "
                f"positions: lower --seq-len to {self.positions}, or cut the sequences",
            )
        if self.trained is not None and ids.shape[1] > self.trained and "length" not in self.told:
            self.told.add("length")
            warnings.warn(
                f"batch {batch} (counted from 0) has sequences of {ids.shape[1]} tokens, and the "
                f"model's max_position_embeddings is {self.trained}: beyond that its activations "
                f"are not those of text that it knows; lower --seq-len to {self.trained}",
                CordaWarning,
                stacklevel=5,
            )
        # On a GPU this would wait for it; ids that are read from a file are on the host.
        if self.vocabulary is not None and ids.device.type == "cpu":
            least, most = (int(bound) for bound in torch.aminmax(ids))
            if least < 0 or most >= self.vocabulary:
                raise BatchError(
                    batch,
                    f"holds token {least if least < 0 else most}, but the model's tokens are 0 to "
                    f"{self.vocabulary - 1}: the tokenizer belongs to another model, take this "
                    "one's own",
                )

    def result(
        self,
        covariances: Mapping[str, Covariance],
        unseen: Sequence[str],
        *,
        tokens: int,
        normalize: Normalize,
        on_unseen: OnUnseen,
    ) -> CovarianceSet:
        """The covariances with notes on where they come from.

        Raises:
            CalibrationError: there were no tokens, or a layer received none.
        """
        if not tokens:
            raise CalibrationError(
                "there were no tokens to calibrate on: the batches are empty or masked throughout"
            )
        if on_unseen == "error":
            refuse_unseen(unseen)
        return CovarianceSet(
            covariances,
            normalize=normalize,
            left_out=self.left_out | dict.fromkeys(unseen, _UNSEEN),
            provenance={
                "model": str(getattr(self.model, "name_or_path", "") or type(self.model).__name__),
                "tokens": tokens,
                "versions": library_versions(),
            },
        )


def unseen(covariances: CovarianceSet) -> list[str]:
    """Names of the layers that were left out because they never received a token."""
    return [name for name, reason in covariances.left_out.items() if reason == _UNSEEN]


def refuse_unseen(names: Sequence[str]) -> None:
    """Raises a CalibrationError if there are layers that never received a token."""
    if names:
        raise CalibrationError(
            f"{len(names)} target layer(s) never received a token: {', '.join(names[:5])}"
            f"{', …' if len(names) > 5 else ''}; leave them out of the targets, or use more "
            'text if they are routed experts, or calibrate(..., on_unseen="skip") in Python'
        )


def _warn_left_out(left_out: Mapping[str, str]) -> None:
    if left_out:
        name, reason = next(iter(left_out.items()))
        warnings.warn(
            f"{len(left_out)} weight(s) get no covariance and no adapter, among them {name}: "
            f"{reason}; all are named in left_out",
            LeftOutWarning,
            stacklevel=5,  # the caller of calibrate, which no_grad wraps
        )


def check_options(
    batches: object,
    outlier_threshold: float,
    normalize: str,
    on_unseen: str,
    checkpoint: CalibrationCheckpoint | None,
    distributed: bool,
    progress: bool,
) -> None:
    """Refuses arguments of a calibration that are not possible, before anything runs.

    Raises:
        ConfigError: an option has a value that is not allowed.
        CalibrationError: the batches are none.
    """
    instance_of(
        "batches", batches, Iterable, CalibrationError, remedy="give a list of (batch, seq) tensors"
    )
    check_threshold(outlier_threshold)
    one_of("normalize", normalize, ("tokens", "peft"))
    one_of("on_unseen", on_unseen, ("error", "skip"))
    instance_of("checkpoint", checkpoint, (CalibrationCheckpoint, type(None)))
    flag("distributed", distributed)
    flag("progress", progress)


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
