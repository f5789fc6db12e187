"""Files in which a calibration keeps its sums: their names, and what makes them belong to a run."""

from __future__ import annotations

import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.arguments import flag, readable_path, whole_number
from corda_kernels.calibration.covariance import Group, read_groups, write_groups
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.errors import CheckpointError, CordaWarning, OutputError
from corda_kernels.fields import Check, check_fields, is_object
from corda_kernels.files import digest
from corda_kernels.linears import linear_shape

FORMAT = "corda_kernels.calibration/1"
_REMEDY = "delete it and start again"
_SAMPLES = 64  # entries of each weight by which a model is recognised

# What follows the path in a file's name: the part or the decoder block, then the rank.
_ENDING = r"(?:-(?P<part>\d+)|-block-(?P<block>\d+))?(?:-rank-\d+-of-(?P<ranks>\d+))?"

# Share of the run's time that may go into writing, and how many floating-point operations a machine
# does in the time in which it writes a byte. 2 CPU cores were measured to do 300 (SmolLM2-135M:
# 2.4 ms a token, 0.5 s for 203 MB); a GPU does far more beside the same disk, and rarely gains from
# a checkpoint.
_SHARE = 0.01
_FLOP_PER_BYTE = {"cpu": 1_000}
_FLOP_PER_BYTE_ELSEWHERE = 200_000


@dataclass(frozen=True)
class CalibrationCheckpoint:
    """Where a calibration keeps its sums while it runs.

    Attributes:
        path: the file; it appears after `every` tokens, and stays until `discard`. Parts of a run,
            decoder blocks and ranks have files of their own, with endings to this name.
        every: tokens between two writes; None for so many that writing takes about a hundredth of
            the time. Sums are kept at the end of the batch in which the count is reached; block by
            block those of a finished block, if the text has that many tokens.
        resume: whether to go on from what the file holds, if it is there.

    Raises:
        CheckpointError: the path is none.
        ConfigError: another value is not possible.
    """

    path: str | os.PathLike[str]
    every: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuses values that are not possible."""
        readable_path(self.path, CheckpointError)
        if self.every is not None:
            whole_number("every", self.every, 0)
        flag("resume", self.resume)

    def kept(self) -> list[Path]:
        """What there is of it: the file itself, or those of parts, blocks and ranks."""
        return [file for file, _ in self._matching()]

    def longest_path(self) -> Path:
        """A path as long as that of any of its files, to see beforehand whether the disk takes it.

        It has room for thousands of blocks and ranks.
        """
        return Path(f"{os.fspath(self.path)}-block-0000-rank-0000-of-0000")

    def parts(self, count: int) -> list[CalibrationCheckpoint]:
        """One for each of the calibrations that make up a run; the file itself where there is one.

        Raises:
            CheckpointError: the run to resume was made up of another number of them, or went block
                by block.
        """
        self._refuse("memory_limit", lambda found: found["block"] is not None)
        self._refuse(
            "stability",
            lambda found: (
                (found["part"] is None) != (count == 1) or int(found["part"] or 0) > count
            ),
        )
        return [self._ending(f"-{i + 1}") for i in range(count)] if count > 1 else [self]

    def block(self, index: int) -> CalibrationCheckpoint:
        """That of one decoder block.

        Raises:
            CheckpointError: the run to resume did not go block by block.
        """
        self._refuse("memory_limit", lambda found: found["block"] is None)
        return self._ending(f"-block-{index}")

    def of_rank(self, ranks: Ranks) -> CalibrationCheckpoint:
        """That of one rank; the file itself where there is one rank.

        Raises:
            CheckpointError: the run to resume was shared by another number of ranks.
        """
        self._refuse("ranks", lambda found: int(found["ranks"] or 1) != ranks.size)
        if ranks.size == 1:
            return self
        return self._ending(f"-rank-{ranks.rank}-of-{ranks.size}")

    def discard(self) -> None:
        """Deletes it once the run's result is safe."""
        for file, _ in self._matching():
            file.unlink(missing_ok=True)

    def interval(
        self, groups: Sequence[Group], modules: Mapping[str, nn.Module], device: str, *, copies: int
    ) -> float:
        """Tokens that have to pass before it pays to write these sums.

        Args:
            groups: the sums, by input.
            modules: that read them.
            device: type of the device that computes.
            copies: how many such sums are written by all parts and ranks, among which the tokens
                are shared out.
        """
        if self.every is not None:
            return self.every
        if not groups:
            return math.inf
        work = sum(covariance.matrix.shape[0] ** 2 for covariance, _ in groups)
        size = 2 * copies * work
        for _, names in groups:
            work += sum(2 * math.prod(linear_shape(modules[name])) for name in names)
        rate = _FLOP_PER_BYTE.get(device, _FLOP_PER_BYTE_ELSEWHERE)
        return math.ceil(size * rate / work / _SHARE)

    def _ending(self, ending: str) -> CalibrationCheckpoint:
        return replace(self, path=f"{os.fspath(self.path)}{ending}")

    def _refuse(self, what: str, differs: Callable[[re.Match[str]], bool]) -> None:
        """Makes sure that no file to go on from is one of a run that went another way."""
        for file, found in self._matching() if self.resume else ():
            if differs(found):
                raise foreign(file, what)

    def _matching(self) -> list[tuple[Path, re.Match[str]]]:
        """The files that have its name, whatever their endings."""
        path = Path(self.path)
        name = re.compile(re.escape(path.name) + _ENDING)
        return sorted(
            (file, found) for file in path.parent.glob("*") if (found := name.fullmatch(file.name))
        )


