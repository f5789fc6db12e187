from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.errors import ConfigError, CovarianceError
from corda_kernels.planning import drift_weights, mix_covariances


def covariance(matrix: Tensor, *, tokens: int = 10, absmax: float = 1.0) -> Covariance:
    channels = len(matrix)
    return Covariance(
        matrix,
        tokens,
        2,
        torch.full((channels,), absmax),
        torch.full((channels,), tokens, dtype=torch.int64),
        6.0,
    )


def domain(seed: int, *, scale: float = 1.0, tokens: int = 10) -> CovarianceSet:
    """Two layers that read one input and one that reads another."""
    generator = torch.Generator().manual_seed(seed)
    matrices = []
    for _ in range(2):
        x = torch.randn(40, 6, generator=generator)
        matrices.append(scale * x.T @ x / 40)
    shared = covariance(matrices[0], tokens=tokens, absmax=float(seed))
    own = covariance(matrices[1], tokens=tokens)
    return CovarianceSet(
        {"q": shared, "k": shared, "o": own},
        left_out={f"expert{seed}": "fused"},
        provenance={
            "model": "tiny",
            "tokens": tokens,
            "versions": {},
            "stability": {},
            "data": f"text{seed}",
        },
    )


def test_traces_are_made_equal_by_default() -> None:
    loud, quiet = domain(1, scale=9.0), domain(2)
    mixed = mix_covariances([loud, quiet], [3, 1])
    for name in mixed:
        parts = [part[name].matrix.double() for part in (loud, quiet)]
        traces = [part.trace() for part in parts]
        mean = 0.75 * traces[0] + 0.25 * traces[1]
        expected = mean * (0.75 * parts[0] / traces[0] + 0.25 * parts[1] / traces[1])
        torch.testing.assert_close(mixed[name].matrix.double(), expected, rtol=1e-5, atol=1e-6)
        assert float(mixed[name].matrix.trace()) == pytest.approx(float(mean), rel=1e-5)


def test_tokens_takes_the_means_as_they_are() -> None:
    loud, quiet = domain(1, scale=9.0), domain(2)
    mixed = mix_covariances([loud, quiet], [0.5, 1.5], normalize="tokens")
    for name in mixed:
        expected = 0.25 * loud[name].matrix + 0.75 * quiet[name].matrix
        torch.testing.assert_close(mixed[name].matrix, expected)


def test_what_is_noted_beside_the_matrix() -> None:
    mixed = mix_covariances([domain(1, tokens=10), domain(2, tokens=30)], [1, 3])
    assert list(mixed) == ["q", "k", "o"]
    assert mixed["q"] is mixed["k"] is not mixed["o"]
    assert (mixed["q"].tokens, mixed["q"].calls) == (40, 4)
    assert torch.equal(mixed["q"].absmax, torch.full((6,), 2.0))
    assert torch.equal(mixed["q"].outlier_count, torch.full((6,), 40))
    assert mixed.left_out == {"expert1": "fused", "expert2": "fused"}
    notes = mixed.provenance
    assert (notes["model"], notes["tokens"]) == ("tiny", 40)
    assert notes["mixture"]["weights"] == (0.25, 0.75)
    assert notes["mixture"]["sources"] == [
        {"model": "tiny", "tokens": 10, "data": "text1"},
        {"model": "tiny", "tokens": 30, "data": "text2"},
    ]


@pytest.mark.parametrize("normalize", ["trace", "tokens"])
def test_a_vertex_is_that_domain(normalize: Any) -> None:
    broken = covariance(torch.full((6, 6), math.inf))
    other = CovarianceSet(dict.fromkeys(("q", "k", "o"), broken))
    mixed = mix_covariances([domain(1), other], [2, 0], normalize="tokens")
    for name, expected in domain(1).items():
        torch.testing.assert_close(mixed[name].matrix, expected.matrix)
        assert mixed[name].tokens == expected.tokens


def test_weights_by_layer() -> None:
    parts = [domain(1), domain(2)]
    weights = {"q": (1, 0), "k": (1, 0), "o": (1, 1)}
    mixed = mix_covariances(parts, weights)
    torch.testing.assert_close(mixed["q"].matrix, parts[0]["q"].matrix)
    half = mix_covariances(parts, [1, 1])
    assert torch.equal(mixed["o"].matrix, half["o"].matrix)
    assert mixed.provenance["mixture"]["weights"]["o"] == (0.5, 0.5)
    with pytest.raises(ConfigError, match="q and k read one input"):
        mix_covariances(parts, weights | {"k": (1, 1)})
    with pytest.raises(ConfigError, match="o is in one only"):
        mix_covariances(parts, {"q": (1, 0), "k": (1, 0)})


def test_sharing_ends_where_one_set_does_not_share() -> None:
    split = dict(domain(2))
    split["k"] = covariance(split["k"].matrix)
    mixed = mix_covariances([domain(1), CovarianceSet(split)], [1, 1])
    assert mixed["q"] is not mixed["k"]
    assert torch.equal(mixed["q"].matrix, mixed["k"].matrix)


