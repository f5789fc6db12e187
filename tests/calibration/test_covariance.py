from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from corda_kernels import files
from corda_kernels.calibration import Covariance, CovarianceSet
from corda_kernels.calibration.covariance_set import save_pieces
from corda_kernels.calibration.packed import pack_symmetric, unpack_symmetric
from corda_kernels.errors import CovarianceError, CovarianceFileError, OutputError

FIELDS = ("matrix", "tokens", "calls", "absmax", "outlier_count", "outlier_threshold")


def covariance_of(x: Tensor, *, calls: int = 1, threshold: float = 1.0) -> Covariance:
    """The covariance of the rows of x (n, d), taken literally."""
    lower = (x.T @ x / max(len(x), 1)).tril()
    return Covariance(
        lower + lower.tril(-1).T,
        len(x),
        calls,
        x.abs().float().amax(0) if len(x) else torch.zeros(x.shape[1]),
        (x.abs() > threshold).sum(0),
        threshold,
    )


def random_set(d: int = 5, **options: Any) -> CovarianceSet:
    """Five modules: q, k, v share one covariance, "o" and "größe" have their own."""
    qkv, o, other = (covariance_of(torch.randn(n, d + n)) for n in (7, 2, 0))
    names = {"v": qkv, "q": qkv, "o": o, "k": qkv, "größe": other}
    return CovarianceSet(names, **options)


def same(a: Covariance, b: Covariance) -> bool:
    pairs = [(getattr(a, field), getattr(b, field)) for field in FIELDS]
    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) else x == y
        for x, y in pairs
    )


@pytest.mark.parametrize(("n", "m"), [(40, 3), (1, 1), (5, 0), (0, 5), (0, 0)])
def test_merging_gives_the_covariance_of_the_concatenation(n: int, m: int) -> None:
    x, y = torch.randn(n, 6), 3 * torch.randn(m, 6)
    merged = covariance_of(x, calls=2).merge(covariance_of(y, calls=3))
    expected = covariance_of(torch.cat([x, y]), calls=5)
    torch.testing.assert_close(merged.matrix, expected.matrix)
    assert torch.equal(merged.matrix, merged.matrix.T)
    assert torch.equal(merged.absmax, expected.absmax)
    assert torch.equal(merged.outlier_count, expected.outlier_count)
    assert (merged.tokens, merged.calls) == (n + m, 5)


def test_merging_weighs_by_calls_where_the_mean_is_over_calls() -> None:
    a, b = (covariance_of(torch.randn(n, 4), calls=calls) for n, calls in ((10, 3), (90, 1)))
    merged = a.merge(b, normalize="peft")
    torch.testing.assert_close(merged.matrix, (3 * a.matrix + b.matrix) / 4)


def test_merging_two_dtypes_keeps_the_wider() -> None:
    a, b = covariance_of(torch.randn(5, 4)), covariance_of(torch.randn(6, 4))
    wide = replace(b, matrix=b.matrix.double())
    assert a.merge(wide).matrix.dtype == torch.float64
    torch.testing.assert_close(wide.merge(a).matrix.float(), a.merge(b).matrix)


def test_merging_leaves_both_sides_alone() -> None:
    x, y = torch.randn(5, 4), torch.randn(6, 4)
    a, b = covariance_of(x), covariance_of(y)
    a.merge(b)
    assert same(a, covariance_of(x))
    assert same(b, covariance_of(y))


@pytest.mark.parametrize(
    "other",
    [
        covariance_of(torch.ones(2, 5)),
        covariance_of(torch.ones(2, 4), threshold=2.0),
    ],
    ids=["channels", "threshold"],
)
def test_what_does_not_match_cannot_merge(other: Covariance) -> None:
    with pytest.raises(CovarianceError, match="cannot be merged"):
        covariance_of(torch.ones(2, 4)).merge(other)


def test_a_set_is_a_mapping_in_the_given_order() -> None:
    found = random_set()
    assert list(found) == ["v", "q", "o", "k", "größe"]
    assert len(found) == 5
    assert "absent" not in found
    assert [names for _, names in found.groups()] == [["v", "q", "k"], ["o"], ["größe"]]
    with pytest.raises(KeyError):
        found["absent"]


def test_an_unknown_normalization_is_refused() -> None:
    with pytest.raises(CovarianceError, match=r'"tokens" or "peft", got .mean.'):
        CovarianceSet({}, normalize="mean")


