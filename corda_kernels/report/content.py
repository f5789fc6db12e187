"""What is known of an adapter or of covariances, as plain data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from corda_kernels.errors import CordaError, CovarianceError
from corda_kernels.fields import is_number
from corda_kernels.planning import Selection, Stability

# What is raised by code that reads a note of another form than it expects.
_ALTERED = (CovarianceError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@contextlib.contextmanager
def unaltered(note: str) -> Iterator[None]:
    """Turns what reading an altered note raises into an error that says so.

    Raises:
        CordaError: the note was altered.
    """
    try:
        yield
    except _ALTERED as error:
        raise CordaError(
            f"the note on {note} was altered ({error!r}): calibrate again, or copy the file"
        ) from error


def size(value: Any) -> Any:
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
        values = tuple(size(number) for number in value["value"])
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
        absmax, spectrum = tuple(map(size, note["absmax"])), note.get("spectrum")
        found = {name: size(note[name]) for name in note.keys() - {"layers", "absmax", "spectrum"}}
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
        shape: (out, in).
        rank: 0 where it has no adapter, None where there is none at all.
        tokens: that its covariance comes from.
        sigma: the largest and the smallest singular value of W·C that the adapter took.
        spectrum: singular values of W·C, damped.
        condition: λmax/λmin of C, damped.
    """

    shape: tuple[int, int] | None = None
    rank: int | None = None
    tokens: int | None = None
    sigma: tuple[float, float] | None = None
    spectrum: Spectrum | None = None
    condition: float | None = None

    def seen(self, note: Mapping[str, Any]) -> Layer:
        """With what `measured_layer` or `measure_spectra` gave."""
        outputs, inputs = note["shape"]
        spectrum, condition = note.get("spectrum"), note.get("condition")
        return replace(
            self,
            shape=(int(outputs), int(inputs)),
            spectrum=self.spectrum if spectrum is None else Spectrum.from_json(spectrum),
            condition=self.condition if condition is None else size(condition),
        )


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
        mode: "ipm" or "kpm"; None where there is no adapter.
        allocation: how a budget was shared out; {} without one.
        trainable: adapter parameters.
        stability: None where it was not measured.
        selection: None where there was one candidate.
        seconds: by stage.
        memory: bytes by what takes them.
        left_out: reasons by name.
    """

    name: str
    title: str
    summary: tuple[tuple[str, str], ...]
    layers: dict[str, Layer]
    damping: float
    inputs: tuple[Input, ...] = ()
    mode: str | None = None
    allocation: dict[str, Any] = field(default_factory=dict)
    trainable: int = 0
    stability: Stability | None = None
    selection: Selection | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

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
        sizes = {name: sum(layer.shape) for name, layer in self.layers.items() if layer.shape}
        if not sizes or len(sizes) < len(self.layers) or not self.trainable:
            return None
        spent = sum((self.layers[name].rank or 0) * size for name, size in sizes.items())
        return spent / sum(sizes.values())
