"""Generation with fewer components of the adapter at some steps than at others."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LogitsProcessor

from corda_kernels.adapter import LayerAdapter, live_adapter
from corda_kernels.adapter.factors import MODES
from corda_kernels.adapter.linear import low_rank
from corda_kernels.arguments import one_of, real_number
from corda_kernels.errors import AdapterError, ConfigError
from corda_kernels.linalg import End

Kind = Literal["linear", "cosine", "entropy"]

KINDS = ("linear", "cosine", "entropy")


@dataclass(frozen=True)
class RankSchedule:
    """The share of each layer's trained components that every step of generation uses.

    A layer of r components uses its first k = round(share·r) as trained. The others have their
    initial values: without them, pretrained weight would be missing from the model in the published
    form. Components of an IPM adapter are ordered from the largest, which carry most of the
    outputs; those of a KPM adapter from the smallest, which disturb the knowledge to keep least.
    Component i of r is rows i and r + i of the LoRA's factors. Without the record (stock PEFT
    loaded or made the adapter), the LoRA's rows are used in the order in which they are stored.

    Step 0 is the pass over the prompt; step t reads the t-th new token. With a cache, keys and
    values of earlier tokens stay as their own step computed them.

    Attributes:
        kind: "linear" or "cosine" go from `first` to `last` with the step. With "entropy" the share
            follows the entropy of the distribution that the token just read was drawn from,
            averaged over the sequences of a batch that have not ended; the prompt is read with the
            larger of `first` and `last`.
        first: share at step 0, or at an entropy of 0, from 0 to 1.
        last: share from step `over` on, or from an entropy of `over` on, from 0 to 1.
        over: number of steps, or entropy in nats.

    Raises:
        ConfigError: a value is not allowed.

    """

    kind: Kind
    first: float
    last: float
    over: float

    def __post_init__(self) -> None:
        """Refuses values that are not possible."""
        one_of("kind", self.kind, KINDS)
        for name in ("first", "last"):
            real_number(name, getattr(self, name), "a share from 0 to 1", lambda x: 0 <= x <= 1)
        real_number("over", self.over, "positive and finite", lambda x: 0 < x < math.inf)

    def share(self, at: float) -> float:
        """The share of the rank at a step, or at an entropy in nats.

        Raises:
            ConfigError: `at` is no number, for example because the model's scores are NaN.
        """
        what = "a step, or the entropy of a step's scores,"
        at = real_number(what, at, "a number", lambda x: not math.isnan(x))
        position = min(max(at / self.over, 0.0), 1.0)
        if self.kind == "cosine":
            position = (1 - math.cos(math.pi * position)) / 2
        return self.first + (self.last - self.first) * position

    @contextlib.contextmanager
    def apply(self, model: nn.Module) -> Iterator[RankControl]:
        """Applies the schedule to one call of `model.generate` inside the block.

        Give the `RankControl` that it yields to `generate` as a logits processor; afterwards its
        `ranks` and `average_rank` say what was used. With a share of 1 nothing more is computed;
        below it each adapted layer takes two to four more small products, so a schedule saves no
        time.

        Args:
            model: result of `init_corda` or `load_for_training`, with PEFT or without; or a
                PeftModel with a plain LoRA. After the block, also after an exception, it is as
                before.

        Raises:
            AdapterError: the model has no adapter, or one whose start is not known.

            ConfigError: `generate` was called twice, or without the processor.
        """
        live = live_adapter(model)
        config: Any = (
            model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
        )
        # Then only the sum of the components began at 0, not each of them.
        if getattr(config, "init_lora_weights", None) == "orthogonal":
            raise AdapterError(
                'a LoRA that began with init_lora_weights="orthogonal" changes the base if some of '
                "its rows are left out: a schedule needs another start"
            )
        record = live.record
        end: End = "largest" if record is None else MODES[record.mode].end
        halves = 1 if record is None else record.rows
        ranks = {name: layer.rank // halves for name, layer in live.layers.items()}
        control = RankControl(self, _ends(model), list(ranks.values()))
        with contextlib.ExitStack() as stack:
            for name, layer in live.layers.items():
                hook = _reverting(layer, control, ranks[name], end)
                handle = live.modules[name].register_forward_hook(hook)
                stack.callback(handle.remove)
            yield control
        if not control.ranks:
            raise ConfigError(
                "no step of generation was seen: call generate inside the block, and give it what "
                "apply() yields: generate(..., logits_processor=[ranks])"
            )


class RankControl(LogitsProcessor):  # type: ignore[misc]
    """Follows one `generate` step by step and sets the next step's rank; scores do not change.

    Attributes:
        ranks: number of components used so far, one entry a step, the mean over adapted layers.

    """

    def __init__(self, schedule: RankSchedule, ends: Tensor, layer_ranks: list[int]) -> None:
        self.ranks: list[float] = []
        self._schedule = schedule
        self._ends = ends
        self._layer_ranks = layer_ranks
        self._length: int | None = None
        entropy = schedule.kind == "entropy"
        self._share = max(schedule.first, schedule.last) if entropy else schedule.share(0)

    @property
    def average_rank(self) -> float:
        """Mean over the steps and the adapted layers."""
        return statistics.fmean(self.ranks)

    def rank(self, full: int) -> int:
        """Components in use, at present, of a layer that has `full`."""
        return round(self._share * full)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Notes the step that gave `scores`, which are returned as they are.

        Args:
            input_ids: (rows, tokens so far).
            scores: (rows, vocabulary), logits or their log-softmax.
        """
        length = input_ids.shape[1]
        if self._length is not None and length != self._length + 1:
            raise ConfigError(
                f"after {self._length} tokens come {length}: apply() follows one generate, token "
                "by token; open a block for each call, and generate without an assistant"
            )
        self._length = length
        self.ranks.append(statistics.fmean(map(self.rank, self._layer_ranks)))
        entropy = self._schedule.kind == "entropy"
        at = self._entropy(input_ids, scores) if entropy else len(self.ranks)
        self._share = self._schedule.share(at)
        return scores

    def _entropy(self, input_ids: Tensor, scores: Tensor) -> float:
        """In nats, the mean over sequences that have not ended; over all, if all have."""
        entropy = torch.special.entr(scores.float().softmax(-1)).sum(-1)
        running = ~torch.isin(input_ids[:, -1], self._ends.to(input_ids.device))
        return float(entropy[running].mean() if bool(running.any()) else entropy.mean())


def _ends(model: nn.Module) -> Tensor:
    """Ids of the tokens that end a sequence or follow its end."""
    config = getattr(model, "generation_config", None)
    found = [getattr(config, name, None) for name in ("eos_token_id", "pad_token_id")]
    ids = [each for one in found for each in (one if isinstance(one, list) else [one])]
    return torch.tensor([each for each in ids if each is not None], dtype=torch.long)


def _reverting(
    layer: LayerAdapter, control: RankControl, full: int, end: End
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    """A forward hook that takes away what the components beyond the present rank have learnt."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        rank = control.rank(full)
        if rank == full:
            return None
        components = torch.arange(layer.rank, device=layer.A.device) % full
        # Both in descending order: of the smallest the last ones stay.
        unused = {"largest": components >= rank, "smallest": components < full - rank}[end]
        learnt = low_rank(args[0], layer.A[unused], layer.B[:, unused])
        if layer.initial is not None:
            initial = layer.initial.to(layer.A.device)
            learnt = learnt - low_rank(args[0], initial.A[unused], initial.B[:, unused])
        return (output - layer.scaling * learnt).to(output.dtype)

    return hook
