"""Damaged and foreign files, and odd command lines: whatever they are, errors are typed ones."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import string
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from characters import CHARACTERS
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from corda_kernels import (
    CordaConfig,
    CovarianceSet,
    calibrate,
    calibrate_blocks,
    export_lora,
    load_for_training,
)
from corda_kernels.adapter import read_adapter, save_adapter, write_adapter
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.cli import main
from corda_kernels.errors import AdapterError, CheckpointError, CordaError, CovarianceFileError
from corda_kernels.files import write_checked
from corda_kernels.init import corda_adapter

pytestmark = pytest.mark.slow

# The same examples every time, and no shrinking: what fails is printed as it is.
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

names = st.text(CHARACTERS, max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
tensors = st.dictionaries(
    st.sampled_from(["0.matrix", "0.absmax", "0.outlier_count", "1.matrix", "x"]),
    st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool]),
    ),
)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What can happen to a file's bytes: cut off, bits flipped, bytes put in or overwritten."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "overwrite", "replace"]))
    where = draw(st.floats(0, 1))
    # Most of a small file's meaning lies at its start.
    near = draw(st.booleans())
    extra = draw(st.binary(min_size=1, max_size=16))

    def damage(contents: bytes) -> bytes:
        place = int(where * (min(len(contents), 600) if near else len(contents)))
        if kind == "cut":
            return contents[:place]
        if kind == "flip":
            flipped = bytearray(contents)
            if flipped:
                flipped[min(place, len(flipped) - 1)] ^= 1 << (extra[0] % 8)
            return bytes(flipped)
        if kind == "insert":
            return contents[:place] + extra + contents[place:]
        if kind == "overwrite":
            return contents[:place] + extra + contents[place + len(extra) :]
        return extra

    return damage


def edited(value: Any, path: list[float], new: Any, delete: bool) -> Any:
    """The JSON value with one thing in it, found along `path`, replaced or deleted."""
    if not isinstance(value, dict | list) or not value or not path:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[min(int(path[0] * len(keys)), len(keys) - 1)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    if delete and len(path) == 1:
        del copy[key]
    else:
        copy[key] = edited(value[key], path[1:], new, delete)
    return copy


edits = st.tuples(
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4), json_values, st.booleans()
)


@contextlib.contextmanager
def only(expected: type[CordaError]) -> Iterator[None]:
    """Anything inside may work, or end in the expected error."""
    with contextlib.suppress(expected):
        yield


@pytest.fixture(scope="module")
def place(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
    adapt: Callable[..., nn.Module],
    save_tokenizer: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Whole files of every kind; nothing here is written to."""
    root = tmp_path_factory.mktemp("whole")
    model, covariances = calibrated()
    CovarianceSet({name: covariances[name] for name in list(covariances)[:5]}).save(root / "cov")
    checkpoint = CalibrationCheckpoint(root / "run", every=1)
    calibrate(model, BATCHES, targets=["q_proj"], checkpoint=checkpoint, progress=False)
    blocks = CalibrationCheckpoint(root / "blocks", every=1)
    next(calibrate_blocks(model, BATCHES, targets=["q_proj"], checkpoint=blocks, progress=False))
    model.save_pretrained(root / "model")
    save_tokenizer(root / "model")
    (root / "text.txt").write_text(" ".join(f"w{i % 60}" for i in range(300)))
    save_adapter(adapt(calibrated()), root / "adapter")
    save_adapter(adapt(calibrated(), residual="weight"), root / "published")
    for name, options in (("judged", {}), ("planned", {"budget": "r=4", "candidates": 2})):
        config = CordaConfig("ipm", rank=4, progress=False, **options)
        texts = [torch.arange(3 + i, 63).view(-1, 60 - i) for i in range(2)]
        write_adapter(corda_adapter(calibrated()[0], texts, config), root / name)
    return root


@pytest.fixture(scope="module")
def model(calibrated: Callable[..., tuple[nn.Module, CovarianceSet]]) -> nn.Module:
    """Calibration leaves it as it was."""
    return calibrated()[0]


BATCHES = [torch.arange(3, 23).view(2, 10)]


def resume(model: nn.Module, path: Path) -> None:
    """Goes on from a checkpoint, of a run in one pass or of its first decoder block."""
    run = path.name.removesuffix("-block-0")
    options: Any = {
        "targets": ["q_proj"],
        "checkpoint": CalibrationCheckpoint(path.with_name(run), every=10**9, resume=True),
        "progress": False,
    }
    if run == path.name:
        calibrate(model, BATCHES, **options)
    else:
        list(calibrate_blocks(model, BATCHES, **options))


checkpoints = pytest.mark.parametrize("file", ["run", "blocks-block-0"])


@given(damage=damages())
@FUZZ
def test_a_damaged_covariance_file(place: Path, tmp_path: Path, damage: Any) -> None:
    contents = (place / "cov").read_bytes()
    assume(damage(contents) != contents)
    (tmp_path / "cov").write_bytes(damage(contents))
    with pytest.raises(CovarianceFileError):
        CovarianceSet.load(tmp_path / "cov")


