"""What test_distributed.py runs on every rank; started by torchrun, or alone with its variables.

rank_script.py work|die|kept|resumed MODEL OUT
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from corda_kernels import CalibrationCheckpoint, CordaConfig, calibrate, load_model
from corda_kernels.calibration.streaming import calibrate_block_parts
from corda_kernels.errors import CordaError
from corda_kernels.initialization import write_adapter
from corda_kernels.pipeline import corda_adapter

OPTIONS: dict[str, Any] = {"distributed": True, "progress": False}


def five_batches() -> list[Any]:
    """Batches that do not divide among two or three ranks, one of them padded."""
    generator = torch.Generator().manual_seed(3)
    batches: list[Any] = [
        torch.randint(3, 64, (4, 12 + index), generator=generator) for index in range(5)
    ]
    mask = torch.ones_like(batches[1])
    mask[2, 5:] = 0
    batches[1] = {"input_ids": batches[1], "attention_mask": mask}
    return batches


def keep_or_resume(model: Any, batches: list[Any], out: Path, *, resume: bool) -> None:
    """Calibrates with checkpoints. What keeps them is cut off on every rank at another place."""
    rank = torch.distributed.get_rank()
    one_pass = CalibrationCheckpoint(out / "pass", every=1, resume=resume)
    blocks = CalibrationCheckpoint(out / "blocks", every=1, resume=resume)
    if not resume:
        calibrate(model, batches[: 4 - 2 * rank], checkpoint=one_pass, **OPTIONS)
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
        config = CordaConfig("kpm", rank=4, progress=False, distributed=True)
        write_adapter(corda_adapter(model, batches, config), out / f"adapter-{rank}")
        planned = replace(config, budget="r=4", candidates=2)
        write_adapter(corda_adapter(model, batches, planned), out / f"planned-{rank}")
        blocks = replace(config, candidates=2, memory_limit=0)
        write_adapter(corda_adapter(model, batches, blocks), out / f"blocks-{rank}")
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
