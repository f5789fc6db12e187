"""What test_distributed.py runs on every rank; started by torchrun, or alone with its variables.

rank_script.py work|die|differ|kept|resumed MODEL OUT
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import AutoConfig, AutoModelForCausalLM

from corda_kernels import (
    CordaConfig,
    calibrate,
    calibrate_blocks,
    init_corda,
    load_model,
    select_covariance,
)
from corda_kernels.adapter import write_adapter
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.calibration.blocks import calibrate_block_parts
from corda_kernels.calibration.covariance_set import save_pieces
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import CordaError, DistributedError
from corda_kernels.init import (
    CalibrationPlan,
    corda_adapter,
    covariance_stages,
)
from corda_kernels.planning import layer_spectra

sys.path.append(str(Path(__file__).parents[1]))
from stages import one_stage

OPTIONS: dict[str, Any] = {"distributed": True, "progress": False}
# Gradients of one layer's experts.
ROUTED: dict[str, Any] = {
    "targets": r".*\.1\.mlp\.experts\.down_proj",
    "experts": "each",
    "sides": "both",
}
# Values of the two ranks for fields of CordaConfig.
CONFIG: dict[str, tuple[Any, Any]] = {
    "mode": ("kpm", "ipm"),
    "rank": (4, 5),
    "damping": (0.01, 0.02),
    "candidates": (1, 2),
    "memory_limit": (None, 0),
    "budget": (None, "r=4"),
}


def mixture() -> Any:
    """A tiny Qwen3-MoE with more experts than some ranks' text reaches."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    routed = {"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **sizes, **heads, **routed)
    return AutoModelForCausalLM.from_config(config)


def five_batches() -> list[Any]:
    """Batches that do not divide among two or three ranks, one padded, one with a token_mask."""
    generator = torch.Generator().manual_seed(3)
    batches: list[Any] = [
        torch.randint(3, 64, (4, 12 + index), generator=generator) for index in range(5)
    ]
    mask = torch.ones_like(batches[1])
    mask[2, 5:] = 0
    batches[1] = {"input_ids": batches[1], "attention_mask": mask}
    batches[3] = {"input_ids": batches[3], "token_mask": batches[3] % 3 > 0}
    return batches


def keep_or_resume(model: Any, batches: list[Any], out: Path, *, resume: bool) -> None:
    """Calibrates with checkpoints. What keeps them is cut off on every rank at another place."""
    rank = torch.distributed.get_rank()
    one_pass = CalibrationCheckpoint(out / "pass", every=1, resume=resume)
    blocks = CalibrationCheckpoint(out / "blocks", every=1, resume=resume)
    if not resume:
        file = out / f"pass-rank-{rank}-of-2"
        calibrate(model, batches[:2], checkpoint=one_pass, **OPTIONS)
        early = file.read_bytes()
        calibrate(model, batches[:4], checkpoint=one_pass, **OPTIONS)
        if rank == 1:
            file.write_bytes(early)
        # Rank 1 is a block ahead of the other.
        found = calibrate_block_parts(model, batches, parts=2, checkpoint=blocks, **OPTIONS)
        for _ in range(2):
            next(found)
        if rank == 0:
            (out / "blocks-block-1-rank-0-of-2").unlink()
        return
    calibrate(model, batches, checkpoint=one_pass, **OPTIONS).save(out / f"whole-{rank}")
    found = calibrate_block_parts(model, batches, parts=2, checkpoint=blocks, **OPTIONS)
    for block, parts in enumerate(found):
        for part, covariances in enumerate(parts):
            covariances.save(out / f"part-{rank}-{block}-{part}")