@given(header=json_values, extra=tensors, edit=edits)
@FUZZ
def test_a_covariance_file_with_a_foreign_header(
    place: Path, tmp_path: Path, header: Any, extra: Any, edit: Any
) -> None:
    path = tmp_path / "cov"
    with only(CovarianceFileError):
        write_checked(path, "corda_kernels.covariances/1", header, extra)
        CovarianceSet.load(path)
    whole = {
        "groups": [
            {
                "modules": ["a", "b"],
                "channels": 2,
                "tokens": 3,
                "calls": 1,
                "outlier_threshold": 6.0,
            }
        ],
        "order": ["a", "b"],
        "normalize": "tokens",
        "left_out": {},
        "provenance": {},
    }
    contents = {
        "0.matrix": torch.ones(3),
        "0.absmax": torch.ones(2),
        "0.outlier_count": torch.zeros(2, dtype=torch.int64),
    }
    with only(CovarianceFileError):
        write_checked(path, "corda_kernels.covariances/1", edited(whole, *edit), contents)
        found = CovarianceSet.load(path)
        # What could be loaded can be used.
        found.merge(found)
        found.save(tmp_path / "again")


@given(
    contents=tensors, metadata=st.none() | st.dictionaries(st.text(CHARACTERS), st.text(CHARACTERS))
)
@FUZZ
def test_a_foreign_safetensors_file(
    model: nn.Module, tmp_path: Path, contents: Any, metadata: Any
) -> None:
    save_file(contents, tmp_path / "x", metadata)
    with pytest.raises(CovarianceFileError):
        CovarianceSet.load(tmp_path / "x")
    with pytest.raises(CheckpointError):
        resume(model, tmp_path / "x")


@checkpoints
@given(damage=damages())
@FUZZ
def test_a_damaged_checkpoint(
    place: Path, tmp_path: Path, model: nn.Module, damage: Any, file: str
) -> None:
    contents = (place / file).read_bytes()
    assume(damage(contents) != contents)
    (tmp_path / file).write_bytes(damage(contents))
    with pytest.raises(CheckpointError):
        resume(model, tmp_path / file)


@checkpoints
@given(header=json_values, extra=tensors, edit=edits)
@FUZZ
def test_a_checkpoint_with_a_foreign_header(
    place: Path, tmp_path: Path, model: nn.Module, header: Any, extra: Any, edit: Any, file: str
) -> None:
    from corda_kernels.calibration.journal import FORMAT
    from corda_kernels.files import read_checked

    path = tmp_path / file
    with only(CheckpointError):
        write_checked(path, FORMAT, header, extra)
        resume(model, path)
    whole, contents = read_checked(place / file, FORMAT, what="", error=CheckpointError, remedy="")
    with only(CordaError):
        write_checked(path, FORMAT, edited(whole, *edit), contents)
        resume(model, path)


FORMS = {
    "adapter": ["corda.json", "adapter_config.json", "adapter_model.safetensors"],
    "published": [
        "corda.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "corda_initial.safetensors",
    ],
}
ADAPTER_FILES = [(form, file) for form, files in FORMS.items() for file in files]


@given(damage=damages(), where=st.sampled_from(ADAPTER_FILES))
@FUZZ
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_adapter_folder(
    place: Path, tmp_path: Path, calibrated: Any, damage: Any, where: tuple[str, str]
) -> None:
    form, file = where
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    shutil.copytree(place / form, tmp_path / "adapter")
    target = tmp_path / "adapter" / file
    target.write_bytes(damage(target.read_bytes()))
    for use in (
        lambda: export_lora(tmp_path / "adapter", tmp_path / "lora"),
        lambda: load_for_training(calibrated()[0], tmp_path / "adapter"),
        lambda: load_for_training(calibrated()[0], tmp_path / "adapter", use_peft=False),
    ):
        with only(AdapterError):
            use()


