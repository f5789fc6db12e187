"""PEFT's own CorDA and this package's `preprocess_corda`, layer by layer, held to float64.

python benches/compare_peft.py MODEL --data FILE [--samples 16 --seq-len 512 --rank 32 --json OUT]

IPM: the smallest cosine between the two subspaces and the largest relative difference of S; and of
each against float64 on PEFT's covariances, for where they differ one of them is wrong; and of PEFT
against itself from our covariances, which differ from its own by the last bits. KPM: the tail's
energy over the least possible, 1 at best. PEFT needs the package attrs.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda as peft_own
from torch import Tensor

from corda_kernels import load_model, load_tokenizer, token_batches
from corda_kernels.bench.timing import environment
from corda_kernels.files import write_json
from corda_kernels.linears import linear_weight
from corda_kernels.peft_corda import preprocess_corda
from corda_kernels.sources import help_topics
from corda_kernels.targets import target_linears

DAMPING = 0.01


def cosine(one: Tensor, other: Tensor) -> float:
    """Smallest cosine of the principal angles between span one and span other."""
    bases = [torch.linalg.qr(U.double()).Q for U in (one, other)]
    return float(torch.linalg.svdvals(bases[0].mT @ bases[1]).min())


def relative(one: Tensor, other: Tensor) -> float:
    return float(((one.double() - other.double()) / other.double()).abs().max())


def compare(weight: Tensor, covariance: Tensor, parts: dict[str, Any], rank: int) -> dict[str, Any]:
    C = covariance.double()
    C.diagonal().add_(DAMPING * C.diagonal().mean())
    M = weight.detach().double() @ C
    U, S, _ = torch.linalg.svd(torch.linalg.qr(M.mT, mode="r").R.mT)
    top, least = U[:, :rank], S[-rank:].norm()
    (peft_U, peft_S), (our_U, our_S) = parts["ipm", "peft"], parts["ipm", "ours"]
    moved_U, moved_S = parts["ipm", "peft from ours"]
    tails = {
        maker: float((torch.linalg.qr(parts["kpm", maker][0].double()).Q.mT @ M).norm() / least)
        for maker in ("peft", "ours")
    }
    return {
        "overlap": cosine(our_U, peft_U),
        "S": relative(our_S, peft_S),
        "overlap_from_ours": cosine(moved_U, peft_U),
        "S_from_ours": relative(moved_S, peft_S),
        "overlap_float64": {"peft": cosine(peft_U, top), "ours": cosine(our_U, top)},
        "S_float64": {"peft": relative(peft_S, S[:rank]), "ours": relative(our_S, S[:rank])},
        "tail_energy": tails,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--field")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    model = load_model(given.model)
    layers = target_linears(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batches = token_batches(
            given.data or help_topics(folder / "help.txt"),
            load_tokenizer(given.model),
            samples=given.samples,
            seq_len=given.seq_len,
            field=given.field,
        )

        @torch.no_grad()
        def run() -> None:
            for batch in batches:
                model(**batch, use_cache=False)

        makers: dict[str, Callable[..., None]] = {
            "peft": peft_own,
            "ours": lambda *a: preprocess_corda(*a, normalize="peft", damping=DAMPING),
        }

        def prepare(maker: str, method: str, source: str) -> dict[str, Tensor]:
            """PEFT's cache from the covariances of `source`, which writes them at its first run."""
            cache = folder / f"{maker}-{method}-{source}.pt"
            options = CordaConfig(
                corda_method=method,
                cache_file=str(cache),
                covariance_file=str(folder / f"{source}.pt"),
            )
            config = LoraConfig(
                r=given.rank,
                target_modules=list(layers),
                init_lora_weights="corda",
                corda_config=options,
            )
            makers[maker](model, config, run)
            written: dict[str, Tensor] = torch.load(cache, weights_only=True)
            return written

        found = {
            (method, maker): prepare(maker, method, maker)
            for maker in makers
            for method in ("ipm", "kpm")
        }
        found["ipm", "peft from ours"] = prepare("peft", "ipm", "ours")
        covariances, ours = (
            torch.load(folder / f"{maker}.pt", weights_only=True) for maker in makers
        )
        rows = {}
        for layer, module in layers.items():
            parts = {
                key: tuple(copy.copy(part[f"{layer}.eigens.{kind}"]) for kind in ("U_WC", "S_WC"))
                for key, part in found.items()
            }
            rows[layer] = compare(linear_weight(module), covariances[layer], parts, given.rank)
            rows[layer]["covariance"] = float(
                (ours[layer] - covariances[layer]).norm() / covariances[layer].norm()
            )
    report(rows)
    if given.json is not None:
        write_json(given.json, {"environment": environment(torch.device("cpu")), "layers": rows})


def report(rows: dict[str, Any]) -> None:
    agree = [n for n, row in rows.items() if row["overlap"] >= 0.9999 and row["S"] <= 1e-4]
    print(f"IPM: {len(agree)} of {len(rows)} layers agree to 0.9999 (subspaces) and 1e-4 (S)")
    for name, row in rows.items():
        if name not in agree:
            truth = row["overlap_float64"]
            print(
                f"  {name}: overlap {row['overlap']:.6f}, S {row['S']:.1e}; with float64 PEFT's "
                f"{truth['peft']:.6f}, {row['S_float64']['peft']:.1e}, ours {truth['ours']:.6f}, "
                f"{row['S_float64']['ours']:.1e}; PEFT's with its own from our covariances "
                f"{row['overlap_from_ours']:.6f}, {row['S_from_ours']:.1e}"
            )
    itself = sum(
        row["overlap_from_ours"] >= 0.9999 and row["S_from_ours"] <= 1e-4 for row in rows.values()
    )
    print(
        f"IPM, PEFT with itself from covariances that differ by their last bits: {itself} of "
        f"{len(rows)} layers agree so"
    )
    worse = [
        n for n, r in rows.items() if r["tail_energy"]["ours"] > r["tail_energy"]["peft"] * 1.001
    ]
    print(f"KPM: {len(worse)} of {len(rows)} layers have a tail energy worse than PEFT's by 0.1 %")
    for maker in ("peft", "ours"):
        energies = torch.tensor([row["tail_energy"][maker] for row in rows.values()])
        print(
            f"  {maker}: tail energy over the least, median {energies.median():.6f}, largest "
            f"{energies.max():.6f}"
        )
    print(f"covariances differ by {max(r['covariance'] for r in rows.values()):.1e} at most")


if __name__ == "__main__":
    main()
