"""The gradient side of calibration: D = E[g gᵀ], Ḡ = E[g xᵀ] and E[‖g‖² ‖x‖²] of every layer.

One backward pass follows each forward pass, through the activations alone: no parameter gets a
gradient, and nothing but the layers' inputs is kept beside what autograd keeps. The loss is the sum
of the token losses, so that no normalisation of a trainer's is in g.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corda_kernels.arguments import holds_numbers
from corda_kernels.calibration.batches import Batch, check_tokens, inputs_of
from corda_kernels.calibration.capture import HOST, Error, InputCapture
from corda_kernels.calibration.covariance import Covariance, Gradient
from corda_kernels.calibration.shrinkage import shrunk_gradients
from corda_kernels.errors import BatchError, CalibrationError, ModelError
from corda_kernels.kernels import symmetrize_, syrk_
from corda_kernels.structure import output_head

Sides = Literal["inputs", "both"]
Labels = Literal["given", "sampled"]

# A label that transformers leaves out of the loss.
_IGNORED = -100
# Labels go under this name with the tokens through `unpadded`, which drops "labels".
LABELS = "corda_labels"


def check_model(model: nn.Module) -> None:
    """Refuses a model that has no loss of tokens to take gradients of.

    Raises:
        ModelError: it has no output head, or does not name its input embeddings.
    """
    if output_head(model) is None or not callable(getattr(model, "get_input_embeddings", None)):
        raise ModelError(
            'sides="both" needs a causal language model of transformers with its head, got '
            f'{type(model).__name__}: load one, or take sides="inputs"'
        )


def with_labels(batch: Batch, index: int) -> Batch:
    """A batch whose labels, where it has some, stay with its tokens when padding is taken off.

    Raises:
        BatchError: the labels are no whole numbers of the shape of the token ids.
    """
    inputs = inputs_of(batch)
    labels, ids = inputs.get("labels"), inputs.get("input_ids")
    if labels is None:
        return batch
    whole = isinstance(labels, Tensor) and holds_numbers(labels) and labels.dtype == torch.int64
    if isinstance(ids, Tensor) and (not whole or labels.shape != ids.shape):
        says = f"has labels that are no int64 tensor of the shape of its input_ids, {ids.shape}"
        raise BatchError(index, f"{says}: give token ids, or -100 for tokens without a loss")
    return {**inputs, LABELS: labels}


def check_labels(inputs: Mapping[str, Any], head: nn.Module | None, index: int) -> None:
    """Refuses labels that the model has no logit for, of sequences without padding.

    Those on a device are not looked at, which would wait for it.

    Raises:
        BatchError: a label is no token of the model.
    """
    labels, classes = inputs.get(LABELS), getattr(head, "out_features", None)
    if labels is None or labels.device.type != "cpu" or classes is None:
        return
    labels = labels[:, 1:]  # no logit is for the first token
    remedy = "use -100 for tokens without a loss"
    check_tokens("has the label", labels[labels != _IGNORED], classes, index, remedy)


def backward_pass(
    model: nn.Module,
    inputs: dict[str, Any],
    labels: Labels,
    batches: Sequence[int],
    device: torch.device,
) -> None:
    """Runs sequences of equal length, without padding, forward and backward.

    Args:
        model: a causal language model, of which `GradientCapture` follows the activations.
        inputs: what it takes, and labels under the name that `with_labels` gave them.
        labels: which losses are summed, see `calibrate`.
        batches: the number of each sequence's batch, by which labels are drawn.
        device: of the inputs.
    """
    given = inputs.pop(LABELS, None)
    with torch.enable_grad():
        logits = model(**inputs).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # The logits of a token are those of the next one.
        following = inputs["input_ids"] if given is None else given
        following = nn.functional.pad(following[:, 1:], (0, 1), value=_IGNORED).to(logits.device)
        if labels == "sampled":
            counted = torch.ones_like(following) if given is None else following != _IGNORED
            rows = Counter(batches)  # those of a batch follow each other
            parts = logits.detach().split(list(rows.values()))
            drawn = [
                _drawn(part, torch.Generator(device).manual_seed(_seed(batch, part.shape[1])))
                for batch, part in zip(rows, parts, strict=True)
            ]
            following = torch.where(counted.bool(), torch.cat(drawn), _IGNORED)
        loss = cross_entropy(
            logits.flatten(0, 1), following.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        loss.backward()  # type: ignore[no-untyped-call]


def _seed(batch: int, length: int) -> int:
    """A seed of its own for the sequences of each length in a batch, which run at other times."""
    return (batch * 0x9E3779B1 + length) % 2**32  # of a seed a CPU takes 32 bits


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each position (batch, seq) of logits (batch, seq, vocabulary)."""
    shares = logits.flatten(0, 1).softmax(-1)
    found: Tensor = torch.multinomial(shares, 1, generator=generator)
    return found.view(logits.shape[:2])


