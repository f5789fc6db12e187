from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from corda_kernels import kernels
from corda_kernels.errors import ConfigError, ConvergenceWarning, DecompositionError, RankError
from corda_kernels.linalg import CoSVD, co_svd, co_svd_layers, layers, parallel_map

# Of more than 256 channels, so that layers without short sides are iterated with.
SHAPES = {"q": (272, 272), "k": (64, 272), "v": (64, 272), "up": (400, 272), "down": (272, 400)}


@functools.cache
def model() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    scales = torch.logspace(0, -3, 400)
    matrices = {}
    for width in (272, 400):
        x = torch.randn(4 * width, width) * scales[:width]
        matrices[width] = x.T @ x / len(x)
    return weights, {name: matrices[shape[1]] for name, shape in SHAPES.items()}


RANKS = {name: 4 + i for i, name in enumerate(SHAPES)}


@functools.cache
def alone(which: str) -> dict[str, CoSVD]:
    """Each layer by itself, on as many threads as there are."""
    weights, covariances = model()
    return {
        name: co_svd(weights[name], covariances[name], rank=rank, which=which, damping=0.01)
        for name, rank in RANKS.items()
    }


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("side_by_side", [0, 2048])
def test_each_layer_is_decomposed_as_it_would_be_alone(
    which: str, side_by_side: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_SMALL", side_by_side)
    weights, covariances = model()
    expected = alone(which)
    threads = request.getfixturevalue("threads")
    found = dict(co_svd_layers(weights, covariances, rank=RANKS, which=which, damping=0.01))
    assert found.keys() == weights.keys()
    for name, part in found.items():
        torch.testing.assert_close(part.S, expected[name].S, rtol=1e-9, atol=0)
        projections = [p.U @ (p.U.T @ weights[name].double()) for p in (part, expected[name])]
        torch.testing.assert_close(*projections, rtol=0, atol=1e-6)
        assert float(part.damping) == 0.01
    assert torch.get_num_threads() == threads


def test_the_number_of_threads_is_restored_when_nobody_listens_any_more(threads: int) -> None:
    weights, covariances = model()
    running = co_svd_layers(weights, covariances, rank=2)
    next(running)
    running.close()
    assert torch.get_num_threads() == threads


def test_a_seed_decides_the_start_of_every_layer() -> None:
    weights, covariances = model()
    first, again, other = (
        dict(co_svd_layers(weights, covariances, rank=2, method="randomized", seed=seed))
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name].U, again[name].U) for name in weights)
    assert not any(torch.equal(first[name].U, other[name].U) for name in weights)


def test_layers_of_one_covariance_share_its_copy() -> None:
    weights, covariances = model()
    together = layers._together(weights, covariances, dict.fromkeys(weights, 4))
    assert together == {torch.device("cpu"): [["q", "k", "v", "up"], ["down"]]}


def test_batches_hold_one_shape_and_rank_and_keep_to_the_memory() -> None:
    weights = {name: torch.empty(8, 8, device="meta") for name in "abcd"}
    weights |= {name: torch.empty(8, 4096, device="meta") for name in "ef"}
    ranks = dict.fromkeys(weights, 2) | {"c": 3}
    together = layers._together(weights, dict.fromkeys(weights, torch.empty(0)), ranks)
    groups = together[torch.device("meta")]
    assert groups == [["a", "b", "d"], ["c"], ["e", "f"]]
    of_two = 2 * 8 * layers._MATRICES * 64 * layers._STREAMS
    batches = layers._batches(groups, weights, of_two)
    assert batches == [["a", "b"], ["d"], ["c"], ["e"], ["f"]]


def test_errors_and_warnings_name_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, covariances = model()
    with pytest.raises(RankError, match=r"layer k: the rank for a weight of 64 × 272 .* 65"):
        next(co_svd_layers(weights, covariances, rank=65))
    broken = covariances | {"up": torch.full((272, 272), torch.nan)}
    with pytest.raises(DecompositionError, match="layer up: the covariance holds NaN"):
        next(co_svd_layers(weights, broken, rank=2))
    with pytest.raises(ConfigError, match="which"):
        next(co_svd_layers(weights, covariances, rank=2, which="both"))
    monkeypatch.setattr("corda_kernels.linalg.krylov._MOST_CYCLES", 1)
    monkeypatch.setattr("corda_kernels.linalg.krylov._MOST_BLOCKS", 1)
    with pytest.warns(ConvergenceWarning, match="layer q: the randomised method did not converge"):
        list(co_svd_layers({"q": weights["q"]}, covariances, rank=2, method="randomized"))


def test_a_mapping_may_make_its_covariances_on_access() -> None:
    class Lazy(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            return super().__getitem__(name).clone()

    weights, covariances = model()
    expected = dict(co_svd_layers(weights, covariances, rank=3))
    for name, found in co_svd_layers(weights, Lazy(covariances), rank=3):
        torch.testing.assert_close(found.S, expected[name].S, rtol=1e-12, atol=0)


def test_worker_threads_use_the_backend_that_was_chosen(threads: int) -> None:
    def chosen(_: int) -> object:
        return kernels._implementation("syrk_", torch.device("cpu"))

    with kernels.use_backend("reference"):
        expected = chosen(0)
        assert set(parallel_map(chosen, range(8))) == {expected}
    assert chosen(0) != expected


def test_every_worker_is_told_of_its_one_thread(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it takes anything: OpenMP's own number for a new thread is another."""
    told = set()

    def noted(number: int) -> None:
        told.add((threading.get_ident(), number))
        set_num_threads(number)

    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", noted)
    workers = set(parallel_map(lambda _: threading.get_ident(), range(8)))
    assert {(worker, 1) for worker in workers} <= told


class _Stream:
    """Stands in for a stream of a GPU, and notes what happens on it."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: _Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"{self.name} is awaited")


def test_items_on_streams_keep_their_order_and_few_streams_serve_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(log, "caller"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(layers, "_stream", lambda device, index: _Stream(log, str(index)))
    found = layers.streamed_map(lambda item: 10 * item, range(20), cpu, 3)
    assert list(found) == [10 * item for item in range(20)]
    waits = [entry for entry in log if entry.endswith("waits for caller")]
    assert len(waits) == 20
    assert len([entry for entry in log if entry.endswith("is awaited")]) == 20
    assert {entry[0] for entry in log} <= {"0", "1", "2"}

    def failing(item: int) -> int:
        if item == 2:
            raise torch.OutOfMemoryError("too little")
        return item

    running = layers.streamed_map(failing, range(20), cpu, 2)
    assert [next(running), next(running)] == [0, 1]
    with pytest.raises(torch.OutOfMemoryError, match="too little"):
        next(running)
