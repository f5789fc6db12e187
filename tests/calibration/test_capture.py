from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corda_kernels.calibration.capture import InputCapture
from corda_kernels.calibration.masks import RowMasks
from corda_kernels.errors import CalibrationError, NonFiniteActivationError

if TYPE_CHECKING:
    from corda_kernels.calibration import Covariance

D = 3


class Feed:
    """Linear layers called by hand, with a note of all that each of them read."""

    def __init__(self, *names: str) -> None:
        self.layers = {name: nn.Linear(D, 2) for name in names}
        self.seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def __call__(self, x: Tensor, *names: str) -> None:
        for name in names:
            self.seen[name].append(x.detach().clone().view(-1, D))
            self.layers[name](x)

    def check(self, found: dict[str, Covariance]) -> None:
        """Holds every covariance to what its layer read."""
        assert list(found) == [name for name, seen in self.seen.items() if seen]
        for name, covariance in found.items():
            x = torch.cat(self.seen[name]).double()
            torch.testing.assert_close(
                covariance.matrix.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6
            )
            assert torch.equal(covariance.absmax, x.abs().amax(0).float())
            assert torch.equal(covariance.outlier_count, (x.abs() > 1).sum(0))
            assert covariance.tokens == len(x)
            assert covariance.calls == len(self.seen[name])


@pytest.fixture(autouse=True)
def _without_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def shared(found: dict[str, Covariance], *names: str) -> bool:
    return len({id(found[name]) for name in names}) == 1


def apart(found: dict[str, Covariance], *names: str) -> bool:
    return len({found[name].matrix.data_ptr() for name in names}) == len(names)


def test_without_statistics_the_covariances_are_the_same() -> None:
    feed = Feed("a", "b")
    x = 3 * torch.randn(20, D)
    found = []
    for statistics in (True, False):
        with InputCapture(feed.layers, statistics=statistics) as capture:
            feed(x, "a", "b")
        found.append(capture.covariances()["a"])
    assert torch.equal(found[0].matrix, found[1].matrix)
    assert found[0].absmax.all()
    assert not found[1].absmax.any()
    assert not found[1].outlier_count.any()


def test_readers_of_one_tensor_share_one_sum() -> None:
    feed = Feed("q", "k", "v", "o")
    with InputCapture(feed.layers, 1.0) as capture:
        for batch in range(3):
            feed(torch.randn(2, 4, D), "q", "k", "v")
            feed(torch.randn(2, 4, D), "o")
            capture.end_pass(batch, (0, 0))
    found = capture.covariances()
    feed.check(found)
    assert shared(found, "q", "k", "v")
    assert apart(found, "q", "o")


def test_readers_of_one_tensor_may_be_interleaved_with_others() -> None:
    """A parallel block: attention and MLP read one tensor, with other layers called between."""
    feed = Feed("q", "o", "up", "down")
    with InputCapture(feed.layers, 1.0) as capture:
        for batch in range(2):
            x = torch.randn(4, D)
            feed(x, "q")
            feed(torch.randn(4, D), "o")
            feed(x, "up")
            feed(torch.randn(4, D), "down")
            capture.end_pass(batch, (0, 0))
    found = capture.covariances()
    feed.check(found)
    assert shared(found, "q", "up")
    assert apart(found, "q", "o", "down")


@pytest.mark.parametrize("ending", [True, False], ids=["by_end_of_pass", "by_next_tensor"])
def test_modules_that_part_ways_later_are_split_with_right_sums(ending: bool) -> None:
    feed = Feed("q", "k", "v")
    with InputCapture(feed.layers, 1.0) as capture:
        for _ in range(2):
            feed(torch.randn(4, D), "q", "k", "v")
        feed(torch.randn(5, D), "q", "k")
        if ending:
            capture.end_pass(0, (0, 0))
        feed(torch.randn(6, D), "v")
        for _ in range(2):
            feed(torch.randn(7, D), "q", "k", "v")
        capture.end_pass(1, (0, 0))
    found = capture.covariances()
    feed.check(found)
    assert shared(found, "q", "k")
    assert apart(found, "q", "v")


def test_a_tensor_changed_in_place_between_two_readers_is_not_shared() -> None:
    feed = Feed("q", "k")
    with InputCapture(feed.layers, 1.0) as capture:
        for batch in range(2):
            x = torch.randn(4, D)
            feed(x, "q")
            x.mul_(3)
            feed(x, "k")
            capture.end_pass(batch, (0, 0))
    found = capture.covariances()
    feed.check(found)
    assert apart(found, "q", "k")


def test_a_shared_tensor_changed_before_its_last_reader_is_an_error() -> None:
    feed = Feed("q", "k")
    with InputCapture(feed.layers, 1.0):
        feed(torch.randn(4, D), "q", "k")
        x = torch.randn(4, D)
        feed(x, "q")
        x.mul_(3)
        with pytest.raises(CalibrationError, match=r"layers q, k .* changed in place"):
            feed(x, "k")


