"""What is known of an adapter or of covariances, gathered from records and covariance files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from corda_kernels.adapter import Adapter, AdapterRecord
from corda_kernels.calibration import CovarianceSet
from corda_kernels.calibration.experts import by_parameter
from corda_kernels.errors import CordaError, CovarianceError
from corda_kernels.fields import is_number
from corda_kernels.planning import Selection, Stability
from corda_kernels.planning.ranks import component_size
from corda_kernels.planning.scores import SCORING_DAMPING

# What is raised by code that reads a note of another form than it expects.
_ALTERED = (CovarianceError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@contextlib.contextmanager
def _unaltered(note: str) -> Iterator[None]:
    """Turns what reading an altered note raises into an error that says so.

    Raises:
        CordaError: the note was altered.
    """
    try:
        yield
    except _ALTERED as error:
        what = f"the note on {note} was altered ({error!r})"
        raise CordaError(f"{what}: calibrate again, or copy the file") from error


def _size(value: Any) -> Any:
    """A finite number, not negative."""
    if not is_number(value, 0):
        raise ValueError(f"{value!r} is no size")
    return value


@dataclass(frozen=True)
class Spectrum:
    """A part of a spectrum.

    Attributes:
        total: length of the whole.
        index: numbers of the values in the whole, from 0, ascending.
        value: descending.
    """

    total: int
    index: tuple[int, ...]
    value: tuple[float, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spectrum:
        """Reads what `sampled_spectrum` gave."""
        total, index = int(value["total"]), tuple(int(number) for number in value["index"])
        values = tuple(_size(number) for number in value["value"])
        places = [-1, *index, total]
        if len(index) != len(values) or not index or places != sorted(set(places)):
            raise ValueError("a spectrum's places and values do not match")
        return cls(total, index, values)

    @property
    def whole(self) -> bool:
        """Whether both ends are there."""
        return self.index[0] == 0 and self.index[-1] == self.total - 1

    @property
    def condition(self) -> float | None:
        """The largest over the smallest value; None where an end is missing or zero."""
        return self.value[0] / self.value[-1] if self.whole and self.value[-1] > 0 else None


@dataclass(frozen=True)
class Input:
    """What is known of a tensor that one or several layers read.

    Attributes:
        layers: their names.
        tokens: how many were seen.
        channels: its width.
        absmax: the largest |x| in each of some runs of neighbouring channels.
        median: over the channels, of their largest |x|.
        channel: the one with the largest |x|.
        outliers: channels in which any |x| exceeded `threshold`.
        threshold: in units of x.
        spectrum: eigenvalues of C over their mean; None where they were not computed.
        largest: eigenvalue of C over the mean; None where not computed, or C is zero.
        smallest: likewise; 0 where C is singular.
        effective_rank: (Σλ)²/Σλ²; None where no eigenvalues were computed.
    """

    layers: tuple[str, ...]
    tokens: int
    channels: int
    absmax: tuple[float, ...]
    median: float
    channel: int
    outliers: int
    threshold: float
    spectrum: Spectrum | None = None
    largest: float | None = None
    smallest: float = 0.0
    effective_rank: float | None = None

    @classmethod
    def from_json(cls, note: Mapping[str, Any]) -> Input:
        """Reads what `measured_input` or `measure_inputs` gave."""
        absmax, spectrum = tuple(map(_size, note["absmax"])), note.get("spectrum")
        found = {name: _size(note[name]) for name in note.keys() - {"layers", "absmax", "spectrum"}}
        if spectrum is not None:
            found["spectrum"] = Spectrum.from_json(spectrum)
        return cls(layers=tuple(map(str, note["layers"])), absmax=absmax, **found)

    def condition(self, damping: float) -> float | None:
        """λmax/λmin of C damped, infinite where it is singular; None where not computed."""
        if self.largest is None:
            return None if self.effective_rank is None else math.inf
        smallest = self.smallest + damping
        return (self.largest + damping) / smallest if smallest else math.inf


@dataclass(frozen=True)
class Layer:
    """What is known of a layer; None for what is not.

    Attributes:
        shape: (out, in); of a parameter of fused experts (experts, out, in).
        rank: 0 where it has no adapter, None where there is none at all.
        tokens: that its covariance comes from.
        sigma: the largest and the smallest singular value that the adapter took, of the report's
            `product`.
        spectrum: singular values of W·C, damped.
        condition: λmax/λmin of C, damped.
    """

    shape: tuple[int, ...] | None = None
    rank: int | None = None
    tokens: int | None = None
    sigma: tuple[float, float] | None = None
    spectrum: Spectrum | None = None
    condition: float | None = None

    def seen(self, note: Mapping[str, Any]) -> Layer:
        """With what `measured_layer` or `measure_spectra` gave."""
        shape = tuple(map(int, note["shape"]))
        if len(shape) not in (2, 3):
            raise ValueError(f"{note['shape']!r} is no shape")
        found: dict[str, Any] = {"shape": shape}
        if note.get("spectrum") is not None:
            found["spectrum"] = Spectrum.from_json(note["spectrum"])
        if note.get("condition") is not None:
            found["condition"] = _size(note["condition"])
        return replace(self, **found)


@dataclass(frozen=True)
class Report:
    """What `inspect` and a page show.

    Attributes:
        name: of the file or folder.
        title: what it holds, in one line.
        summary: label and text of further lines.
        layers: by name, in the model's order.
        damping: of the covariances in conditions and spectra of W·C, times their mean diagonal.
        inputs: of the layers.
        mode: "ipm", "kpm" or "task"; None where there is no adapter.
        product: whose singular values the adapter took.
        allocation: how a budget was shared out; {} without one.
        trainable: adapter parameters.
        stability: None where it was not measured.
        selection: None where there was one candidate.
        seconds: by stage.
        memory: bytes by what takes them.
        left_out: reasons by name.
        experts: for a parameter of fused experts the tokens of every expert's own covariance.
    """

    name: str
    title: str
    summary: tuple[tuple[str, str], ...]
    layers: dict[str, Layer]
    damping: float
    inputs: tuple[Input, ...] = ()
    mode: str | None = None
    product: str = "W·C"
    allocation: dict[str, Any] = field(default_factory=dict)
    trainable: int = 0
    stability: Stability | None = None
    selection: Selection | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    experts: dict[str, list[int]] = field(default_factory=dict)

    def input_of(self) -> dict[str, Input]:
        """The input of every layer of which it is known."""
        return {name: entry for entry in self.inputs for name in entry.layers}

    def conditions(self) -> dict[str, float]:
        """λmax/λmin of C damped, by layer."""
        known = {name: entry.condition(self.damping) for name, entry in self.input_of().items()}
        found = {name: known.get(name) or layer.condition for name, layer in self.layers.items()}
        return {name: value for name, value in found.items() if value is not None}

    def uniform_rank(self) -> float | None:
        """The rank that the same number of parameters would pay for in all layers."""
        sizes = {
            name: component_size(layer.shape) for name, layer in self.layers.items() if layer.shape
        }
        if not sizes or len(sizes) < len(self.layers) or not self.trainable:
            return None
        spent = sum((self.layers[name].rank or 0) * size for name, size in sizes.items())
        return spent / sum(sizes.values())


def covariance_report(
    name: str, covariances: CovarianceSet, inputs: Sequence[Mapping[str, Any]]
) -> Report:
    """What covariances hold: their spectra, conditions and channels, and how they came about.

    Conditions are with a damping of 0.01, the default of adapters. Experts' own covariances are
    shown by parameter, without spectra.

    Args:
        name: of the file.
        covariances: the set.
        inputs: what `measure_inputs` gave of it.

    Raises:
        CordaError: the notes in the file were altered.
    """
    selection, stability, lines = _told(covariances.provenance)
    tokens = max((covariance.tokens for covariance in covariances.values()), default=0)
    fused = by_parameter(covariances)
    own = {expert for names in fused.values() for expert in names}
    layers = [layer for layer in covariances if layer not in own]
    experts = f" and inputs of {len(own)} experts" if own else ""
    report = Report(
        name=name,
        title=f"{len(layers)} layers{experts}, {len(covariances.groups())} covariances",
        summary=(("calibration tokens", f"{tokens:,}"), *lines),
        layers=dict.fromkeys(layers, Layer()),
        experts={
            parameter: [covariances[e].tokens for e in fused[parameter]] for parameter in fused
        },
        damping=SCORING_DAMPING,
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
        note = record.layers[layer]
        shape = (*factors.B.shape[:-1], factors.A.shape[-1])
        layers[layer] = Layer(shape, note.rank, note.tokens, (note.sigma_max, note.sigma_min))
    trainable = sum(factors.A.numel() + factors.B.numel() for factors in adapter.layers.values())
    widest = max((factors.A.shape[-2] for factors in adapter.layers.values()), default=0)
    tokens = max((note.tokens for note in record.layers.values()), default=0)
    form = ["residual weight" if record.hold is None else f"hold {record.hold:g}"]
    form += [f"damping {record.damping or 'none'}", *(f"{k} {v}" for k, v in record.lora.items())]
    report = Report(
        name=name,
        title=f"{record.mode.upper()} adapter of {describe_ranks(record)} for {len(record.layers)} "
        f"layers of {record.base_name} ({', '.join(form)})",
        summary=(
            ("trains", f"{record.trains}{', B alone' if record.freeze_a else ''}"),
            ("largest rank of the LoRA", str(widest)),
            ("trainable parameters", f"{trainable:,}"),
            ("calibration tokens", f"{tokens:,}" if tokens else "not recorded"),
            *lines,
        ),
        layers=layers,
        damping=record.damping or (SCORING_DAMPING if record.allocation else 0.0),
        mode=record.mode,
        product=record.product,
        allocation=record.allocation,
        trainable=trainable,
        stability=stability,
        selection=selection,
        memory={"adapter": 4 * trainable * (1 if adapter.initial is None else 2)},
    )
    if not run:
        return report
    with _unaltered("the run"):
        report = with_covariances(report, measured.get("inputs", ()), measured.get("layers"))
        seconds = {stage: _size(time) for stage, time in measured.get("seconds", {}).items()}
        peaks = {
            f"peak of {'the process' if place == 'process' else place}": _size(peak)
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
    unknown = "not recorded (the commands init and calibrate record it)"
    lines = [] if notes.keys() & {"data", "mixture"} else [("data", unknown)]
    for name, value in notes.items():
        if name == "mixture":
            with _unaltered("the mixture"):
                value = describe_mixture(value)
        elif isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry!r}" for key, entry in value.items() if entry)
        if name not in ("selection", "stability", "tokens"):  # which stand elsewhere
            lines.append((name, str(value)))
    with _unaltered("the selection"):
        if notes.get("selection"):
            selection = Selection.from_json(notes["selection"])
            selection.spreads()  # so that scores too large to be summed up are told here
            lines.append(("selection", selection.summary()))
    with _unaltered("stability"):
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
        experts = {note.rank for note in record.layers.values()} - {record.rank}
        return f"rank {record.rank}{f' (of experts {min(experts)})' if experts else ''}"
    ranks = record.allocation["ranks"].values()
    none = sum(rank == 0 for rank in ranks)
    return (
        f"ranks {min(rank for rank in ranks if rank)} to {record.rank}"
        f"{f' (and 0 in {none} layers)' if none else ''}, "
        f"{record.allocation['spent']:,} of {record.allocation['budget']:,} parameters,"
    )
