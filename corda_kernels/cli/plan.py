"""`corda-kernels plan`: what calibrating a model needs, from its config alone."""

from __future__ import annotations

from corda_kernels.cli import options
from corda_kernels.cli.printing import show


def plan(
    model: options.Model,
    samples: options.Samples = 256,
    seq_len: options.SeqLen = 2048,
    targets: options.Targets = None,
    stability: options.Stability = True,
    dtype: options.Dtype = None,
    task: options.Task = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what calibrating MODEL needs, in one pass and block by block; loads no weights."""
    from corda_kernels.calibration.needs import calibration_needs
    from corda_kernels.models import load_skeleton
    from corda_kernels.outputs import format_bytes
    from corda_kernels.report import Table

    skeleton = load_skeleton(model, task=task, dtype=dtype, trust_remote_code=trust_remote_code)
    needs = calibration_needs(skeleton, targets, seq_len=seq_len)
    tokens, sets = samples * seq_len, 3 if stability else 1
    weights, whole, blocks = needs.weight_bytes, sets * needs.covariance_bytes, needs.block_bytes
    # Bytes in memory at once, in one pass and block by block.
    sizes = {"weights": [weights], "covariances": [whole], "hidden states": [0]}
    if blocks is not None:
        largest, hidden = sets * max(blocks.values()), tokens * needs.hidden_bytes
        for row, size in zip(sizes.values(), (weights, largest, hidden), strict=True):
            row.append(size)
    sizes["together"] = [sum(column) for column in zip(*sizes.values(), strict=True)]
    rows = [
        (what, *map(format_bytes, row), *(["-"] if blocks is None else []))
        for what, row in sizes.items()
    ]
    rows.append(("forward passes", "1", "1"))
    for what, flops in (("forward", needs.forward_flops), ("covariances", needs.covariance_flops)):
        rows.append((f"FLOPs: {what}", *2 * (f"{flops * tokens:.1e}",)))
    halves = ", with covariances of both halves and their mean (--no-stability needs a third)"
    notes = [
        f"for {samples} sequences of {seq_len} tokens{halves if stability else ''}; activations of "
        "one forward pass and the decomposition's workspace come on top"
    ]
    if needs.positions is not None and seq_len > needs.positions:
        notes.append(
            f"the model has {needs.positions} positions and cannot run {seq_len} tokens: lower "
            f"--seq-len to {needs.positions}"
        )
    notes.append(
        "next: corda-kernels init, with --memory-limit to go block by block"
        if blocks is not None
        else f"block by block: not possible, since {needs.obstacle}"
    )
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    layers = sum(len(names) for _, names in needs.groups)
    title = (
        f"{model}: {parameters / 1e9:.2f} billion parameters in {str(skeleton.dtype)[6:]}, "
        f"{layers} layers, {len(needs.groups)} distinct covariances"
    )
    show(Table(title, ("", "one pass", "block by block"), tuple(rows), tuple(notes)))
