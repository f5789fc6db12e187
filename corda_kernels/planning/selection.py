"""Dynamic covariance selection: several samples of text, and which of them each layer keeps."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from corda_kernels import fields
from corda_kernels.arguments import instance_of, one_of
from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.calibration.distributed import Ranks
from corda_kernels.calibration.expert_layers import expert_covariances, expert_layers, expert_names
from corda_kernels.errors import CovarianceError, ModelError
from corda_kernels.experts import ExpertParameter, expert_parameters
from corda_kernels.planning.scores import CONDITIONS, Condition, check_condition, layer_spectra

Method = Literal["argmin", "pool"]

METHODS = ("argmin", "pool")

_FIELDS: dict[str, fields.Schema] = {
    "method": fields.one_of(*METHODS),
    "damping": fields.number(0),
    "condition": fields.one_of(*CONDITIONS),
    "tokens": fields.list_of(fields.is_whole),
    "domains": fields.list_of(fields.is_text),
    "scores": {"*": fields.list_of(fields.is_number)},
    "groups": fields.list_of(lambda value: fields.is_names(value) and len(value) > 0),
}

# From how many times the deviation within one domain on scores are said to differ.
_BEYOND_NOISE = 2


def select_covariance(
    model: nn.Module,
    candidates: Iterable[CovarianceSet | Callable[[], CovarianceSet]],
    *,
    selection: Method = "argmin",
    damping: float = 1e-2,
    condition: Condition = "ratio",
    distributed: bool = False,
    progress: bool = True,
) -> CovarianceSet:
    """Scores candidates by their compactness and makes one set of them, layer by layer.

    Candidates are taken one at a time, and each is released before the next is asked for, so no
    more than two sets are in memory if they are made on demand. Layers that read one input choose
    together, by the sum of their scores. So do all experts of one fused parameter, because a sample
    with few tokens for one expert looks compact to that expert.

    Args:
        model: model that the covariances belong to.
        candidates: covariances of the same layers from different samples of text, or functions that
            make them; for example a generator that calibrates on a new sample each time. A set's
            `provenance["domain"]`, if present, names the text that it is a sample of.
        selection: "argmin" keeps the candidate with the lowest score, as published (the earlier of
            equals); "pool" takes all candidates together, weighted by tokens. On held-out samples
            of one text pooling was better, because there scores differ by chance.
        damping: share of a candidate's mean diagonal that is added to its diagonal for the score;
            the result is not damped.
        condition: definition of π in the score; see `corda_kernels.planning.compactness`.
        distributed: whether the ranks of torch.distributed share the scoring. All ranks must be
            given the same candidates; all get the same result.
        progress: whether to show a progress bar for each candidate.

    Returns:
        The set, with a `Selection` as JSON in `provenance["selection"]`.

    Raises:
        ConfigError: an option has a value that is not allowed.
        ModelError: `model` is no module.

        CovarianceError: there are no candidates, or they cover different layers, share inputs
            differently or are normalised differently.
        DecompositionError: a candidate does not fit the model, or is not finite.
        DistributedError: another rank has ended, or was given something else.

    Source: CorDA++, dynamic covariance selection.
    """
    one_of("selection", selection, METHODS)
    check_condition(damping, condition)
    instance_of("model", model, nn.Module, ModelError)
    instance_of("candidates", candidates, Iterable, CovarianceError)
    scoring: Any = {"damping": damping, "condition": condition}
    ranks = Ranks.of(distributed)
    ranks.agree("select_covariance", lambda: {"selection": selection, **scoring})
    scoring |= {"tail": False, "distributed": distributed, "progress": progress}
    report = Selection(selection, damping, condition, [], [], {}, [])
    parameters = expert_parameters(model)
    kept: dict[str, Covariance] = {}
    about: dict[str, Any] = {}
    for entry in candidates:
        candidate = entry() if callable(entry) else entry
        instance_of("each candidate", candidate, CovarianceSet, CovarianceError)
        members = _members(candidate, parameters)
        groups = _deciding(candidate, members)
        if about:
            check_alike("the candidates", candidate, about["normalize"], kept)
            if set(map(frozenset, groups)) != set(map(frozenset, report.groups)):
                raise CovarianceError(
                    "layers share their inputs in one candidate that do not in another: calibrate "
                    "all with the same model"
                )
        about = about or {
            name: getattr(candidate, name) for name in ("normalize", "left_out", "provenance")
        }
        experts = {name: parameters[name] for name in members if name in parameters}
        modules = {name: model_layer(model, name) for name in members if name not in experts}
        modules |= expert_layers(experts)
        spectra = layer_spectra(modules, expert_covariances(candidate, experts), **scoring)
        scores = {
            name: math.fsum(
                spectra[each].compactness
                for each in (expert_names(name, experts[name]) if name in experts else [name])
            )
            for name in members
        }
        report = report.after(candidate, scores, groups)
        _adopt(kept, candidate, report, members)
        del entry, candidate  # before the next is made
    if not about:
        raise CovarianceError("there are no candidates to select from: give at least one")
    ranks.gather(None, "the end of the candidates")
    # The stability was one candidate's, as was the domain.
    notes = {k: v for k, v in about["provenance"].items() if k not in ("stability", "domain")}
    notes |= {"tokens": sum(report.tokens), "selection": asdict(report)}
    return CovarianceSet(kept, **{**about, "provenance": notes})


@dataclass(frozen=True)
class Selection:
    """How the candidates compared.

    Attributes:
        method: "argmin" or "pool".
        damping: of all candidates, times their mean diagonal.
        condition: which π; see `log_condition`.
        tokens: of each candidate.
        domains: what each candidate is a sample of, "" where its provenance does not say.
        scores: by layer, the compactness under each candidate; by parameter of fused experts, the
            sum of its experts'.
        groups: names of the layers and parameters that read one input, and that decide together.
    """

    method: str
    damping: float
    condition: str
    tokens: list[int]
    domains: list[str]
    scores: dict[str, list[float]]
    groups: list[list[str]]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Selection:
        """Reads what `asdict` gave.

        Raises:
            CovarianceError: it is something else.
        """
        try:
            fields.check_fields(value, _FIELDS)
            rounds = len(value["tokens"])
            lengths = {len(each) for each in (value["domains"], *value["scores"].values())}
            if lengths != {rounds} or not rounds:
                raise ValueError("its fields are not of the same candidates")
            if sorted(itertools.chain(*value["groups"])) != sorted(value["scores"]):
                raise ValueError("'groups' and 'scores' are not of the same layers")
        except ValueError as error:
            what = "the covariances' note on their selection cannot be read"
            raise CovarianceError(f"{what} ({error}): calibrate again") from error
        return cls(**value)

    def after(
        self, candidate: CovarianceSet, scores: Mapping[str, float], groups: list[list[str]]
    ) -> Selection:
        """With one more candidate and its scores by layer, in these groups."""
        return replace(
            self,
            tokens=[*self.tokens, max(covariance.tokens for covariance in candidate.values())],
            domains=[*self.domains, str(candidate.provenance.get("domain", ""))],
            scores={name: [*self.scores.get(name, []), score] for name, score in scores.items()},
            groups=groups,
        )

    def joined(self, other: Selection) -> Selection:
        """With what the same candidates scored in other layers."""
        return replace(
            self,
            tokens=[max(pair) for pair in zip(self.tokens, other.tokens, strict=True)],
            scores=self.scores | other.scores,
            groups=self.groups + other.groups,
        )

    @property
    def rounds(self) -> int:
        """How many candidates were scored."""
        return len(self.tokens)

    def totals(self) -> list[list[float]]:
        """Of each group, the sum of its layers' scores under each candidate."""
        return [
            [math.fsum(column) for column in zip(*(self.scores[n] for n in names), strict=True)]
            for names in self.groups
        ]

    def winners(self) -> dict[str, int]:
        """The candidate with the lowest score by layer, the earlier of equals."""
        return {
            name: scores.index(min(scores))
            for names, scores in zip(self.groups, self.totals(), strict=True)
            for name in names
        }

    def spreads(self) -> list[float]:
        """Of each group, the standard deviation of its scores over their mean."""
        return [_deviation([scores]) for scores in self.totals()]

    def noises(self) -> list[float] | None:
        """The same among candidates of one domain, pooled over the domains.

        Samples of one text differ by chance alone, so that this is what chance does. None if no
        domain has two candidates, or the candidates do not say what they are samples of.
        """
        kinds = [
            [index for index, other in enumerate(self.domains) if other == domain]
            for domain in dict.fromkeys(self.domains)
        ]
        if "" in self.domains or all(len(kind) < 2 for kind in kinds):
            return None
        return [_deviation([[row[i] for i in kind] for kind in kinds]) for row in self.totals()]

    def summary(self) -> str:
        """Whether the scores tell the candidates apart, in plain words."""
        if self.rounds < 2:
            return "one candidate: there was nothing to choose"
        spreads, noises = self.spreads(), self.noises()
        found = (
            f"{self.rounds} candidates, whose scores differ by {statistics.median(spreads):.1%} "
            "(standard deviation, the median over all inputs)"
        )
        if noises is None:
            return f"{found}; how much of that is chance, two samples of one domain would tell"
        if len(set(self.domains)) == 1:
            advice = "" if self.method == "pool" else '; selection "pool" would use all of it'
            return f"{found}; all are samples of one text, so that this is chance{advice}"
        beyond = sum(s > _BEYOND_NOISE * n for s, n in zip(spreads, noises, strict=True))
        return (
            f"{found}, within one domain by {statistics.median(noises):.1%}; more than "
            f"{_BEYOND_NOISE} times as much, for {beyond} of {len(noises)} inputs, is beyond chance"
        )


