"""How much rank each layer gets: one budget shared out over all layers, and what a budget may be.

The filtering loop of CorDA++ takes components away one at a time, always the smallest of the layer
that can best do without it. Over a million of them that is one sort.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from decimal import Decimal, DecimalException
from typing import Literal

import torch
from torch import Tensor

from corda_kernels import arguments
from corda_kernels.arguments import shown, whole_number
from corda_kernels.errors import ConfigError, RankError

# (out, in) of a linear layer, (experts, out, in) of a parameter of fused experts.
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_MOST = 2**40  # of a rank or a size: more than any layer has, and products fit into int64
_LAST = torch.full((1,), torch.inf, dtype=torch.float64)  # score of a layer's last component
_DIGITS = 99  # of a budget: more than any that is meant, and fewer than Python refuses to read


@torch.no_grad()
def allocate_ranks(
    spectra: Mapping[str, Tensor],  # (R,) each
    log_condition: Mapping[str, float],
    shapes: Shapes,
    *,
    budget: int,
    mode: Literal["kpm", "ipm"] = "kpm",
    min_rank: int = 0,
    max_rank: int | None = None,
    rank_multiple: int = 1,
    rows: int = 1,
) -> dict[str, int]:
    """Shares a budget of adapter parameters out over the layers.

    Components are removed one at a time. After n removals in layer l its next component has the
    score

        s_l = log π(C_l) · σ_-(n+1) / Σ_{k=1..R−n−1} σ_k

    with σ_-(j) the j-th smallest singular value, and the sum over those that would remain. The
    lowest score goes first; of equal scores, the earlier layer's. A component σ = 0 scores 0, and
    the last of a layer +∞. With c_N the cost of the first N components, rows·(out + in) each, and τ
    the budget:

    - "kpm" trains what was removed, N = max{N : c_N ≤ τ};
    - "ipm" trains what remains, N = min{N : c_total − c_N ≤ τ}.

    In other words, components are granted in that order, or in reverse, up to the first that the
    budget cannot pay. A cheaper one after it is not taken instead, so that a larger budget never
    takes rank away from a layer. Bounds change which components are granted:

    - Components beyond a layer's `max_rank` are left out; their cost is left for other layers.
    - With `rank_multiple` m a layer is granted m components at once, at the place of the last of
      them. This equals rounding every rank down and sharing out what that frees in the same order.
      A layer with R < m gets 0.
    - The first components of each layer, up to `min_rank` rounded up to a multiple (or all that the
      layer can have, if fewer), are granted before all others.


    Args:
        spectra: singular values of W·C by layer name, (R,), descending, any floating dtype. The
            layers' order decides ties.
        log_condition: log π(C) of each layer, finite and at least 0.
        shapes: (out, in) of each layer's weight, or (experts, out, in) of a parameter of fused
            experts. All its experts get the same rank; its spectrum is the mean or sum of theirs.
        budget: number of adapter parameters, never exceeded.
        mode: "kpm" to train the smallest components, "ipm" the largest.
        min_rank: lowest rank of a layer.
        max_rank: highest rank of a layer; None for R. Without it "kpm" gives most of its budget to
            the layers with the flattest tails.
        rank_multiple: number that every rank is a multiple of.
        rows: number of rows of A, and columns of B, that the adapter has for each component.


    Returns:
        The rank of each layer, 0 … R, in the order of `spectra`.

    Raises:
        ConfigError: the mappings name different layers, a spectrum or log condition has a wrong
            type or value, or an option has a value that is not allowed.
        RankError: the budget cannot hold `min_rank` in every layer, or a spectrum is longer than
            its layer allows.

    Source: dynamic rank allocation of CorDA++; multiples and bounds are additions.
    """
    arguments.one_of("mode", mode, ("kpm", "ipm"))
    budget = whole_number("budget", budget, 0)
    rows = whole_number("rows", rows, 1, 1024)
    check_bounds(min_rank, max_rank, rank_multiple)
    _check_names(spectra, log_condition, shapes)
    values = [_checked_spectrum(name, spectra[name], shapes[name]) for name in spectra]
    if not values:
        return {}

    sizes = torch.tensor([len(value) for value in values])
    multiple = int(rank_multiple)
    costs = rows * torch.tensor([component_size(shapes[name]) for name in spectra])
    most, guaranteed = _bounds(sizes, costs, budget, min_rank, max_rank, multiple)

    # Of each component, in the order in which it is granted: its layer, and which of it (from 1).
    order = _filtering_order(values, list(spectra), log_condition)
    layer = torch.repeat_interleave(torch.arange(len(values)), sizes)
    nth = torch.arange(len(layer)) - (sizes.cumsum(0) - sizes)[layer] + 1
    if mode == "ipm":
        order = order.flip(0)
        nth = sizes[layer] + 1 - nth
    layer, nth = layer[order], nth[order]
    granted = (nth % multiple == 0) & (nth <= most[layer])
    layer, nth = layer[granted], nth[granted]
    first = nth <= guaranteed[layer]
    layer = torch.cat([layer[first], layer[~first]])

    spent = multiple * costs[layer].cumsum(0)
    # A budget beyond int64 is no more than all of it.
    paid = int((spent <= min(budget, int((sizes * costs).sum()))).sum())
    ranks = torch.bincount(layer[:paid], minlength=len(values)) * multiple
    return dict(zip(spectra, ranks.tolist(), strict=True))


def check_bounds(min_rank: int, max_rank: int | None, rank_multiple: int) -> None:
    """Refuses bounds of ranks that leave no rank between them; see `allocate_ranks`.

    Raises:
        ConfigError: they do, or are no whole numbers.
    """
    multiple = whole_number("rank_multiple", rank_multiple, 1, _MOST)
    first = max(-(-whole_number("min_rank", min_rank, 0, _MOST) // multiple), 1) * multiple
    if max_rank is not None and whole_number("max_rank", max_rank, 0, _MOST) < first:
        raise ConfigError(
            f"the least rank above 0 with min_rank {min_rank} and rank_multiple {multiple} is "
            f"{first}, and max_rank is {max_rank}: raise max_rank to {first} or lower the others"
        )


def check_guaranteed(
    shapes: Shapes, budget: int, min_rank: int, max_rank: int | None, rank_multiple: int, rows: int
) -> None:
    """Refuses a budget that does not hold `min_rank` in every layer, or pays for nothing in any,
    before spectra are known.

    Raises:
        RankError: it does not.
    """
    sizes = torch.tensor([min(shape[-2:]) for shape in shapes.values()])
    costs = rows * torch.tensor([component_size(shape) for shape in shapes.values()])
    limit, _ = _bounds(sizes, costs, budget, min_rank, max_rank, rank_multiple)
    if not bool(limit.any()):
        raise RankError(
            f"rank_multiple {rank_multiple} is more than any layer can have, at most "
            f"{int(sizes.max())}: lower it"
        )
    prices = {
        name: rank_multiple * int(cost)
        for name, cost, most in zip(shapes, costs, limit, strict=True)
        if most
    }
    name = min(prices, key=prices.__getitem__)
    if budget < prices[name]:
        raise RankError(
            f"a budget of {budget} adapter parameters pays for nothing: {rank_multiple} "
            f"component(s) of layer {name}, the cheapest, take {prices[name]}: raise the budget, "
            "or write it as the rank it would hold in all layers (r=8)"
        )


def _bounds(
    sizes: Tensor, costs: Tensor, budget: int, least: int, most: int | None, multiple: int
) -> tuple[Tensor, Tensor]:
    """What each layer gets at most, and what before all others; multiples both.

    Raises:
        RankError: the budget does not pay for the latter.
    """
    limit = sizes if most is None else sizes.clamp_max(most)
    limit = limit - limit % multiple
    guaranteed = limit.clamp_max(-(-least // multiple) * multiple)
    needed = int((guaranteed * costs).sum())
    if needed > budget:
        raise RankError(
            f"min_rank {least} needs {needed} adapter parameters over {len(sizes)} layers, the "
            f"budget holds {budget}: lower min_rank or raise the budget"
        )
    return limit, guaranteed


def component_size(shape: Shape) -> int:
    """Numbers in a row of A and a column of B; of fused experts in those of all of them."""
    return math.prod(shape[:-2]) * sum(shape[-2:])


def components(rank: int, shape: Shape, active: int) -> int:
    """A layer's share of a rank: of fused experts, of which a token is sent to `active`, so many
    that a token gets the rank from them together, and 1 at least."""
    return rank if len(shape) == 2 else max(1, rank // active)


def uniform_budget(shapes: Shapes, rank: int, rows: int = 1, active: int = 1) -> int:
    """Adapter parameters of one rank in all layers, Σ min(rank, out, in)·rows·(out + in).

    Args:
        shapes: see `allocate_ranks`.
        rank: the rank; layers too small for it get what they can have.
        rows: see `allocate_ranks`.
        active: see `components`.

    Raises:
        ConfigError: the rank is not at least 1.
    """
    rank = whole_number("rank", rank, 1)
    return rows * sum(
        min(components(rank, shape, active), *shape[-2:]) * component_size(shape)
        for shape in shapes.values()
    )


def parse_budget(
    value: str | float, shapes: Shapes, total_parameters: int, rows: int = 1, active: int = 1
) -> int:
    """Reads a budget the way a user writes it.

    Args:
        value: a whole number of parameters ("2500000"); a share of the model ("0.01", "1%", at
            most all of it; 1.0 is all of it, 1 is one parameter); or "r=128", the budget of that
            rank in all layers.
        shapes: see `allocate_ranks`.
        total_parameters: of the model.
        rows: see `allocate_ranks`.
        active: see `components`.

    Returns:
        The number of adapter parameters; of a share, rounded down.

    Raises:
        ConfigError: the value is none of these.
    """
    text = shown(value) if isinstance(value, int) else str(value).strip()
    if len(text) <= _DIGITS:
        if match := re.fullmatch(r"r\s*=\s*(\d+)", text, re.ASCII):
            return uniform_budget(shapes, int(match[1]), rows, active)
        if re.fullmatch(r"\d+(_\d+)*", text, re.ASCII) and int(text) >= 1:
            return int(text)
        # Decimal, for 29 % of 100 is not 28.
        share = Decimal(0)
        if not re.fullmatch(r"[+-]?\d+", text):
            with contextlib.suppress(DecimalException):
                share = Decimal(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if share.is_finite() and 0 < share <= 1:
            return int(share * total_parameters)
    raise ConfigError(
        f"{shown(value)} is not a budget: write a number of parameters (2500000), a share of the "
        "model (0.01 or 1%, at most all of it), or the rank it would hold in all layers (r=128)"
    )


def _filtering_order(
    spectra: list[Tensor], names: list[str], log_condition: Mapping[str, float]
) -> Tensor:
    """Indices into all components, layer by layer and ascending, in the order of filtering.

    Within a layer the scores never fall: the next component is no smaller, the sum over what
    remains no larger, and rounding keeps both orders. The loop, which takes the lowest of
    all layers' next scores and the earlier layer's of equals, therefore merges sorted lists.
    """
    rule = "finite and at least 0 (damp a singular covariance)"
    scores = []
    for name, spectrum in zip(names, spectra, strict=True):
        what = f"layer {name}: its log condition"
        factor = arguments.real_number(what, log_condition[name], rule, lambda x: 0 <= x < math.inf)
        tail = spectrum.flip(0)  # the smallest component first
        # Summed from the largest down: a difference of sums would not be rounded in order.
        remaining = spectrum.cumsum(0)[:-1].flip(0)
        scores += [(factor * tail[:-1] / remaining).masked_fill(tail[:-1] == 0, 0), _LAST]
    return torch.sort(torch.cat(scores), stable=True).indices


def _check_names(
    spectra: Mapping[str, Tensor], log_condition: Mapping[str, float], shapes: Shapes
) -> None:
    arguments.instance_of("spectra", spectra, Mapping)
    for what, given in (("log_condition", log_condition), ("shapes", shapes)):
        arguments.instance_of(what, given, Mapping)
        if odd := sorted(spectra.keys() ^ given.keys()):
            there, absent = ("spectra", what) if odd[0] in spectra else (what, "spectra")
            raise ConfigError(
                f"layer {odd[0]} is in {there} but not in {absent} ({len(odd)} such layers): take "
                "all of them from the same layers of one model"
            )


def _checked_spectrum(name: str, spectrum: Tensor, shape: Shape) -> Tensor:
    """The spectrum in float64 on the CPU; the shape is checked too."""
    what = f"layer {name}: its shape"
    arguments.instance_of(what, shape, (tuple, list))
    if len(shape) not in (2, 3):
        raise ConfigError(f"{what} must be (out, in) or (experts, out, in), got {shown(shape)}")
    for size in shape:
        whole_number(f"each size in {what}", size, 1, _MOST)
    what = f"layer {name}: its spectrum"
    arguments.real_tensor(what, spectrum, ConfigError)
    spectrum = spectrum.detach().cpu().double()
    if spectrum.ndim != 1 or not len(spectrum):
        raise ConfigError(f"{what} is a vector of singular values, got {tuple(spectrum.shape)}")
    if len(spectrum) > min(shape[-2:]):
        raise RankError(
            f"layer {name}: {len(spectrum)} singular values, but a weight of {shape[-2]} × "
            f"{shape[-1]} has {min(shape[-2:])}: the spectrum belongs to another layer"
        )
    if not bool(spectrum.sum().isfinite()):
        raise ConfigError(
            f"{what} holds NaN or Inf, or sums up to Inf: check weight and covariance"
        )
    if bool(spectrum[-1] < 0) or bool((spectrum.diff() > 0).any()):
        raise ConfigError(f"{what} must be descending and at least 0: was it sorted otherwise?")
    return spectrum
