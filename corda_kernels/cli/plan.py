"""`corda-kernels plan`: what calibrating a model needs, from its config alone."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from corda_kernels.cli import options
from corda_kernels.cli.printing import show

ONE_PASS, BY_BLOCK, OFFLOADED = "one pass", "block by block", "offloaded"


def plan(
    model: options.Model,
    samples: options.Samples = 256,
    seq_len: options.SeqLen = 2048,
    targets: options.Targets = None,
    experts: options.Experts = None,
    memory: Annotated[
        str | None,
        Option(
            metavar="SIZE",
            callback=options.parse_size,
            help="Memory of your device, such as 80GB: show also what fits into it.",
        ),
    ] = None,
    stability: Annotated[
        bool,
        Option(help="Count what --stability of init and calibrate takes, three times as much."),
    ] = False,
    sides: options.Sides = "inputs",
    dtype: options.Dtype = None,
    task: options.Task = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show the memory and FLOPs that calibrating a model takes.

    Reads the model's config, and loads no weights. The table has a column for each way to run: all
    covariances in one pass; block by block, which holds those of one decoder block at a time; and
    with --memory also with the other blocks' weights offloaded.

    \b
    Example:
      corda-kernels plan meta-llama/Llama-2-7b-hf --samples 256 --memory 80GB

    The last line says with which command to go on.
    """
    # A text on the command line, bytes once it is parsed.
    limit: Any = memory
    from corda_kernels.calibration.experts import by_parameter
    from corda_kernels.calibration.needs import calibration_needs
    from corda_kernels.models import load_skeleton
    from corda_kernels.outputs import format_bytes
    from corda_kernels.report.table import Table

    skeleton = load_skeleton(model, task=task, dtype=dtype, trust_remote_code=trust_remote_code)
    needs = calibration_needs(skeleton, targets, experts, seq_len=seq_len)
    both, tokens, sets = sides == "both", samples * seq_len, 3 if stability else 1
    # Bytes in memory at once.
    sizes = {"weights": needs.weight_bytes, "covariances": sets * needs.covariance_bytes}
    if both:
        sizes["gradients"] = sets * needs.gradient_bytes
    sizes["hidden states"] = 0
    ways = {ONE_PASS: sizes}
    if needs.block_bytes is not None:
        covariances, gradients = (sets * size for size in needs.largest_block(sides))
        hidden = tokens * needs.hidden_bytes
        if both:  # the input of every block stays
            hidden *= len(needs.block_bytes) + 1
        elif limit is not None:  # a device's memory may run out, and a block start again: twice
            hidden *= 2
        ways[BY_BLOCK] = sizes | {"covariances": covariances, "hidden states": hidden}
        if both:
            ways[BY_BLOCK]["gradients"] = gradients
        if limit is not None:
            ways[OFFLOADED] = ways[BY_BLOCK] | {"weights": needs.block_weight_bytes}
    columns = list(dict.fromkeys([*ways, BY_BLOCK]))
    rows = [
        (what, *(format_bytes(ways[way][what]) if way in ways else "-" for way in columns))
        for what in sizes
    ]
    totals = (format_bytes(sum(ways[way].values())) if way in ways else "-" for way in columns)
    rows.append(("together", *totals))
    passes = [2 if both and way != ONE_PASS else 1 for way in columns]
    rows.append(("forward passes", *(f"{n} and back" if both else f"{n}" for n in passes)))
    work: dict[str, float] = {"covariances": needs.covariance_flops}
    if both:
        work |= {"backward": needs.forward_flops, "gradients": needs.gradient_flops}
    forward = (f"{needs.forward_flops * tokens * n:.1e}" for n in passes)
    rows.append(("FLOPs: forward", *forward))
    for what, flops in work.items():
        rows.append((f"FLOPs: {what}", *len(columns) * (f"{flops * tokens:.1e}",)))
    as_by = (
        "calibrate needs by default, for both halves of the text and their mean"
        if stability
        else "init needs by default; calibrate judges the stability, which takes three times the "
        "covariances (--stability)"
    )
    notes = [
        f"for {samples} sequences of {seq_len} tokens, as {as_by}; activations of one forward pass "
        "and the decomposition's workspace come on top"
    ]
    if needs.positions is not None and seq_len > needs.positions:
        notes.append(
            f"the model has {needs.positions} positions and cannot run {seq_len} tokens: lower "
            f"--seq-len to {needs.positions}"
        )
    if BY_BLOCK not in ways:
        notes.append(f"block by block: not possible, since {needs.obstacle}")
    if limit is not None:
        notes += _fitting(ways, limit, stability)
    elif BY_BLOCK in ways:
        command = "calibrate" if stability else "init"
        notes.append(f"next: corda-kernels {command}, with --memory-limit to go block by block")
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    names = [name for _, members in needs.groups for name in members]
    own = sum(map(len, by_parameter(names).values()))
    fused = f" and inputs of {own} experts" if own else ""
    title = (
        f"{model}: {parameters / 1e9:.2f} billion parameters in {str(skeleton.dtype)[6:]}, "
        f"{len(names) - own} layers{fused}, {len(needs.groups)} distinct covariances"
    )
    show(Table(title, ("", *columns), tuple(rows), tuple(notes)))


def _fitting(ways: dict[str, dict[str, int]], limit: int, stability: bool) -> list[str]:
    """Lines on which ways fit into a device's memory; the hidden states wait on the host."""
    from corda_kernels.outputs import format_bytes

    fits = [
        way for way, sizes in ways.items() if sum(sizes.values()) - sizes["hidden states"] <= limit
    ]
    room = format_bytes(limit)
    command = "calibrate" if stability else "init"
    lines = [f"{room}: none of these ways fits"]
    if fits:
        lines = [f"{room} hold weights and covariances: {', '.join(fits)}"]
    if OFFLOADED in ways:
        lines.append(
            f"{OFFLOADED}: block by block, while the weights of all other blocks wait on the host "
            "or the disk; hidden states are on the host in either case"
        )
    if ONE_PASS in fits:
        lines.append(f"next: corda-kernels {command}")
    elif BY_BLOCK in fits:
        left = limit - ways[BY_BLOCK]["weights"]
        lines.append(f"next: corda-kernels {command} --memory-limit {left}")
    elif OFFLOADED in fits:
        lines.append(
            'next: from Python, from_pretrained(…, device_map="auto", max_memory={…}) and '
            "calibrate_blocks(…)"
        )
    elif stability:
        lines.append("next: leave --stability out, which takes a third of the covariances")
    else:
        lines.append("next: leave layers out (--targets), or calibrate on the CPU")
    return lines
