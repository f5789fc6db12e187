from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corda_kernels.calibration import Covariance, CovarianceSet, calibrate
from corda_kernels.errors import ConfigError, CovarianceError, DecompositionError
from corda_kernels.linears import linear_weight
from corda_kernels.planning import Selection, compactness, select_covariance

pytestmark = pytest.mark.slow

ROUNDS = 4


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return tiny_model("llama", initializer_range=0.1)


def sample(model: nn.Module, round_: int) -> CovarianceSet:
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(round_))
    return calibrate(model, [ids], progress=False)


@pytest.fixture(scope="module")
def candidates(model: nn.Module) -> list[CovarianceSet]:
    return [sample(model, round_) for round_ in range(ROUNDS)]


def select(model: nn.Module, candidates: Any, **options: Any) -> CovarianceSet:
    return select_covariance(model, candidates, progress=False, **options)


def report(chosen: CovarianceSet) -> Selection:
    return Selection.from_json(chosen.provenance["selection"])


@pytest.mark.parametrize("condition", ["ratio", "tight"])
def test_each_input_keeps_the_candidate_of_the_lowest_score(
    model: nn.Module, candidates: list[CovarianceSet], condition: Any
) -> None:
    chosen = select(model, candidates, condition=condition, damping=0.05)
    winners = set()
    for covariance, names in chosen.groups():
        totals = torch.zeros(ROUNDS, dtype=torch.float64)
        for name in names:
            weight = linear_weight(model.get_submodule(name))
            scores = [
                compactness(weight, each[name].matrix, damping=0.05, condition=condition)
                for each in candidates
            ]
            assert report(chosen).scores[name] == pytest.approx([float(s) for s in scores])
            totals += torch.stack(scores)
        winner = int(totals.argmin())
        winners.add(winner)
        assert {report(chosen).winners()[name] for name in names} == {winner}
        assert covariance is candidates[winner][names[0]]
    assert len(winners) > 1
    assert {tuple(names) for _, names in chosen.groups()} == {
        tuple(names) for _, names in candidates[0].groups()
    }


def test_pooling_is_all_the_text_at_once(model: nn.Module, candidates: list[CovarianceSet]) -> None:
    pooled = select(model, candidates, selection="pool")
    ids = [
        torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(round_))
        for round_ in range(ROUNDS)
    ]
    together = calibrate(model, ids, progress=False)
    for name, covariance in pooled.items():
        torch.testing.assert_close(covariance.matrix, together[name].matrix)
        assert covariance.tokens == together[name].tokens == ROUNDS * 64
    assert pooled.provenance["tokens"] == ROUNDS * 64
    assert len(pooled.groups()) == len(together.groups())
    # The scores are those of the candidates, whatever is done about them.
    assert report(pooled).scores == report(select(model, candidates)).scores


@pytest.mark.parametrize("selection", ["argmin", "pool"])
def test_no_more_than_two_sets_are_in_memory(model: nn.Module, selection: Any) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(round_: int) -> CovarianceSet:
        nonlocal most
        gc.collect()
        before = sum(matrix() is not None for matrix in alive)
        made = sample(model, round_)
        alive.extend(weakref.ref(covariance.matrix) for covariance, _ in made.groups())
        most = max(most, before + len(made.groups()))
        return made

    groups = len(sample(model, 0).groups())
    generator = (watched(round_) for round_ in range(ROUNDS))
    chosen = select(model, generator, selection=selection)
    assert most <= 2 * groups
    if selection == "argmin":
        gc.collect()
        assert sum(matrix() is not None for matrix in alive) == len(chosen.groups())


def scored(scores: list[float], domains: list[str]) -> Selection:
    return Selection(
        "argmin",
        0.01,
        "ratio",
        [8] * len(scores),
        domains,
        {"a": scores, "b": scores},
        [["a", "b"]],
    )


