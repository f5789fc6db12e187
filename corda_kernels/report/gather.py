"""Gathers what is known of covariances, or of an adapter, from its record and its covariances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from corda_kernels.adapter import Adapter, AdapterRecord
from corda_kernels.calibration import CovarianceSet
from corda_kernels.planning import Selection, Stability
from corda_kernels.planning.scores import SCORING_DAMPING
from corda_kernels.report.content import Input, Layer, Report, size, unaltered

# Of covariances where no adapter says with which damping they are used.
DAMPING = SCORING_DAMPING


def covariance_report(
    name: str, covariances: CovarianceSet, inputs: Sequence[Mapping[str, Any]]
) -> Report:
    """What covariances hold: their spectra, conditions and channels, and how they came about.

    Conditions are with a damping of 0.01, the default of adapters.

    Args:
        name: of the file.
        covariances: the set.
        inputs: what `measure_inputs` gave of it.

    Raises:
        CordaError: the notes in the file were altered.
    """
    selection, stability, lines = _told(covariances.provenance)
    tokens = max((covariance.tokens for covariance in covariances.values()), default=0)
    report = Report(
        name=name,
        title=f"{len(covariances)} layers, {len(covariances.groups())} covariances",
        summary=(("calibration tokens", f"{tokens:,}"), *lines),
        layers=dict.fromkeys(covariances, Layer()),
        damping=DAMPING,
        stability=stability,
        selection=selection,
        left_out=covariances.left_out,
    )
    return with_covariances(report, inputs)


def adapter_report(name: str, adapter: Adapter, *, run: bool = True) -> Report:
    """What an adapter's record keeps of itself and of the run that made it.

    Args:
        name: of the folder.
        adapter: as read from it.
        run: whether to take in the notes on the run: spectra, inputs, time and memory.

    Raises:
        CordaError: the record's notes were altered.
    """
    record, measured = adapter.record, adapter.record.measured
    notes = record.calibration | {"stability": record.stability}
    selection, stability, lines = _told(notes, record.rank)
    layers = dict.fromkeys(record.allocation.get("ranks") or record.layers, Layer(rank=0))
    for layer, factors in adapter.layers.items():
        entry = record.layers[layer]
        shape, sigma = (
            (len(factors.B), factors.A.shape[1]),
            (entry["sigma_max"], entry["sigma_min"]),
        )
        layers[layer] = Layer(shape, entry["rank"], entry["tokens"], sigma)
    trainable = sum(factors.A.numel() + factors.B.numel() for factors in adapter.layers.values())
    tokens = max((entry["tokens"] for entry in record.layers.values()), default=0)
    form = ["residual weight" if record.hold is None else f"hold {record.hold:g}"]
    form += [f"damping {record.damping or 'none'}", *(f"{k} {v}" for k, v in record.lora.items())]
    report = Report(
        name=name,
        title=f"{record.mode.upper()} adapter of {describe_ranks(record)} for {len(record.layers)} "
        f"layers of {record.base_name} ({', '.join(form)})",
        summary=(
            ("trains", f"the {'largest' if record.mode == 'ipm' else 'smallest'} components"),
            ("trainable parameters", f"{trainable:,}"),
            ("calibration tokens", f"{tokens:,}" if tokens else "not recorded"),
            *lines,
        ),
        layers=layers,
        damping=record.damping or (SCORING_DAMPING if record.allocation else 0.0),
        mode=record.mode,
        allocation=record.allocation,
        trainable=trainable,
        stability=stability,
        selection=selection,
        memory={"adapter": 4 * trainable * (1 if adapter.initial is None else 2)},
    )
    if not run:
        return report
    with unaltered("the run"):
        report = with_covariances(report, measured.get("inputs", ()), measured.get("layers"))
        seconds = {stage: size(time) for stage, time in measured.get("seconds", {}).items()}
        peaks = {
            f"peak of {'the process' if place == 'process' else place}": size(peak)
            for place, peak in measured.get("peak_bytes", {}).items()
        }
        return replace(report, seconds=seconds, memory=peaks | report.memory)


def with_covariances(
    report: Report,
    inputs: Sequence[Mapping[str, Any]],
    layers: Mapping[str, Mapping[str, Any]] | None = None,
) -> Report:
    """A report with what was measured of the covariances that its adapter was made from.

    Args:
        report: of the adapter, or of the covariances.
        inputs: what `measure_inputs` gave.
        layers: what `measure_spectra` gave with the report's damping; None to do without.
    """
    notes = layers or {}
    seen = {
        name: layer if (note := notes.get(name)) is None else layer.seen(note)
        for name, layer in report.layers.items()
    }
    found = tuple(map(Input.from_json, inputs))
    # Of all distinct covariances in float32.
    memory = report.memory | {"covariances": sum(4 * entry.channels**2 for entry in found)}
    return replace(report, layers=seen, inputs=found, memory=memory)


def _told(
    notes: Mapping[str, Any], rank: int | None = None
) -> tuple[Selection | None, Stability | None, list[tuple[str, str]]]:
    """Selection and stability, where there are notes on them, and the lines of a summary."""
    selection, stability = None, None
    samples = "their stability was not measured"
    lines = []
    for name, value in notes.items():
        if name == "mixture":
            with unaltered("the mixture"):
                value = describe_mixture(value)
        elif isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry!r}" for key, entry in value.items() if entry)
        if name not in ("selection", "stability"):
            lines.append((name, str(value)))
    with unaltered("the selection"):
        if notes.get("selection"):
            selection = Selection.from_json(notes["selection"])
            selection.spreads()  # so that scores too large to be summed up are told here
            lines.append(("selection", selection.summary()))
    with unaltered("stability"):
        if notes.get("stability"):
            stability = Stability.from_json(notes["stability"])
            samples = stability.summary(rank)
    return selection, stability, [*lines, ("samples", samples)]


def describe_mixture(mixture: Mapping[str, Any]) -> str:
    """What was mixed, in one line."""
    files = mixture.get("files") or [f"set {index}" for index in range(len(mixture["sources"]))]
    equal = ", their traces made equal" if mixture["normalize"] == "trace" else ""
    if isinstance(mixture["weights"], Mapping):
        return f"{' + '.join(files)}, weights by layer{equal}"
    parts = zip(mixture["weights"], files, strict=True)
    return " + ".join(f"{weight:.3g} {file}" for weight, file in parts) + equal


def describe_ranks(record: AdapterRecord) -> str:
    """The ranks of an adapter in a few words."""
    if not record.allocation:
        return f"rank {record.rank}"
    ranks = record.allocation["ranks"].values()
    none = sum(rank == 0 for rank in ranks)
    return (
        f"ranks {min(rank for rank in ranks if rank)} to {record.rank}"
        f"{f' (and 0 in {none} layers)' if none else ''}, "
        f"{record.allocation['spent']:,} of {record.allocation['budget']:,} parameters,"
    )
