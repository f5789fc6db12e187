"""How far a narrow model with `residual="weight"` starts from its base, before training.

The base is loaded in bfloat16, its residual W' = W − B0 A0 rounded to the same. Two starts: from
the initial factors A0, B0, and from those that make up for the rounding. Logits on text that the
covariances were not taken from, with those weights in float64 arithmetic, so that nothing but the
weights is rounded; relative to the base's own logits in float64, and as the mean Kullback-Leibler
divergence of the next token, in nats. The first row is what bfloat16 arithmetic does to the base
itself, the last rows of each mode what it makes of the start.

    corda-kernels calibrate MODEL COVARIANCES --data TEXT --samples 16 --seq-len 512
    python benches/residual_rounding.py MODEL COVARIANCES OTHER-TEXT --template TEMPLATE \\
        > benches/results/cpu-residual-rounding.txt
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from corda_kernels import CordaConfig, CovarianceSet, load_model, load_tokenizer
from corda_kernels.bench.timing import environment
from corda_kernels.data import token_batches
from corda_kernels.initialization import Adapter, attach, residual
from corda_kernels.initialization.adapter import LayerAdapter
from corda_kernels.linears import linear_weight
from corda_kernels.pipeline import corda_adapter

SAMPLES, LENGTH = 4, 256


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.double()


def merged(base: nn.Module, adapter: Adapter) -> nn.Module:
    """The base with W' + s·B·A in place of every W, in float64."""
    wide = copy.deepcopy(base).double()
    for name, layer in adapter.layers.items():
        rounded = residual(linear_weight(base.get_submodule(name)), layer.initial())
        product = layer.scaling * (layer.B.double() @ layer.A.double())
        linear_weight(wide.get_submodule(name)).copy_(rounded.double() + product)
    return wide


def row(name: str, found: Tensor, exact: Tensor) -> None:
    expected, got = exact.log_softmax(-1), found.log_softmax(-1)
    divergence = (expected.exp() * (expected - got)).sum(-1).mean()
    error = (found - exact).norm() / exact.norm()
    print(f"{name:50}{float(error):12.2e}{float(divergence):12.2e}", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("covariances")
    parser.add_argument("text")
    parser.add_argument("--template")
    parser.add_argument("--rank", type=int, default=32)
    given = parser.parse_args()
    described = environment(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    print(f"bfloat16, rank {given.rank}, {SAMPLES} x {LENGTH} tokens")
    print(f"\n{'':50}{'logits':>12}{'KL':>12}")
    base = load_model(given.model, dtype="bfloat16")
    covariances = CovarianceSet.load(given.covariances)
    (batch,) = token_batches(
        given.text,
        load_tokenizer(given.model),
        samples=SAMPLES,
        seq_len=LENGTH,
        batch_size=SAMPLES,
        template=given.template,
    )
    ids = batch["input_ids"]
    exact = logits(copy.deepcopy(base).double(), ids)
    row("base, bfloat16 arithmetic", logits(base, ids), exact)
    for mode in ("ipm", "kpm"):
        config = CordaConfig(mode, rank=given.rank, residual="weight", progress=False)
        started = corda_adapter(base, covariances, config)
        initial = Adapter(
            {
                name: LayerAdapter(layer.A0, layer.B0, layer.A0, layer.B0, layer.scaling)
                for name, layer in started.layers.items()
            },
            started.record,
        )
        for what, adapter in (("A0, B0", initial), ("rounding made up for", started)):
            row(f"{mode}, {what}, float64 arithmetic", logits(merged(base, adapter), ids), exact)
        for what, adapter in (("A0, B0", initial), ("rounding made up for", started)):
            narrow = attach(copy.deepcopy(base), adapter, use_peft=False)
            row(f"{mode}, {what}, bfloat16 arithmetic", logits(narrow, ids), exact)


if __name__ == "__main__":
    main()
