"""Calibration shared out over the ranks of torch.distributed: each runs a part of the text.

Every rank has the whole model and all batches, runs those that are its own, and keeps sums. At the
end one reduction adds the sums up, so that every rank holds the covariances of the whole text.
Before that the ranks compare what they were given: sums of different layers or texts would add up
without a word.

Ranks over which FSDP2 has sharded the model run all batches in step, for each pass gathers weights
from all of them. They share the decompositions, for which each gathers the layers that are its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from corda_kernels.calibration.batches import Batch, TextSum
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.covariance import Covariance, Gradient, Group
from corda_kernels.calibration.covariance_set import CovarianceSet
from corda_kernels.calibration.experts import Reader, reader_shape, reader_weight
from corda_kernels.calibration.gradients import GradientCapture
from corda_kernels.calibration.packed import pack_symmetric, unpack_symmetric
from corda_kernels.errors import CalibrationError, ConfigError, DistributedError, first_line
from corda_kernels.files import digest
from corda_kernels.linears import linear_shape, whole, whole_layer
from corda_kernels.structure import is_sharded
from corda_kernels.versions import library_versions

T = TypeVar("T")

# Within which numbers of two ranks are the same: a GPU and a CPU round differently.
_ALIKE = 1e-4
# What a message has room for: letters of a value, of which a checksum has more, and ranks.
_SHOWN = 40
_NAMED = 3
_SAMPLES = 64  # entries of each weight by which a model is recognised


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a piece of work.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        in_step: whether all of them run the whole text.
    """

    rank: int = 0
    size: int = 1
    in_step: bool = False

    @classmethod
    def of(cls, distributed: bool, *, in_step: bool = False) -> Ranks:
        """The ranks of torch.distributed's default group, or this process alone.

        Raises:
            ConfigError: they are asked for, but there is no such group.
        """
        if not distributed:
            return cls()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            remedy = "start the program with torchrun and call init_process_group first"
            raise ConfigError(f"distributed work needs a process group: {remedy}")
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), in_step)

    def owns(self, number: int) -> bool:
        """Whether this rank runs item `number` of a list, where ranks take turns."""
        return self.in_step or number % self.size == self.rank

    def share_layers(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """This rank's part of linear layers, where decompositions cost all ranks about the same.

        Those of a sharded model hold their whole weights.
        """
        shapes = {name: linear_shape(module) for name, module in modules.items()}
        costs = {name: math.prod(shape) * max(shape) for name, shape in shapes.items()}
        loads = [0] * self.size
        mine = set()
        for name in sorted(costs, key=lambda name: -costs[name]):
            least = loads.index(min(loads))
            loads[least] += costs[name]
            if least == self.rank:
                mine.add(name)
        found = {}
        for name, module in modules.items():
            layer = whole_layer(module)  # which all ranks take part in
            if name in mine:
                found[name] = layer
        return found

    def gather(self, value: T, step: str) -> list[T]:
        """The value of every rank, in their order. Tensors in it should be on the CPU.

        Args:
            value: of this rank.
            step: what it is gathered for, by which ranks that have parted ways find out.

        Raises:
            DistributedError: a rank has ended, or has come to another step.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers_needed():
            torch.distributed.all_gather_object(values, (step, value))
        if difference := _difference([found for found, _ in values]):
            says = f"the ranks have come to different steps ({difference})"
            raise DistributedError(f"{says}: make the same calls on every rank")
        return [entry for _, entry in values]

    def agree(self, step: str, given: Callable[[], Mapping[str, object]]) -> None:
        """Makes sure that every rank has come to the same step, and was given the same for it.

        Args:
            step: the call, or what it is about to do.
            given: makes what is compared, by the names that a message gives it: tensors of float64
                on the CPU within 1e-4, all else by its text. Only called where there are ranks.

        Raises:
            DistributedError: something differs, or a rank has ended.
        """
        if self.size == 1:
            return
        versions = {f"version of {name}": text for name, text in library_versions().items()}
        mine = {
            name: value if isinstance(value, Tensor) else str(value)
            for name, value in {**versions, **given()}.items()
        }
        every = self.gather(mine, step)
        names = dict.fromkeys(name for each in every for name in each)
        found = {name: _difference([each.get(name) for each in every]) for name in names}
        differing = [f"{name} ({difference})" for name, difference in found.items() if difference]
        if differing:
            says = f"at {step} the ranks differ in {', '.join(differing)}"
            raise DistributedError(f"{says}: give every rank the same")

    def add_up(self, capture: InputCapture, device: torch.device) -> None:
        """Replaces the capture's sums by those over all ranks, one after the other in its place.

        Layers share a covariance if they do so on every rank.

        Args:
            capture: of this rank.
            device: where the model runs, and the reduction; sums that a rank keeps on the host for
                want of memory go there and back one by one.

        Raises:
            DistributedError: a rank has ended.
            CalibrationError: the device has no memory for a single packed sum.
        """
        if self.size == 1 or self.in_step:
            return
        groups = capture.sums()
        # The number of a layer's sum on each rank; None where it was never called.
        here = {name: number for number, (_, names) in enumerate(groups) for name in names}
        places = self.gather(here, "adding up the sums")
        together: dict[tuple[int | None, ...], list[str]] = {}
        for name in capture.modules:
            key = tuple(place.get(name) for place in places)
            if any(number is not None for number in key):
                together.setdefault(key, []).append(name)
        # Layers that share a sum here may not on another rank: only the last can have its place.
        last = {key[self.rank]: key for key in together}
        summed: list[Group] = []
        for key, names in together.items():
            number = key[self.rank]
            try:
                if number is None:
                    part = _zeros(capture.modules[names[0]], capture.outlier_threshold, device)
                else:
                    part, _ = groups[number]
                into = part.matrix if last[number] == key else torch.empty_like(part.matrix)
                summed.append((_added(part, into, device), names))
            except torch.OutOfMemoryError as error:
                raise CalibrationError(
                    f"{device} has too little memory to add up covariances at layer {names[0]}: go "
                    "block by block (--memory-limit), or run on the CPU (--device cpu)"
                ) from error
        capture.restore(summed)
        if isinstance(capture, GradientCapture):
            capture.gradients = {
                name: _added_gradient(capture.gradients.get(name), capture.modules[name], device)
                for names in together.values()
                for name in names
            }


def _added(part: Covariance, into: Tensor, device: torch.device) -> Covariance:
    """The sum of every rank's part, its matrix written to `into`."""
    home = part.matrix.device
    where = home if home.type == device.type else device
    triangle = pack_symmetric(part.matrix).to(where)
    absmax = part.absmax.clone().to(where)
    counts = torch.cat([part.outlier_count.cpu(), torch.tensor([part.tokens, part.calls])])
    counts = counts.to(where)
    with _peers_needed():
        torch.distributed.all_reduce(triangle)
        torch.distributed.all_reduce(absmax, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(counts)
    tokens, calls = counts[-2:].tolist()
    return Covariance(
        unpack_symmetric(triangle.to(home), len(part.matrix), out=into),
        tokens,
        calls,
        absmax.to(home),
        counts[:-2].to(home, copy=True),
        part.outlier_threshold,
    )


def _added_gradient(part: Gradient | None, module: Any, device: torch.device) -> Gradient:
    """The sum of every rank's part, where this one has any."""
    if part is None:
        part = Gradient.zeros(*reader_shape(module), like=_zeros(module, 0.0, device).matrix)
    home = part.mean.device
    where = home if home.type == device.type else device
    sums = [each.to(where) for each in (pack_symmetric(part.matrix), *part.tensors[1:])]
    with _peers_needed():
        for each in sums:
            torch.distributed.all_reduce(each)
    triangle, *others = (each.to(home) for each in sums)
    return Gradient(unpack_symmetric(triangle, len(part.matrix)), *others)


def _zeros(reader: Reader, threshold: float, device: torch.device) -> Covariance:
    """The sums of a rank on which the layer was never called."""
    channels, weight = reader_shape(reader)[1], reader_weight(reader)
    device = device if weight.is_meta else weight.device  # offloaded
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    matrix = torch.zeros(channels, channels, dtype=dtype, device=device)
    absmax = torch.zeros(channels, dtype=torch.float32, device=device)
    return Covariance(matrix, 0, 0, absmax, torch.zeros_like(absmax, dtype=torch.int64), threshold)


def _difference(values: list[Any]) -> str:
    """Which ranks have another value than rank 0, and which; "" where none has.

    Nothing is said of numbers, and of a checksum its start.
    """
    first = values[0]

    def alike(value: Any) -> bool:
        if isinstance(value, Tensor) and isinstance(first, Tensor):
            same = value.shape == first.shape
            return same and torch.allclose(value, first, rtol=_ALIKE, atol=0, equal_nan=True)
        return type(value) is type(first) and bool(value == first)

    others = [rank for rank, value in enumerate(values) if not alike(value)]
    named = []
    for rank in [0, *others[:_NAMED]] if others else []:
        text = "" if isinstance(values[rank], Tensor) else str(values[rank])
        named.append(f"{text if len(text) <= _SHOWN else text[:8]} on rank {rank}".lstrip())
    return ", ".join([*named, "…"] if others[_NAMED:] else named)


@contextlib.contextmanager
def _peers_needed() -> Iterator[None]:
    """Turns the many errors of a lost connection into one that says what has happened."""
    try:
        yield
    except torch.OutOfMemoryError:  # this rank's own, though a RuntimeError too
        raise
    except RuntimeError as error:
        says = f"another rank has ended or cannot be reached ({first_line(error)})"
        raise DistributedError(f"{says}: see what it said, and start all again") from error


def check_sharded(model: nn.Module, distributed: bool, asked: Mapping[str, bool]) -> None:
    """Refuses what cannot be done to a model that FSDP2 has sharded over ranks.

    Args:
        model: the model.
        distributed: whether the ranks are to work together.
        asked: which of such options are asked for, by what messages call them.

    Raises:
        ConfigError: an option is, or the ranks are not to.
        ModelError: the model is sharded in another way.
    """
    if not is_sharded(model):
        return
    if not distributed:
        raise ConfigError(
            "FSDP2 has sharded the model, and each of its passes needs all ranks: give every rank "
            "the same batches and distributed=True"
        )
    for name in (name for name, wanted in asked.items() if wanted):
        raise ConfigError(
            f"{name} is not possible for a model that FSDP2 has sharded: leave it out, or load the "
            'whole model (with device_map="auto" where it does not fit on one device)'
        )


def text_given(batches: Iterable[Batch]) -> dict[str, object]:
    """The text; nothing of one that may be read but once, which is compared at its end."""
    return TextSum(batches).given() if isinstance(batches, Sequence | Tensor) else {}


def layers_given(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> dict[str, object]:
    """Weights and their dtypes, and which layers it is about.

    The weights are recognised by the names, sizes and dtypes of all, and by entries of each.

    Args:
        modules: that hold the weights, by their names in the model, which itself has the name "".
        targets: names of the layers.
    """
    dtypes = {parameter.dtype for module in modules.values() for parameter in module.parameters()}
    sizes = []
    samples = {}
    for prefix, module in modules.items():
        for name, tensor in [*module.named_parameters(prefix), *module.named_buffers(prefix)]:
            sizes.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
            for part, values in _plain_parts(whole(tensor.detach())).items():
                if values.device.type != "meta":  # offloaded: its values are elsewhere
                    flat = values.reshape(-1)
                    samples[name + part] = flat[:: max(1, math.ceil(flat.numel() / _SAMPLES))]
    return {
        "targets": digest({}, "\n".join(targets)),
        "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        "weights": digest(samples, "\n".join(sizes)),
    }


def covariances_given(covariances: CovarianceSet) -> dict[str, object]:
    """The covariances, by which layers share them, their tokens and their Frobenius norms.

    No checksum: where one rank has summed up on the host for want of memory, the last bits differ.
    """
    groups = covariances.groups()
    counts = [(names, part.tokens, part.calls) for part, names in groups]
    matrices = [part.matrix for part, _ in groups]
    for gradient in covariances.gradients.values():
        matrices += gradient.tensors[:2]
    norms = [matrix.norm(dim=-1).norm().double().cpu() for matrix in matrices]
    return {
        "tokens of the covariances": digest({}, str(counts)),
        "covariances": torch.stack(norms) if norms else torch.empty(0),
        "normalization": covariances.normalize,
    }


def _plain_parts(tensor: Any) -> dict[str, Tensor]:
    """The tensor by the name "", or those that a quantised one of torchao is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {"": tensor}
    names, _ = tensor.__tensor_flatten__()
    return {
        f".{name}{part}": values
        for name in names
        for part, values in _plain_parts(getattr(tensor, name)).items()
    }