def test_a_tensor_may_change_after_its_last_reader() -> None:
    feed = Feed("q", "k")
    with InputCapture(feed.layers, 1.0) as capture:
        for batch in range(3):
            x = torch.randn(4, D)
            feed(x, "q", "k")
            x.mul_(3)
            capture.end_pass(batch, (0, 0))
    found = capture.covariances()
    feed.check(found)
    assert shared(found, "q", "k")


def test_equal_views_of_one_memory_do_not_share_but_are_right() -> None:
    feed = Feed("q", "k")
    with InputCapture(feed.layers, 1.0) as capture:
        x = torch.randn(2, 4, D)
        feed(x, "q")
        feed(x.view(8, D), "k")
        capture.end_pass(0, (0, 0))
    found = capture.covariances()
    feed.check(found)
    assert apart(found, "q", "k")


def test_memory_that_is_used_again_never_groups_layers() -> None:
    """Every layer reads a new tensor in the same memory, and mostly with the same id()."""
    names = [f"layer{i}" for i in range(40)]
    feed = Feed(*names)
    memory = np.zeros((4, D), dtype=np.float32)
    with InputCapture(feed.layers, 1.0) as capture:
        for batch in range(3):
            for name in names:
                memory[:] = torch.randn(4, D).numpy()
                feed(torch.from_numpy(memory), name)
            capture.end_pass(batch, (0, 0))
    found = capture.covariances()
    feed.check(found)
    assert apart(found, *names)


def test_no_input_is_kept_alive_after_its_pass() -> None:
    feed = Feed("q", "k", "v", "o")
    with InputCapture(feed.layers) as capture:
        for batch in range(2):
            qkv, o = torch.randn(4, D), torch.randn(4, D)
            kept = [weakref.ref(x) for x in (qkv, o)]
            feed(qkv, "q", "k", *(["v"] if batch == 0 else []))
            feed(o, "o")
            del qkv, o
            capture.end_pass(batch, (0, 0))
            assert [reference() for reference in kept] == [None, None]


def test_a_layer_called_twice_in_a_pass_counts_twice() -> None:
    feed = Feed("q", "k")
    with InputCapture(feed.layers, 1.0) as capture:
        for batch in range(2):
            feed(torch.randn(4, D), "q", "k", "q")
            capture.end_pass(batch, (0, 0))
    feed.check(capture.covariances())


READS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),  # the layer
        st.integers(0, 2),  # which tensor of the pass it reads
        st.sampled_from([False] * 5 + [True]),  # whether that is changed in place first
    ),
    max_size=7,
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(passes=st.lists(READS, max_size=4), seed=st.integers(0, 1000))
def test_whatever_the_order_of_reads_no_sum_is_wrong(
    passes: list[list[tuple[str, int, bool]]], seed: int
) -> None:
    torch.manual_seed(seed)
    feed = Feed("a", "b", "c")
    changed = False
    try:
        with InputCapture(feed.layers, 1.0) as capture:
            for batch, reads in enumerate(passes):
                tensors = [torch.randn(2, D) for _ in range(3)]
                for name, which, change in reads:
                    if change:
                        tensors[which].mul_(2)
                        changed = True
                    feed(tensors[which], name)
                capture.end_pass(batch, (0, 0))
    except CalibrationError:
        assert changed
    else:
        feed.check(capture.covariances())


