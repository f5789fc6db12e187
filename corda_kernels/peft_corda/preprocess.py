"""PEFT's `preprocess_corda` on this package's parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig
from torch import nn

from corda_kernels.arguments import instance_of, one_of, readable_path, shown, whole_number
from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.masks import RowMasks
from corda_kernels.calibration.watched import Watch
from corda_kernels.errors import (
    CalibrationError,
    CompatibilityWarning,
    ConfigError,
    LeftOutWarning,
    ModelError,
    warn,
)
from corda_kernels.linalg import co_svd_layers
from corda_kernels.linalg.operand import check_damping
from corda_kernels.outputs import check_output
from corda_kernels.peft_corda import cache
from corda_kernels.peft_corda.targets import Target, corda_targets
from corda_kernels.progress import progress_bar

if TYPE_CHECKING:
    from peft.tuners.lora.config import CordaConfig

# What PEFT hangs on a layer beside its result.
_TEMPORARY = ("sample_count", "covariance_matrix", "corda_method", "rank")


@dataclass(frozen=True)
class Options:
    """The options of `preprocess_corda` that PEFT's function lacks.

    Attributes:
        normalize: "peft" divides each call's input by its largest entry and takes the mean over
            calls, which gives PEFT's numbers; "tokens" takes the mean over tokens, which changes
            the scale of C, and with it how √σ is split between A and B.
        damping: share of each covariance's mean diagonal that is added to its diagonal; None for
            none.
        method: method of the decomposition; see `co_svd`.
        on_unseen: "error" to stop at targets that were never called, "skip" to add them to
            `lora_config.exclude_modules`.
        memory_limit: most bytes that covariances may take; None for no limit. If they need more,
            `run_model` is called several times, each time for some of the layers, and must run the
            same data each time.

    Raises:
        ConfigError: an option has a value that is not allowed.

    """

    normalize: Literal["tokens", "peft"] = "peft"
    damping: float | None = 0.01
    method: Literal["auto", "exact", "randomized"] = "auto"
    on_unseen: Literal["error", "skip"] = "error"
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, ("tokens", "peft"))
        one_of("method", self.method, ("auto", "exact", "randomized"))
        one_of("on_unseen", self.on_unseen, ("error", "skip"))
        check_damping(self.damping)
        if self.memory_limit is not None:
            whole_number("memory_limit", self.memory_limit, 0)

    def check_seen(self, wanted: Iterable[str], found: Container[str], lack: str) -> None:
        """Refuses layers that are missing from `found`, unless they are to be skipped.

        Raises:
            CalibrationError: there are some.
        """
        absent = [name for name in wanted if name not in found]
        if absent and self.on_unseen == "error":
            raise CalibrationError(
                f"{len(absent)} target layer(s) {lack}: {', '.join(absent[:5])}"
                f"{', …' if len(absent) > 5 else ''}; leave them out of target_modules, or pass "
                'on_unseen="skip"'
            )


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
    **options: Any,
) -> None:
    """Prepares a model for `get_peft_model` with `init_lora_weights="corda"`.

    Takes the arguments of PEFT's function of this name and leaves the same result: `module.eigens`
    on every target layer, which `get_peft_model` turns into the adapter and the residual weight.
    After an error the model is unchanged.

    All of `lora_config.corda_config` is used, except `use_float16_for_covariance`: sums are kept in
    float32, because they overflow in float16.

    Args:
        model: base model.
        lora_config: PEFT's LoraConfig, with `corda_config`.
        run_model: function that runs the model on the calibration data, with batches of any size.
            Padding does not count if the model gets its `attention_mask`. If a GPU's memory runs
            out, it is called once more, and must run the same data again. None if the cache or the
            covariance file exists.
        hooked_model: model that `run_model` runs, if it is another one.
        options: `normalize`, `damping`, `method`, `on_unseen` and `memory_limit`; see
            `corda_kernels.peft_corda.Options`.

    Raises:
        ConfigError: an option has a value that is not allowed, or contradicts another.
        ModelError: `model` is no module.

        TargetError, RankError: a layer cannot be adapted as asked; found before anything runs.
        CalibrationError: a target was never called, or received NaN or Inf.
        CacheError: a file is damaged, stale, or does not cover the layers.
        OutputError: a file could not be written; found before anything runs.

    Source: CorDA (arXiv:2406.05223), algorithm 1; PEFT's peft/tuners/lora/corda.py for the form.
    """
    ours = Options(**options)
    instance_of("the model", model, nn.Module, ModelError)
    instance_of("hooked_model", hooked_model, (nn.Module, type(None)), ModelError)
    if run_model is not None and not callable(run_model):
        raise ConfigError(f"run_model must be a function, got {shown(run_model)}")
    theirs = _checked(getattr(lora_config, "corda_config", None), ours.memory_limit)
    targets = corda_targets(model, lora_config)
    method, normalize = theirs.corda_method, ours.normalize
    recipe = {"corda_method": method, "damping": ours.damping, "normalize": normalize}
    eigens: dict[str, cache.CordaEigens] = {}
    kept: dict[str, cache.Observed] = {}
    if cache.is_written(theirs.cache_file):
        eigens, _ = cache.read_cache(theirs.cache_file, targets, recipe, model)
        ours.check_seen(targets, eigens, f"are not in {theirs.cache_file}")
    else:
        for path in (theirs.cache_file, theirs.covariance_file):
            if path is not None:
                check_output(path)
        watch = Watch(hooked_model or model, run_model, "pass memory_limit") if run_model else None
        for found in _covariances(model, targets, theirs, ours, watch):
            if not theirs.prune_temporary_fields:
                kept = dict(found)
            eigens |= _decompose(found, targets, theirs, ours)
        if theirs.cache_file is not None:
            cache.write_cache(theirs.cache_file, eigens, model, recipe)
    absent = [name for name in targets if name not in eigens]
    if absent:
        _exclude(lora_config, absent)
        warn(
            f"{len(absent)} target layer(s) get no adapter, among them {absent[0]}: there was "
            "nothing to make it from; they were added to lora_config.exclude_modules",
            LeftOutWarning,
        )
    for name, target in targets.items():
        module: Any = target.module
        for field in _TEMPORARY:
            vars(module).pop(field, None)
        if name in eigens:
            module.eigens = eigens[name]
            if not theirs.prune_temporary_fields:
                module.corda_method, module.rank = method, target.rank
        if name in kept:
            module.covariance_matrix, module.sample_count = kept[name].matrix, kept[name].calls


def _checked(options: CordaConfig | None, memory_limit: int | None) -> CordaConfig:
    if options is None or options.corda_method not in ("ipm", "kpm"):
        raise ConfigError(
            'corda_config.corda_method must be "ipm" or "kpm": set LoraConfig(init_lora_weights='
            '"corda", corda_config=CordaConfig(corda_method=…))'
        )
    for path in (options.cache_file, options.covariance_file):
        if path is not None:
            readable_path(path, ConfigError)
    if options.use_float16_for_covariance:
        warn(
            "use_float16_for_covariance is not followed: a float16 sum overflows; covariances that "
            "layers share are held once, and memory_limit bounds them",
            CompatibilityWarning,
        )
    freed = options.covariance_file is None and options.prune_temporary_fields
    if memory_limit is not None and not freed:
        raise ConfigError(
            "memory_limit frees covariances as it goes: it cannot be combined with covariance_file "
            "or prune_temporary_fields=False"
        )
    return options


def _parts(targets: dict[str, Target], memory_limit: int | None) -> list[dict[str, Target]]:
    """Consecutive layers whose covariances, taken as shared by none, fit into the limit."""
    if memory_limit is None:
        return [targets]
    parts: list[dict[str, Target]] = []
    room = 0
    for name, target in targets.items():
        size = 4 * target.weight.shape[1] ** 2
        if size > memory_limit:
            raise ConfigError(
                f"the covariance of layer {name} alone takes {size} bytes, more than "
                f"memory_limit={memory_limit}"
            )
        if size > room or not parts:
            parts.append({})
            room = memory_limit
        parts[-1][name] = target
        room -= size
    return parts


def _covariances(
    model: nn.Module,
    targets: dict[str, Target],
    theirs: CordaConfig,
    ours: Options,
    watch: Watch | None,
) -> Iterator[dict[str, cache.Observed]]:
    """The layers' covariances, from their file or from passes of `run_model`; all, or in parts."""
    file = theirs.covariance_file
    if cache.is_written(file):
        found = cache.read_covariances(file, targets, ours.normalize, model)
        ours.check_seen(targets, found, f"are not in {file}")
        yield found
        return
    if watch is None:
        raise ConfigError(
            "run_model is None, but neither the cache nor the covariance file is written yet: pass "
            "a function that runs the model on calibration data"
        )
    for part in _parts(targets, ours.memory_limit):
        found = _observed(watch, part, ours.normalize)
        ours.check_seen(part, found, "never received a token")
        if file is not None:
            cache.write_covariances(file, found, model, ours.normalize)
        yield found


