from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Make
from stages import one_stage
from torch import Tensor, nn

from corda_kernels import CovarianceSet, calibrate
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration import run as run_module
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.calibration.journal import Journal
from corda_kernels.errors import CheckpointError, CordaWarning

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """What a kill looks like from inside: nothing catches it."""


@pytest.fixture(autouse=True)
def _few_tokens_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that most of a text lies behind a checkpoint, and some batches run together."""
    monkeypatch.setattr(run_module, "_TOGETHER", {False: 24})


def random_batches(count: int = 6) -> list[Tensor]:
    """10, 10, 12, 12, 14, 14, … tokens, of which the first four batches run in pairs."""
    return [torch.randint(3, 64, (2, 5 + index // 2)) for index in range(count)]


def until(batches: list[Tensor], end: int) -> Iterator[Tensor]:
    """The batches, with a kill before number `end`."""
    yield from batches[:end]
    raise Killed


def checkpoint(folder: Path, **options: Any) -> CalibrationCheckpoint:
    return CalibrationCheckpoint(folder / "run", **({"every": 1, "resume": True} | options))


def run(model: nn.Module, batches: Any, **options: Any) -> CovarianceSet:
    options = {"outlier_threshold": 1.0, "progress": False} | options
    return calibrate(model, batches, **options)


def contents(covariances: CovarianceSet, path: Path) -> bytes:
    covariances.save(path)
    return path.read_bytes()


def interrupted(model: nn.Module, batches: list[Tensor], end: int, folder: Path, **o: Any) -> Path:
    """Runs up to batch `end` and dies; the checkpoint's path."""
    kept = checkpoint(folder, every=o.pop("every", 1))
    with pytest.raises(Killed):
        run(model, until(batches, end), checkpoint=kept, **o)
    return Path(kept.path)


@pytest.mark.parametrize(("architecture", "every"), [("llama", 1), ("gpt2", 20), ("mixtral", 20)])
@pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning")
def test_a_resumed_run_gives_the_same_file_wherever_it_was_killed(
    tiny_model: Make, tmp_path: Path, architecture: str, every: int
) -> None:
    model, batches = tiny_model(architecture), random_batches()
    expected = contents(run(model, batches), tmp_path / "whole")
    for end in range(len(batches) + 1):
        interrupted(model, batches, end, tmp_path, every=every)
        ran: list[int] = []
        handle = model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        found = run(model, batches, checkpoint=checkpoint(tmp_path, every=every))
        handle.remove()
        assert contents(found, tmp_path / "resumed") == expected
        checkpoint(tmp_path).discard()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["resumed", "whole"]


def test_what_is_done_is_not_done_again(tiny_model: Make, tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), random_batches()
    interrupted(model, batches, 4, tmp_path)
    ran = []
    model.base_model.register_forward_pre_hook(lambda *_: ran.append(1))
    run(model, batches, checkpoint=checkpoint(tmp_path))
    assert len(ran) == 2


def test_a_run_can_be_killed_again_and_again(tiny_model: Make, tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), random_batches()
    for end in range(1, 6):
        interrupted(model, batches, end, tmp_path)
    found = run(model, batches, checkpoint=checkpoint(tmp_path))
    assert contents(found, tmp_path / "a") == contents(run(model, batches), tmp_path / "b")


