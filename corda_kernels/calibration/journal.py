"""Calibration that survives a kill: its sums are kept in files, and a run can go on from those.

In one pass the sums so far are kept every so many tokens, between batches that do not run together,
when every shared tensor has been settled: a run that goes on from them adds the same numbers in the
same order as one that was never interrupted. Each of several ranks keeps those of its own batches,
and goes on from where they end; what the others have done meanwhile does not matter, since sums
meet at the end of the text only.

Block by block each finished block's sums over the whole text are kept. A run that goes on sends the
hidden states through such blocks without any products; the hidden states themselves, far larger
than the sums on a long text, are never written.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from corda_kernels.arguments import flag, readable_path, whole_number
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.covariance_file import read_groups, write_groups
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.calibration.experts import reader_shape, reader_weight
from corda_kernels.errors import CheckpointError, CordaWarning, OutputError, warn
from corda_kernels.fields import Check, is_object, is_text, is_whole, list_of, whole

FORMAT = "corda_kernels.calibration/1"
_FILE: Any = {
    "format_": FORMAT,
    "what": "calibration checkpoint",
    "error": CheckpointError,
    "remedy": "delete it and start again",
}
# What a file says of itself, besides its groups, and what each field may hold.
_FIELDS: dict[str, Check] = {
    "fingerprint": is_object,
    # Sums are of a batch at least, or those before the first one would count twice.
    "batches": whole(1),
    "text": is_text,
    "parts": list_of(is_whole),
    "gradients?": list_of(is_text),
    "gradient_parts": list_of(is_whole),
}

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
    """The file in which a calibration keeps its sums while it runs.

    Attributes:
        path: file to write; it appears after `every` tokens, and stays until `discard`. Parts of a
            run, decoder blocks and ranks each have a file of their own, whose name begins so.
        every: number of tokens between two writes; None for so many that writing takes about 1 % of
            the time. Sums are written after the batch that reaches the number, and those that run
            together with it; block by block, after each block, if the text has that many tokens.
        resume: whether to continue from the file, if it exists.

    Raises:
        CheckpointError: the path is no path.
        ConfigError: another attribute has a value that is not allowed.

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
        for file, found in self._to_resume():
            if found["block"] is not None:
                raise foreign(file, "memory_limit")
            if (found["part"] is None) != (count == 1) or int(found["part"] or 0) > count:
                raise foreign(file, "stability")
        return [self._ending(f"-{i + 1}") for i in range(count)] if count > 1 else [self]

    def block(self, index: int) -> CalibrationCheckpoint:
        """That of one decoder block.

        Raises:
            CheckpointError: the run to resume did not go block by block.
        """
        for file, found in self._to_resume():
            if found["block"] is None:
                raise foreign(file, "memory_limit")
        return self._ending(f"-block-{index}")

    def of_rank(self, ranks: Ranks) -> CalibrationCheckpoint:
        """That of one rank; the file itself where there is one rank.

        Raises:
            CheckpointError: the run to resume was shared by another number of ranks.
        """
        for file, found in self._to_resume():
            if int(found["ranks"] or 1) != ranks.size:
                raise foreign(file, "ranks")
        return self if ranks.size == 1 else self._ending(f"-rank-{ranks.rank}-of-{ranks.size}")

    def discard(self) -> None:
        """Deletes it once the run's result is safe."""
        for file in self.kept():
            file.unlink(missing_ok=True)

    def _ending(self, ending: str) -> CalibrationCheckpoint:
        return replace(self, path=f"{os.fspath(self.path)}{ending}")

    def _to_resume(self) -> list[tuple[Path, re.Match[str]]]:
        return self._matching() if self.resume else []

    def _matching(self) -> list[tuple[Path, re.Match[str]]]:
        """The files that have its name, whatever their endings."""
        path = Path(self.path)
        name = re.compile(re.escape(path.name) + _ENDING)
        return sorted(
            (file, found) for file in path.parent.glob("*") if (found := name.fullmatch(file.name))
        )


