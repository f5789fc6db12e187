from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import Calibrated
from stages import one_stage
from torch import Tensor, nn

from corda_kernels import CordaConfig, calibrate
from corda_kernels.errors import CalibrationError
from corda_kernels.init import corda_adapter, covariance_stages
from corda_kernels.planning import Stability

FIRST = "model.layers.0.self_attn.q_proj"


def config(mode: Any = "ipm", **options: Any) -> CordaConfig:
    return CordaConfig(mode, **({"rank": 4, "stability": True, "progress": False} | options))


def random_batches(count: int = 4, rows: int = 4, length: int = 16) -> list[Tensor]:
    return [torch.randint(3, 64, (rows, length)) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_halves_merge_to_the_whole(calibrated: Calibrated, count: int) -> None:
    model, _ = calibrated()
    batches = random_batches(count)
    whole = calibrate(model, batches, progress=False)
    halves = one_stage(model, batches, rank=4, progress=False)
    assert list(halves) == list(whole)
    assert [names for _, names in halves.groups()] == [names for _, names in whole.groups()]
    for name, expected in whole.items():
        found = halves[name]
        assert (found.matrix - expected.matrix).norm() < 1e-6 * expected.matrix.norm()
        assert (found.tokens, found.calls) == (expected.tokens, 2)  # a call for each half
        assert torch.equal(found.absmax, expected.absmax)
        assert torch.equal(found.outlier_count, expected.outlier_count)
    stability = halves.provenance["stability"]
    assert stability["layers"].keys() == whole.keys()
    assert sum(stability["tokens"]) == halves[FIRST].tokens


@pytest.mark.parametrize("rank", [4, None])
def test_halves_note_where_they_come_from(calibrated: Calibrated, rank: int | None) -> None:
    model, _ = calibrated()
    batches = random_batches(3)
    whole = calibrate(model, batches, progress=False).provenance
    halves = one_stage(model, batches, rank=rank, progress=False).provenance
    assert {name: halves[name] for name in whole} == whole


@pytest.mark.parametrize(
    ("count", "options"), [(1, {}), (4, {"stability": False})], ids=["one batch", "not asked for"]
)
def test_without_two_halves_there_is_no_stability(
    calibrated: Calibrated, count: int, options: dict[str, Any]
) -> None:
    model, _ = calibrated()
    rank = 4 if options.get("stability", True) else None
    halves = one_stage(model, random_batches(count), rank=rank, progress=False)
    assert halves.provenance["stability"] is None
    record = corda_adapter(model, random_batches(count), config(**options)).record
    assert record.stability == {}
    assert "stability" not in record.calibration


@pytest.mark.parametrize(("mode", "end"), [("kpm", "bottom"), ("ipm", "top")])
def test_stability_is_judged_at_the_end_that_is_trained(
    calibrated: Calibrated, mode: str, end: str
) -> None:
    record = corda_adapter(calibrated()[0], random_batches(), config(mode)).record
    for layer in record.stability["layers"].values():
        measured = {name for name, value in layer.items() if value is not None}
        assert measured == {end}


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_covariances_of_a_whole_model_say_of_an_adapter_what_its_text_would(
    calibrated: Calibrated, mode: str
) -> None:
    model, _ = calibrated()
    batches = random_batches()
    covariances = one_stage(model, batches, rank=4, progress=False)
    options = config(mode, targets=["v_proj"])
    given = corda_adapter(model, covariances, options).record.stability
    assert given == corda_adapter(model, batches, options).record.stability
    assert list(given["layers"]) == [f"model.layers.{block}.self_attn.v_proj" for block in (0, 1)]


@pytest.mark.parametrize(("mode", "measured"), [("kpm", False), ("ipm", True)])
def test_stability_of_the_other_end_alone_is_none_of_an_adapter(
    calibrated: Calibrated, mode: str, measured: bool
) -> None:
    model, _ = calibrated()
    (covariances,) = covariance_stages(model, random_batches(), config("ipm"))
    assert bool(corda_adapter(model, covariances, config(mode)).record.stability) == measured


class Routed(nn.Module):
    """Two experts, between which the first token of a sequence decides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 8)
        self.shared = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x, chosen = self.shared(self.embedding(input_ids)), input_ids[:, 0]
        numbers = chosen.unique().tolist()
        return torch.cat([self.experts[number](x[chosen == number]) for number in numbers])


def routed_to(expert: int) -> Tensor:
    ids = torch.randint(2, (2, 5))
    ids[:, 0] = expert
    return ids


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("shared", [["shared"], []])
def test_a_layer_that_one_half_alone_reaches_is_that_half_s(first: int, shared: list[str]) -> None:
    model = Routed()
    batches = [routed_to(expert) for expert in (first, 1 - first) * 2]
    experts = ["experts.0", "experts.1"]
    options: Any = {"targets": shared + experts, "progress": False}
    whole = calibrate(model, batches, **options)
    halves = one_stage(model, batches, rank=2, **options)
    assert list(halves) == list(whole) == shared + experts
    assert not halves.left_out
    for name in whole:
        torch.testing.assert_close(halves[name].matrix, whole[name].matrix)
    stability = Stability.from_json(halves.provenance["stability"])
    assert list(stability.layers) == list(whole)
    # Nothing speaks for their text.
    assert {stability.verdict(stability.layers[name]) for name in experts} == {"unstable"}


def test_a_target_that_one_half_has_nothing_of() -> None:
    batches = [routed_to(0), routed_to(1)]
    (halves,) = covariance_stages(Routed(), batches, config("kpm", rank=2, targets=["experts.0"]))
    assert halves.provenance["stability"]["layers"] == {"experts.0": {"top": None, "bottom": 0.0}}


def test_a_layer_that_no_half_reaches_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"1 target layer.*experts\.1"):
        one_stage(
            Routed(),
            [routed_to(0), routed_to(0)],
            rank=2,
            targets=["shared", "experts.0", "experts.1"],
            progress=False,
        )
