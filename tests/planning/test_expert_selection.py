"""Selection among candidates in a mixture: all experts of one parameter decide together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corda_kernels import CordaConfig, CovarianceSet, calibrate
from corda_kernels.calibration.expert_layers import expert_names
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import CordaWarning
from corda_kernels.experts import expert_parameters
from corda_kernels.init import corda_adapter, covariance_stages
from corda_kernels.linears import linear_weight
from corda_kernels.planning import Selection, compactness, select_covariance

pytestmark = [
    pytest.mark.filterwarnings("ignore::corda_kernels.errors.LeftOutWarning"),
    pytest.mark.filterwarnings("ignore::corda_kernels.errors.RankDeficientWarning"),
]
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    """With more experts than a short text reaches."""
    torch.manual_seed(0)
    return tiny_model("qwen3_moe", num_experts=12, initializer_range=0.2)


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(3, 64, (1, 9), generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def candidates(model: nn.Module, texts: list[Tensor]) -> list[CovarianceSet]:
    options: dict[str, Any] = {"experts": "shared", "on_unseen": "skip"}
    return [calibrate(model, [text], **options, **QUIET) for text in texts]


def report(chosen: CovarianceSet) -> Selection:
    return Selection.from_json(chosen.provenance["selection"])


def test_the_experts_of_a_parameter_keep_one_candidate_by_the_sum_of_their_scores(
    model: nn.Module, candidates: list[CovarianceSet]
) -> None:
    chosen = select_covariance(model, candidates, **QUIET)
    assert list(chosen) == list(candidates[0])
    found, parameters = report(chosen), expert_parameters(model)
    linears = [name for name in candidates[0] if ".experts." not in name]
    assert found.scores.keys() == {*linears, *parameters}
    winners = {}
    for name, parameter in parameters.items():
        names, totals = expert_names(name, parameter), []
        for part in candidates:
            matrices = [part[each if each in part else name].matrix for each in names]
            weights = torch.stack([parameter.weight(e) for e in range(len(names))]).double()
            totals.append(float(compactness(weights, torch.stack(matrices).double()).sum()))
        assert found.scores[name] == pytest.approx(totals)
        winners[name] = found.winners()[name]
        if parameter.takes_hidden:
            names = [name]
        else:
            assert [name] in found.groups
            assert winners[name] == min(range(3), key=totals.__getitem__)
        for each in names:
            assert chosen[each] is candidates[winners[name]][each]
    assert min(winners.values()) < max(winners.values())
    unseen = [{n for n in part if not part[n].tokens} for part in candidates]
    assert len({frozenset(names) for names in unseen}) == 3
    for name in linears:
        C = candidates[0][name].matrix
        score = float(compactness(linear_weight(model.get_submodule(name)), C))
        assert found.scores[name][0] == pytest.approx(score)


def test_pooled_experts_weigh_candidates_by_their_tokens(
    model: nn.Module, candidates: list[CovarianceSet]
) -> None:
    pooled = select_covariance(model, candidates, selection="pool", **QUIET)
    seen_by_some = 0
    for name in pooled:
        parts = [part[name] for part in candidates]
        tokens = sum(part.tokens for part in parts)
        assert pooled[name].tokens == tokens
        if tokens:
            seen_by_some += any(not part.tokens for part in parts)
            mean = sum(part.matrix.double() * part.tokens for part in parts) / tokens
            torch.testing.assert_close(pooled[name].matrix.double(), mean, rtol=0, atol=1e-6)
    assert seen_by_some


def test_an_adapter_takes_candidates_with_experts_block_by_block_too(
    model: nn.Module, texts: list[Tensor]
) -> None:
    options: Any = {"rank": 4, "experts": "shared", "candidates": 3, **QUIET}
    config = CordaConfig("ipm", **options)
    with pytest.warns(CordaWarning, match=r"no token was routed to \d+ expert projection"):
        (selected,) = covariance_stages(model, texts, config)
    once = corda_adapter(model, selected, config)
    limited = CordaConfig(
        "ipm", memory_limit=2 * covariance_bytes(model, None, "shared")[1], **options
    )
    with pytest.warns(CordaWarning, match="no token was routed to"):
        blocks = corda_adapter(model, texts, limited)
    found = Selection.from_json(blocks.record.calibration["selection"])
    assert found.scores == report(selected).scores
    for name, layer in once.layers.items():
        assert torch.equal(layer.A, blocks.layers[name].A), name
        assert torch.equal(layer.B, blocks.layers[name].B), name
