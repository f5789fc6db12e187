"""Forward hooks that turn linear layers' inputs into running covariances, one for each tensor."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.calibration.covariance import Covariance, Gradient, Group
from corda_kernels.calibration.experts import ExpertInput, Reader, recording
from corda_kernels.calibration.masks import RowMasks
from corda_kernels.errors import CalibrationError, NonFiniteActivationError
from corda_kernels.kernels import symmetrize_, syrk_

# Sums that new modules can still join. Readers of one tensor are called close together (q, k, v;
# in a parallel block also the MLP's input layers), so a few suffice, and each one keeps an
# activation alive.
_FORMING = 8
HOST = torch.device("cpu")

# Makes the error about a sum that is not finite: of a batch, its range of tokens, and how many
# channels of how many are not.
Error = Callable[[int, tuple[int, int], int, int], CalibrationError]


@dataclass
class _Sighting:
    """A tensor seen at a module's input; holding it keeps its memory from being reused."""

    tensor: Tensor
    version: float
    modules: list[str]
    kept: Tensor | None = None  # of its rows those that count, as an index; None for all

    def matches(self, tensor: Tensor) -> bool:
        return self.tensor is tensor and self.version == _version(tensor)


def _version(tensor: Tensor) -> float:
    """The counter of changes in place; inference tensors have none, and match nothing (NaN)."""
    return math.nan if tensor.is_inference() else tensor._version


@dataclass
class _Sums:
    """Running sums of the inputs of the modules that have read the same tensors so far."""

    modules: list[str]
    matrix: Tensor  # (d, d) float32 or float64, lower triangle
    absmax: Tensor  # (d,) float32
    outlier_count: Tensor  # (d,) int64
    tokens: int = 0
    calls: int = 0
    pending: _Sighting | None = None  # read by some of the modules, not yet by all


@dataclass(frozen=True, eq=False)
class _Look:
    """Which entries of diagonals on one device were finite after a pass, on the way to the host."""

    finite: Tensor  # (entries,) bool
    copied: torch.Event | None  # None where nothing has to be waited for
    found: list[tuple[int, Error]]  # how many of them are of one sum
    batch: int
    tokens: tuple[int, int]


