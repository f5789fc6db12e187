"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .data import Batch
from .likelihood import answer_nll

WARM_UP = 4


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    learning_rate: float,
    *,
    penalty: Callable[[], Tensor] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains what is trainable, one step of Adam a batch.

    The learning rate rises over the first four steps and then stays, so that the model at any step
    is what a run of that length would have given.

    Args:
        model: with an adapter; left in evaluation mode, in which a model without dropout trains
            alike.
        batches: of problems; the loss is the mean over the tokens of their answers.
        learning_rate: of Adam (β 0.9 and 0.999, no weight decay).
        penalty: added to the loss of each step; a scalar.
        after_step: called with the number of steps done, after each.

    Returns:
        The loss of each batch before its step, without the penalty. The list ends before the first
        one that is not finite, and so does the training.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    model.eval()
    losses: list[float] = []
    for step, batch in enumerate(batches, 1):
        loss = answer_nll(model, batch).mean()
        value = loss.item()
        if not math.isfinite(value):
            break
        losses.append(value)
        total = loss if penalty is None else loss + penalty()
        torch.autograd.backward(total)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / WARM_UP)
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step)
    return losses
