"""`corda-kernels plan`: what calibrating a model needs, from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_kernels.cli import options
from corda_kernels.cli.printing import echo
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

    for option, count in (("--samples", samples), ("--seq-len", seq_len)):
        if count < 1:
            raise ConfigError(f"{option} must be at least 1, got {count}")
    skeleton = load_skeleton(model, dtype=dtype, trust_remote_code=trust_remote_code)
    needs = calibration_needs(skeleton, options.parse_targets(targets), seq_len=seq_len)
    layers = sum(len(names) for _, names in needs.groups)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    echo(
        f"{model}: {parameters / 1e9:.2f} billion parameters in {str(skeleton.dtype)[6:]}, "
        f"{layers} layers, {len(needs.groups)} distinct covariances"
    )
    rows = [("", "one pass", "block by block")]
    for what, sizes in _memory(needs, samples * seq_len, 3 if stability else 1).items():
        whole, blocks = ("-" if size is None else format_bytes(size) for size in sizes)
        rows.append((what, whole, blocks))
    rows.append(("forward passes", "1", "1"))
    for what, flops in (
        ("forward", needs.forward_flops),
        ("covariances", needs.covariance_flops),
    ):
        shown = f"{flops * samples * seq_len:.1e}"
        rows.append((f"FLOPs: {what}", shown, shown))
    for what, whole, blocks in rows:
        echo(f"{what:24}{whole:>16}{blocks:>16}")
    echo(
        f"for {samples} sequences of {seq_len} tokens"
        + (
            ", with covariances of both halves and their mean (--no-stability needs a third)"
            if stability
            else ""
        )
        + "; activations of one forward pass and the decomposition's workspace come on top"
    )
    if needs.positions is not None and seq_len > needs.positions:
        echo(
            f"the model has {needs.positions} positions and cannot run {seq_len} tokens: lower "
            f"--seq-len to {needs.positions}"
        )
    if needs.block_bytes is None:
        echo(f"block by block: not possible, since {needs.obstacle}")
    else:
        echo("next: corda-kernels init, with --memory-limit to go block by block")


def _memory(needs: CalibrationNeeds, tokens: int, sets: int) -> dict[str, tuple[int, int | None]]:
    """Bytes of what is in memory at once, in one pass and block by block."""
    whole = sets * needs.covariance_bytes
    rows: dict[str, tuple[int, int | None]] = {
        "weights": (needs.weight_bytes, needs.weight_bytes),
        "covariances": (whole, None),
        "hidden states": (0, None),
        "together": (needs.weight_bytes + whole, None),
    }
    if needs.block_bytes is not None:
        largest = sets * max(needs.block_bytes.values())
        hidden = tokens * needs.hidden_bytes
        together = needs.weight_bytes + largest + hidden
        for what, size in (
            ("covariances", largest),
            ("hidden states", hidden),
            ("together", together),
        ):
            rows[what] = (rows[what][0], size)
    return rows