def _observed(watch: Watch, names: Iterable[str], normalize: str) -> dict[str, cache.Observed]:
    """What each layer that is called reads; those that the model does not have are passed by."""
    every = dict(watch.model.named_modules())
    readers = {name: every[name] for name in names if name in every}

    def capture() -> InputCapture:
        masks = RowMasks(watch.model)
        return InputCapture(readers, normalize=normalize, statistics=False, masks=masks)

    found = watch.sums(capture).covariances()
    return {name: cache.Observed(each.matrix, each.calls) for name, each in found.items()}


def _decompose(
    found: dict[str, cache.Observed], targets: dict[str, Target], theirs: CordaConfig, ours: Options
) -> dict[str, cache.CordaEigens]:
    """The layers' components. Uses `found` up: each is freed after its last reader."""
    order = list(found)
    weights = {name: targets[name].weight for name in order}
    # The very same tensor for layers that share it.
    matrices = {name: found.pop(name).matrix for name in order}
    decomposed = co_svd_layers(
        weights,
        matrices,
        rank={name: targets[name].rank for name in order},
        which="largest" if theirs.corda_method == "ipm" else "smallest",
        method=ours.method,
        damping=ours.damping,
    )
    bar = progress_bar(
        decomposed, description="decomposing", unit="layers", shown=theirs.verbose, total=len(order)
    )
    eigens = {}
    for name, components in bar:
        eigens[name] = cache.corda_eigens(weights[name], components)
        del matrices[name]
    return {name: eigens[name] for name in order}


def _exclude(config: LoraConfig, names: Sequence[str]) -> None:
    """Adds layers to `config.exclude_modules`, in place: `get_peft_model` then passes them by."""
    present = config.exclude_modules or []
    if isinstance(present, str):
        config.exclude_modules = "|".join([f"(?:{present})", *map(re.escape, names)])
    else:
        config.exclude_modules = {*present, *names}
