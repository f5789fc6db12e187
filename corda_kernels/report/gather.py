"""Gathers what a report shows from an adapter's record, from covariances, or from both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from corda_kernels.adapter import Adapter
from corda_kernels.calibration import CovarianceSet
from corda_kernels.planning import Selection, Stability
from corda_kernels.planning.compactness import SCORING_DAMPING
from corda_kernels.report.content import Input, Layer, Report, size

# Of covariances where no adapter says with which damping they are used.
DAMPING = SCORING_DAMPING

_MODES = {
    "ipm": "IPM: trains the largest components",
    "kpm": "KPM: trains the smallest components",
}
_PEAKS = {"process": "peak of the process"}


def covariance_report(
    name: str,
    covariances: CovarianceSet,
    *,
    inputs: Sequence[Mapping[str, Any]],
    spectra: Mapping[str, Mapping[str, Any]] | None = None,
) -> Report:
    """What covariances hold: their spectra, conditions and channels, and how they came about.

    Conditions are with a damping of 0.01, the default of adapters.

    Args:
        name: of the file.
        covariances: the set.
        inputs: what `measure_inputs` gave of it.
        spectra: what `measure_spectra` gave, with the same damping; None to do without.
    """
    provenance = covariances.provenance
    model = str(provenance.get("model", "a model without a name"))
    stability, selection = _judged(provenance.get("stability"), provenance.get("selection"))
    tokens = max((covariance.tokens for covariance in covariances.values()), default=0)
    summary = [
        ("Covariances", f"{len(covariances.groups())} distinct, of {len(covariances)} layers"),
        ("Model", model),
        ("Calibration tokens", f"{tokens:,}"),
        *_verdicts(stability, selection),
    ]
    if covariances.left_out:
        summary.append(("Left out", f"{len(covariances.left_out)} weights, see the end"))
    report = Report(
        name=name,
        model=model,
        summary=tuple(summary),
        layers={layer: Layer() for layer in covariances},
        inputs=(),
        damping=DAMPING,
        stability=stability,
        selection=selection,
        left_out=covariances.left_out,
    )
    return with_covariances(report, inputs, spectra)


def with_covariances(
    report: Report,
    inputs: Sequence[Mapping[str, Any]],
    spectra: Mapping[str, Mapping[str, Any]] | None = None,
) -> Report:
    """A report with what the covariances show that its adapter was made from.

    Args:
        report: of the adapter.
        inputs: what `measure_inputs` gave.
        spectra: what `measure_spectra` gave with the report's damping; None to do without.
    """
    spectra = spectra or {}
    layers = {
        name: layer.seen(spectra[name]) if name in spectra else layer
        for name, layer in report.layers.items()
    }
    seen = tuple(Input.from_json(note, report.damping) for note in inputs)
    memory = report.memory | {"covariances": _covariance_bytes(seen)}
    return replace(report, layers=layers, inputs=seen, memory=memory)


def adapter_report(name: str, adapter: Adapter) -> Report:
    """What an adapter's record keeps of itself and of the run that made it.

    Args:
        name: of the folder.
        adapter: as read from it.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, ArithmeticError: the record's notes were
            altered.
    """
    record = adapter.record
    measured = record.measured
    damping = record.damping or (SCORING_DAMPING if record.allocation else 0.0)
    ranks = record.allocation.get("ranks") or {n: e["rank"] for n, e in record.layers.items()}
    layers = {layer: _adapted(adapter, layer, rank) for layer, rank in ranks.items()}
    inputs = tuple(Input.from_json(note, damping) for note in measured.get("inputs", ()))
    stability, selection = _judged(record.stability, record.calibration.get("selection"))
    trainable = sum(factors.A.numel() + factors.B.numel() for factors in adapter.layers.values())
    tokens = max((entry["tokens"] for entry in record.layers.values()), default=0)
    none = sum(rank == 0 for rank in ranks.values())
    form = "residual weight" if record.hold is None else f"hold {record.hold:g}"
    options = ", ".join(
        [form, f"damping {record.damping or 'none'}", *(f"{k} {v}" for k, v in record.lora.items())]
    )
    summary = [
        ("Model", record.base_name),
        ("Mode", _MODES.get(record.mode, record.mode)),
        ("Rank", _ranks(record.rank, record.allocation)),
        ("Layers", f"{len(ranks) - none}" + (f"; {none} others got no rank" if none else "")),
        ("Trainable parameters", f"{trainable:,}"),
        ("Calibration tokens", f"{tokens:,}" if tokens else "not recorded"),
        ("Options", options),
        *_verdicts(stability, selection, record.rank),
    ]
    memory = {
        _PEAKS.get(place, f"peak of {place}"): int(size(peak))
        for place, peak in measured.get("peak_bytes", {}).items()
    }
    if inputs:
        memory["covariances"] = _covariance_bytes(inputs)
    memory["adapter"] = 4 * trainable * (1 if adapter.initial is None else 2)
    return Report(
        name=name,
        model=record.base_name,
        summary=tuple(summary),
        layers=layers,
        inputs=inputs,
        damping=damping,
        mode=record.mode,
        allocation=record.allocation,
        trainable=trainable,
        stability=stability,
        selection=selection,
        seconds={stage: size(time) for stage, time in measured.get("seconds", {}).items()},
        memory=memory,
    )


def _adapted(adapter: Adapter, name: str, rank: int) -> Layer:
    """One layer of an adapter, with or without a rank."""
    layer = Layer(rank=rank)
    if name in adapter.layers:
        factors, entry = adapter.layers[name], adapter.record.layers[name]
        layer = Layer(
            shape=(factors.B.shape[0], factors.A.shape[1]),
            rank=rank,
            sigma=(entry["sigma_max"], entry["sigma_min"]),
        )
    note = adapter.record.measured.get("layers", {}).get(name)
    return layer if note is None else layer.seen(note)


def _judged(stability: Any, selection: Any) -> tuple[Stability | None, Selection | None]:
    return (
        Stability.from_json(stability) if stability else None,
        Selection.from_json(selection) if selection else None,
    )


def _verdicts(
    stability: Stability | None, selection: Selection | None, rank: int | None = None
) -> list[tuple[str, str]]:
    found = [("Samples", "not measured" if stability is None else stability.summary(rank))]
    if selection is not None:
        found.append(("Selection", selection.summary()))
    return found


def _ranks(rank: int, allocation: Mapping[str, Any]) -> str:
    if not allocation:
        return f"{rank} in every layer"
    ranks = [rank for rank in allocation["ranks"].values() if rank]
    return (
        f"{min(ranks)} to {max(ranks)}, {allocation['spent']:,} of a budget of "
        f"{allocation['budget']:,} parameters"
    )


def _covariance_bytes(inputs: tuple[Input, ...]) -> int:
    """Of all distinct covariances in float32."""
    return sum(4 * entry.channels**2 for entry in inputs)
