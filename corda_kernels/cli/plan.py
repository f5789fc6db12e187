"""`corda-kernels plan`: what calibrating a model needs, from its config alone."""

from __future__ import annotations

from corda_kernels.cli import options
from corda_kernels.cli.printing import show


def plan(
    model: options.Model,
    samples: options.Samples = 256,
    seq_len: options.SeqLen = 2048,
    targets: options.Targets = "all-linear",
    stability: options.Stability = True,
    sides: options.Sides = "inputs",
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what calibrating MODEL needs, in one pass and block by block; loads no weights."""
    from corda_kernels.calibration.needs import calibration_needs
    from corda_kernels.models import load_skeleton
    from corda_kernels.outputs import format_bytes
    from corda_kernels.report import Table

    skeleton = load_skeleton(model, dtype=dtype, trust_remote_code=trust_remote_code)
    needs = calibration_needs(skeleton, targets, seq_len=seq_len)
    both = sides == "both"
    tokens, sets = samples * seq_len, 3 if stability else 1
    weights, whole, blocks = needs.weight_bytes, sets * needs.covariance_bytes, needs.block_bytes
    # Bytes in memory at once, in one pass and block by block.
    sizes = {"weights": [weights], "covariances": [whole], "hidden states": [0]}
    if blocks is not None:
        largest, hidden = sets * max(blocks.values()), tokens * needs.hidden_bytes
        for row, size in zip(sizes.values(), (weights, largest, hidden), strict=True):
            row.append(size)
    if both:
        sizes = {what: row[:1] for what, row in sizes.items()} | {
            "gradients": [sets * needs.gradient_bytes]
        }
        blocks = None
    sizes["together"] = [sum(column) for column in zip(*sizes.values(), strict=True)]
    rows = [
        (what, *map(format_bytes, row), *(["-"] if blocks is None else []))
        for what, row in sizes.items()
    ]
    passes = ("1 and back", "-") if both else ("1", "1")
    rows.append(("forward passes", *passes))
    work = {"forward": needs.forward_flops, "covariances": needs.covariance_flops}
    if both:
        work |= {"backward": needs.forward_flops, "gradients": needs.gradient_flops}
    for what, flops in work.items():
        rows.append(
            (f"FLOPs: {what}", f"{flops * tokens:.1e}", "-" if both else f"{flops * tokens:.1e}")
        )
    halves = ", with covariances of both halves and their mean (--no-stability needs a third)"
    notes = [
        f"for {samples} sequences of {seq_len} tokens{halves if sets == 3 else ''}; activations of "
        "one forward pass and the decomposition's workspace come on top"
    ]
    if needs.positions is not None and seq_len > needs.positions:
        notes.append(
            f"the model has {needs.positions} positions and cannot run {seq_len} tokens: lower "
            f"--seq-len to {needs.positions}"
        )
    obstacle = "gradients take one pass through the whole model" if both else needs.obstacle
    notes.append(
        "next: corda-kernels init, with --memory-limit to go block by block"
        if blocks is not None
        else f"block by block: not possible, since {obstacle}"
    )
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    layers = sum(len(names) for _, names in needs.groups)
    title = (
        f"{model}: {parameters / 1e9:.2f} billion parameters in {str(skeleton.dtype)[6:]}, "
        f"{layers} layers, {len(needs.groups)} distinct covariances"
    )
    show(Table(title, ("", "one pass", "block by block"), tuple(rows), tuple(notes)))
