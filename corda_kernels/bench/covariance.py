"""Streaming SYRK against the honest baseline, and calibration against the bare forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.bench.timing import Timing, measure
from corda_kernels.calibration import calibrate
from corda_kernels.kernels import available_backends, symmetrize_, syrk_, use_backend
from corda_kernels.models import decoder

# Relative Frobenius error of C up to which a speed is worth printing: rounding of float32 sums on a
# CPU, and on a GPU the truncation of the tensor cores over 8,192 tokens.
_ALLOWED = {"cpu": 1e-5, "cuda": 5e-5}
_PEAK_FLOPS = {"H100": 800e12, "H200": 800e12, "A100": 312e12}  # dense bf16, as sustained
_ROTATED_BYTES = 256 << 20
_BASELINE = "addmm"


@dataclass(frozen=True)
class Row:
    """One backend on one case.

    Attributes:
        backend: its name; "addmm" is the baseline.
        tokens: rows of X.
        channels: columns of X.
        dtype: of X.
        error: relative Frobenius error of C against float64.
        passed: whether the error is small enough; if not, there are no timings but the baseline's.
        timing: with statistics, seconds.
        plain: median without statistics, seconds.
        speedup: baseline's median over this one's.
        tflops: useful, tokens·channels·(channels + 1), with statistics.
        ceiling: share of the measured GEMM rate (the same flops counted twice for the GEMM).
        peak: share of the device's peak rate, where it is known.
    """

    backend: str
    tokens: int
    channels: int
    dtype: str
    error: float
    passed: bool
    timing: Timing | None = None
    plain: float | None = None
    speedup: float | None = None
    tflops: float | None = None
    ceiling: float | None = None
    peak: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@torch.no_grad()
def bench_syrk(
    tokens: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Row]:
    """Yields the baseline's row, then one of every backend that can run on the device."""
    generator = torch.Generator(device).manual_seed(0)
    size = tokens * channels * dtype.itemsize
    copies = max(1, min(8, _ROTATED_BYTES // size))
    inputs = [
        torch.randn(tokens, channels, device=device, generator=generator).to(dtype)
        for _ in range(copies)
    ]
    truth = _float64_gram(inputs[0])
    c = torch.zeros(channels, channels, device=device)
    flops = tokens * channels * (channels + 1)
    gemm = measure(lambda x: x.T @ x, inputs, device, ahead=True).p50
    rate = 2 * tokens * channels**2 / gemm
    peak = _peak(device)

    def row(
        backend: str, run: Callable[[Tensor], object], plain: Callable[[Tensor], object] | None
    ) -> Row:
        c.zero_()
        run(inputs[0])
        error = float((symmetrize_(c).double() - truth).norm() / truth.norm())
        facts = (backend, tokens, channels, str(dtype).removeprefix("torch."), error)
        passed = error <= _ALLOWED[device.type]
        if not passed and backend != _BASELINE:
            return Row(*facts, passed=False)
        timing = measure(run, inputs, device, ahead=True)
        without = timing.p50 if plain is None else measure(plain, inputs, device, ahead=True).p50
        useful = flops / timing.p50
        return Row(
            *facts,
            passed=passed,
            timing=timing,
            plain=without,
            tflops=useful / 1e12,
            speedup=(timing.p50 if base is None else base) / timing.p50,
            ceiling=useful / rate,
            peak=useful / peak if peak else None,
        )

    base: float | None = None
    first = row(_BASELINE, lambda x: addmm_baseline(c, x), None)
    assert first.timing is not None
    base = first.timing.p50
    yield first
    absmax = torch.zeros(channels, device=device)
    count = torch.zeros(channels, dtype=torch.int64, device=device)
    for backend, reason in available_backends("syrk_").items():
        if reason is None and backend not in _elsewhere(device):
            with use_backend(backend):
                yield row(
                    backend,
                    lambda x: syrk_(c, x, absmax=absmax, outlier_count=count),
                    lambda x: syrk_(c, x),
                )


def _elsewhere(device: torch.device) -> tuple[str, ...]:
    """Backends that are for another kind of device."""
    return ("cpu",) if device.type == "cuda" else ("triton",)


def _float64_gram(x: Tensor) -> Tensor:
    total = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for chunk in torch.split(x, 4096):
        rows = chunk.double()
        total.addmm_(rows.T, rows)
    return total


def addmm_baseline(c: Tensor, x: Tensor) -> None:
    """c (d, d) += xᵀx by the best that torch has: in place, in float32, on a GPU uncopied."""
    if x.dtype == torch.float32:
        c.addmm_(x.T, x)
    elif x.is_cuda:
        torch.addmm(c, x.T, x, out_dtype=torch.float32, out=c)
    else:
        rows = x.float()
        c.addmm_(rows.T, rows)


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK_FLOPS.items() if model in name), None)


@dataclass(frozen=True)
class CalibrationRow:
    """Calibration of a model against its bare forward pass without logits, in seconds."""

    model: str
    tokens: int
    forward: Timing
    calibration: Timing

    @property
    def ratio(self) -> float:
        """Calibration's median over the forward pass's."""
        return self.calibration.p50 / self.forward.p50

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self) | {"ratio": self.ratio}


@torch.no_grad()
def bench_calibration(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> CalibrationRow:
    """Times `calibrate` and the decoder alone over the same batches."""
    device = next(model.parameters()).device
    runner = decoder(model.eval())

    def forward(_: None) -> None:
        for batch in batches:
            runner(input_ids=batch["input_ids"].to(device), use_cache=False)

    def calibration(_: None) -> None:
        calibrate(model, batches, progress=False)

    return CalibrationRow(
        str(getattr(model, "name_or_path", "")),
        sum(batch["input_ids"].numel() for batch in batches),
        measure(forward, [None], device, repeats=3),
        measure(calibration, [None], device, repeats=3),
    )
