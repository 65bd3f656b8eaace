"""Stored bytes to tensors: the reference against the shard codecs and numpy, the Triton kernel against the reference."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mpmae.kernels.backends import BackendError
from mpmae.kernels.unfilter import StoredMaps, classify_maps, decode_maps, normalise_maps
from mpmae.kernels.unfilter.reference import WORD_BYTES, view_of
from mpmae.modalities import NoData
from mpmae.shard_codecs import decode_pixels, encode_pixels
from mpmae.shard_format import PixelEntry, Quantisation

BANDS, SIDE, OUT = 3, 24, 17
VIEWS = [[0, 0, 0, 0], [7, 3, 1, 0], [2, 7, 0, 1], [5, 5, 1, 1]]
CODE = 7
FORMS = [(dtype, filtered, None) for dtype in WORD_BYTES for filtered in (True, False)] + [("int16", True, 0.01)]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed")


def entry_of(dtype: str, filtered: bool, step: float | None) -> PixelEntry:
    return PixelEntry(
        name="sentinel1",
        kind="continuous",
        dtype=np.dtype("float32" if step else dtype).newbyteorder("<").str,
        shape=(BANDS, SIDE, SIDE),
        bands=("a", "b", "c"),
        codec="raw",
        filter="delta-planes" if filtered else "none",
        no_data=NoData(),
        quantisation=Quantisation(step=step, max_error=step) if step else None,
    )


def stored_batch(dtype: str, filtered: bool, step: float | None):
    """Random maps with every bit pattern, holes and small codes; their bytes, one after the other behind 8 others."""
    rng = np.random.default_rng(5)
    entry, shape = entry_of(dtype, filtered, step), (len(VIEWS), BANDS, SIDE, SIDE)
    if step:
        maps = rng.normal(-10, 6, shape).astype(np.float32)
    else:
        maps = rng.integers(0, 256, (*shape[:-1], SIDE * WORD_BYTES[dtype])).astype(np.uint8).view(dtype)
    maps[3] = rng.integers(0, 12, shape[1:])
    if maps.dtype.kind == "f":
        maps[0, 0, 5:9, 2:9], maps[1, 1, 6], maps[2, 2, :, 8] = -np.inf, np.nan, np.inf
    parts = [encode_pixels(entry, part) for part in maps]
    decoded = np.stack([decode_pixels(entry, part) for part in parts])
    data = torch.frombuffer(bytearray(b"\xff" * 8 + b"".join(parts)), dtype=torch.uint8)
    offsets = torch.arange(len(parts)) * len(parts[0]) + 8
    return decoded, data, offsets, StoredMaps(dtype, BANDS, SIDE, filtered, step)


def tables(device: str = "cpu") -> dict:
    generator = torch.Generator().manual_seed(1)
    random = {
        "level": torch.tensor([0, 1, 1, 0], dtype=torch.int32),
        "mean": torch.rand(2, BANDS, generator=generator) * 9,
        "std": torch.rand(2, BANDS, generator=generator) + 0.1,
        "codes": torch.tensor([CODE]),
    }
    return {name: tensor.to(device) for name, tensor in random.items()} | {"non_finite": True, "out_side": OUT}


def class_table() -> torch.Tensor:
    table = torch.full((256,), -1, dtype=torch.int8)
    table[1:10], table[200] = torch.arange(9, dtype=torch.int8), 9
    return table


def cut(maps: np.ndarray) -> np.ndarray:
    parts = []
    for image, (top, left, hflip, vflip) in zip(maps, VIEWS, strict=True):
        part = image[:, top : top + OUT, left : left + OUT]
        parts.append(part[:, :: -1 if vflip else 1, :: -1 if hflip else 1])
    return np.stack(parts)


@pytest.mark.parametrize(("dtype", "filtered", "step"), FORMS)
def test_reference_against_codecs_and_numpy(dtype, filtered, step):
    maps, data, offsets, stored = stored_batch(dtype, filtered, step)
    decoded = decode_maps(data, offsets, stored)
    if maps.dtype.kind == "f":
        same = decoded.numpy().view(np.uint8) == maps.view(np.uint8)
        assert same.all() or (step and np.array_equal(decoded.numpy(), maps, equal_nan=True))
    else:
        assert np.array_equal(decoded.numpy(), maps.astype(np.int64))

    views, raw = torch.tensor(VIEWS, dtype=torch.int32), cut(maps)
    assert np.array_equal(view_of(decoded, views, OUT).numpy(), raw.astype(decoded.numpy().dtype), equal_nan=True)

    options = tables()
    values, valid = normalise_maps(data, offsets, views, stored, **options)
    expected_valid = np.isfinite(raw) & (raw != CODE)
    mean, std = (options[key].numpy()[options["level"].numpy()][:, :, None, None] for key in ("mean", "std"))
    clean = np.where(expected_valid, raw, 0).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = np.where(expected_valid, (clean - mean) / std, np.float32(0))
    assert np.array_equal(valid.numpy(), expected_valid)
    assert np.array_equal(values.numpy(), expected)
    half, _ = normalise_maps(data, offsets, views, stored, **options, dtype=torch.bfloat16)
    assert torch.equal(half, values.to(torch.bfloat16))

    ids, valid = classify_maps(data, offsets, views, stored, table=class_table(), out_side=OUT)
    in_table = (raw >= 0) & (raw < 256)
    expected = class_table().numpy()[np.where(in_table, raw, 0).astype(np.int64)]
    assert np.array_equal(ids.numpy(), expected)
    assert np.array_equal(valid.numpy(), expected >= 0)
    assert ids.dtype == torch.int64


def test_inputs_of_another_type():
    _, data, offsets, stored = stored_batch("uint16", True, None)
    views = torch.tensor(VIEWS, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"offsets: torch.int32 .*expected contiguous torch.int64.*; views: torch.int64"):
        classify_maps(data, offsets.int(), views.long(), stored, table=class_table(), out_side=OUT)
    with pytest.raises(ValueError, match="stored maps of float64"):
        classify_maps(data, offsets, views, stored._replace(dtype="float64"), table=class_table(), out_side=OUT)


def test_what_is_asked_for_and_not_there(monkeypatch):
    _, data, offsets, stored = stored_batch("uint16", True, None)
    inputs = (data, offsets, torch.tensor(VIEWS, dtype=torch.int32), stored)
    with pytest.raises(BackendError, match=r"unfilter: backend triton was asked for .*on the cpu device"):
        classify_maps(*inputs, table=class_table(), out_side=OUT, backend="triton")
    for asked_of_the_model in ("cuda", "triton"):
        monkeypatch.setenv("MPMAE_KERNELS", asked_of_the_model)
        classify_maps(*inputs, table=class_table(), out_side=OUT)


def compare_backends(device: str) -> None:
    """The Triton kernel gives what the reference gives, bit for bit, in every form; other output dtypes in one of them."""
    options, table = tables(device), class_table().to(device)
    views = torch.tensor(VIEWS, dtype=torch.int32, device=device)
    for form in FORMS:
        _, data, offsets, stored = stored_batch(*form)
        inputs = (data.to(device), offsets.to(device), views, stored)
        is_first = form == FORMS[0]
        for dtype in (torch.float32, torch.float16, torch.bfloat16) if is_first else (torch.float32,):
            expected = normalise_maps(*inputs, **options, dtype=dtype, backend="reference")
            got = normalise_maps(*inputs, **options, dtype=dtype, backend="triton")
            assert got[0].dtype == dtype
            assert torch.equal(got[1], expected[1]), (form, dtype)
            if dtype == torch.bfloat16 and device == "cpu":  # the interpreter cuts bits off where a GPU rounds
                assert torch.allclose(got[0], expected[0], rtol=2**-7)
            else:
                assert torch.equal(got[0], expected[0]), (form, dtype)
        for dtype in (torch.int64, torch.int8) if is_first else (torch.int64,):
            expected = classify_maps(*inputs, table=table, out_side=OUT, dtype=dtype, backend="reference")
            got = classify_maps(*inputs, table=table, out_side=OUT, dtype=dtype, backend="triton")
            assert all(map(torch.equal, got, expected)), (form, dtype)


def compile_offline() -> None:
    """The kernel compiles for sm_80 and sm_90 with IEEE division and without spilling."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from mpmae.kernels.unfilter.triton import _unfilter_kernel as kernel

    pointers = {"data": "u8", "offsets": "i64", "views": "i32", "level": "i32", "mean": "fp32", "std": "fp32"}
    pointers |= {"codes": "i64", "table": "i8", "values": "fp32", "valid": "u8"}
    for word_bytes, kind, step, classes in ((2, "u", None, False), (4, "f", None, False), (1, "u", None, True)):
        constants = {"WORD_BYTES": word_bytes, "KIND": kind, "STEP": step, "FILTERED": word_bytes > 1}
        constants |= {"CLASSES": classes, "NON_FINITE": kind == "f", "NUM_CODES": 1, "ROWS": 16, "COLUMNS": 128}
        constants |= dict.fromkeys(("level", "mean", "std", "codes") if classes else ("table",))
        types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in kernel.arg_names}
        types |= dict.fromkeys(constants, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        for capability in (80, 90):
            built = compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", capability, 32))
            ptx = built.asm["ptx"]
            assert ".local" not in ptx
            assert classes or ("div.rn.f32" in ptx and "div.full" not in ptx)


def in_subprocess(call: str, **environment: str) -> None:
    code = f"from tests.kernels.test_unfilter import {call}; {call}"
    done = subprocess.run(
        [sys.executable, "-c", code.replace(call, call.split("(")[0], 1)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_triton_in_the_interpreter():
    in_subprocess("compare_backends('cpu')", TRITON_INTERPRET="1")


@needs_triton
def test_triton_compiles_offline(tmp_path):
    in_subprocess("compile_offline()", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
def test_triton_on_the_gpu():
    compare_backends("cuda")
