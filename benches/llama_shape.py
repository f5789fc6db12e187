"""A random model in the shapes of LLaMA-2-7B, end to end: seconds and peak memory of each part.

    python benches/llama_shape.py --json OUT                                  # on a GPU
    python benches/llama_shape.py --layers 2 --hidden 256 --dtype float32     # to try it anywhere
    python benches/llama_shape.py --layers 1 --peft --json OUT                # with PEFT's CorDA

The weights are made on the device, layer by layer. The parts are the bare forward passes without
the output head, the calibration, and `init_corda` as a whole, which calibrates, decomposes and
attaches, with the seconds of each of its stages. Covariances that do not fit into --memory-limit
come block by block. The file is written after every part, so that a run that is stopped leaves what
it has.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from corda_kernels import CordaConfig, init_corda
from corda_kernels.bench.timing import environment
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import RankDeficientWarning
from corda_kernels.files import write_json
from corda_kernels.init import CalibrationPlan, covariance_stages
from corda_kernels.memory import forget_peak, free_bytes, peak_bytes, used_bytes
from corda_kernels.models import parse_dtype
from corda_kernels.outputs import check_output, format_bytes
from corda_kernels.structure import decoder
from corda_kernels.targets import target_linears

# LLaMA-2-7B's widths, as multiples of its hidden size of 4096.
_HEADS = 32
_INNER = 11008 / 4096


def make_model(layers: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Random weights, on the device from the start."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=int(hidden * _INNER),
        num_hidden_layers=layers,
        num_attention_heads=min(_HEADS, hidden // 16),
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def measured(part: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Seconds, and by how many bytes memory grew at the most; and the seconds of each stage, if
    the part gives them."""
    forget_peak(device)
    before = used_bytes(device)
    started = time.perf_counter()
    stages = part()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    found = {"seconds": seconds, "growth": peak_bytes(device) - before}
    return found | {"stages": stages} if stages else found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--mode", choices=("ipm", "kpm"), default="ipm")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--memory-limit",
        type=int,
        help="bytes of all covariances; half of what is free if not given",
    )
    parser.add_argument(
        "--peft", action="store_true", help="also PEFT's own CorDA, on another copy"
    )
    parser.add_argument("--json", type=Path, help="a file for all results")
    given = parser.parse_args()
    if given.json is not None:
        check_output(given.json)
    device = torch.device(given.device)
    model = make_model(given.layers, given.hidden, parse_dtype(given.dtype), device)
    generator = torch.Generator().manual_seed(0)
    shape = (given.samples, 1, given.seq_len)
    batches = list(torch.randint(0, 32000, shape, generator=generator).to(device))
    limit = free_bytes(device) // 2 if given.memory_limit is None else given.memory_limit
    needed, _ = covariance_bytes(model)
    results: dict[str, Any] = {
        "environment": environment(device),
        "layers": given.layers,
        "hidden": given.hidden,
        "dtype": given.dtype,
        "mode": given.mode,
        "rank": given.rank,
        "tokens": given.samples * given.seq_len,
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        "covariance_bytes": needed,
        "way": "one pass" if needed <= limit else "block by block",
        "parts": {},
    }
    print(", ".join(f"{key} {value}" for key, value in results["environment"].items()))
    print(
        f"{given.layers} layers of width {given.hidden}, {given.dtype}, "
        f"{format_bytes(results['weight_bytes'])}; {results['tokens']} tokens; covariances "
        f"{format_bytes(needed)}, {results['way']}"
    )
    warnings.simplefilter("ignore", RankDeficientWarning)  # few tokens are as good for the clock
    for name, part in parts(model, batches, given, limit).items():
        found = results["parts"][name] = measured(part, device)
        print(
            f"{name:<16} {found['seconds']:9.2f} s, memory grew by {format_bytes(found['growth'])}",
            flush=True,
        )
        for stage, seconds in found.get("stages", {}).items():
            print(f"  {stage:<14} {seconds:9.2f} s", flush=True)
        if given.json is not None:
            write_json(given.json, results)


def parts(
    model: Any, batches: list[Tensor], given: argparse.Namespace, limit: int
) -> dict[str, Callable[[], Any]]:
    runner = decoder(model)

    @torch.no_grad()
    def forward() -> None:
        for ids in batches:
            runner(input_ids=ids, use_cache=False)

    def calibration() -> None:
        plan = CalibrationPlan(memory_limit=limit, progress=False)
        for _ in covariance_stages(model, batches, plan):
            pass

    def initialisation() -> dict[str, float]:
        config = CordaConfig(
            given.mode, rank=given.rank, memory_limit=limit, stability=False, progress=False
        )
        adapted: Any = init_corda(model, batches, config)
        seconds: dict[str, float] = adapted.corda_record.measured["seconds"]
        return seconds

    def published() -> None:
        preprocess_corda(other, lora, lambda: [other(ids) for ids in batches])
        get_peft_model(other, lora)

    with torch.no_grad():
        runner(input_ids=batches[0], use_cache=False)  # the first call prepares things
    found: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "calibration": calibration,
        "initialisation": initialisation,
    }
    if given.peft:
        other = copy.deepcopy(model)
        lora = LoraConfig(
            r=given.rank,
            target_modules=list(target_linears(other)),
            init_lora_weights="corda",
            corda_config=PeftCordaConfig(corda_method=given.mode),
        )
        found["peft"] = published
    return found


if __name__ == "__main__":
    main()