@dataclass
class InputCapture:
    """Accumulates the covariance of every given module's input while it is entered as a context.

    Modules share one accumulation when they read the very same tensor object (`is`, with an
    unchanged version counter) at every call. The first tensor a module is seen with decides whose
    group it joins; from then on a group's tensor is added when all its modules have read it, and a
    group whose modules part ways is split before the first tensor that they do not share, so that
    no sum is ever wrong.

    Attributes:
        modules: the layers by name; each takes one tensor (..., in) as its first argument. Inputs
            of fused experts may be among them.
        outlier_threshold: |x| above which an activation counts as an outlier, in units of x.
        normalize: "tokens", or "peft" for each call's input divided by |max x|.
        deterministic: adds in one order, so that a run can be repeated bit for bit on a GPU too.
        statistics: whether the channels' absmax and outliers are taken; otherwise both stay 0.
        on_host: copies inputs to the host and sums them up there, for a device with too little
            memory.
        masks: which rows count; None for all.
        row_mask: (batch, seq) bool, the tokens that count in the present pass, in place of `masks`;
            None for what these say. It may change between passes only, see `begin_rows`.
        gradients: sums of D and Ḡ by layer, where a `GradientCapture` takes them.
    """

    modules: Mapping[str, Reader]
    outlier_threshold: float = 6.0
    normalize: str = "tokens"
    deterministic: bool = False
    statistics: bool = True
    on_host: bool = False
    masks: RowMasks | None = None
    row_mask: Tensor | None = field(default=None, init=False)
    gradients: dict[str, Gradient] = field(default_factory=dict, init=False)
    _counted: Tensor = field(init=False)  # numbers of the rows that `row_mask` keeps
    _looks: list[_Look] = field(default_factory=list, init=False)  # of the last pass
    _sums: dict[str, _Sums] = field(default_factory=dict, init=False)
    # The first tensor of some sums: other new modules that read it join.
    _forming: deque[tuple[_Sighting, _Sums]] = field(
        default_factory=lambda: deque(maxlen=_FORMING), init=False
    )
    _hooks: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    def __enter__(self) -> InputCapture:
        experts: dict[str, ExpertInput] = {}
        if self.masks is not None:
            self._hooks.enter_context(self.masks)
        for name, module in self.modules.items():
            if isinstance(module, ExpertInput):
                experts[name] = module
            else:
                hook = partial(self._hook, name)
                self._hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        if experts:
            self._hooks.enter_context(recording(experts, self._read_routed))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _hook(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            says = f"layer {name} was called without an input tensor: leave it out of the targets"
            raise CalibrationError(says)
        # Sums made under the caller's inference mode could not be changed outside it.
        with torch.inference_mode(False), torch.no_grad():
            self._read(name, x, self._kept(name, x))

    def _read_routed(
        self, name: str, x: Tensor, rows: Tensor | None, output: Tensor | None
    ) -> None:
        """Reads what the router made of a pass, see `Read`."""
        kept = self._routed_kept(rows)
        if kept is None:
            self._read(name, x, self._kept(name, x))
        else:
            self._read(name, x[kept], None)

    def _routed_kept(self, rows: Tensor | None) -> Tensor | None:
        """Of rows of a pass, by their numbers, those that count; None for all."""
        mask = self.row_mask if self.masks is None or self.row_mask is not None else self.masks.mask
        return None if mask is None or rows is None else mask.flatten().to(rows.device)[rows]

    def _read(self, name: str, x: Tensor, kept: Tensor | None) -> None:
        sums = self._sums.get(name)
        if sums is None:
            self._join_or_found(name, x, kept)
        elif len(sums.modules) == 1:
            self._add(sums, x, kept)
        elif sums.pending is None:
            sums.pending = _Sighting(x, _version(x), [name], kept)
            if x.is_inference():
                self._split(sums)
        elif sums.pending.matches(x) and name not in sums.pending.modules:
            sums.pending.modules.append(name)
            if len(sums.pending.modules) == len(sums.modules):
                self._add(sums, x, sums.pending.kept)
                sums.pending = None
        else:
            self._split(sums)
            self._read(name, x, kept)

    def _join_or_found(self, name: str, x: Tensor, kept: Tensor | None) -> None:
        for first, sums in self._forming:
            if first.matches(x) and sums.calls == 1 and sums.pending is None:
                sums.modules.append(name)
                self._sums[name] = sums
                return
        d = x.shape[-1]
        zeros = partial(torch.zeros, device=HOST if self.on_host else x.device)
        matrix = zeros(d, d, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        statistics = (zeros(d, dtype=torch.float32), zeros(d, dtype=torch.int64))
        sums = self._sums[name] = _Sums([name], matrix, *statistics)
        self._forming.append((_Sighting(x, _version(x), [name]), sums))
        self._add(sums, x, kept)

    def _split(self, sums: _Sums) -> None:
        """Gives the modules that read the pending tensor sums of their own and adds it there."""
        pending = sums.pending
        assert pending is not None
        if _version(pending.tensor) > pending.version:
            raise CalibrationError(
                f"layers {', '.join(sums.modules)} read one tensor, which was changed in place in "
                "between: calibrate each in a run of its own, and merge the results"
            )
        sums.pending = None
        copies = (sums.matrix.clone(), sums.absmax.clone(), sums.outlier_count.clone())
        apart = _Sums(pending.modules, *copies, sums.tokens, sums.calls)
        sums.modules = [name for name in sums.modules if name not in pending.modules]
        self._sums.update(dict.fromkeys(apart.modules, apart))
        self._add(apart, pending.tensor, pending.kept)

    def _kept(self, name: str, x: Tensor) -> Tensor | None:
        """The rows of an input that count: a mask of them or their numbers; None for all."""
        rows, mask = x.shape[:-1].numel(), self.row_mask
        if mask is None:
            return None if self.masks is None else self.masks.kept(name, x)
        if mask.numel() != rows:
            raise CalibrationError(
                f"layer {name} received {rows} rows, which do not match the token mask of shape "
                f"{tuple(mask.shape)}: run sequences without padding or token_mask, or leave the "
                "layer out"
            )
        self._counted = self._counted.to(x.device)  # once a pass
        return self._counted

    def _add(self, sums: _Sums, x: Tensor, kept: Tensor | None) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if kept is not None:
            rows = rows[kept.to(rows.device)]
        if self.on_host:
            rows = rows.to(HOST)
        # A checkpoint may have left the sums on another device than the inputs.
        sums.matrix = sums.matrix.to(rows.device)
        sums.absmax = sums.absmax.to(rows.device)
        sums.outlier_count = sums.outlier_count.to(rows.device)
        alpha = 1.0
        if self.normalize == "peft" and rows.numel():
            scale = abs(float(rows.max()))
            if scale == 0.0:
                raise CalibrationError(
                    f"layer {sums.modules[0]} received an input whose largest entry is 0, "
                    'by which normalize="peft" divides: use normalize="tokens"'
                )
            # Of what is not finite the sums then show the channels.
            alpha = scale**-2 if math.isfinite(scale) else 1.0
        syrk_(
            sums.matrix,
            rows,
            alpha=alpha,
            absmax=sums.absmax if self.statistics else None,
            outlier_count=sums.outlier_count if self.statistics else None,
            outlier_threshold=self.outlier_threshold,
            deterministic=self.deterministic,
        )
        sums.tokens += len(rows)
        sums.calls += 1

    def begin_rows(self, mask: Tensor | None) -> None:
        """Begins sequences of which those tokens count, after settling what the last ones shared.

        Args:
            mask: (batch, seq) of ones and zeros; None where all count.
        """
        self._settle()
        self.row_mask = None if mask is None else mask.to(torch.bool)
        if self.row_mask is not None:
            # By their numbers, for which a device need not be waited for as for a mask.
            self._counted = self.row_mask.flatten().nonzero().flatten()

    def _settle(self) -> None:
        self._forming.clear()
        for sums in self._distinct():
            if sums.pending is not None:
                self._split(sums)

    def end_pass(self, batch: int, tokens: tuple[int, int]) -> None:
        """Closes a forward pass: settles shared tensors and looks whether every sum is finite.

        What it sees there is checked when the next pass ends, or by `check`, so that the host need
        not wait for the device.

        Raises:
            NonFiniteActivationError: see `check`, of the pass before.
        """
        self._settle()
        self.check()
        by_device: dict[torch.device, list[tuple[Tensor, Error]]] = {}
        for diagonal, error in self._diagonals():
            by_device.setdefault(diagonal.device, []).append((diagonal, error))
        for device, found in by_device.items():
            entries = torch.cat([diagonal for diagonal, _ in found])
            finite, copied = entries.isfinite().to(HOST, non_blocking=True), None
            if device != HOST:
                copied = torch.Event(device)
                copied.record(torch.accelerator.current_stream(device))
            sizes = [(len(diagonal), error) for diagonal, error in found]
            self._looks.append(_Look(finite, copied, sizes, batch, tokens))

    def check(self) -> None:
        """Checks that every sum was finite when the last pass ended.

        Raises:
            NonFiniteActivationError: a layer received NaN or Inf; `batch` and `tokens` are what
                `end_pass` was given.
        """
        looks, self._looks = self._looks, []
        for look in looks:
            if look.copied is not None:
                look.copied.synchronize()
            if not look.finite.all():
                parts = torch.split(look.finite, [size for size, _ in look.found])
                for finite, (_, error) in zip(parts, look.found, strict=True):
                    if not finite.all():
                        raise error(look.batch, look.tokens, int((~finite).sum()), len(finite))

    def _diagonals(self) -> list[tuple[Tensor, Error]]:
        """Of all sums, in the order in which their layers ran."""
        return [
            (sums.matrix.diagonal(), partial(NonFiniteActivationError, sums.modules[0]))
            for sums in self._distinct()
        ]

    def tokens(self) -> int:
        """The most tokens that any layer has received."""
        return max((sums.tokens for sums in self._distinct()), default=0)

    def _distinct(self) -> list[_Sums]:
        return list({id(sums): sums for sums in self._sums.values()}.values())

    def sums(self) -> list[Group]:
        """The sums so far, not divided by anything, each with the modules that share it.

        Only lower triangles are filled. The tensors are the running ones: they change with the next
        pass.

        Raises:
            NonFiniteActivationError: see `check`.
        """
        self.check()
        found: list[Group] = []
        for sums in self._distinct():
            numbers = (sums.tokens, sums.calls, sums.absmax, sums.outlier_count)
            part = Covariance(sums.matrix, *numbers, self.outlier_threshold)
            found.append((part, sums.modules))
        return found

    def restore(self, groups: list[Group]) -> None:
        """Takes up sums that `sums` gave between two passes, in place of its own."""
        self._sums.clear()
        for part, names in groups:
            numbers = (part.matrix, part.absmax, part.outlier_count, part.tokens, part.calls)
            self._sums.update(dict.fromkeys(names, _Sums(names, *numbers)))

    def covariances(self) -> dict[str, Covariance]:
        """The covariance of every module seen, in the order of `modules`. Ends the accumulation."""
        finished: dict[str, Covariance] = {}
        for covariance, names in self.sums():
            count = covariance.tokens if self.normalize == "tokens" else covariance.calls
            symmetrize_(covariance.matrix).div_(max(count, 1))
            if covariance.tokens:
                finished.update(dict.fromkeys(names, covariance))
        return {name: finished[name] for name in self.modules if name in finished}
