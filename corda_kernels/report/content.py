"""What a report shows, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from corda_kernels.planning import Selection, Stability


def size(value: Any) -> float:
    """A finite number, not negative."""
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{value!r} is no size")
    return number


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
        condition: λmax/λmin of C with the damping of the report; None where not computed.
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
    condition: float | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any], damping: float) -> Input:
        """Reads what `measured_input` or `measure_inputs` gave."""
        spectrum = value.get("spectrum")
        smallest = size(value.get("smallest", 0.0)) + damping
        condition = None
        if "largest" in value:
            largest = size(value["largest"]) + damping
            condition = largest / smallest if smallest else math.inf
        return cls(
            tuple(str(name) for name in value["layers"]),
            int(value["tokens"]),
            int(value["channels"]),
            tuple(size(entry) for entry in value["absmax"]),
            size(value["median"]),
            int(value["channel"]),
            int(value["outliers"]),
            size(value["threshold"]),
            None if spectrum is None else Spectrum.from_json(spectrum),
            condition,
        )


@dataclass(frozen=True)
class Layer:
    """What is known of a layer; None for what is not.

    Attributes:
        shape: (out, in).
        rank: 0 where it has no adapter, None where there is none at all.
        sigma: the largest and the smallest singular value of W·C that the adapter took.
        spectrum: singular values of W·C, damped.
        condition: λmax/λmin of C, damped.
    """

    shape: tuple[int, int] | None = None
    rank: int | None = None
    sigma: tuple[float, float] | None = None
    spectrum: Spectrum | None = None
    condition: float | None = None

    def seen(self, note: Mapping[str, Any]) -> Layer:
        """With what `measured_layers` or `measure_spectra` gave."""
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
    """What a page shows.

    Attributes:
        name: of the file or folder.
        model: name or path of the base.
        summary: label and text of each line at the top.
        layers: by name, in the model's order.
        inputs: of the layers.
        damping: of the covariances in conditions and spectra of W·C, times their mean diagonal.
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
    model: str
    summary: tuple[tuple[str, str], ...]
    layers: dict[str, Layer]
    inputs: tuple[Input, ...]
    damping: float
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
        inputs = self.input_of()
        found = {}
        for name, layer in self.layers.items():
            entry = inputs.get(name)
            value = layer.condition if entry is None else entry.condition or layer.condition
            if value is not None:
                found[name] = value
        return found

    def uniform_rank(self) -> float | None:
        """The rank that the same number of parameters would pay for in all layers."""
        sizes = {name: sum(layer.shape) for name, layer in self.layers.items() if layer.shape}
        if not sizes or len(sizes) < len(self.layers) or not self.trainable:
            return None
        spent = sum((self.layers[name].rank or 0) * size for name, size in sizes.items())
        return spent / sum(sizes.values())
