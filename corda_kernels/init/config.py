"""How to make covariances of text, and an adapter of covariances: what a user asks for, checked."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from corda_kernels.adapter.factors import MODES, check_hold, lora_rows
from corda_kernels.arguments import flag, name_list, one_of, real_number, seed_number, whole_number
from corda_kernels.calibration.experts import Experts
from corda_kernels.calibration.gradients import Labels, Sides
from corda_kernels.errors import ConfigError
from corda_kernels.linalg import End
from corda_kernels.linalg.operand import check_damping
from corda_kernels.planning.ranks import check_bounds, parse_budget
from corda_kernels.planning.scores import CONDITIONS, Condition
from corda_kernels.planning.selection import METHODS, Method
from corda_kernels.planning.stability import AGREEMENT
from corda_kernels.targets import check_selection

# Options of PEFT's LoraConfig that an adapter of this package cannot have, and why.
_OF_PEFT = {
    **dict.fromkeys(("r", "rank_pattern"), "the LoRA's ranks follow from rank, or from a budget"),
    **dict.fromkeys(("lora_alpha", "alpha_pattern", "use_rslora"), "hold sets the scaling"),
    **dict.fromkeys(
        ("target_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
        "targets and experts choose the layers",
    ),
    **dict.fromkeys(
        ("init_lora_weights", "loftq_config", "eva_config", "corda_config"),
        "the start is what this package makes",
    ),
    **dict.fromkeys(("bias", "lora_bias"), "a bias has no covariance, and the base stays as it is"),
    "trainable_token_indices": "name the embeddings in modules_to_save",
    **dict.fromkeys(("layer_replication", "use_qalora"), "it changes what a layer's inputs are"),
}


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """How text becomes covariances, whatever is made of them.

    Attributes:
        rank: rank at which the stability is judged.
        candidates: number of samples that the batches make: batch i belongs to sample i modulo
            this number.
        selection: see `select_covariance`.
        condition: see `select_covariance`.
        damping: damping for the comparison of halves and the scores of candidates; scores need one,
            and take 0.01 where it is None.

        targets: see `calibrate`.
        experts: see `calibrate`; "both" sides take "each".
        stability: whether to compare two halves of the text, which every other batch belongs to;
            not with several candidates, and not of fused experts. An expert's covariance is then
            the mean of both halves', each drawn towards the half's own mean.
        memory_limit: in bytes; if the covariances take more, the model runs block by block. Counted
            are three sets with `stability`, two with candidates, else one. None for no limit.
        sides: see `calibrate`; not "both" with candidates.
        labels: see `calibrate`; None for "given".
        distributed: see `calibrate`; the ranks share the judging too.
        progress: whether to show progress bars.
    """

    rank: int = 32
    candidates: int = 1
    selection: Method = "argmin"
    condition: Condition = "ratio"
    damping: float | None = 0.01
    targets: str | Sequence[str] | None = None
    experts: Experts | None = None
    stability: bool = False
    memory_limit: int | None = None
    sides: Sides = "inputs"
    labels: Labels | None = None
    distributed: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuses values that are not allowed; numbers are kept as Python's own, for the record."""
        one_of("selection", self.selection, METHODS)
        one_of("condition", self.condition, CONDITIONS)
        one_of("experts", self.experts, (None, "shared", "each"))
        for name in ("stability", "distributed", "progress"):
            flag(name, getattr(self, name))
        if self.targets is not None:
            check_selection("targets", self.targets, ConfigError)
        check_damping(self.damping)
        if self.damping is not None:
            object.__setattr__(self, "damping", float(self.damping))
        for name in ("rank", "candidates"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        if self.memory_limit is not None:
            limit = whole_number("memory_limit", self.memory_limit, 0)
            object.__setattr__(self, "memory_limit", limit)
        one_of("sides", self.sides, ("inputs", "both"))
        object.__setattr__(self, "labels", "given" if self.labels is None else self.labels)
        one_of("labels", self.labels, ("given", "sampled"))
        if self.sides == "both" and self.experts == "shared":
            raise ConfigError(
                'sides="both" needs a covariance of each fused expert: give experts="each"'
            )
        if self.sides == "both" and self.candidates > 1:
            raise ConfigError(
                'sides="both" takes gradients of one sample of the text: leave candidates at 1'
            )

    @property
    def ends(self) -> tuple[End, ...]:
        """The ends of the spectrum at which the stability is judged."""
        return tuple(AGREEMENT)

    @property
    def all_at_once(self) -> bool:
        """Whether block by block will not do, since ranks depend on all layers."""
        return False

    def given(self) -> dict[str, object]:
        """What all ranks must be given alike; the layers are compared instead of their choice."""
        apart = ("targets", "exclude_modules", "progress")
        return {name: value for name, value in asdict(self).items() if name not in apart}


@dataclass(frozen=True)
class CordaConfig(CalibrationPlan):
    """How to make an adapter.

    Attributes:
        mode: "kpm" trains the smallest components and calibrates on the knowledge to keep; "ipm"
            trains the largest and calibrates on the new task. "task" starts from the gradient
            Ḡ of the task's loss: a plain LoRA with B = 0 and A = V_rᵀ C^-½, scaled to the RMS of
            LoRA's own A. V_r holds the first right singular vectors of Ḡ C^-½; C is the covariance
            of the knowledge to keep, or the identity without one (as in LoRA-GA and LoRA-One).
        rank: number of components of every layer. The LoRA's rank is twice that; in mode "task"
            and with `residual="weight"` it is the same. Under a budget it is only the rank at which
            stability is judged.
        budget: number of adapter parameters to share out over the layers, in place of `rank`; or a
            share of the model's (0.01 or "1%"); or "r=128" for what 128 components would take in
            all layers.
        min_rank: lowest rank of a layer under a budget.
        max_rank: highest rank of a layer under a budget; None for no limit.
        rank_multiple: number to a multiple of which ranks under a budget are rounded down.
        candidates: number of samples that the batches make: batch i belongs to sample i modulo
            this number.

        selection: "argmin" keeps for each layer the candidate with the lowest score, as CorDA++
            does; "pool" takes all of them together. See `select_covariance`.
        condition: definition of π in the scores of selection and budget; see
            `planning.compactness`.
        hold: factor on the initial lengths in the LoRA; see `adapter_factors`. Doubling it
            divides the share of the change's energy outside the components' tangent space by about
            four. Values from 1 to 16 were tried.

        residual: None for a plain LoRA that starts at zero on the untouched base; "weight" for the
            published form, which writes W − B A into the base and trains A and B.
        damping: share of each covariance's mean diagonal that is added to its diagonal; None for
            none. Scores need one, and then take 0.01.
        targets: layers to adapt: endings of their names, a regular expression for whole names, or
            "all-linear"; None for "all-linear", in a vision–language model of its language model.
            See `corda_kernels.targets.target_layers`.
        experts: "shared" or "each" to adapt fused experts too, see `calibrate`; gradients need
            "each". An expert's rank is `rank` divided by the number of experts that a token is
            sent to, at least 1.
        exclude_modules: layers to leave out, named as in `targets`.
        modules_to_save: modules that are trained whole beside the adapter, as in PEFT's LoraConfig;
            a classification head need not be named.
        lora_dropout: as in LoraConfig.
        use_dora: as in LoraConfig. It starts at the base exactly in float32 only.
        method: method of the decomposition; see `co_svd`.
        seed: random seed of the decomposition.
        stability: whether to judge if there were enough batches, by decomposing two halves of them
            as well. That takes about as long again, and is not possible with several candidates.
        memory_limit: most bytes that covariances may take; None for no limit. If they need more,
            the model is calibrated and decomposed block by block, and a budget is refused.
            Gradients count too, and all covariances of a text to keep.
        sides: "both" takes components of D^½ W C^½ in place of W C, where D = E[g gᵀ] of the
            gradients g at the layer's outputs. Mode "task" takes gradients in any case.
        labels: tokens whose losses these gradients are of, see `calibrate`; None for "given" in
            mode "task" and "sampled" in the others.
        freeze_a: whether to train B alone in mode "task", so that the change never leaves the span
            of A's rows; not with fused experts.
        distributed: whether the ranks of torch.distributed share the work. All ranks must be given
            the same model, batches and options, which they compare before they begin; all get the
            same adapter.

        progress: whether to show progress bars.
    """

    mode: Literal["kpm", "ipm", "task"]
    budget: int | float | str | None = None
    min_rank: int = 0
    max_rank: int | None = None
    rank_multiple: int = 1
    hold: float = 1.0
    residual: Literal["weight"] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    lora_dropout: float = 0.0
    use_dora: bool = False
    method: Literal["auto", "exact", "randomized"] = "auto"
    seed: int = 0
    freeze_a: bool = False

    def __new__(cls, *args: Any, **options: Any) -> CordaConfig:
        """Refuses options of LoraConfig that are not passed on, with the reason."""
        for name in options.keys() & _OF_PEFT.keys():
            raise ConfigError(
                f"{name} of PEFT's LoraConfig is not an option here: {_OF_PEFT[name]}"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuses values that are not allowed."""
        one_of("mode", self.mode, tuple(MODES))
        if self.mode == "task":
            object.__setattr__(self, "sides", "both")
        elif self.labels is None:
            object.__setattr__(self, "labels", "sampled")
        super().__post_init__()
        flag("freeze_a", self.freeze_a)
        if self.mode == "task":
            if self.labels == "sampled" or self.hold != 1 or self.residual is not None:
                raise ConfigError(
                    'mode "task" needs the gradient of the text\'s own labels (of sampled ones '
                    'it is only noise), and has no hold or residual: leave labels at "given", '
                    "hold at 1 and residual at None"
                )
        elif self.freeze_a:
            raise ConfigError(
                f'freeze_a is for mode "task": in mode "{self.mode}" half of A starts at zero and '
                "must be trained"
            )
        if self.sides == "both" and (self.stability or self.budget is not None):
            raise ConfigError(
                'stability and budgets need the decomposition of W·C, which mode "task" and '
                'sides="both" do not make: leave stability off, and give a rank instead of a budget'
            )
        one_of("residual", self.residual, (None, "weight"))
        one_of("method", self.method, ("auto", "exact", "randomized"))
        flag("use_dora", self.use_dora)
        object.__setattr__(self, "hold", check_hold(self.hold))
        object.__setattr__(self, "seed", seed_number("seed", self.seed))
        if self.budget is not None:
            parse_budget(self.budget, {}, 1)
        check_bounds(*self.bounds)
        if self.budget is None and self.bounds != (0, None, 1):
            raise ConfigError(
                "min_rank, max_rank and rank_multiple bound the ranks under a budget: give one, "
                'such as budget="r=32"'
            )
        if self.exclude_modules is not None:
            check_selection("exclude_modules", self.exclude_modules, ConfigError)
        if self.modules_to_save is not None:
            name_list("modules_to_save", self.modules_to_save)
        real_number("lora_dropout", self.lora_dropout, "from 0 to below 1", lambda x: 0 <= x < 1)
        if self.residual is not None and (self.hold != 1 or self.use_dora or self.lora_dropout):
            raise ConfigError(
                'residual="weight" goes with neither hold, use_dora nor lora_dropout, which would '
                "drop pretrained weight: leave residual at None for these"
            )

    @property
    def bounds(self) -> tuple[int, int | None, int]:
        """The lowest rank under a budget, the highest, and the number it is a multiple of."""
        return self.min_rank, self.max_rank, self.rank_multiple

    @property
    def lora(self) -> dict[str, Any]:
        """The options that are passed on to PEFT's LoraConfig."""
        options = {
            "modules_to_save": self.modules_to_save and list(self.modules_to_save),
            "lora_dropout": float(self.lora_dropout),
            "use_dora": self.use_dora,
        }
        return {name: value for name, value in options.items() if value}

    @property
    def rows(self) -> int:
        """Rows of the LoRA for each component."""
        return lora_rows(self.mode, self.residual)

    @property
    def which(self) -> End:
        """The end of the spectrum that the mode trains."""
        return MODES[self.mode].end

    @property
    def ends(self) -> tuple[End, ...]:
        """The end of the spectrum that the mode trains, at which the stability is judged."""
        return (self.which,)

    @property
    def all_at_once(self) -> bool:
        """Whether block by block will not do, since a budget needs the spectra of all layers."""
        return self.budget is not None


# `__new__` would hide the options from help().
_without_self = partial(CordaConfig.__init__, None)  # type: ignore[arg-type]
CordaConfig.__signature__ = inspect.signature(_without_self)  # type: ignore[attr-defined]
