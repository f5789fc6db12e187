"""Adapters of a base that FSDP2 has sharded over ranks, made where it lies.

sharded_script.py BASE OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsdp_script import step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from corda_kernels import CordaConfig, calibrate, init_corda, save_adapter
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import CordaError
from corda_kernels.structure import fsdp_modules

# What adapters are made with, by the names of their folders.
WAYS: dict[str, dict[str, Any]] = {
    "ipm": {"mode": "ipm"},
    "stable": {"mode": "kpm", "stability": True},
    "blocks": {"mode": "kpm", "memory_limit": 0},  # of one block; see `config_of`
    "budget": {"mode": "ipm", "budget": "r=4", "candidates": 2},
}


def config_of(way: str, model: Any, distributed: bool) -> CordaConfig:
    options = {"rank": 4, "stability": False, "progress": False} | WAYS[way]
    if "memory_limit" in options:
        options["memory_limit"] = covariance_bytes(model)[1]
    return CordaConfig(**options, distributed=distributed)


def text() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (4, 12 + index), generator=generator) for index in range(5)]


def by_torch(base: Path) -> Any:
    """Sharded by hand, as torch's own trainers do."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = AutoModelForCausalLM.from_pretrained(base)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_transformers(base: Path) -> Any:
    """Loaded into shards, each rank its own."""
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(base, distributed_config=config)


LOADS: dict[str, Callable[[Path], Any]] = {"torch": by_torch, "transformers": by_transformers}
RUNS = [*(("torch", way) for way in WAYS), ("transformers", "ipm")]


def averaged_step(model: Any) -> None:
    """One step whose gradients the ranks average, as FSDP2 does of parameters that it shards."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda each: dist.all_reduce(each.grad, dist.ReduceOp.AVG)
            )
    step(model)


def told(call: Callable[[], object]) -> str:
    try:
        call()
    except CordaError as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def main(base: Path, out: Path) -> None:
    dist.init_process_group("gloo")
    for load, way in RUNS:
        model = LOADS[load](base)
        adapted = init_corda(model, text(), config_of(way, model, True))
        save_adapter(adapted, out / f"{load}-{way}-{dist.get_rank()}")
        averaged_step(adapted)
        adapted.save_pretrained(out / f"{load}-{way}-trained-{dist.get_rank()}")
        for module in fsdp_modules(model):
            module.reshard()  # which shows parameters that were frozen while they were whole
        trained = [name for name, each in adapted.named_parameters() if each.requires_grad]
        assert all(".lora_" in name for name in trained), trained
    model = by_torch(base)
    split = AutoModelForCausalLM.from_pretrained(base)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(split.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
    options: dict[str, Any] = {"distributed": True, "progress": False}
    kept = CalibrationCheckpoint(out / "kept")
    config = CordaConfig("ipm", rank=4, progress=False, distributed=True)
    written = CordaConfig("ipm", rank=4, residual="weight", **options)
    print(
        told(lambda: calibrate(model, text(), progress=False)),
        told(lambda: calibrate(model, text(), checkpoint=kept, **options)),
        told(lambda: calibrate(model, text(), sides="both", **options)),
        told(lambda: init_corda(model, text(), config, use_peft=False)),
        told(lambda: init_corda(model, text(), written)),
        told(lambda: calibrate(split, text(), **options)),
        sep="\n",
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
