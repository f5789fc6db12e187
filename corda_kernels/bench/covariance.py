"""Streaming SYRK against the honest baseline, and calibration against the bare forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from corda_kernels.bench.timing import Timing, measure
from corda_kernels.calibration import calibrate
from corda_kernels.kernels import available_backends, symmetrize_, syrk_, use_backend
from corda_kernels.structure import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative Frobenius error of C up to which a speed is worth printing: rounding of float32 sums on a
# CPU, and on a GPU the truncation of the tensor cores over 8,192 tokens.
_ALLOWED = {"cpu": 1e-5, "cuda": 5e-5}
_ROTATED_BYTES = 256 << 20
_BASELINE = "addmm"

HEADER = (
    f"{'backend':<10} {'tokens':>7} {'d':>6} {'dtype':>9} {'p20 ms':>9} {'p50 ms':>9} "
    f"{'p80 ms':>9} {'× addmm':>8} {'TFLOP/s':>8} {'of GEMM':>8} "
    f"{'stats':>7} {'error':>8}"
)


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

    def line(self) -> str:
        """As printed below HEADER."""
        case = f"{self.backend:<10} {self.tokens:>7} {self.channels:>6} {self.dtype:>9}"
        if self.timing is None:
            return f"{case} {'wrong: no speed':>62} {self.error:>8.1e}"
        statistics = self.timing.p50 / (self.plain or math.nan) - 1
        return (
            f"{case} {self.timing.milliseconds()} {self.speedup:>8.2f} {self.tflops:>8.2f} "
            f"{self.ceiling:>8.0%} {statistics:>+7.1%} {self.error:>8.1e}"
            f"{'' if self.passed else ' wrong'}"
        )


@torch.no_grad()
def bench_syrk(
    tokens: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Row]:
    """Yields the baseline's row, then one of every backend that can run on the device."""
    generator = torch.Generator(device).manual_seed(0)
    copies = max(1, min(8, _ROTATED_BYTES // (tokens * channels * dtype.itemsize)))
    shape = tokens, channels
    inputs = [
        torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(copies)
    ]
    exact = inputs[0].double().T @ inputs[0].double()
    c = torch.zeros(channels, channels, device=device)
    absmax = torch.zeros(channels, device=device)
    count = torch.zeros(channels, dtype=torch.int64, device=device)
    timed = partial(measure, inputs=inputs, device=device, ahead=True)
    rate = 2 * tokens * channels**2 / timed(lambda x: x.T @ x).p50
    base = math.nan
    other = "cpu" if device.type == "cuda" else "triton"  # for another kind of device
    reasons = available_backends("syrk_")
    # No GPU has run "sm90", and it may hang: benches/syrk_experiment.py tries it by itself.
    here = [name for name, why in reasons.items() if why is None and name not in (other, "sm90")]
    for backend in (_BASELINE, *here):
        first = backend == _BASELINE
        bare = partial(addmm_baseline if first else syrk_, c)
        run = bare if first else partial(bare, absmax=absmax, outlier_count=count)
        with nullcontext() if first else use_backend(backend):
            c.zero_()
            run(inputs[0])
            error = float((symmetrize_(c).double() - exact).norm() / exact.norm())
            passed = error <= _ALLOWED[device.type]
            facts = (backend, *shape, str(dtype).removeprefix("torch."), error, passed)
            if not (passed or first):
                yield Row(*facts)
                continue
            timing = timed(run)
            plain = timing if first else timed(bare)
        base = timing.p50 if first else base
        useful = tokens * channels * (channels + 1) / timing.p50
        yield Row(*facts, timing, plain.p50, base / timing.p50, useful / 1e12, useful / rate)


def addmm_baseline(c: Tensor, x: Tensor) -> None:
    """c (d, d) += xᵀx by the best that torch has: in place, in float32, on a GPU uncopied."""
    if x.dtype == torch.float32:
        c.addmm_(x.T, x)
    elif x.is_cuda:
        torch.addmm(c, x.T, x, out_dtype=torch.float32, out=c)
    else:
        rows = x.float()
        c.addmm_(rows.T, rows)


@dataclass(frozen=True)
class CalibrationRow:
    """Calibration of a model against its bare forward pass without logits, in seconds; `ratio` is
    that of the medians."""

    model: str
    tokens: int
    forward: Timing
    calibration: Timing
    ratio: float

    def line(self) -> str:
        """As printed."""
        return (
            f"calibration of {self.model}, {self.tokens} tokens: {self.calibration.p50:.1f} s, "
            f"bare forward pass {self.forward.p50:.1f} s, ratio {self.ratio:.2f}"
        )


@torch.no_grad()
def bench_calibration(model: PreTrainedModel) -> CalibrationRow:
    """Times `calibrate` and the decoder alone over the same 16 × 512 random tokens."""
    runner = decoder(model.eval())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (4, 4, 512), generator=generator)
    batches = list(tokens.to(model.device))

    def bare(_: None) -> None:
        for ids in batches:
            runner(input_ids=ids, use_cache=False)

    timed = partial(measure, inputs=[None], device=model.device, repeats=3)
    base, timing = timed(bare), timed(lambda _: calibrate(model, batches, progress=False))
    ratio = timing.p50 / base.p50
    return CalibrationRow(model.name_or_path, tokens.numel(), base, timing, ratio)
