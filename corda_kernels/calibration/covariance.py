"""What calibration yields of one layer: the covariance of its inputs, and their statistics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from corda_kernels import arguments
from corda_kernels.errors import CovarianceError

NORMALIZATIONS = ("tokens", "peft")


@dataclass(frozen=True, eq=False)
class Covariance:
    """Second moment of one layer's inputs, C = (1/n) Σ x xᵀ, with channel statistics.

    Attributes:
        matrix: (in, in) float32 (or float64), symmetric; the mean over tokens, or over calls if the
            set's `normalize` is "peft".
        tokens: number of tokens that it was taken from.
        calls: number of forward calls of the layer.
        absmax: (in,) float32, the largest |x| of each channel.
        outlier_count: (in,) int64, number of |x| above the threshold in each channel.
        outlier_threshold: threshold in units of x.

    Raises:
        CovarianceError: an attribute has the wrong type, shape or dtype. Entries are not checked.

    """

    matrix: Tensor
    tokens: int
    calls: int
    absmax: Tensor
    outlier_count: Tensor
    outlier_threshold: float

    def __post_init__(self) -> None:
        """Refuses values of another kind or shape."""
        arguments.real_tensor("a covariance's matrix", self.matrix, CovarianceError)
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1]:
            raise CovarianceError(f"a covariance's matrix must be (in, in), got {shape}")
        for name in ("absmax", "outlier_count"):
            statistic = getattr(self, name)
            arguments.instance_of(name, statistic, Tensor, CovarianceError)
            if statistic.shape != shape[:1]:
                raise CovarianceError(f"{name} must be {shape[:1]}, got {tuple(statistic.shape)}")
        for name in ("tokens", "calls"):
            arguments.whole_number(name, getattr(self, name), 0, error=CovarianceError)
        number = partial(arguments.real_number, error=CovarianceError)
        number("outlier_threshold", self.outlier_threshold, "at least 0", lambda x: x >= 0)

    def merge(self, other: Covariance, *, normalize: str = "tokens") -> Covariance:
        """The covariance of both samples: the mean weighted by tokens, or by calls for "peft".

        Raises:
            CovarianceError: sizes or outlier thresholds differ, or `normalize` is not possible.
        """
        arguments.instance_of("other", other, Covariance, CovarianceError)
        arguments.one_of("normalize", normalize, NORMALIZATIONS, CovarianceError)
        pair = (self, other)
        here, there = ((len(part.matrix), part.outlier_threshold) for part in pair)
        if here != there:
            says = "covariances of (channels, outlier threshold)"
            raise CovarianceError(f"{says} {here} and {there} cannot be merged")
        mine, theirs = (part.tokens if normalize == "tokens" else part.calls for part in pair)
        dtype = torch.promote_types(self.matrix.dtype, other.matrix.dtype)
        share = theirs / max(mine + theirs, 1)
        return Covariance(
            torch.lerp(self.matrix.to(dtype), other.matrix.to(dtype), share),
            self.tokens + other.tokens,
            self.calls + other.calls,
            torch.maximum(self.absmax, other.absmax),
            self.outlier_count + other.outlier_count,
            self.outlier_threshold,
        )


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient side of one layer, see `calibrate` for what is averaged over.

    Attributes:
        matrix: D = E[g gᵀ] (out, out) float32 (or float64), symmetric, with g the gradient at the
            layer's output.
        mean: Ḡ = E[g xᵀ] (out, in), of the same dtype: the gradient for the layer's weight.
        fisher_trace: E[‖g‖² ‖x‖²] (), of the same dtype: the trace of E[(g ⊗ x)(g ⊗ x)ᵀ], which
            would be tr D · tr C if g and x were independent.

    Raises:
        CovarianceError: an attribute is no such tensor. Entries are not checked.
    """

    matrix: Tensor
    mean: Tensor
    fisher_trace: Tensor

    def __post_init__(self) -> None:
        """Refuses values of another kind or shape."""
        for name in ("matrix", "mean", "fisher_trace"):
            arguments.real_tensor(f"a gradient's {name}", getattr(self, name), CovarianceError)
        square, shape = tuple(self.matrix.shape), tuple(self.mean.shape)
        if len(shape) != 2 or square != 2 * shape[:1] or self.fisher_trace.ndim:
            raise CovarianceError(
                f"D {square}, Ḡ {shape} and the trace {tuple(self.fisher_trace.shape)} must be "
                "(out, out), (out, in) and ()"
            )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """D, Ḡ and the trace."""
        return self.matrix, self.mean, self.fisher_trace

    @classmethod
    def zeros(cls, out: int, channels: int, like: Tensor) -> Gradient:
        """Empty sums, of the dtype and on the device of `like`."""
        return cls(*(like.new_zeros(shape) for shape in ((out, out), (out, channels), ())))

    def to(self, device: str | torch.device) -> Gradient:
        """The same on another device."""
        return Gradient(*(part.to(device) for part in self.tensors))

    def merge(self, other: Gradient, share: float) -> Gradient:
        """The mean of both, of which the other's weight is `share`."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return Gradient(*(torch.lerp(mine, theirs, share) for mine, theirs in pairs))


# A covariance and the names of the layers that share it.
Group = tuple[Covariance, list[str]]