def foreign(path: str | os.PathLike[str], *differing: str) -> CheckpointError:
    """The error about a file that another run has left, by what differs."""
    return CheckpointError(
        f"{path} is the checkpoint of another run, which differs in "
        f"{', '.join(differing)}: "
        "resume with what that run was started with, or delete the file and start again"
    )


def fingerprint(
    model: nn.Module,
    targets: Iterable[str],
    device: torch.device,
    *,
    outlier_threshold: float,
    normalize: str,
    ranks: Ranks,
) -> dict[str, Any]:
    """What a run depends on besides its text, by the name under which it is reported."""
    found: dict[str, Any] = {
        "model": weights_digest({"": model}),
        "targets": digest({}, "\n".join(targets)),
        "outlier_threshold": outlier_threshold,
        "normalize": normalize,
        "device": device.type,
    }
    if ranks.size > 1:
        found["ranks"] = [ranks.rank, ranks.size]
    return found


def weights_digest(modules: Mapping[str, nn.Module]) -> str:
    """A checksum over the names, sizes and dtypes of all weights, and over entries of each.

    Args:
        modules: by their names in the model; the model itself has the name "".
    """
    samples = {}
    sizes = []
    named = (
        weights
        for prefix, module in modules.items()
        for weights in (module.named_parameters(prefix), module.named_buffers(prefix))
    )
    for name, tensor in itertools.chain.from_iterable(named):
        sizes.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        for part, values in _plain_parts(tensor.detach()).items():
            if values.device.type != "meta":  # offloaded: its values are elsewhere
                flat = values.reshape(-1)
                samples[name + part] = flat[:: max(1, math.ceil(flat.numel() / _SAMPLES))]
    return digest(samples, "\n".join(sizes))


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


def write_sums(
    path: str | os.PathLike[str],
    groups: Sequence[Group],
    header: Mapping[str, Any],
    *,
    stacklevel: int,
) -> None:
    """Writes sums as a checkpoint; where that fails, warns, for the run itself can go on.

    Args:
        path: the file.
        groups: the sums, by input.
        header: with the run's `fingerprint` and what else says what they are the sums of.
        stacklevel: of the warning, counted from the caller.
    """
    try:
        write_groups(path, FORMAT, groups, header)
    except OutputError as error:
        warnings.warn(
            f"this run's progress could not be kept: {error}; it goes on, and can be resumed "
            "from the last checkpoint that was written",
            CordaWarning,
            stacklevel=stacklevel + 1,
        )


def read_sums(
    path: str | os.PathLike[str],
    expected: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    fields: Mapping[str, Check],
    *,
    device: str | torch.device = "cpu",
) -> tuple[dict[str, Any], list[Group]]:
    """Reads what `write_sums` wrote: the header, and the sums.

    Args:
        path: the file.
        expected: the run's fingerprint.
        modules: that the sums must fit.
        fields: of the header, besides the fingerprint and the groups, and what each may hold.
        device: where the sums go.

    Raises:
        CheckpointError: the file is missing, truncated, altered, or of another run.
    """
    header, groups = read_groups(
        path,
        FORMAT,
        what="calibration checkpoint",
        error=CheckpointError,
        remedy=_REMEDY,
        device=device,
    )
    try:
        allowed = {"fingerprint": is_object, "groups": lambda _: True, **fields}
        check_fields(header, allowed, "the header")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its header is not that of a calibration checkpoint file ({error}): {_REMEDY}"
        ) from error
    found = header["fingerprint"]
    differing = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if differing:
        raise foreign(path, *differing)
    for part, names in groups:
        for name in names:
            module = modules.get(name)
            if module is None or linear_shape(module)[1] != part.matrix.shape[0]:
                raise CheckpointError(f"{path} holds sums that do not fit layer {name}: {_REMEDY}")
    return header, groups


def check_distinct(path: str | os.PathLike[str], groups: Sequence[Group]) -> None:
    """Makes sure that sums of one text hold each layer once.

    Raises:
        CheckpointError: they do not.
    """
    names = [name for _, members in groups for name in members]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path} holds the sums of a layer twice: {_REMEDY}")