@dataclass(kw_only=True)
class GradientCapture(InputCapture):
    """Accumulates D and Ḡ of every given module beside the covariances of their inputs.

    Attributes:
        model: whose loss is followed back, as far as its input embeddings.
    """

    model: nn.Module

    def __enter__(self) -> GradientCapture:
        super().__enter__()
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        self._hooks.callback(self._train, trained)
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        self._hooks.enter_context(embeddings.register_forward_hook(_followed))
        for name, module in self.modules.items():
            if isinstance(module, nn.Module):
                hook = partial(self._watch, name)
                self._hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def _train(self, names: Iterable[str]) -> None:
        for name in names:  # of which one that is offloaded is another object by now
            self.model.get_parameter(name).requires_grad_(True)

    def _watch(
        self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self._follow(name, x, self._kept(name, x), output)

    def _read_routed(
        self, name: str, x: Tensor, rows: Tensor | None, output: Tensor | None
    ) -> None:
        super()._read_routed(name, x, rows, output)
        assert output is not None  # experts that share their input are refused before
        self._follow(name, x, self._routed_kept(rows), output)

    def _follow(self, name: str, x: Tensor, kept: Tensor | None, output: Tensor) -> None:
        """Adds up the gradient at a layer's output when the backward pass comes to it."""
        x = x.detach()
        if name not in self.gradients:
            dtype = torch.promote_types(x.dtype, torch.float32)
            like = torch.empty(0, dtype=dtype, device=HOST if self.on_host else x.device)
            self.gradients[name] = Gradient.zeros(output.shape[-1], x.shape[-1], like)
        if output.requires_grad:
            hook = partial(self._add_gradient, name, x, x._version, kept)
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _add_gradient(
        self, name: str, x: Tensor, version: int, kept: Tensor | None, gradient: Tensor
    ) -> None:
        if x._version != version:
            raise CalibrationError(
                f"the input of layer {name} is changed in place after the layer has read it, so "
                "that its gradient cannot be taken: leave the layer out of the targets"
            )
        device = HOST if self.on_host else gradient.device
        # A checkpoint may have left the sums on another device.
        sums = self.gradients[name] = self.gradients[name].to(device)
        g = gradient.reshape(-1, gradient.shape[-1]).to(device)
        rows = x.reshape(-1, x.shape[-1]).to(device)
        if kept is not None:
            g, rows = g[kept.to(device)], rows[kept.to(device)]
        syrk_(sums.matrix, g, deterministic=self.deterministic)
        g, rows = g.to(sums.mean.dtype), rows.to(sums.mean.dtype)
        sums.mean.addmm_(g.mT, rows)
        sums.fisher_trace.add_(torch.dot(g.square().sum(1), rows.square().sum(1)))

    def _diagonals(self) -> list[tuple[Tensor, Error]]:
        return super()._diagonals() + [
            (sums.matrix.diagonal(), partial(_not_finite, name))
            for name, sums in self.gradients.items()
        ]

    def means(self, covariances: Mapping[str, Covariance]) -> dict[str, Gradient]:
        """D and Ḡ of the layers that have a covariance, experts' as `shrunk_gradients` has them.

        Ends the accumulation.

        Raises:
            CalibrationError: no token had a loss.
        """
        found = {name: self.gradients[name] for name in covariances if name in self.gradients}
        if not any(bool(gradient.matrix.diagonal().any()) for gradient in found.values()):
            raise CalibrationError(
                "no token has a loss, so that there is no gradient: every label is masked (-100), "
                "or every sequence has a single token"
            )
        for name, gradient in found.items():
            symmetrize_(gradient.matrix)
            for part in gradient.tensors:
                part.div_(max(covariances[name].tokens, 1))
        return shrunk_gradients(found, covariances, self.modules)


def _not_finite(name: str, batch: int, *_: object) -> BatchError:
    says = f"gives the gradient at layer {name} NaN or Inf"
    return BatchError(batch, f"{says}: use a wider dtype (--dtype bfloat16 or float32)")


def _followed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Embeddings as the place where a backward pass ends; a copy, which may be changed in place."""
    return output.detach().requires_grad_().clone() if torch.is_grad_enabled() else output
