"""What the command line makes of the environment that torchrun sets."""

from __future__ import annotations

import warnings

import pytest
import torch

from corda_kernels.cli import _quiet, options
from corda_kernels.errors import (
    ConfigError,
    ConvergenceWarning,
    CordaWarning,
    DataWarning,
    LeftOutWarning,
    PaddingWarning,
    RankDeficientWarning,
)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the second rank of four, two on a machine."""
    for name, value in {"WORLD_SIZE": 4, "RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_each_rank_takes_a_gpu_of_its_own(torchrun: pytest.MonkeyPatch) -> None:
    torchrun.setattr(torch.cuda, "is_available", lambda: True)
    assert [options.resolve_device(name) for name in ("cpu", "cuda", "auto")] == [
        *("cpu", "cuda:1", "cuda:1")
    ]
    torchrun.setenv("WORLD_SIZE", "1")
    assert [options.resolve_device(name) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]


def test_ranks_do_not_share_a_gpu(torchrun: pytest.MonkeyPatch) -> None:
    shared = "--device cuda:1 .* gives no rank a GPU of its own: .* give --device cuda"
    with pytest.raises(ConfigError, match=shared):
        options.resolve_device("cuda:1")
    with pytest.raises(ConfigError, match=r"--device xpu .* gives no rank a GPU of its own"):
        options.resolve_device("xpu")


@pytest.mark.parametrize("rank", [None, "first"])
def test_another_launcher_than_torchrun_is_pointed_out(
    torchrun: pytest.MonkeyPatch, rank: str | None
) -> None:
    if rank is None:
        torchrun.delenv("LOCAL_RANK")
    else:
        torchrun.setenv("LOCAL_RANK", rank)
    with pytest.raises(ConfigError, match=r"a LOCAL_RANK of .*: start the program with torchrun"):
        options.resolve_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_ranks_without_a_gpu_say_so(torchrun: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--device 'cuda' is not there"), options.ranks("cuda"):
        pass


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        *((kind, True) for kind in (ConvergenceWarning, CordaWarning, PaddingWarning)),
        *((kind, False) for kind in (DataWarning, LeftOutWarning, RankDeficientWarning)),
    ],
)
def test_a_rank_shows_warnings_of_its_own_share(
    torchrun: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type[Warning],
    shown: bool,
) -> None:
    for library in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        torchrun.setenv(library, "error")
    with warnings.catch_warnings():
        _quiet()
        for rank in (0, 1):
            torchrun.setenv("RANK", str(rank))
            warnings.warn("layer x", kind, stacklevel=1)
    lines = ["rank 0: warning: layer x", "rank 1: warning: layer x"]
    assert capsys.readouterr().err.splitlines() == lines[: 2 if shown else 1]