def test_an_input_that_one_domain_never_saw() -> None:
    silent = dict(domain(2)) | {"o": covariance(torch.zeros(6, 6))}
    mixed = mix_covariances([domain(1), CovarianceSet(silent)], [1, 1])
    torch.testing.assert_close(mixed["o"].matrix, domain(1)["o"].matrix / 4)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "o"):
            setattr(self, name, nn.Linear(6, 6, bias=False))
            nn.init.eye_(getattr(self, name).weight)


def diagonal(*energies: float) -> CovarianceSet:
    shared = covariance(torch.diag(torch.tensor(energies, dtype=torch.float32)))
    return CovarianceSet(dict.fromkeys(("q", "k", "o"), shared))


def test_drift_keeps_what_either_domain_needs() -> None:
    # Each is quiet in three channels, both in two of them: a mixture trains those, a vertex does
    # not know which they are.
    first, second = diagonal(9, 4, 1, 3, 1, 2), diagonal(1, 9, 4, 0.5, 1, 2)
    chosen = drift_weights(Layers(), [first, second], [first, second], rank=2, progress=False)
    (weights,) = set(chosen.values())
    drifts = {}
    for step in range(5):
        C = (step / 4) * first["q"].matrix / first["q"].matrix.trace() + (1 - step / 4) * second[
            "q"
        ].matrix / second["q"].matrix.trace()
        quiet = C.diagonal().argsort()[:2]
        drifts[step / 4, 1 - step / 4] = [
            float(each["q"].matrix.diagonal()[quiet].sum()) for each in (first, second)
        ]
    best = drifts[1, 0][0], drifts[0, 1][1]
    worst = {
        key: max(value / least for value, least in zip(values, best, strict=True))
        for key, values in drifts.items()
    }
    assert worst[weights] == pytest.approx(min(worst.values()))
    assert 0 < weights[0] < 1


def test_drift_is_measured_on_held_out_text() -> None:
    first, second = diagonal(9, 4, 1, 3, 1, 2), diagonal(1, 9, 4, 0.5, 1, 2)
    # On other text the first domain is the second: then nothing speaks for its own covariance.
    chosen = drift_weights(Layers(), [first, second], [second, second], rank=2, progress=False)
    mixed = mix_covariances([first, second], chosen)
    assert mixed.provenance["mixture"]["weights"] == chosen
    of_q = mix_covariances([first, second], chosen["q"])
    torch.testing.assert_close(mixed["q"].matrix, of_q["q"].matrix)


def test_what_is_refused() -> None:
    good = [domain(1), domain(2)]
    lacking = CovarianceSet({name: good[1][name] for name in ("q", "k")})
    wide = CovarianceSet(dict.fromkeys(("q", "k", "o"), covariance(torch.eye(7))))
    for sets, weights, options, error, says in (
        ([], [], {}, CovarianceError, "at least one"),
        (good, [1], {}, ConfigError, "2 sets need 2 weights"),
        (good, [1, -1], {}, ConfigError, "at least 0"),
        (good, [0, 0], {}, ConfigError, "not all of them 0"),
        (good, [1, math.nan], {}, ConfigError, "need 2 weights"),
        (good, "drift", {}, ConfigError, "need 2 weights"),
        (good, [1, 1], {"normalize": "peft"}, ConfigError, '"trace" or "tokens"'),
        ([good[0], lacking], [1, 1], {}, CovarianceError, "sets 0 and 1 cover different layers"),
        ([good[0], wide], [1, 1], {}, CovarianceError, "layer q: .* channels"),
        (
            [good[0], CovarianceSet(good[1], normalize="peft")],
            [1, 1],
            {},
            CovarianceError,
            "calibrate all alike",
        ),
    ):
        with pytest.raises(error, match=says):
            mix_covariances(sets, weights, **options)  # type: ignore[arg-type]
    for options, says in (({"rank": 0}, "rank"), ({"steps": 0}, "steps")):
        with pytest.raises(ConfigError, match=says):
            drift_weights(Layers(), good, good, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="as many held-out sets"):
        drift_weights(Layers(), good, good[:1])


@pytest.mark.parametrize("make", [np.float32, torch.tensor])
def test_weights_may_be_numbers_of_any_kind(make: Any, tmp_path: Path) -> None:
    one, other = (CovarianceSet({"a": covariance(torch.eye(2) * s)}) for s in (1.0, 2.0))
    mixed = mix_covariances([one, other], [make(1.0), make(3.0)], normalize="tokens")
    mixed.save(tmp_path / "mixed.safetensors")
    loaded = CovarianceSet.load(tmp_path / "mixed.safetensors").provenance
    assert loaded["mixture"]["weights"] == [0.25, 0.75]
    torch.testing.assert_close(mixed["a"].matrix, 1.75 * torch.eye(2))
