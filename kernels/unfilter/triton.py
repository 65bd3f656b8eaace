"""The fused kernel: one program per (sample, band, block of rows); a row lies in registers from its bytes to its values.

Bytes are read once and only for the rows of the crop; the prefix sum needs a row from its first column on, so crop and
horizontal flip happen at the store. Sums are of 32-bit words and wrap around, narrower words are their low bits.

Shapes: N samples, C bands, P tile side, H image side (pixels), L product levels, K no-data codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpmae.kernels.unfilter.reference import StoredMaps

ELEMENTS_PER_PROGRAM = 2048


@triton.jit
def _read_words(data, word, inside, num_words, WORD_BYTES: tl.constexpr, FILTERED: tl.constexpr):
    """The words at index `word`, 32 bits each, and what the row's filter made of them undone."""
    words = tl.zeros(word.shape, tl.int32)
    for byte in tl.static_range(WORD_BYTES):
        place = word + byte * num_words if FILTERED else word * WORD_BYTES + byte
        words |= tl.load(data + place, mask=inside, other=0).to(tl.int32) << (8 * byte)
    if FILTERED:
        half = (words.to(tl.uint32, bitcast=True) >> 1).to(tl.int32, bitcast=True)
        words = tl.cumsum(half ^ -(words & 1), axis=1)
    return words


@triton.jit
def _typed(words, WORD_BYTES: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr):
    """The low bits of `words` as float32 (KIND f, or q: counts of STEP), or as signed or unsigned integers (KIND i, u)."""
    if KIND == "q":
        count = words.to(tl.int16).to(tl.int32)
        value = (count.to(tl.float64) * tl.full((), STEP, tl.float64)).to(tl.float32)
        return tl.where((count <= -32767) | (count == 32767), float("nan"), value)
    elif WORD_BYTES == 4:
        if KIND == "f":
            return words.to(tl.float32, bitcast=True)
        elif KIND == "u":
            return words.to(tl.uint32, bitcast=True)
        else:
            return words
    elif KIND == "f":
        return words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == "u":
        return words & ((1 << (8 * WORD_BYTES)) - 1)
    elif WORD_BYTES == 2:
        return words.to(tl.int16).to(tl.int32)
    else:
        return words.to(tl.int8).to(tl.int32)


@triton.jit
def _unfilter_kernel(
    data,
    offsets,
    views,
    level,
    mean,
    std,
    codes,
    table,
    values,
    valid,
    num_bands,
    side,
    out_side,
    WORD_BYTES: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    FILTERED: tl.constexpr,
    CLASSES: tl.constexpr,
    NON_FINITE: tl.constexpr,
    NUM_CODES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample_band = tl.program_id(0)
    sample, band = sample_band // num_bands, sample_band % num_bands
    top, left = tl.load(views + sample * 4), tl.load(views + sample * 4 + 1)
    hflip, vflip = tl.load(views + sample * 4 + 2), tl.load(views + sample * 4 + 3)

    out_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_row = top + tl.where(vflip != 0, out_side - 1 - out_row, out_row)
    column = tl.arange(0, COLUMNS)
    inside = (out_row < out_side)[:, None] & (column < side)[None, :]
    word = (band * side + in_row[:, None]) * side + column[None, :]
    words = _read_words(data + tl.load(offsets + sample), word, inside, num_bands * side * side, WORD_BYTES, FILTERED)
    raw = _typed(words, WORD_BYTES, KIND, STEP)
    IS_FLOAT: tl.constexpr = KIND == "f" or KIND == "q"

    if CLASSES:
        in_table = (raw >= 0) & (raw < 256)
        number = tl.load(table + tl.where(in_table, raw, 0).to(tl.int32))
        is_valid = number >= 0
    else:
        is_valid = inside
        if NON_FINITE and IS_FLOAT:
            is_valid = is_valid & (tl.abs(raw) < float("inf"))
        for k in tl.static_range(NUM_CODES):
            code = tl.load(codes + k)
            is_valid = is_valid & (raw != code.to(tl.float32) if IS_FLOAT else raw.to(tl.int64) != code)
        row = tl.load(level + sample) * num_bands + band
        clean = tl.where(is_valid, raw, 0).to(tl.float32)
        # IEEE division: Triton's own `/` is off by up to 2 ulp
        number = tl.where(is_valid, tl.div_rn(clean - tl.load(mean + row), tl.load(std + row)), 0.0)

    out_column = tl.where(hflip != 0, left + out_side - 1 - column, column - left)
    kept = inside & ((out_column >= 0) & (out_column < out_side))[None, :]
    place = (sample_band.to(tl.int64) * out_side + out_row[:, None]) * out_side + out_column[None, :]
    tl.store(values + place, number.to(values.dtype.element_ty), mask=kept)
    tl.store(valid + place, is_valid.to(tl.uint8), mask=kept)


def launch(
    data: Tensor,
    offsets: Tensor,
    views: Tensor,
    stored: StoredMaps,
    out_side: int,
    dtype: torch.dtype,
    *,
    level: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    codes: Tensor | None = None,
    non_finite: bool = False,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values [N, C, H, H] of `dtype` and valid bool: class ids if `table` is given, else normalised values."""
    shape = (len(offsets), stored.num_bands, out_side, out_side)
    values = torch.empty(shape, dtype=dtype, device=data.device)
    valid = torch.empty(shape, dtype=torch.bool, device=data.device)
    columns = triton.next_power_of_2(stored.side_px)
    rows = max(1, min(triton.next_power_of_2(out_side), ELEMENTS_PER_PROGRAM // columns))
    _unfilter_kernel[(shape[0] * shape[1], triton.cdiv(out_side, rows))](
        data,
        offsets,
        views,
        level,
        mean,
        std,
        codes,
        table,
        values,
        valid.view(torch.uint8),
        stored.num_bands,
        stored.side_px,
        out_side,
        WORD_BYTES=stored.word_bytes,
        KIND="q" if stored.step is not None else stored.dtype[0],
        STEP=stored.step,
        FILTERED=stored.filtered,
        CLASSES=table is not None,
        NON_FINITE=non_finite,
        NUM_CODES=0 if codes is None else len(codes),
        ROWS=rows,
        COLUMNS=columns,
    )
    return values, valid