@pytest.mark.parametrize("shape", [(D,), (0, D), (5, D), (2, 5, D), (2, 3, 4, D)])
def test_inputs_of_any_rank_count_their_rows(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(D, 2)
    with InputCapture({"a": layer}, 1.0) as capture:
        x = torch.randn(shape)
        layer(x)
        layer(input=torch.ones(1, D))
    found = capture.covariances()["a"]
    rows = torch.cat([x.view(-1, D), torch.ones(1, D)])
    torch.testing.assert_close(found.matrix, rows.T @ rows / len(rows))
    assert found.tokens == len(rows)


def test_double_inputs_are_summed_in_double() -> None:
    layer = nn.Linear(D, 2).double()
    with InputCapture({"a": layer}) as capture:
        x = torch.randn(10, D, dtype=torch.float64)
        layer(x)
    torch.testing.assert_close(capture.covariances()["a"].matrix, x.T @ x / 10, rtol=1e-13, atol=0)


def test_layers_without_tokens_are_unseen_and_have_no_covariance() -> None:
    feed = Feed("called", "empty", "never")
    with InputCapture(feed.layers) as capture:
        feed.layers["called"](torch.randn(4, D))
        feed.layers["empty"](torch.randn(0, D))
    assert list(capture.covariances()) == ["called"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_layer_that_read_nan_or_inf_is_named(value: float) -> None:
    feed = Feed("first", "second", "third")
    bad = torch.randn(4, D)
    bad[2, 1] = value
    with InputCapture(feed.layers) as capture:
        feed(torch.randn(4, D), "first")
        feed(bad, "third")
        feed(bad.clone(), "second")
        capture.end_pass(5, (0, 0))
        feed(torch.full((4, D), torch.nan), "first", "third")  # a later pass changes nothing
        with pytest.raises(NonFiniteActivationError, match="1 of 3 channels in batch 5") as caught:
            capture.end_pass(6, (0, 0))
    assert (caught.value.layer, caught.value.batch) == ("third", 5)


def test_peft_normalization_divides_by_the_largest_entry_of_each_call() -> None:
    layer = nn.Linear(D, 2)
    inputs = [torch.randn(n, D) for n in (4, 1, 9)]
    with InputCapture({"a": layer}, normalize="peft") as capture:
        for x in inputs:
            layer(x)
    scaled = [x / x.max().abs() for x in inputs]
    expected = sum(x.T @ x for x in scaled) / len(inputs)
    torch.testing.assert_close(capture.covariances()["a"].matrix, expected)


def test_peft_normalization_refuses_to_divide_by_zero() -> None:
    layer = nn.Linear(D, 2)
    refused = pytest.raises(CalibrationError, match=r"layer a .* largest entry is 0")
    with InputCapture({"a": layer}, normalize="peft"), refused:
        layer(torch.zeros(4, D))


def test_a_layer_called_without_a_tensor_is_named() -> None:
    layer = nn.Linear(D, 2)
    refused = pytest.raises(CalibrationError, match="layer a was called without an input tensor")
    with InputCapture({"a": layer}), refused:
        layer([1.0] * D)


def test_hooks_live_inside_the_context_only() -> None:
    layer = nn.Linear(D, 2)
    own = layer.register_forward_pre_hook(lambda module, args: None)

    def fail() -> None:
        with InputCapture({"a": layer}):
            assert len(layer._forward_pre_hooks) == 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(layer._forward_pre_hooks) == [own.id]
    assert not layer._forward_pre_hooks_with_kwargs


class Masked(nn.Module):
    """A model that feeds some layers, with the attention mask of its sequences."""

    def __init__(self, feed: Feed) -> None:
        super().__init__()
        self.feed = [feed]

    def forward(self, x: Tensor, *names: str, attention_mask: Tensor | None = None) -> None:
        self.feed[0](x, *names)


def test_masked_rows_count_nowhere() -> None:
    feed = Feed("q", "k", "o", "heads", "pooled")
    model, keep = Masked(feed), torch.tensor([[True, False, True], [False, False, True]])
    x, y, z = torch.randn(2, 3, D), torch.randn(2, 3, D), torch.randn(2, 3, 4, D)
    x[0, 1] = torch.nan  # what a model makes of padding is nobody's concern
    with InputCapture(feed.layers, 1.0, masks=RowMasks(model)) as capture:
        model(x, "q", "k", attention_mask=keep)
        model(y.flatten(0, 1), "o", attention_mask=keep.long())
        model(z, "heads", attention_mask=keep.float())
        model(z[:, 0, 0], "pooled", attention_mask=keep)
        model(x, "q", attention_mask=keep)  # alone: they part ways when the pass ends
        capture.end_pass(0, (0, 3))
        model(x[:1, :1], "q", "k")
        capture.end_pass(1, (3, 4))
    feed.seen = {
        "q": [x[keep], x[keep], x[0, :1]],
        "k": [x[keep], x[0, :1]],
        "o": [y[keep]],
        "heads": [z[keep].flatten(0, 1)],
        "pooled": [z[:, 0, 0]],
    }
    feed.check(capture.covariances())


def test_a_mask_that_does_not_fit_a_layers_rows_is_refused() -> None:
    feed = Feed("expert")
    model, keep = Masked(feed), torch.tensor([[True, False, True]])
    with InputCapture(feed.layers, masks=RowMasks(model)):
        says = r"layer expert received 2 rows, .* \(1, 3\)"
        with pytest.raises(CalibrationError, match=says):
            model(torch.randn(2, D), "expert", attention_mask=keep)


@pytest.mark.parametrize("first", [True, False], ids=["from_the_start", "later"])
def test_inference_tensors_are_summed_but_not_shared(first: bool) -> None:
    """They have no version counter, so that a change in place could not be told."""
    feed = Feed("q", "k")
    with InputCapture(feed.layers, 1.0) as capture:
        for batch in range(3):
            with torch.inference_mode(first or batch == 1):
                x = torch.randn(4, D)
                feed(x, "q")
                if x.is_inference():
                    x.mul_(3)
                feed(x, "k")
                capture.end_pass(batch, (0, 0))
    found = capture.covariances()
    feed.check(found)
    assert apart(found, "q", "k")
    assert not found["q"].matrix.is_inference()
