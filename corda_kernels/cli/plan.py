"""`corda-kernels plan`: what calibrating a model needs, from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_kernels.cli import options
from corda_kernels.cli.printing import show
from corda_kernels.errors import ConfigError

if TYPE_CHECKING:
    from corda_kernels.calibration.needs import CalibrationNeeds


def plan(
    model: options.Model,
    samples: options.Samples = 256,
    seq_len: options.SeqLen = 2048,
    targets: options.Targets = "all-linear",
    stability: options.Stability = True,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what calibrating MODEL needs, in one pass and block by block; loads no weights."""
    from corda_kernels.calibration.needs import calibration_needs
    from corda_kernels.models import load_skeleton
    from corda_kernels.outputs import format_bytes
    from corda_kernels.report import Table

    for option, count in (("--samples", samples), ("--seq-len", seq_len)):
        if count < 1:
            raise ConfigError(f"{option} must be at least 1, got {count}")
    skeleton = load_skeleton(model, dtype=dtype, trust_remote_code=trust_remote_code)
    needs = calibration_needs(skeleton, options.parse_targets(targets), seq_len=seq_len)
    layers = sum(len(names) for _, names in needs.groups)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    rows = [
        (what, *("-" if size is None else format_bytes(size) for size in sizes))
        for what, sizes in _memory(needs, samples * seq_len, 3 if stability else 1).items()
    ]
    rows.append(("forward passes", "1", "1"))
    for what, flops in (("forward", needs.forward_flops), ("covariances", needs.covariance_flops)):
        rows.append((f"FLOPs: {what}", *2 * (f"{flops * samples * seq_len:.1e}",)))
    notes = [
        f"for {samples} sequences of {seq_len} tokens"
        + (
            ", with covariances of both halves and their mean (--no-stability needs a third)"
            if stability
            else ""
        )
        + "; activations of one forward pass and the decomposition's workspace come on top"
    ]
    if needs.positions is not None and seq_len > needs.positions:
        notes.append(
            f"the model has {needs.positions} positions and cannot run {seq_len} tokens: lower "
            f"--seq-len to {needs.positions}"
        )
    if needs.block_bytes is None:
        notes.append(f"block by block: not possible, since {needs.obstacle}")
    else:
        notes.append("next: corda-kernels init, with --memory-limit to go block by block")
    title = (
        f"{model}: {parameters / 1e9:.2f} billion parameters in {str(skeleton.dtype)[6:]}, "
        f"{layers} layers, {len(needs.groups)} distinct covariances"
    )
    show(Table(title, ("", "one pass", "block by block"), tuple(rows), tuple(notes)))


def _memory(needs: CalibrationNeeds, tokens: int, sets: int) -> dict[str, tuple[int, int | None]]:
    """Bytes of what is in memory at once, in one pass and block by block."""
    whole, weights = sets * needs.covariance_bytes, needs.weight_bytes
    largest = hidden = together = None
    if needs.block_bytes is not None:
        largest = sets * max(needs.block_bytes.values())
        hidden = tokens * needs.hidden_bytes
        together = weights + largest + hidden
    return {
        "weights": (weights, weights),
        "covariances": (whole, largest),
        "hidden states": (0, hidden),
        "together": (weights + whole, together),
    }
