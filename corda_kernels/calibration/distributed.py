"""Calibration shared out over the ranks of torch.distributed: each runs a part of the text.

Every rank has the whole model and all batches, runs those that are its own, and keeps sums. At the
end one reduction adds the sums up, so that every rank holds the covariances of the whole text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.covariance import Covariance, Group
from corda_kernels.calibration.packing import pack_symmetric, unpack_symmetric
from corda_kernels.errors import ConfigError, DistributedError
from corda_kernels.linears import linear_shape

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a piece of work.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, distributed: bool) -> Ranks:
        """The ranks of torch.distributed's default group, or this process alone.

        Raises:
            ConfigError: they are asked for, but there is no such group.
        """
        if not distributed:
            return cls()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ConfigError(
                "distributed work needs a process group: start the program with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def owns(self, number: int) -> bool:
        """Whether item `number` of a list is this rank's, where ranks take turns."""
        return number % self.size == self.rank

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """The names that are this rank's, where all ranks get work of about the same cost."""
        loads = [0.0] * self.size
        mine = set()
        for name in sorted(costs, key=lambda name: -costs[name]):
            least = loads.index(min(loads))
            loads[least] += costs[name]
            if least == self.rank:
                mine.add(name)
        return [name for name in costs if name in mine]

    def share_layers(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """This rank's part of linear layers, by what their decompositions cost."""
        shapes = {name: linear_shape(module) for name, module in modules.items()}
        costs = {name: math.prod(shape) * max(shape) for name, shape in shapes.items()}
        return {name: modules[name] for name in self.share(costs)}

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in their order. Tensors in it should be on the CPU.

        Raises:
            DistributedError: a rank has ended.
        """
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with _peers_needed():
            torch.distributed.all_gather_object(values, value)
        return [entry for entry in values if entry is not None]

    def add_up(self, capture: InputCapture, device: torch.device) -> None:
        """Replaces the capture's sums by those over all ranks.

        Layers share a covariance if they do so on every rank.

        Args:
            capture: of this rank.
            device: where the model runs, and the reduction; sums that a rank keeps on the host for
                want of memory go there and back one by one.

        Raises:
            DistributedError: a rank has ended.
        """
        if self.size == 1:
            return
        groups = capture.sums()
        mine = {name: part for part, names in groups for name in names}
        numbers = {name: number for number, (_, names) in enumerate(groups) for name in names}
        # Where on each rank a layer's sum is, and whether any rank keeps it in float64.
        places = self.gather(
            {name: (numbers[name], mine[name].matrix.dtype == torch.float64) for name in numbers}
        )
        together: dict[tuple[int | None, ...], list[str]] = {}
        for name in capture.modules:
            key = tuple(place.get(name, (None, False))[0] for place in places)
            if any(number is not None for number in key):
                together.setdefault(key, []).append(name)
        summed: list[Group] = []
        for names in together.values():
            wide = any(place.get(names[0], (None, False))[1] for place in places)
            part = mine.get(names[0])
            if part is None:
                part = _zeros(capture.modules[names[0]], wide, capture.outlier_threshold)
            summed.append((self._added(part, device), names))
        capture.restore(summed)

    def _added(self, part: Covariance, device: torch.device) -> Covariance:
        """The sum of every rank's part, of which only the lower triangle is filled."""
        channels, home = part.matrix.shape[0], part.matrix.device
        where = home if home.type == device.type else device
        triangle = pack_symmetric(part.matrix).to(where)
        absmax = part.absmax.clone().to(where)
        counts = torch.cat([part.outlier_count.cpu(), torch.tensor([part.tokens, part.calls])])
        counts = counts.to(where)
        with _peers_needed():
            torch.distributed.all_reduce(triangle)
            torch.distributed.all_reduce(absmax, torch.distributed.ReduceOp.MAX)
            torch.distributed.all_reduce(counts)
        return Covariance(
            unpack_symmetric(triangle.to(home), channels),
            int(counts[-2]),
            int(counts[-1]),
            absmax.to(home),
            counts[:-2].to(home, copy=True),
            part.outlier_threshold,
        )


def _zeros(module: nn.Module, wide: bool, threshold: float) -> Covariance:
    """The sums of a rank on which the layer was never called."""
    channels = linear_shape(module)[1]
    weight: Any = module.weight
    device = weight.device

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    matrix = zeros(channels, channels, dtype=torch.float64 if wide else torch.float32)
    absmax = zeros(channels, dtype=torch.float32)
    return Covariance(matrix, 0, 0, absmax, zeros(channels, dtype=torch.int64), threshold)


@contextlib.contextmanager
def _peers_needed() -> Iterator[None]:
    """Turns the many errors of a lost connection into one that says what has happened."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise DistributedError(
            f"another rank has ended or cannot be reached ({reason}): see what it said, and start "
            "all ranks again"
        ) from error
