"""How to make covariances of text, and an adapter of covariances: what a user asks for, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
        rank: at which the stability is judged.
        candidates: into how many candidates to deal the batches out, one after the other in turn,
            each a sample of its own: candidate i takes batch i and every `candidates`-th after it.
        selection: of candidates, see `select_covariance`.
        condition: of candidates, see `select_covariance`.
        damping: of the comparison of halves, and of the scores of candidates, which cannot do
            without and take 0.01 then.
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
            trains the largest and calibrates on the new task. "task" starts from the task's
            gradient Ḡ: a plain LoRA with A = V_rᵀ C^-½ of the largest singular pairs of Ḡ C^-½,
            scaled to the RMS of LoRA's own, and B = 0, where C is that of the knowledge to keep
            (the identity without, as in LoRA-GA and LoRA-One); see `steepest_rows`.
        rank: number of components of every layer; the LoRA's rank is twice that, in mode "task"
            and with `residual="weight"` the same. Under a budget it only sets the rank at which
            stability is judged.
        budget: shares so many adapter parameters out over the layers instead: a number of them, a
            share of the model (0.01 or "1%"), or "r=128", what so many components would take in all
            layers.
        min_rank: what every layer gets at least of a budget.
        max_rank: what a layer gets at most of a budget; None for all it can have.
        rank_multiple: of which every rank under a budget is a multiple.
        candidates: into how many candidates to deal the batches out, one after the other in turn,
            each a sample of its own.
        selection: "argmin" keeps for each layer the candidate with the lowest score, as CorDA++
            does; "pool" takes all of them together. See `select_covariance`.
        condition: π in the scores of selection and budget; see `planning.compactness`.
        hold: how firmly training is held to what the components span; see `adapter_factors`. Twice
            as much about quarters the share of the change that leaves them. 1 to 16 were tried.
        residual: None for a plain LoRA that starts at zero on the untouched base; "weight" for the
            published form, which writes W − B A into the base and trains A and B.
        damping: added to each covariance, times its mean diagonal; None for none. Scores cannot do
            without and take 0.01 then.
        targets: the layers: endings of their names, a regular expression for whole names, or
            "all-linear"; see `corda_kernels.targets.target_layers`.
        experts: see `calibrate`; gradients take "each". Fused experts that `targets` selects are
            adapted too. The rank of each is `rank` over the number of experts that a token is sent
            to, at least 1.
        exclude_modules: layers to leave out of these, as `targets` names them.
        modules_to_save: modules that are trained whole beside the adapter, as in PEFT's LoraConfig;
            a classification head is one without being named.
        lora_dropout: as in LoraConfig.
        use_dora: as in LoraConfig. It starts at the base exactly in float32 only.
        method: of the decomposition; see `co_svd`.
        seed: of the randomised method.
        stability: whether to find out, where batches are given, if there were enough of them, by
            decomposing two halves of them as well, which takes about as long again; not with
            several candidates.
        memory_limit: of the covariances, in bytes; if all of them take more, the model is
            calibrated and decomposed block by block; a budget is then refused. Gradients count too,
            and all covariances of a text to keep. None for no limit.
        sides: "both" weights the outputs too: components of D^½ W C^½ in place of W C, where
            D = E[g gᵀ] of the gradients at the layer's outputs. Mode "task" takes gradients anyway.
        labels: of the losses whose gradients those are, see `calibrate`; None for "sampled", and in
            mode "task" "given".
        freeze_a: in mode "task" whether A stays as it is and only B is trained, so that the change
            never leaves the span of A's rows; not with fused experts.
        distributed: whether the ranks of torch.distributed share the work; all of them must be
            given the same model, batches and options, which they compare before they begin, and
            end up with the same adapter.
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
        """Of a rank under a budget: the least, the most, and what it is a multiple of."""
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
        """The end that the mode trains, alone."""
        return (self.which,)

    @property
    def all_at_once(self) -> bool:
        """A budget is shared out by the spectra of all layers."""
        return self.budget is not None