def _deviation(kinds: Sequence[Sequence[float]]) -> float:
    """Standard deviation within kinds, pooled over them, over the mean of all."""
    mean = statistics.fmean(value for kind in kinds for value in kind)
    freedom = sum(len(kind) - 1 for kind in kinds)
    if not mean or not freedom:
        return 0.0
    squares = math.fsum((v - statistics.fmean(kind)) ** 2 for kind in kinds for v in kind)
    return math.sqrt(squares / freedom) / mean


def _members(
    covariances: CovarianceSet, parameters: Mapping[str, ExpertParameter]
) -> dict[str, list[str]]:
    """The names in a set by what they belong to: a layer, or a parameter of fused experts."""
    own = {each: n for n, parameter in parameters.items() for each in expert_names(n, parameter)}
    members: dict[str, list[str]] = {}
    for name in covariances:
        members.setdefault(own.get(name, name), []).append(name)
    return members


def _deciding(covariances: CovarianceSet, members: Mapping[str, list[str]]) -> list[list[str]]:
    """The layers and parameters that decide together, since they read one input."""
    groups: dict[int, list[str]] = {}
    for name, names in members.items():
        groups.setdefault(id(covariances[names[0]]), []).append(name)
    return list(groups.values())


def check_alike(
    which: str, covariances: CovarianceSet, normalize: str, names: Iterable[str]
) -> None:
    """Refuses covariances that do not go with others.

    Args:
        which: sets it is about.
        covariances: one of them.
        normalize: how the others are normalised.
        names: of the layers that they cover.

    Raises:
        CovarianceError: they are normalised differently or cover different layers.
    """
    if covariances.normalize != normalize:
        raise CovarianceError(
            f'{which} are normalised by "{normalize}" and "{covariances.normalize}", which cannot '
            "be put together: calibrate all alike"
        )
    if odd := sorted(covariances.keys() ^ set(names)):
        raise CovarianceError(
            f"{which} cover different layers ({odd[0]} and {len(odd) - 1} more are in one only): "
            "calibrate all with the same model and targets, on enough text for every layer"
        )


def _adopt(
    kept: dict[str, Covariance],
    candidate: CovarianceSet,
    report: Selection,
    members: Mapping[str, list[str]],
) -> None:
    """Takes over from the last candidate what its scores call for, one input after the other.

    In place, so that what is replaced is let go at once.
    """
    winners = report.winners()
    for group in report.groups:
        names = [name for each in group for name in members[each]]
        found: Mapping[str, Covariance] = {name: candidate[name] for name in names}
        if report.method == "pool" and names[0] in kept:
            normalize = candidate.normalize
            before = CovarianceSet({name: kept[name] for name in names}, normalize=normalize)
            found = before.merge(CovarianceSet(found, normalize=normalize))
        elif winners[group[0]] < report.rounds - 1:
            continue
        kept.update(found)


def model_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, of which there is a covariance.

    Raises:
        CovarianceError: the model has none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        what = f"the model has no layer {name}, of which there is a covariance"
        raise CovarianceError(f"{what}: give the model that was calibrated") from error
