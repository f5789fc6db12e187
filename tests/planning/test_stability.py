from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.errors import CovarianceError, DecompositionError
from corda_kernels.planning import LayerStability, Stability, subspace_stability
from corda_kernels.planning.stability import _BOUNDS

SIZES = {"wide": (24, 60), "square": (48, 48), "tall": (60, 24)}
ENDS = (["largest", "smallest"], ["smallest"], ["largest"])
FAIR = {"top": sum(_BOUNDS["top"]) / 2, "bottom": sum(_BOUNDS["bottom"]) / 2}


def modules() -> dict[str, nn.Module]:
    """Linear layers without a name of their own, by name."""
    return {
        name: nn.Linear(channels, out, bias=False, dtype=torch.float64)
        for name, (out, channels) in SIZES.items()
    }


def decaying(channels: int, *, seed: int = 0) -> Tensor:
    """A way to mix independent channels, of which few are loud."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(turn).Q * torch.logspace(1, -2, channels, dtype=torch.float64)


def covariance(x: Tensor) -> Covariance:
    return Covariance(
        x.T @ x / len(x),
        len(x),
        1,
        x.abs().amax(0).float(),
        torch.zeros(x.shape[1], dtype=torch.int64),
        6.0,
    )


def calibration(tokens: int, *, seed: int = 0) -> CovarianceSet:
    """Covariances from tokens of one distribution, which `seed` chooses."""
    return CovarianceSet(
        {
            name: covariance(
                torch.randn(tokens, channels, dtype=torch.float64) @ decaying(channels, seed=seed).T
            )
            for name, (_, channels) in SIZES.items()
        }
    )


def of_grades(*grades: str) -> Stability:
    """Layers of which each is stable, fair or unstable at the top."""
    top = {"stable": 1.0, "fair": FAIR["top"], "unstable": 0.0}
    layers = {str(index): LayerStability(top[grade], None) for index, grade in enumerate(grades)}
    return Stability(4, 0.01, (10, 12), layers)


@pytest.mark.parametrize("damping", [None, 0.01])
def test_identical_halves_agree_entirely(damping: float | None) -> None:
    half = calibration(400)
    found = subspace_stability(modules(), half, half, rank=4, damping=damping)
    assert list(found.layers) == list(SIZES)
    for layer in found.layers.values():
        assert layer.top == pytest.approx(1, abs=1e-9)
        assert layer.bottom == pytest.approx(1, abs=1e-6)
        assert found.verdict(layer) == "stable"
    assert found.summary().startswith("enough samples (3 of 3 layers stable, 0 fair, 0 unstable")


def test_unrelated_halves_do_not_agree() -> None:
    halves = calibration(400, seed=1), calibration(400, seed=2)
    found = subspace_stability(modules(), *halves, rank=4)
    for layer in found.layers.values():
        assert layer.top < _BOUNDS["top"][1]
        assert found.verdict(layer) == "unstable"
    assert found.summary().startswith("not enough samples: use at least four times as many (0 of 3")


def test_more_tokens_agree_better() -> None:
    layers = modules()
    few, many = (
        subspace_stability(layers, calibration(tokens), calibration(tokens), rank=4).layers
        for tokens in (12, 20_000)
    )
    for name in SIZES:
        assert 0 <= few[name].top < many[name].top <= 1 + 1e-12
        assert 0 <= few[name].bottom < many[name].bottom <= 1 + 1e-12


def test_the_top_is_the_overlap_of_the_two_subspaces() -> None:
    # W = 1, and the halves share one of the two loudest channels.
    layer = nn.Linear(5, 5, bias=False, dtype=torch.float64)
    nn.init.eye_(layer.weight)
    halves = (
        CovarianceSet({"layer": covariance(torch.diag(torch.tensor(scale).double()))})
        for scale in ([9.0, 8, 3, 2, 1], [9.0, 3, 8, 2, 1])
    )
    found = subspace_stability({"layer": layer}, *halves, rank=2)
    assert found.layers["layer"].top == pytest.approx(0.5)
    assert found.layers["layer"].bottom == pytest.approx(1)


@pytest.mark.parametrize("ends", ENDS)
def test_rank_is_cut_to_the_layer(ends: list[str]) -> None:
    halves = calibration(400), calibration(400)
    found = subspace_stability(modules(), *halves, rank=1000, ends=ends)
    assert found.rank == 1000
    for layer in found.layers.values():  # everything against everything
        assert layer.top == (pytest.approx(1) if "largest" in ends else None)
        assert layer.bottom == (pytest.approx(1, abs=1e-6) if "smallest" in ends else None)


def test_the_order_of_the_halves_does_not_matter() -> None:
    layers, few, many = modules(), calibration(15), calibration(2000)
    found, turned = (
        subspace_stability(layers, *halves, rank=4).layers for halves in ((few, many), (many, few))
    )
    for name in SIZES:
        assert found[name].top == pytest.approx(turned[name].top)
        assert found[name].bottom == pytest.approx(turned[name].bottom)
        assert found[name].bottom < 1


def test_damping_is_added_to_both_covariances() -> None:
    layers, halves = modules(), (calibration(60), calibration(90))
    for half in halves:  # so loud that a damping of its mean diagonal changes much
        half["wide"].matrix[:2] *= 100
        half["wide"].matrix[:, :2] *= 100
    found = subspace_stability(layers, *halves, rank=4, damping=0.01).layers
    bare = subspace_stability(layers, *halves, rank=4, damping=None).layers
    for half in halves:
        for one in half.values():
            one.matrix.diagonal().add_(0.01 * one.matrix.diagonal().mean())
    damped = subspace_stability(layers, *halves, rank=4, damping=None).layers
    for name in SIZES:
        assert found[name].top == pytest.approx(damped[name].top)
        assert found[name].bottom == pytest.approx(damped[name].bottom)
    assert found["wide"].bottom != pytest.approx(bare["wide"].bottom, rel=0.01)


@pytest.mark.parametrize(
    ("which", "end", "other"), [("largest", "top", "bottom"), ("smallest", "bottom", "top")]
)
def test_one_end_alone_leaves_the_other_out(which: str, end: str, other: str) -> None:
    layers, halves = modules(), (calibration(60), calibration(60))
    both = subspace_stability(layers, *halves, rank=4)
    alone = subspace_stability(layers, *halves, rank=4, ends=[which])
    for name, layer in alone.layers.items():
        assert getattr(layer, other) is None
        assert getattr(layer, end) == pytest.approx(getattr(both.layers[name], end), rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_give_finite_numbers(tokens: int) -> None:
    halves = calibration(tokens), calibration(tokens)
    for damping in (None, 0.01):
        found = subspace_stability(modules(), *halves, rank=4, damping=damping)
        for layer in found.layers.values():
            assert 0 <= layer.top <= 1 + 1e-12
            assert 0 <= layer.bottom <= 1 + 1e-12


def test_the_weight_dtype_and_its_gradient_do_not_matter() -> None:
    layers = {name: module.to(torch.bfloat16) for name, module in modules().items()}
    found = subspace_stability(layers, half := calibration(400), half, rank=4)
    assert found.layers["wide"].top == pytest.approx(1)


def test_tokens_of_each_half_are_told() -> None:
    found = subspace_stability(modules(), calibration(30), calibration(50), rank=4, damping=None)
    assert (found.tokens, found.rank, found.damping) == ((30, 50), 4, None)


@pytest.mark.parametrize(
    ("top", "bottom", "verdict"),
    [
        (1.0, 1.0, "stable"),
        (1.0, None, "stable"),
        (None, 1.0, "stable"),
        (_BOUNDS["top"][0], _BOUNDS["bottom"][0], "stable"),
        (FAIR["top"], None, "fair"),
        (None, FAIR["bottom"], "fair"),
        (FAIR["top"], 1.0, "fair"),
        (1.0, FAIR["bottom"], "fair"),
        (_BOUNDS["top"][1], _BOUNDS["bottom"][1], "fair"),
        (0.0, 1.0, "unstable"),
        (0.0, FAIR["bottom"], "unstable"),
        (0.0, None, "unstable"),
    ],
)
def test_the_worse_end_makes_the_verdict(
    top: float | None, bottom: float | None, verdict: str
) -> None:
    assert of_grades().verdict(LayerStability(top, bottom)) == verdict


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((8, 0, 0), "enough samples (8 of 8 layers stable, 0 fair, 0 unstable"),
        ((4, 4, 0), "enough samples (4 of 8 layers stable, 4 fair, 0 unstable"),
        ((3, 5, 0), "barely enough samples: twice as many would be better (3 of 8 "),
        ((7, 0, 1), "barely enough samples: twice as many would be better (7 of 8 "),
        ((6, 0, 2), "barely enough samples: twice as many would be better (6 of 8 "),
        ((5, 0, 3), "not enough samples: use at least four times as many (5 of 8 "),
        ((0, 0, 1), "not enough samples: use at least four times as many (0 of 1 "),
    ],
)
def test_summary_says_whether_the_samples_suffice(counts: tuple[int, int, int], words: str) -> None:
    grades = [
        grade
        for grade, count in zip(("stable", "fair", "unstable"), counts, strict=True)
        for _ in range(count)
    ]
    assert of_grades(*grades).summary().startswith(words)


def test_one_end_of_some_layers_alone() -> None:
    layers = {"a": LayerStability(1.0, 0.0), "b": LayerStability(0.0, 1.0), "c": LayerStability(1)}
    whole = Stability(4, 0.01, (10, 12), layers)
    bottom = whole.at("smallest", ["b", "c", "unknown"])
    assert bottom == Stability(4, 0.01, (10, 12), {"b": LayerStability(None, 1.0)})
    assert whole.at("largest", ["a"]).layers == {"a": LayerStability(1.0, None)}
    assert whole.at("smallest", ["c"]) is None


@pytest.mark.parametrize(("rank", "says"), [(None, False), (4, False), (8, True)])
def test_the_summary_says_if_it_was_judged_at_another_rank(rank: int | None, says: bool) -> None:
    summary = of_grades("stable").summary(rank)
    assert summary.endswith("of the text, judged at rank 4)") == says
    assert summary.endswith("of the text)") != says


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("damping", [None, 0.01])
def test_json_gives_back_the_same(damping: float | None, ends: list[str]) -> None:
    halves = calibration(30), calibration(50)
    found = subspace_stability(modules(), *halves, rank=4, damping=damping, ends=ends)
    assert Stability.from_json(json.loads(json.dumps(asdict(found)))) == found


def wrong_size(half: CovarianceSet) -> CovarianceSet:
    return CovarianceSet({**half, "wide": half["square"]})


def not_finite(half: CovarianceSet) -> CovarianceSet:
    half["wide"].matrix[3, 4] = torch.nan
    return half


@pytest.mark.parametrize("spoil", [wrong_size, not_finite])
def test_a_covariance_that_does_not_fit_is_refused(
    spoil: Callable[[CovarianceSet], CovarianceSet],
) -> None:
    with pytest.raises(DecompositionError):
        subspace_stability(modules(), calibration(30), spoil(calibration(30)), rank=4)


@pytest.mark.parametrize(
    "note",
    [
        {},
        {"layers": 3},
        {"rank": 4, "damping": 0.01, "tokens": [1], "layers": {}},
        {"rank": 4, "damping": 0.01, "tokens": [1, 2], "layers": {"a": {"middle": 0.5}}},
        {"rank": 4, "damping": 0.01, "tokens": 5, "layers": {"a": None}},
        [],
    ],
)
def test_a_note_that_is_none_says_so(note: Any) -> None:
    with pytest.raises(CovarianceError, match="note on their stability cannot be read"):
        Stability.from_json(note)
