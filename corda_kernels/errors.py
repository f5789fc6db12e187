"""Typed errors and warnings.

Every message says what went wrong and where (the layer, the file), the likely cause, and what to do
about it, so that the command line can print it as one line and a caller can catch it by type.
"""

from __future__ import annotations

import sys
import warnings


class CordaError(Exception):
    """Base of every error this package raises on purpose."""


class ModelError(CordaError):
    """A model or tokenizer cannot be loaded, or cannot be used for what was asked."""


class TargetError(ModelError):
    """No layer, or not the right kind of layer, matches the requested targets."""


class DataError(CordaError):
    """Calibration text cannot be read, or does not fit its template."""


class CalibrationError(CordaError):
    """The forward passes did not yield a usable covariance for every layer."""


class BatchError(CalibrationError):
    """A batch is malformed, or does not go together with the model.

    Attributes:
        batch: its index, from 0.
        reason: what is wrong with it, and what to do.
    """

    def __init__(self, batch: int, reason: str) -> None:
        super().__init__(f"batch {batch} (counted from 0) {reason}")
        self.batch = batch
        self.reason = reason


class NonFiniteActivationError(CalibrationError):
    """A layer received NaN or Inf.

    Attributes:
        layer: name of the first layer, in execution order, whose inputs were not finite.
        batch: index, from 0, of the batch in which it happened.
        tokens: range of tokens of that batch, counted from 0 over all batches, end excluded.
        broken: number of channels that held them.
        channels: number of channels of the layer's input.
    """

    def __init__(
        self, layer: str, batch: int, tokens: tuple[int, int], broken: int, channels: int
    ) -> None:
        super().__init__(
            f"layer {layer} received NaN or Inf in {broken} of {channels} channels in batch "
            f"{batch} (counted from 0), tokens {tokens[0]} to {tokens[1]}: check "
            "the weights and inputs up to this layer, or use a wider dtype (float16 overflows at "
            "65504; --dtype bfloat16 or float32)"
        )
        self.layer = layer
        self.batch = batch
        self.tokens = tokens
        self.broken = broken
        self.channels = channels


class CovarianceError(CordaError):
    """A covariance does not fit what it is used for (shape, missing layer, normalisation)."""


class CovarianceFileError(CovarianceError):
    """A covariance file is truncated, altered or of another kind."""


class CheckpointError(CordaError):
    """An interrupted calibration's checkpoint is damaged, or of another run."""


class DistributedError(CordaError):
    """Another rank of a distributed run has ended, cannot be reached, or got different inputs."""


class DecompositionError(CordaError):
    """A matrix cannot be decomposed or inverted as asked."""


class RankError(CordaError):
    """A rank is not possible for a layer."""


class ConfigError(CordaError, ValueError):
    """An option has a value that is not allowed, or that contradicts another."""


class AdapterError(CordaError):
    """An adapter folder or adapted model is incomplete, altered, or does not belong to its base."""


class CacheError(CordaError):
    """A cache file of PEFT's CorDA is damaged, or was made with other options."""


class CompatibilityError(CordaError):
    """Another library is of a version that this one cannot work with."""


class OutputError(CordaError):
    """A result cannot be written: no permission, not a folder, or no space left."""


class MissingExtraError(CordaError):
    """A part of this package needs a library that is not installed."""


class BackendError(CordaError):
    """A kernel backend was requested that cannot run here."""


class CordaWarning(UserWarning):
    """Base of every warning this package emits."""


class RankDeficientWarning(CordaWarning):
    """A covariance was taken from fewer tokens than it has channels and is singular."""


class DataWarning(CordaWarning):
    """There is less calibration text than was asked for."""


class PaddingWarning(CordaWarning):
    """A batch looks padded but carries no attention mask."""


class OutOfMemoryWarning(CordaWarning):
    """A device's memory did not suffice, and the work goes on in smaller pieces or on the CPU."""


class LeftOutWarning(CordaWarning):
    """Weights that "all-linear" does not reach, such as fused experts."""


class ConvergenceWarning(CordaWarning):
    """An iterative method did not converge and the exact one was used instead."""


class CompatibilityWarning(CordaWarning):
    """Another library, or a file that it wrote, is used in a way that cannot be checked."""


def warn(message: str, category: type[CordaWarning]) -> None:
    """Warns at the line of the caller: the innermost one that is not of this package.

    What decorates its functions does not count either.
    """
    level, frame = 1, sys._getframe()
    not_the_caller = ("corda_kernels", "torch", "contextlib")
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in not_the_caller:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