def test_merged_sets_hold_merged_covariances_and_keep_their_sharing() -> None:
    a, b = random_set(left_out={"x": "why"}, provenance={"model": "m"}), random_set()
    merged = a.merge(b)
    assert list(merged) == list(a)
    assert all(same(merged[name], a[name].merge(b[name])) for name in a)
    assert merged["q"] is merged["k"] is merged["v"]
    assert (merged.left_out, merged.provenance) == (a.left_out, a.provenance)


def test_merged_sets_keep_no_note_of_one_sample_alone() -> None:
    of_one = {"stability": {"rank": 4}, "selection": {"method": "pool"}, "model": "m"}
    a = random_set(provenance={"tokens": 3, "data": {"file": "a"}, "domain": "d"} | of_one)
    b = random_set(provenance={"tokens": 4, "data": {"file": "b"}, "domain": "d"} | of_one)
    assert a.merge(b).provenance == {"tokens": 7, "domain": "d", "model": "m"}


def test_merged_sets_share_only_where_both_did() -> None:
    one, two = (covariance_of(torch.randn(4, 3)) for _ in range(2))
    shared = CovarianceSet({"q": one, "k": one, "v": one})
    apart = CovarianceSet({"q": one, "k": one, "v": two})
    for merged in (shared.merge(apart), apart.merge(shared)):
        assert merged["q"] is merged["k"] is not merged["v"]
        torch.testing.assert_close(merged["v"].matrix, (one.matrix + two.matrix) / 2)


def test_sets_merge_by_calls_where_their_means_are_over_calls() -> None:
    a, b = (
        CovarianceSet({"q": covariance_of(torch.randn(n, 3), calls=c)}, normalize="peft")
        for n, c in ((4, 5), (9, 1))
    )
    merged = a.merge(b)
    assert merged.normalize == "peft"
    torch.testing.assert_close(merged["q"].matrix, (5 * a["q"].matrix + b["q"].matrix) / 6)


def test_sets_of_other_layers_or_another_normalization_cannot_merge() -> None:
    one = covariance_of(torch.ones(2, 3))
    with pytest.raises(CovarianceError, match="different layers"):
        CovarianceSet({"q": one}).merge(CovarianceSet({"q": one, "k": one}))
    with pytest.raises(CovarianceError, match='normalised by "tokens" and "peft"'):
        CovarianceSet({"q": one}).merge(CovarianceSet({"q": one}, normalize="peft"))


@pytest.mark.parametrize(
    ("d", "dtype"), [(1, torch.float64), (6, torch.float32), (33, torch.float64)]
)
def test_a_file_gives_back_every_bit(tmp_path: Path, d: int, dtype: torch.dtype) -> None:
    written = CovarianceSet({"q": covariance_of(torch.randn(50, d, dtype=dtype))})
    written.save(tmp_path / "c.safetensors")
    assert same(CovarianceSet.load(tmp_path / "c.safetensors")["q"], written["q"])


def test_a_file_keeps_order_sharing_and_notes(tmp_path: Path) -> None:
    written = random_set(
        normalize="peft",
        left_out={"experts": "fused"},
        provenance={"model": "größe", "tokens": 7, "nested": {"a": [1, 2.5, None]}},
    )
    written.save(tmp_path / "c.safetensors")
    found = CovarianceSet.load(str(tmp_path / "c.safetensors"))
    assert list(found) == list(written)
    assert all(same(found[name], written[name]) for name in written)
    assert found["q"] is found["k"] is found["v"] is not found["o"]
    assert found.normalize == "peft"
    assert (found.left_out, found.provenance) == (written.left_out, written.provenance)


def test_an_empty_set_can_be_saved(tmp_path: Path) -> None:
    CovarianceSet({}).save(tmp_path / "c.safetensors")
    assert dict(CovarianceSet.load(tmp_path / "c.safetensors")) == {}