@pytest.mark.parametrize("normalize", ["tokens", "peft"])
def test_layers_that_part_ways_do_so_after_a_kill_too(
    tmp_path: Path, normalize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_TOGETHER", {False: 0})  # each batch is a call

    class Parting(nn.Module):
        """Two layers that read one tensor at first, and their own from the third call on."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 6)
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.calls = 0

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            self.calls += 1
            return self.one(x) + self.two(x if self.calls < 3 else 2 * x)

    torch.manual_seed(0)
    model, batches = Parting(), random_batches()
    expected = contents(run(model, batches, normalize=normalize), tmp_path / "whole")
    for end in range(1, 6):
        model.calls = 0
        interrupted(model, batches, end, tmp_path, normalize=normalize)
        model.calls = end
        found = run(model, batches, normalize=normalize, checkpoint=checkpoint(tmp_path))
        assert contents(found, tmp_path / "resumed") == expected


def test_sums_are_kept_at_token_counts(tiny_model: Make, tmp_path: Path) -> None:
    model, batches, kept = tiny_model("llama"), random_batches(8), []

    def watched() -> Iterator[Tensor]:
        for batch in batches:
            kept.append((tmp_path / "run").exists())
            (tmp_path / "run").unlink(missing_ok=True)
            yield batch

    run(model, watched(), checkpoint=checkpoint(tmp_path, every=25))
    # 44, then 28, then 32 tokens since the last write.
    assert kept == [False, False, False, False, True, False, True, False]
    assert (tmp_path / "run").exists()


def test_by_default_a_short_run_keeps_nothing(tiny_model: Make, tmp_path: Path) -> None:
    run(tiny_model("llama"), random_batches(), checkpoint=checkpoint(tmp_path, every=None))
    assert not list(tmp_path.iterdir())


def test_without_resume_a_checkpoint_is_overwritten(tiny_model: Make, tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), random_batches()
    interrupted(model, batches[::-1], 4, tmp_path)
    fresh = checkpoint(tmp_path, resume=False)
    assert contents(run(model, batches, checkpoint=fresh), tmp_path / "a") == contents(
        run(model, batches), tmp_path / "b"
    )


OTHER: dict[str, Callable[[nn.Module, list[Tensor], dict[str, Any]], None]] = {
    "weights": lambda model, batches, options: model.model.norm.weight.data.add_(1),
    "targets": lambda model, batches, options: options.update(targets=["q_proj"]),
    "outlier_threshold": lambda model, batches, options: options.update(outlier_threshold=2.0),
    "normalize": lambda model, batches, options: options.update(normalize="peft"),
    "data": lambda model, batches, options: batches[1].add_(1),
}


@pytest.mark.parametrize("what", OTHER)
def test_the_checkpoint_of_another_run_is_refused_by_what_differs(
    tiny_model: Make, tmp_path: Path, what: str
) -> None:
    model, batches = tiny_model("llama"), random_batches()
    path = interrupted(model, batches, 4, tmp_path)
    before = path.read_bytes()
    options: dict[str, Any] = {}
    OTHER[what](model, batches, options)
    with pytest.raises(CheckpointError, match=rf"run is the .* another run.* differs in {what}: "):
        run(model, batches, checkpoint=checkpoint(tmp_path), **options)
    assert path.read_bytes() == before


def test_fewer_batches_than_were_summed_up_are_refused(tiny_model: Make, tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), random_batches()
    interrupted(model, batches, 4, tmp_path)
    with pytest.raises(CheckpointError, match="differs in data"):
        run(model, batches[:3], checkpoint=checkpoint(tmp_path))


def test_more_text_may_follow(tiny_model: Make, tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), random_batches()
    interrupted(model, batches[:4], 4, tmp_path)
    found = run(model, batches, checkpoint=checkpoint(tmp_path))
    assert contents(found, tmp_path / "a") == contents(run(model, batches), tmp_path / "b")


def test_a_damaged_checkpoint_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), random_batches()
    path = interrupted(model, batches, 4, tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 4
    saved = contents(run(model, batches), tmp_path / "covariances")
    for damaged, reason in (
        (whole[:-1], "truncated"),
        (whole[:100], "truncated"),
        (b"", "truncated"),
        (bytes(flipped), "altered or damaged"),
        (saved, r"not a calibration checkpoint file .*corda_kernels.covariances/1"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{path}.*{reason}"):
            run(model, batches, checkpoint=checkpoint(tmp_path))


def test_a_full_disk_warns_and_loses_nothing(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = tiny_model("llama"), random_batches()
    expected = contents(run(model, batches), tmp_path / "whole")
    path = interrupted(model, batches, 3, tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.warns(CordaWarning) as caught:
            whole = run(model, batches, checkpoint=checkpoint(tmp_path))
    assert caught[0].filename == __file__
    assert "No space left on device" in str(caught[0].message)
    assert path.read_bytes() == before
    assert contents(whole, tmp_path / "a") == expected
    assert contents(run(model, batches, checkpoint=checkpoint(tmp_path)), path) == expected


def test_halves_are_resumed_wherever_they_were_killed(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = tiny_model("llama"), random_batches()
    options: dict[str, Any] = {"rank": 4, "progress": False}
    expected = contents(one_stage(model, batches, **options), tmp_path / "whole")
    for end in range(2 * 3 + 1):
        kept = checkpoint(tmp_path)
        writes = 0

        def die(*_: Any, end: int = end) -> None:
            nonlocal writes
            writes += 1
            if writes > end:
                raise Killed

        handle = model.base_model.register_forward_pre_hook(die)
        if end < 6:
            with pytest.raises(Killed):
                one_stage(model, batches, checkpoint=kept, **options)
        handle.remove()
        found = one_stage(model, batches, checkpoint=kept, **options)
        assert contents(found, tmp_path / "resumed") == expected
        kept.discard()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["resumed", "whole"]


def test_halves_do_not_go_on_from_a_whole(tiny_model: Make, tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), random_batches()
    interrupted(model, batches, 4, tmp_path)
    with pytest.raises(CheckpointError, match="differs in stability"):
        one_stage(model, batches, rank=4, checkpoint=checkpoint(tmp_path))
    shutil.move(tmp_path / "run", tmp_path / "run-1")
    with pytest.raises(CheckpointError, match="differs in stability"):
        one_stage(model, batches, checkpoint=checkpoint(tmp_path))


def test_discarding_takes_the_files_of_the_run_alone(tmp_path: Path) -> None:
    for name in ("run", "run-1", "run-block-3-rank-0-of-2", "run-other", "running"):
        (tmp_path / name).touch()
    checkpoint(tmp_path).discard()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run-other", "running"]


@pytest.mark.parametrize(
    ("device", "sizes"), [("cpu", (576, 1536)), ("cpu", (4096, 11008)), ("cuda", (4096, 11008))]
)
def test_the_default_interval_costs_about_a_hundredth(
    device: str, sizes: tuple[int, int], tmp_path: Path
) -> None:
    narrow, wide = sizes
    layers = {"up": nn.Linear(narrow, wide, device="meta"), "down": nn.Linear(wide, narrow)}
    capture = InputCapture(layers)
    journal = Journal(checkpoint(tmp_path, every=None), dict, torch.device(device), Ranks())
    for name, layer in layers.items():
        capture._read(name, torch.zeros(1, layer.in_features), None)
    written = 2 * (narrow**2 + wide**2)
    operations = 4 * narrow * wide + narrow**2 + wide**2
    rate = 1_000 if device == "cpu" else 200_000
    assert written * rate == pytest.approx(
        0.01 * operations * journal.interval([capture]), rel=1e-3
    )