def test_the_summary_says_what_is_chance() -> None:
    one = scored([1.0, 1.1, 0.9], ["text"] * 3)
    assert one.spreads() == one.noises() == [pytest.approx(0.1)]
    assert "samples of one text, so that this is chance" in one.summary()
    two = scored([1.0, 1.02, 2.0, 2.02], ["a", "a", "b", "b"])
    (spread,), (noise,) = two.spreads(), two.noises() or []
    assert spread == pytest.approx(0.5774 / 1.51, rel=1e-3)
    assert noise == pytest.approx(0.01414 / 1.51, rel=1e-3)
    assert "for 1 of 1 inputs, is beyond chance" in two.summary()
    mixed = scored([1.0, 2.0, 1.0, 2.0], ["a", "a", "b", "b"])
    assert "for 0 of 1 inputs, is beyond chance" in mixed.summary()
    for unknown in (scored([1.0, 2.0], ["", ""]), scored([1.0, 2.0], ["a", "b"])):
        assert unknown.noises() is None
        assert "two samples of one domain would tell" in unknown.summary()
    assert "nothing to choose" in scored([1.0], ["text"]).summary()
    assert scored([0.0, 0.0], ["text"] * 2).spreads() == [0.0]


def test_of_equals_the_earlier_wins() -> None:
    assert scored([2.0, 1.0, 1.0], ["text"] * 3).winners() == {"a": 1, "b": 1}


def test_domains_are_taken_from_the_candidates(
    model: nn.Module, candidates: list[CovarianceSet]
) -> None:
    named = []
    for index, each in enumerate(candidates):
        domain = {"domain": "first" if index < 2 else "second", "stability": {"of": "one"}}
        named.append(CovarianceSet(each, provenance=each.provenance | domain))
    chosen = select(model, named)
    assert report(chosen).domains == ["first", "first", "second", "second"]
    assert report(chosen).tokens == [64] * ROUNDS
    assert not {"domain", "stability"} & chosen.provenance.keys()


def altered(covariances: CovarianceSet, **options: Any) -> CovarianceSet:
    return CovarianceSet(covariances, **options)


def test_candidates_that_do_not_go_together_are_refused(
    model: nn.Module, candidates: list[CovarianceSet]
) -> None:
    first, second = candidates[:2]
    name, *rest = first
    lacking = CovarianceSet({key: second[key] for key in rest})
    own = second[name]
    alone = Covariance(
        own.matrix, own.tokens, own.calls, own.absmax, own.outlier_count, own.outlier_threshold
    )
    apart = CovarianceSet(dict(second) | {name: alone})
    for other, says in (
        (lacking, f"different layers \\({name} and 0 more"),
        (apart, "share their inputs in one candidate"),
        (CovarianceSet(second, normalize="peft"), 'normalised by "tokens" and "peft"'),
    ):
        with pytest.raises(CovarianceError, match=says):
            select(model, [first, other])
    with pytest.raises(CovarianceError, match="no candidates"):
        select(model, [])
    with pytest.raises(CovarianceError, match=f"no layer {name}"):
        select(nn.Linear(3, 3), [first])
    small = CovarianceSet({name: first[next(n for n in first if n.endswith("down_proj"))]})
    with pytest.raises(DecompositionError, match=f"layer {name}"):
        select(model, [small])


def test_impossible_options_are_refused(model: nn.Module, candidates: list[CovarianceSet]) -> None:
    for options, says in (
        ({"selection": "best"}, '"argmin" or "pool"'),
        ({"damping": -1}, "damping"),
        ({"condition": "other"}, "condition"),
    ):
        with pytest.raises(ConfigError, match=says):
            select(model, candidates, **options)  # type: ignore[arg-type]


def test_reports_on_several_layers_become_one() -> None:
    # Routed experts see no more than a part of the tokens.
    first = Selection("argmin", 0.01, "ratio", [5, 8], ["a", "b"], {"x": [1.0, 2.0]}, [["x"]])
    second = Selection(
        "argmin", 0.01, "ratio", [6, 7], ["a", "b"], {"y": [3, 1], "z": [1, 2]}, [["y", "z"]]
    )
    both = first.joined(second)
    assert (both.tokens, both.domains) == ([6, 8], ["a", "b"])
    assert both.winners() == {"x": 0, "y": 1, "z": 1}
    assert both.winners() == first.winners() | second.winners()