@dataclass(frozen=True)
class Journal:
    """Keeps the sums of captures in a checkpoint's files, or restores them.

    Attributes:
        checkpoint: where to; None for nowhere.
        given: makes what the run depends on besides its text, by the names in messages.
        device: where the model runs.
        ranks: that share the text.

    Raises:
        CheckpointError: the run to resume was shared by another number of ranks.
    """

    checkpoint: CalibrationCheckpoint | None
    given: Callable[[], Mapping[str, object]]
    device: torch.device
    ranks: Ranks

    def __post_init__(self) -> None:
        """Refuses what other ranks have left."""
        if self.checkpoint is not None:
            self.checkpoint.of_rank(self.ranks)

    @cached_property
    def _fingerprint(self) -> dict[str, object]:
        return {**self.given(), "ranks": [self.ranks.rank, self.ranks.size]}

    def file(self, block: int | None = None) -> Path:
        """This rank's file, of one decoder block or of a pass over the whole model."""
        assert self.checkpoint is not None
        checkpoint = self.checkpoint if block is None else self.checkpoint.block(block)
        return Path(checkpoint.of_rank(self.ranks).path)

    def holds(self, block: int | None = None) -> bool:
        """Whether there is something to go on from."""
        checkpoint = self.checkpoint
        return checkpoint is not None and checkpoint.resume and self.file(block).exists()

    def interval(self, captures: Sequence[InputCapture]) -> float:
        """Tokens that have to pass before it pays to write the captures' sums."""
        if self.checkpoint is None:
            return math.inf
        if self.checkpoint.every is not None:
            return self.checkpoint.every
        groups, modules = captures[0].sums(), captures[0].modules
        if not groups:
            return math.inf
        work = sum(covariance.matrix.shape[0] ** 2 for covariance, _ in groups)
        # Parts and ranks share the tokens out, and each of them writes as much.
        size = 2 * len(captures) * self.ranks.size * work
        for _, names in groups:
            work += sum(2 * math.prod(reader_shape(modules[name])) for name in names)
        rate = _FLOP_PER_BYTE.get(self.device.type, _FLOP_PER_BYTE_ELSEWHERE)
        return math.ceil(size * rate / work / _SHARE)

    def keep(
        self, captures: Sequence[InputCapture], batches: int, text: str, block: int | None = None
    ) -> None:
        """Writes the captures' sums; where that fails, warns, for the run itself can go on.

        Args:
            captures: one for each part of the text.
            batches: how many batches the sums are of, those of other ranks included.
            text: checksum of the rank's own among them.
            block: the decoder block that the captures are of.
        """
        sums = [capture.sums() for capture in captures]
        gradients = [[*capture.gradients.items()] for capture in captures]
        header = {
            "fingerprint": self._fingerprint,
            "batches": batches,
            "text": text,
            "parts": [len(groups) for groups in sums],
            "gradient_parts": [len(part) for part in gradients],
        }
        try:
            chained = list(itertools.chain(*gradients))
            write_groups(self.file(block), FORMAT, itertools.chain(*sums), header, chained)
        except OutputError as error:
            says = f"this run goes on, but its progress could not be kept: {error}"
            warn(f"{says}; it can be resumed from the checkpoint before", CordaWarning)

    def restore(
        self, captures: Sequence[InputCapture], block: int | None = None
    ) -> tuple[int, str]:
        """Gives the captures the sums that `keep` wrote; returns its `batches` and `text`.

        Raises:
            CheckpointError: the file is missing, truncated, altered, or of another run.
        """
        file, modules = self.file(block), captures[0].modules
        device = torch.device("cpu")  # sums that are still added to move to where their inputs are
        if block is not None:
            # Where the block's inputs come from, and hence its sums are: not where weights wait.
            device = reader_weight(next(iter(modules.values()))).device
            device = self.device if device.type == "meta" else device
        header, groups, gradients = read_groups(file, _FIELDS, device, **_FILE)
        found, expected = header["fingerprint"], self._fingerprint
        differing = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        if differing:
            raise foreign(file, *differing)
        shapes = {name: reader_shape(module) for name, module in modules.items()}
        odd = [name for name, part in gradients if part.mean.shape != shapes.get(name)]
        counts, of_parts = header["parts"], header["gradient_parts"]
        wrong = sum(counts) != len(groups) or sum(of_parts) != len(gradients)
        if wrong or not len(counts) == len(of_parts) == len(captures):
            raise foreign(file, "stability")
        for capture, count, some in zip(captures, counts, of_parts, strict=True):
            own, groups = groups[:count], groups[count:]
            capture.gradients = dict(gradients[:some])
            gradients = gradients[some:]
            left = dict(shapes)  # each layer once
            for part, names in own:
                odd += [n for n in names if left.pop(n, (0, 0))[1] != len(part.matrix)]
            capture.restore(own)
        if odd:
            says = f"{file} holds sums that do not fit layer {odd[0]}"
            raise CheckpointError(f"{says}: {_FILE['remedy']}")
        return header["batches"], header["text"]


def foreign(path: str | os.PathLike[str], *differing: str) -> CheckpointError:
    """The error about a file that another run has left, by what differs."""
    return CheckpointError(
        f"{path} is the checkpoint of another run, which differs in {', '.join(differing)}: "
        "resume with what that run was started with, or delete the file and start again"
    )
