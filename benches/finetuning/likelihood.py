"""How probable a model finds answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from corda_kernels.structure import decoder, input_device

from .data import Batch


def without_wrapper(model: nn.Module) -> Any:
    """The transformers model in a PeftModel, with its adapters; any other model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def answer_nll(model: nn.Module, batch: Batch, past: Any = None) -> Tensor:
    """Negative log-likelihood of every token of the answers, in nats.

    Only what predicts an answer goes through the output head.

    Args:
        model: a causal language model, with adapters or without.
        batch: every row begins with at least one token that is not of the answer.
        past: transformers' cache of a prefix that all rows share, repeated for each row. It is
            changed.

    Returns:
        (answer tokens,) float32, row after row.
    """
    causal = without_wrapper(model)
    device = input_device(causal)
    batch = batch.to(device)
    mask = batch.real
    if past is not None:
        prefix = mask.new_ones(mask.shape[0], past.get_seq_length())
        mask = torch.cat([prefix, mask], dim=1)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        hidden = decoder(causal)(
            input_ids=batch.ids,
            attention_mask=mask.long(),
            past_key_values=past,
            use_cache=past is not None,
        ).last_hidden_state
        predicting = batch.answer[:, 1:]
        logits = causal.get_output_embeddings()(hidden[:, :-1][predicting])
    targets = batch.ids[:, 1:][predicting]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def mean_by_row(values: Tensor, batch: Batch) -> Tensor:
    """Means of what `answer_nll` gives, (rows,) float64."""
    counts = batch.answer[:, 1:].sum(dim=1)
    parts = torch.split(values.double().cpu(), counts.tolist())
    return torch.stack([part.mean() for part in parts])