def test_a_file_holds_one_triangle_for_each_distinct_covariance(tmp_path: Path) -> None:
    written = random_set()
    written.save(tmp_path / "c.safetensors")
    with safe_open(str(tmp_path / "c.safetensors"), framework="pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    channels = [covariance.matrix.shape[0] for covariance, _ in written.groups()]
    triangles = [[d * (d + 1) // 2] for d in channels]
    assert sorted(sizes) == sorted(triangles + [[d] for d in channels for _ in range(2)])


def test_a_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    random_set().save(tmp_path / "c")
    plain, written = ((tmp_path / name).stat().st_mode for name in ("plain", "c"))
    assert stat.S_IMODE(plain) == stat.S_IMODE(written)


@pytest.mark.slow
def test_any_altered_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    CovarianceSet({"q": covariance_of(torch.randn(3, 2))}).save(path)
    contents = path.read_bytes()
    for position in range(len(contents)):
        altered = bytearray(contents)
        altered[position] ^= 1
        path.write_bytes(altered)
        with pytest.raises(CovarianceFileError):
            CovarianceSet.load(path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_noticed(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "c.safetensors"
    random_set().save(path)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(kept * len(contents))])
    with pytest.raises(CovarianceFileError, match="truncated or not a safetensors file"):
        CovarianceSet.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_safetensors_file_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    save_file({"0.matrix": torch.ones(3)}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(CovarianceFileError, match="not a covariance file written by this"):
        CovarianceSet.load(tmp_path / "x.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_pieces_make_the_file_of_the_whole(tmp_path: Path, count: int) -> None:
    import gc
    import weakref

    whole = {f"{i}.{name}": c for i in range(count) for name, c in random_set().items()}
    CovarianceSet(whole, left_out={"x": "why"}, provenance={"n": count}).save(tmp_path / "whole")
    alive: list[weakref.ref[CovarianceSet]] = []

    def pieces() -> Any:
        for i in range(count):
            gc.collect()
            assert not any(reference() is not None for reference in alive)
            part = {name: c for name, c in whole.items() if name.startswith(f"{i}.")}
            piece = CovarianceSet(part, left_out={"x": "why"}, provenance={"n": 1})
            alive.append(weakref.ref(piece))
            yield piece
            del piece

    save_pieces(pieces(), tmp_path / "pieces", lambda notes: {"n": sum(n["n"] for n in notes)})
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pieces", "whole"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CovarianceFileError, match=r"absent: no such covariance file"):
        CovarianceSet.load(tmp_path / "absent")
    with pytest.raises(CovarianceFileError, match="no such covariance file"):
        CovarianceSet.load(tmp_path)


def test_a_path_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        random_set().save(tmp_path / "file" / "c.safetensors")


@pytest.mark.parametrize(("module", "function"), [(os, "replace"), (files, "save_file")])
def test_a_full_disk_leaves_the_old_file_intact(
    tmp_path: Path, module: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "c.safetensors"
    random_set().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(module, function, full)
    with pytest.raises(OutputError, match="No space left on device"):
        random_set().save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize(
    ("d", "dtype"), [*((d, torch.float32) for d in range(9)), (40, torch.float64)]
)
def test_round_trip_is_exact_and_half_the_size(d: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(d, d, dtype=dtype)
    matrix = matrix + matrix.T
    packed = pack_symmetric(matrix)
    assert packed.shape == (d * (d + 1) // 2,)
    assert packed.dtype == dtype
    assert torch.equal(unpack_symmetric(packed, d), matrix)


@pytest.mark.parametrize("d", [6, 7])
def test_only_the_lower_triangle_is_read(d: int) -> None:
    lower = torch.randn(d, d).tril()
    unspecified = torch.full((d, d), torch.nan).triu(1)
    assert torch.equal(
        unpack_symmetric(pack_symmetric(lower + unspecified), d), lower + lower.tril(-1).T
    )


@pytest.mark.parametrize("d", [6, 7])
def test_a_matrix_of_any_strides_can_be_packed(d: int) -> None:
    matrix = torch.randn(d, 2 * d)[:, ::2]
    assert torch.equal(pack_symmetric(matrix), pack_symmetric(matrix.contiguous()))


@pytest.mark.parametrize("d", [6, 7])
def test_a_matrix_can_be_unpacked_into_another(d: int) -> None:
    packed = pack_symmetric(torch.randn(d, d))
    into = torch.full((d, d), torch.nan)
    assert unpack_symmetric(packed, d, out=into) is into
    assert torch.equal(into, unpack_symmetric(packed, d))


def test_packing_a_triangle_leaves_the_matrix_alone() -> None:
    matrix = torch.randn(7, 7)
    before = matrix.clone()
    pack_symmetric(matrix)
    assert torch.equal(matrix, before)