@given(edit=edits, form=st.sampled_from(list(FORMS)))
@FUZZ
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_folder_with_an_edited_configuration(
    place: Path, tmp_path: Path, calibrated: Any, edit: Any, form: str
) -> None:
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    shutil.copytree(place / form, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    value = edited(json.loads(file.read_text()), *edit)
    file.write_text(json.dumps(value), encoding="utf-8", errors="replace")
    for use in (
        lambda: export_lora(tmp_path / "adapter", tmp_path / "lora"),
        lambda: load_for_training(calibrated()[0], tmp_path / "adapter"),
    ):
        with only(AdapterError):
            use()


@given(edit=edits, kind=st.sampled_from(["adapter", "published", "judged", "planned"]))
@FUZZ
def test_an_adapter_folder_with_an_edited_record(
    place: Path, tmp_path: Path, calibrated: Any, edit: Any, kind: str
) -> None:
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    shutil.copytree(place / kind, tmp_path / "adapter")
    record = tmp_path / "adapter" / "corda.json"
    value = edited(json.loads(record.read_text()), *edit)
    record.write_text(json.dumps(value), encoding="utf-8", errors="replace")
    with only(AdapterError):
        read_adapter(tmp_path / "adapter")
    with only(CordaError):
        export_lora(tmp_path / "adapter", tmp_path / "lora")
    with only(AdapterError):
        load_for_training(calibrated()[0], tmp_path / "adapter")
    assert _status(["inspect", str(tmp_path / "adapter")]) in (0, 2)


@given(contents=tensors, where=st.sampled_from(ADAPTER_FILES).filter(lambda w: ".safe" in w[1]))
@FUZZ
def test_an_adapter_folder_with_foreign_tensors(
    place: Path, tmp_path: Path, contents: Any, where: tuple[str, str]
) -> None:
    form, file = where
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    shutil.copytree(place / form, tmp_path / "adapter")
    keys = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(contents | dict.fromkeys(keys, torch.ones(4, 3)), tmp_path / "adapter" / file)
    with pytest.raises(AdapterError):
        read_adapter(tmp_path / "adapter")


def _status(arguments: list[str]) -> int:
    """Runs the program in this process; its exit status. Any other exception is a fault."""
    before = sys.argv
    sys.argv = ["corda-kernels", *arguments]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


# No slashes: nothing may be written elsewhere.
words = st.text(string.ascii_letters + string.digits + "-.{}\\ éσ\n", max_size=8)
numbers = st.integers(-3, 40).map(str) | st.sampled_from(["1e9", "nan", "inf", "-0", "9" * 25, "٣"])
OPTIONS: dict[str, st.SearchStrategy[str]] = {
    "--rank": numbers,
    "--samples": numbers,
    "--seq-len": numbers,
    "--batch-size": numbers,
    "--seed": numbers,
    "--damping": numbers,
    "--memory-limit": numbers | words,
    "--checkpoint-every": numbers,
    "--mode": st.sampled_from(["kpm", "ipm"]) | words,
    "--hold": numbers | words,
    "--residual": st.sampled_from(["none", "weight"]) | words,
    "--method": st.sampled_from(["exact", "randomized"]) | words,
    "--targets": words | st.sampled_from(["q_proj", ".*", "(", "[a-", "*", "all-linear"]),
    "--exclude": words
    | st.sampled_from(["q_proj", ".*", "(", ",", "v_proj,lm_head", "all-linear"]),
    "--field": words,
    "--template": words | st.sampled_from(["{text}", "{", "}", "{0}", "{a[}", "\\"]),
    "--dtype": st.sampled_from(["float32", "bfloat16", "float64"]) | words,
    "--device": st.sampled_from(["cpu", "cuda:99", "meta"]) | words,
    "--cov": st.sampled_from(["cov", "text.txt", "model", "run"]),
    "--mix": st.sampled_from(["cov=1", "cov=nan", "cov", "text.txt=1", "=", "cov=0"]) | words,
    "--budget": numbers | words | st.sampled_from(["r=2", "1%", "r=", "r=-1", "0%", "101%"]),
    "--min-rank": numbers,
    "--max-rank": numbers,
    "--rank-multiple": numbers,
    "--candidates": st.sampled_from(["-1", "0", "1", "2", "3"]) | words,
    "--selection": st.sampled_from(["argmin", "pool"]) | words,
}


@given(
    command=st.sampled_from(["init", "calibrate", "inspect", "export", "merge", "plan", "doctor"]),
    positional=st.lists(
        st.sampled_from(
            ["model", "adapter", "published", "cov", "text.txt", "run", "absent", "out", ""]
        )
        | words,
        max_size=2,
    ),
    chosen=st.dictionaries(st.sampled_from(list(OPTIONS)), st.integers(0, 2**31), max_size=4),
    flags=st.sets(
        st.sampled_from(
            [
                "--no-pack",
                "--chat-template",
                "--no-stability",
                "--resume",
                "--save-base",
                "--help",
                "--frobnicate",
            ]
        ),
        max_size=2,
    ),
    likely=st.booleans(),
    data=st.data(),
)
@settings(FUZZ, max_examples=150)
def test_any_command_line_ends_in_success_or_one_of_our_errors(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    positional: list[str],
    chosen: dict[str, int],
    flags: set[str],
    likely: bool,
    data: Any,
) -> None:
    shutil.rmtree(tmp_path / "here", ignore_errors=True)
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    arguments = [command]
    if likely and command in ("init", "calibrate"):
        arguments += ["model", "out", "--data", "text.txt", "--samples", "2", "--seq-len", "8"]
        arguments += ["--rank", "4"] + (["--mode", "ipm"] if command == "init" else [])
    else:
        arguments += positional
    for name in chosen:
        arguments += [name, data.draw(OPTIONS[name], label=name)]
    arguments += sorted(flags)
    capsys.readouterr()
    status = _status(arguments)
    shown = capsys.readouterr().err
    assert status in (0, 2), shown
    if status == 2:
        assert "error: " in shown.lower()
        assert "Traceback" not in shown
