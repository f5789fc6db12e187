"""Ways from tokens to an adapter that benches/pipeline.py compares: ours, and what PEFT offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corda_kernels.text import fitting_batch_size
from corda_kernels.usage import Stopwatch

Mode = Literal["ipm", "kpm"]


@dataclass(frozen=True)
class Task:
    """What to initialise.

    Attributes:
        model: folder of the model.
        batches: token ids (1, seq), for PEFT takes one sequence at a time.
        mode: "ipm" or "kpm", where a contestant has them.
        rank: of every layer, or its components, of which `init_corda` makes a LoRA of twice that.
        device: where the model is.
    """

    model: str
    batches: list[Tensor]
    mode: Mode
    rank: int
    device: torch.device


class Stages(Stopwatch):
    """Seconds by stage: "calibration", the forward passes and the covariances that are made on the
    way; "decomposition", with the forward passes where those are one with it; "attaching", the
    adapter to the model. Only those that a contestant has.

    Attributes:
        passes: forward passes over one batch each.
    """

    def __init__(self, passes: int, devices: Iterable[torch.device] = ()) -> None:
        super().__init__(devices)
        self.passes = passes


@dataclass(frozen=True, eq=False)
class Subject:
    """A model at hand, and how to run it.

    Attributes:
        task: what to do.
        model: loaded.
        forward: runs the model on all sequences, one by one.
        folder: for a cache in PEFT's form, NAME.pt.
    """

    task: Task
    model: Any
    forward: Callable[[], None]
    folder: Path


def _lora(subject: Subject, initialisation: str, **options: Any) -> Any:
    from peft import LoraConfig

    from corda_kernels.targets import target_linears

    return LoraConfig(
        r=subject.task.rank,
        target_modules=list(target_linears(subject.model)),
        init_lora_weights=initialisation,
        **options,
    )


def _corda(
    name: str, preprocess: Callable[..., None], subject: Subject, stages: Stages
) -> nn.Module:
    """PEFT's two calls: `preprocess_corda`, whoever's, and `get_peft_model`."""
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig as PeftCordaConfig

    cache = subject.folder / f"{name}.pt"
    options = PeftCordaConfig(corda_method=subject.task.mode, cache_file=str(cache))
    lora = _lora(subject, "corda", corda_config=options)

    def forward() -> None:
        with stages.stage("calibration"):
            subject.forward()

    with stages.stage("decomposition"):
        preprocess(subject.model, lora, forward)
    with stages.stage("attaching"):
        adapted: nn.Module = get_peft_model(subject.model, lora)
    return adapted


def _peft(subject: Subject, stages: Stages) -> nn.Module:
    """PEFT's own CorDA."""
    from peft.tuners.lora.corda import preprocess_corda

    return _corda("peft", preprocess_corda, subject, stages)


def _patch_peft(subject: Subject, stages: Stages) -> nn.Module:
    """The function that `patch_peft` puts in its place, with its numbers."""
    from corda_kernels.peft_corda import preprocess_corda

    return _corda("patch_peft", preprocess_corda, subject, stages)


def _init_corda(subject: Subject, stages: Stages) -> nn.Module:
    """`init_corda` at its defaults; what its record has not timed is attaching."""
    from corda_kernels.init import CordaConfig, init_corda

    config = CordaConfig(subject.task.mode, rank=subject.task.rank, progress=False)
    with stages.stage("attaching"):
        adapted: Any = init_corda(subject.model, subject.task.batches, config)
    for stage, seconds in adapted.corda_record.measured["seconds"].items():
        stages.seconds[stage] = seconds
        stages.seconds["attaching"] -= seconds
    return adapted  # type: ignore[no-any-return]


def larger_batches(batches: list[Tensor]) -> list[Tensor]:
    """The sequences of `batches`, one in each, as the command line runs them."""
    size = fitting_batch_size(len(batches), batches[0].shape[1])
    return [torch.cat(batches[start : start + size]) for start in range(0, len(batches), size)]


def _pissa(subject: Subject, stages: Stages) -> nn.Module:
    """PEFT's PiSSA: a full SVD of every weight, without any text, while it attaches."""
    from peft import get_peft_model
    from peft.tuners.lora.layer import LoraLayer

    original = LoraLayer.pissa_init

    def timed(*arguments: Any) -> None:
        with stages.stage("decomposition"):
            original(*arguments)

    stages.passes = 0
    try:
        LoraLayer.pissa_init = timed
        with stages.stage("attaching"):
            adapted: nn.Module = get_peft_model(subject.model, _lora(subject, "pissa"))
    finally:
        LoraLayer.pissa_init = original
    return adapted


def _eva(subject: Subject, stages: Stages) -> nn.Module:
    """PEFT's EVA, with one rank for all layers: incremental SVDs of the inputs, pass by pass, until
    all have converged, in as many passes as that takes."""
    from peft import EvaConfig, get_peft_model
    from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights

    stages.passes = 0

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        stages.passes += 1
        model(**batch, use_cache=False)

    loader = [{"input_ids": ids} for ids in subject.task.batches]
    with stages.stage("attaching"):
        lora = _lora(subject, "eva", eva_config=EvaConfig(rho=1.0))
        # As PEFT advises for EVA.
        adapted: nn.Module = get_peft_model(subject.model, lora, low_cpu_mem_usage=True)
    with stages.stage("decomposition"):
        found = get_eva_state_dict(adapted, loader, forward_fn=forward, show_progress_bar=False)
    with stages.stage("attaching"):
        initialize_lora_eva_weights(adapted, eva_state_dict=found)
    return adapted


METHODS: dict[str, Callable[[Subject, Stages], nn.Module]] = {
    "peft": _peft,
    "patch_peft": _patch_peft,
    "init_corda": _init_corda,
    "pissa": _pissa,
    "eva": _eva,
}
