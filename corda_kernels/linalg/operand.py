"""A matrix to multiply by in another precision than it is kept in, without a copy of it; C + λI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from corda_kernels.arguments import real_number
from corda_kernels.errors import DecompositionError

Operator = Callable[[Tensor], Tensor]

# Rows converted at a time: at 256 to 512 of 1536 or 4096 columns, conversion and product together
# take what the product alone takes (2 cores), where a whole copy adds a third or more. On a GPU all
# are, and once: there is memory for it, and launches are what costs.
_PANEL = 384
# Up to this size Xᵀ·matrix is faster than matrixᵀ·X on a CPU: of 576 × 1536 with 48 columns in
# float32 93 against 68 GFLOP/s on one core. At 4096, on two, it is 145 against 168.
_SMALL = 2048
# With the largest entries between these, products of four such matrices are within float32's range.
_MODERATE = (1e-6, 1e6)
# With the largest entries between these, squares of W·C are within float64's, whatever the damping.
_RANGE = (1e-60, 1e60)
# Beside a larger damping nothing is left of C in float64.
_MOST_DAMPING = 1 / torch.finfo(torch.float64).eps


@dataclass(eq=False)
class Operand:
    """G = matrix + shift·I, for products in float64 or float32.

    Attributes:
        matrix: (*batch, rows, columns), any floating dtype.
        shift: (*batch, 1, 1) float64, for square matrices; None for none.
        symmetric: whether the matrix is.
        damping: the shift as a multiple of the mean diagonal, or 0.
    """

    matrix: Tensor
    shift: Tensor | None = None
    symmetric: bool = False
    damping: float = 0.0
    # Kept from product to product: fresh memory costs more than the conversion.
    _buffer: Tensor | None = field(default=None, init=False, repr=False)

    def times(self, X: Tensor) -> Tensor:
        """G X (*batch, rows, k) for X (*batch, columns, k), in X's dtype."""
        if self.matrix.dtype == X.dtype:
            product = self.matrix @ X
        else:
            product = X.new_empty(*X.shape[:-2], self.matrix.shape[-2], X.shape[-1])
            for rows, panel in self._panels(X.dtype):
                product[..., rows, :] = panel @ X
        return self._shifted(product, X)

    def transposed_times(self, X: Tensor) -> Tensor:
        """Gᵀ X (*batch, columns, k) for X (*batch, rows, k), in X's dtype."""
        if self.matrix.dtype == X.dtype:
            small = max(self.matrix.shape[-2:]) <= _SMALL
            product = (X.mT @ self.matrix).mT if small else self.matrix.mT @ X
        else:
            product = X.new_zeros(*X.shape[:-2], self.matrix.shape[-1], X.shape[-1])
            for rows, panel in self._panels(X.dtype):
                product += panel.mT @ X[..., rows, :]
        return self._shifted(product, X)

    def of(self, index: tuple[int, ...]) -> Operand:
        """That of one of a batch."""
        shift = None if self.shift is None else self.shift[index]
        return replace(self, matrix=self.matrix[index], shift=shift)

    def double(self, *, copy: bool = False) -> Tensor:
        """G in float64; the matrix itself where it can be, unless a copy is asked for."""
        G = self.matrix.to(torch.float64, copy=copy or self.shift is not None)
        if self.shift is not None:
            G.diagonal(dim1=-2, dim2=-1).add_(self.shift[..., 0])
        return G

    def single(self) -> Operand:
        """G in float32, scaled where products of it could overflow or vanish."""
        largest = largest_entry(self.matrix)
        if self.shift is not None:
            largest = largest + self.shift
        least, most = _MODERATE
        if bool(((least < largest) & (largest < most)).all()):
            return replace(self, matrix=self.matrix.float())
        largest = largest.clamp_min(torch.finfo(torch.float64).tiny)
        shift = None if self.shift is None else self.shift / largest
        dtype = torch.promote_types(self.matrix.dtype, torch.float32)
        return replace(
            self, matrix=(self.matrix.to(dtype) / largest.to(dtype)).float(), shift=shift
        )

    def _shifted(self, product: Tensor, X: Tensor) -> Tensor:
        return product if self.shift is None else product.addcmul_(self.shift.to(X), X)

    def _panels(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and what stands in them in another dtype until the next are asked for."""
        taken = list(panels(self.matrix.shape[-2], self.matrix.device))
        buffer = self._buffer
        known = buffer is not None and buffer.dtype == dtype
        if buffer is None or not known:
            *batch, _, width = self.matrix.shape
            buffer = self.matrix.new_empty(*batch, taken[0].stop, width, dtype=dtype)
            self._buffer = buffer
        for rows in taken:
            panel = buffer[..., : rows.stop - rows.start, :]
            # A panel that is all of the matrix still stands there from the last time.
            if not known or len(taken) > 1:
                panel.copy_(self.matrix[..., rows, :])
            yield rows, panel


def panels(height: int, device: torch.device) -> Iterator[slice]:
    """Rows 0 … height, as many at a time as are best converted together."""
    step = _PANEL if device.type == "cpu" else max(height, 1)
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def check_damping(damping: float | None) -> None:
    """Refuses what is no damping.

    Raises:
        ConfigError: it is no number, negative, NaN, or so large that nothing would be left of C.
    """
    if damping is not None:
        rule = "at least 0 and finite, and no larger than 4.5e15"
        real_number("damping", damping, rule, lambda x: 0 <= x <= _MOST_DAMPING)


def damped(covariance: Tensor, damping: float | None) -> Operand:
    """C + λI for C (*batch, in, in), λ of each matrix the damping times its mean diagonal."""
    share, shift = float(damping or 0.0), None
    if share:
        mean = covariance.diagonal(dim1=-2, dim2=-1).double().mean(-1)
        shift = (share * mean)[..., None, None]
    return Operand(covariance, shift, symmetric=True, damping=share)


def largest_entry(matrix: Tensor) -> Tensor:
    """The largest |entry| of each matrix (*batch, rows, columns), (*batch, 1, 1) float64."""
    most, least = matrix.amax((-2, -1), keepdim=True), matrix.amin((-2, -1), keepdim=True)
    return torch.maximum(most, -least).double()


def near_one(matrix: Tensor) -> Tensor:
    """A copy in float64 of matrices (*batch, rows, columns), each by a power of two of its own.

    The largest entry comes to lie between 1 and 2; that changes exponents only.
    """
    largest = largest_entry(matrix)
    scale = largest / (2 * torch.frexp(largest).mantissa)
    return matrix.double() / torch.where(largest > 0, scale, 1.0)


def check_entries(name: str, matrix: Tensor, remedy: str) -> None:
    """Refuses matrices (*batch, rows, columns) of which no decomposition could be right.

    Args:
        name: what they are called.
        matrix: the matrices.
        remedy: what to do about entries that are not finite.

    Raises:
        DecompositionError: an entry is NaN or Inf, or a matrix so large or small that squares
            overflow or vanish.
    """
    largest = largest_entry(matrix)
    least, most = _RANGE
    if bool((((largest >= least) & (largest <= most)) | (largest == 0)).all()):
        return
    if not bool(largest.isfinite().all()):
        raise DecompositionError(f"the {name} holds NaN or Inf: {remedy}")
    raise DecompositionError(
        f"the largest entry of the {name} is not between {least:.0e} and {most:.0e}, and W·C "
        f"leaves the range of float64: scale the {name} to sizes near 1"
    )