def differing(model: Any, batches: list[Any], out: Path) -> dict[str, Callable[[int], object]]:
    """Calls that the two ranks make in different ways, by what differs."""
    texts = batches, [*batches[:4], batches[4].flip(1)]
    changed = copy.deepcopy(model)
    changed.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    models = model, changed
    dtypes = model, copy.deepcopy(model).bfloat16()
    kept = CalibrationCheckpoint(out / "differing", every=1)
    sets = [calibrate(model, part, progress=False) for part in (batches[:2], batches[2:])]
    few = {name: model.get_submodule(name) for name in list(sets[0])[:2]}
    run = partial(calibrate, **OPTIONS)
    blocks = partial(calibrate_blocks, **OPTIONS)
    config = CordaConfig("kpm", rank=4, **OPTIONS)
    calls: dict[str, Callable[[int], object]] = {
        "targets": lambda rank: run(model, batches, targets=["k_proj", "v_proj"][: 2 - rank]),
        "data": lambda rank: run(model, texts[rank]),
        "data that is read once": lambda rank: run(model, iter(texts[rank])),
        "data of blocks": lambda rank: blocks(model, iter(texts[rank])),
        "batches": lambda rank: run(model, batches[: 5 - rank]),
        "batches that are read once": lambda rank: run(model, iter(batches[: 5 - rank])),
        "weights": lambda rank: run(models[rank], batches),
        "dtype": lambda rank: run(dtypes[rank], batches),
        "outlier_threshold": lambda rank: run(model, batches, outlier_threshold=6.0 + rank),
        "normalize": lambda rank: run(model, batches, normalize=("tokens", "peft")[rank]),
        "on_unseen": lambda rank: run(model, batches, on_unseen=("error", "skip")[rank]),
        "checkpoint": lambda rank: run(model, batches, checkpoint=(None, kept)[rank]),
        "resume": lambda rank: run(model, batches, checkpoint=replace(kept, resume=rank == 1)),
        "entry": lambda rank: (run, blocks)[rank](model, batches),
        "parts": lambda rank: calibrate_block_parts(model, batches, parts=1 + rank, **OPTIONS),
        "halves": lambda rank: one_stage(model, texts[rank], rank=4, **OPTIONS),
        "rank of halves": lambda rank: one_stage(model, batches, rank=4 + rank, **OPTIONS),
        "number of candidates": lambda rank: one_stage(
            model, batches, candidates=2 + rank, **OPTIONS
        ),
        "limit": lambda rank: list(
            covariance_stages(
                model, batches, CalibrationPlan(memory_limit=(None, 0)[rank], **OPTIONS)
            )
        ),
        "selection": lambda rank: select_covariance(
            model, sets, selection=("argmin", "pool")[rank], **OPTIONS
        ),
        "candidates of a selection": lambda rank: select_covariance(
            model, sets[: 2 - rank], **OPTIONS
        ),
        "covariances scored": lambda rank: layer_spectra(few, sets[rank], **OPTIONS),
        "covariances": lambda rank: corda_adapter(model, sets[rank], config),
        "kind of data": lambda rank: corda_adapter(model, (batches, sets[0])[rank], config),
        "use_peft": lambda rank: init_corda(model, batches, config, use_peft=rank == 0),
        "init or calibrate": lambda rank: (
            init_corda(model, batches, config) if rank else run(model, batches)
        ),
    }

    def configured(name: str, rank: int) -> object:
        return init_corda(model, batches, replace(config, **{name: CONFIG[name][rank]}))

    return calls | {name: partial(configured, name) for name in CONFIG}


def outcome(call: Callable[[int], object], rank: int) -> str:
    """What a rank is told."""
    try:
        call(rank)
    except DistributedError as error:
        return str(error)
    return "went on"


def main(what: str, folder: Path, out: Path) -> None:
    batches = five_batches()
    model = load_model(folder)
    rank = torch.distributed.get_rank()
    if what == "work":
        calibrate(model, batches, distributed=True, progress=False).save(out / f"whole-{rank}")
        found = calibrate_block_parts(model, batches, parts=2, distributed=True, progress=False)
        for block, parts in enumerate(found):
            for part, covariances in enumerate(parts):
                covariances.save(out / f"part-{rank}-{block}-{part}")
        routed = calibrate(mixture(), batches, experts="shared", **OPTIONS)
        routed.save(out / f"experts-{rank}")
        calibrate(mixture(), batches, **ROUTED, **OPTIONS).save(out / f"routed-{rank}")
        both = calibrate(model, batches, sides="both", labels="sampled", **OPTIONS)
        both.save(out / f"both-{rank}")
        pieces = calibrate_blocks(model, batches, sides="both", labels="sampled", **OPTIONS)
        save_pieces(pieces, out / f"both-blocks-{rank}", lambda notes: notes[0])
        task = CordaConfig("task", rank=4, **OPTIONS)
        write_adapter(corda_adapter(model, batches, task, keep=batches[1:]), out / f"task-{rank}")
        config = CordaConfig("kpm", rank=4, stability=True, progress=False, distributed=True)
        write_adapter(corda_adapter(model, batches, config), out / f"adapter-{rank}")
        planned = replace(config, budget="r=4", candidates=2)
        write_adapter(corda_adapter(model, batches, planned), out / f"planned-{rank}")
        blocks = replace(config, candidates=2, memory_limit=2 * covariance_bytes(model)[1])
        write_adapter(corda_adapter(model, batches, blocks), out / f"blocks-{rank}")
    elif what == "differ":
        calls = differing(model, batches, out)
        calls["nothing"] = lambda _: calibrate(model, batches, **OPTIONS)
        told = {name: outcome(call, rank) for name, call in calls.items()}
        (out / f"told-{rank}.json").write_text(json.dumps(told))
    elif what in ("kept", "resumed"):
        keep_or_resume(model, batches, out, resume=what == "resumed")
    else:
        if rank == 1:
            model.model.layers[1].register_forward_pre_hook(
                lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            )
        calibrate(model, batches, distributed=True, progress=False)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    try:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    except CordaError as error:
        print(f"rank {torch.distributed.get_rank()}: {error}", file=sys.stderr)
        os._exit(2)  # what is left of the group cannot be taken down in order
    torch.distributed.destroy_process_group()
