"""Deferred logits are as good as logits to whoever looks, and cost nothing where nobody does."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corda_kernels.errors import CalibrationError
from corda_kernels.integrations.peft.deferred import DeferredTensor, deferred_output
from corda_kernels.integrations.peft.observe import Observer


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 50, bias=False)


@pytest.fixture
def computed(head: nn.Linear) -> list[Tensor]:
    """Inputs of the products that the head has really made."""
    made: list[Tensor] = []
    weight = head.weight

    class Counting(nn.Parameter):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is nn.functional.linear:
                made.append(args[0])
            return super().__torch_function__(func, types, args, kwargs or {})

    head.weight = weight.detach().as_subclass(Counting)
    return made


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def loss(logits: Tensor) -> Tensor:
    labels = torch.arange(4)
    return nn.functional.cross_entropy(logits[..., :-1, :].reshape(-1, 50).float(), labels)


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "a loss": loss,
    "a view": lambda t: t[..., -1, :],
    "an operator": lambda t: 2 * t - 1,
    "a comparison": lambda t: t == t.amax(),
    "in place": lambda t: t.div_(3).tanh_().mul_(3),
    "among others": lambda t: torch.cat([t, torch.zeros_like(t)]),
    "of torch.ops": lambda t: torch.ops.aten.add.Tensor(t, t),
    "another dtype": lambda t: t.to(torch.float64),
    "NumPy": lambda t: torch.from_numpy(t.numpy()),
    "NumPy's own": lambda t: torch.from_numpy(np.asarray(t)),
    "a list": lambda t: torch.tensor(t.tolist()),
    "a number": lambda t: torch.tensor(t[0, 0, 0].item()),
    "rows": lambda t: torch.stack(list(t)),
    "DLPack": torch.utils.dlpack.from_dlpack,
    "a copy": copy.deepcopy,
    "a pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "a file": saved,
    "attributes": lambda t: t.data,
    "text": lambda t: torch.tensor([ord(c) for c in f"{t}"]),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@torch.no_grad()
def test_whatever_is_done_with_it_is_done_with_the_numbers(
    head: nn.Linear, hidden: Tensor, look: Callable[[Tensor], Any]
) -> None:
    expected = look(head(hidden))
    with deferred_output(head):
        deferred = head(hidden)
        assert type(deferred) is DeferredTensor
        found = look(deferred)
    assert type(found) is Tensor
    assert torch.equal(found, expected)


@torch.no_grad()
def test_what_nobody_looks_at_is_not_computed(
    head: nn.Linear, computed: list[Tensor], hidden: Tensor
) -> None:
    with deferred_output(head):
        for _ in range(3):
            deferred = head(hidden)
            assert isinstance(deferred, Tensor)
            assert deferred.shape == deferred.size() == (2, 3, 50)
            assert (deferred.dtype, deferred.device) == (torch.float32, hidden.device)
            assert (deferred.ndim, deferred.dim(), deferred.numel()) == (3, 3, 300)
            assert deferred.is_floating_point()
            assert not deferred.requires_grad
            assert deferred in {deferred: 1}
        del deferred
    assert computed == []


@torch.no_grad()
def test_the_numbers_are_computed_once(
    head: nn.Linear, computed: list[Tensor], hidden: Tensor
) -> None:
    with deferred_output(head):
        deferred = head(hidden)
        first = deferred.argmax(-1)
        assert torch.equal(deferred.argmax(-1), first)
        deferred.zero_()
        assert not deferred.any()
    assert len(computed) == 1


@torch.no_grad()
def test_what_is_held_at_the_end_is_that_of_the_weights_as_they_were(
    head: nn.Linear, hidden: Tensor
) -> None:
    expected = head(hidden)
    with deferred_output(head):
        held = head(hidden)
    head.weight.zero_()
    assert torch.equal(held + 0, expected)
    assert not head(hidden).any()
    assert type(head) is nn.Linear


@torch.no_grad()
def test_the_head_is_as_before_after_an_error(head: nn.Linear, hidden: Tensor) -> None:
    def fail() -> None:
        with deferred_output(head):
            head(hidden)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert type(head) is nn.Linear
    assert type(head(hidden)) is Tensor


@pytest.mark.parametrize("change", ["input", "weight", "memory"])
@torch.no_grad()
def test_what_changes_before_the_look_is_an_error_to_who_looks(
    head: nn.Linear, hidden: Tensor, change: str
) -> None:
    with deferred_output(head):
        deferred = head(hidden)
        if change == "memory":
            head.half()
        else:
            (hidden if change == "input" else head.weight).add_(1)
        with pytest.raises(CalibrationError, match="changed in place before the logits"):
            deferred.sum()
    with pytest.raises(CalibrationError, match="changed in place before the logits"):
        deferred.sum()


@torch.no_grad()
def test_other_weights_for_a_call_are_those_of_its_logits(head: nn.Linear, hidden: Tensor) -> None:
    with deferred_output(head):
        found = torch.func.functional_call(head, {"weight": torch.zeros(50, 8)}, (hidden,))
        assert isinstance(found, DeferredTensor)
    assert not found.any()


@torch.no_grad()
def test_copies_that_are_made_meanwhile_compute_with_their_own_weights(
    head: nn.Linear, hidden: Tensor
) -> None:
    with deferred_output(head):
        copies = [copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
        for other in copies:
            other.weight.zero_()
            assert type(other(hidden)) is Tensor
            assert not other(hidden).any()
        assert head(hidden).any()
    assert not copies[0](hidden).any()


@torch.no_grad()
def test_several_threads_may_look_at_once(
    head: nn.Linear, computed: list[Tensor], hidden: Tensor
) -> None:
    expected = hidden @ head.weight.as_subclass(Tensor).T
    with deferred_output(head), ThreadPoolExecutor(4) as threads:
        for _ in range(50):
            deferred = head(hidden)
            together = threading.Barrier(4)

            def look(deferred: Tensor = deferred, together: Any = together) -> Tensor:
                together.wait()
                with torch.no_grad():
                    return deferred + 0

            for future in [threads.submit(look) for _ in range(4)]:
                torch.testing.assert_close(future.result(), expected)
    assert len(computed) == 50


@torch.no_grad()
def test_it_follows_what_changes_its_shape_in_place(head: nn.Linear, hidden: Tensor) -> None:
    with deferred_output(head):
        deferred = head(hidden)
        deferred.unsqueeze_(0)
        assert deferred.shape == (1, 2, 3, 50)
        assert (deferred.ndim, deferred.dim()) == (4, 4)
        assert deferred.requires_grad_().requires_grad
        assert deferred.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_a_compiled_head_computes_as_ever(head: nn.Linear, hidden: Tensor) -> None:
    expected = 2 * head(hidden)
    with deferred_output(head):
        compiled = torch.compile(lambda x: 2 * head(x), backend="eager", fullgraph=True)
        found = compiled(hidden)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)


def test_the_head_computes_as_ever_where_deferring_would_not_do(
    head: nn.Linear, hidden: Tensor
) -> None:
    with deferred_output(head):
        assert head(hidden).requires_grad
        with torch.no_grad():
            with torch.autocast("cpu"):
                assert head(hidden).dtype == torch.bfloat16
            handle = head.register_forward_hook(lambda *_: None)
            assert type(head(hidden)) is Tensor
            handle.remove()
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                head(hidden[..., 1:])
            with pytest.raises(RuntimeError, match="dtype"):
                head(hidden.double())
        with torch.inference_mode():
            assert type(head(hidden + 1)) is Tensor

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    wrapped = nn.Linear(8, 50)
    wrapped.forward = lambda x: x  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        for other in (Scaled(8, 50), wrapped):
            with deferred_output(other):
                assert type(other(hidden)) is Tensor
        with deferred_output(None):
            pass


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_script_that_reads_logits_and_a_loss_gets_what_the_model_gives(
    tiny_model: Callable[..., nn.Module], architecture: str
) -> None:
    model = tiny_model(architecture, initializer_range=0.1)
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    kept, read = [], []

    def run() -> None:
        output = model(input_ids=ids, labels=ids)
        read.append(float(output.loss))
        kept.append(model(input_ids=ids).logits)
        read.append(float(kept[-1].logsumexp(-1).sum()))

    with torch.no_grad():
        run()
    linears = {name: m for name, m in model.named_modules() if name.endswith("down_proj")}
    linears |= {name: m for name, m in model.named_modules() if name.endswith("mlp.c_proj")}
    Observer("tokens").observe(model, linears, run)
    assert read[2:] == read[:2]
    assert torch.equal(kept[1] + 0, kept[0])
