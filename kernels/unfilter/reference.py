"""Stored maps to tensors in plain PyTorch, on any device: the yardstick of the fused kernel.

Shapes: N samples, C bands, P tile side, H image side (pixels), L product levels, K no-data codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WORD_BYTES = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "float16": 2, "float32": 4}
QUANTISED_NON_FINITE = {-32768: -float("inf"), -32767: float("nan"), 32767: float("inf")}
_FLOATS = {"float16": (torch.int16, torch.float16), "float32": (torch.int32, torch.float32)}


class StoredMaps(NamedTuple):
    """How one modality's map [C, P, P] of a sample lies in memory, little-endian.

    dtype: numpy name, a key of WORD_BYTES. filtered: one plane per byte of the word, [word bytes, C*P*P], of zigzag coded
    horizontal differences (the shard filter `delta-planes`); else plain words. step: if not None, the words are int16 counts
    of `step` and stand for float32 values, with QUANTISED_NON_FINITE for what is not finite.
    """

    dtype: str
    num_bands: int
    side_px: int
    filtered: bool
    step: float | None = None

    @property
    def word_bytes(self) -> int:
        """Bytes of a stored word; ValueError for a dtype the kernels do not know."""
        if self.dtype not in WORD_BYTES or (self.step is not None and self.dtype != "int16"):
            raise ValueError(
                f"stored maps of {self.dtype}, step {self.step}; expected {', '.join(WORD_BYTES)}, or int16 with a step"
            )
        return WORD_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of one sample's map."""
        return self.num_bands * self.side_px**2 * self.word_bytes

    @property
    def is_float(self) -> bool:
        """Whether the values are floating-point."""
        return self.dtype in _FLOATS or self.step is not None


def decode_maps(data: Tensor, offsets: Tensor, stored: StoredMaps) -> Tensor:
    """The whole maps [N, C, P, P]: float16/float32 as stored or quantised, integers as int64.

    data: uint8, any length. offsets: int64 [N], where each sample's map begins.
    """
    num_words, word_bytes = stored.num_bands * stored.side_px**2, stored.word_bytes
    rows = torch.stack([data[start : start + stored.num_bytes] for start in offsets.tolist()])
    if stored.filtered:
        planes = rows.view(-1, word_bytes, num_words)
    else:
        planes = rows.view(-1, num_words, word_bytes).transpose(1, 2)
    words = sum(planes[:, byte].to(torch.int32) << (8 * byte) for byte in range(word_bytes))
    words = words.view(-1, stored.num_bands, stored.side_px, stored.side_px)
    if stored.filtered:  # in 32 bits, which wrap around; narrower words are the low bits
        half = (words >> 1) & 0x7FFFFFFF
        words = torch.cumsum(half ^ -(words & 1), dim=-1, dtype=torch.int32)
    if stored.step is not None:
        counts = words.to(torch.int16)
        values = (counts.to(torch.float64) * stored.step).to(torch.float32)
        for code, value in QUANTISED_NON_FINITE.items():
            values[counts == code] = value
        return values
    if stored.is_float:
        word_dtype, dtype = _FLOATS[stored.dtype]
        return words.to(word_dtype).view(dtype)
    if stored.dtype.startswith("u"):
        return words.to(torch.int64) & ((1 << (8 * word_bytes)) - 1)
    return words.to(getattr(torch, stored.dtype)).to(torch.int64)


def view_of(maps: Tensor, views: Tensor, out_side: int) -> Tensor:
    """The crop [N, C, H, H] of `maps` [N, C, P, P], flipped; H = `out_side`.

    views: int32 [N, 4], per sample top, left, horizontal flip, vertical flip (0 or 1). The crop comes first.
    """
    top, left, hflip, vflip = (column[:, None].to(torch.int64) for column in views.unbind(1))
    position = torch.arange(out_side, device=maps.device)
    rows = top + torch.where(vflip != 0, out_side - 1 - position, position)
    columns = left + torch.where(hflip != 0, out_side - 1 - position, position)
    samples = torch.arange(len(maps), device=maps.device)[:, None, None]
    return maps[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def normalise_maps(
    data: Tensor,
    offsets: Tensor,
    views: Tensor,
    stored: StoredMaps,
    *,
    level: Tensor,
    mean: Tensor,
    std: Tensor,
    codes: Tensor,
    non_finite: bool,
    out_side: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """See `mpmae.kernels.unfilter.normalise_maps`."""
    raw = view_of(decode_maps(data, offsets, stored), views, out_side)
    valid = torch.isfinite(raw) if non_finite and stored.is_float else torch.ones_like(raw, dtype=torch.bool)
    valid &= (raw[..., None] != codes).all(-1)
    clean = torch.where(valid, raw, 0).to(torch.float32)
    rows = level.to(torch.int64)
    values = (clean - mean[rows][:, :, None, None]) / std[rows][:, :, None, None]
    return torch.where(valid, values, 0).to(dtype), valid


def classify_maps(
    data: Tensor,
    offsets: Tensor,
    views: Tensor,
    stored: StoredMaps,
    *,
    table: Tensor,
    out_side: int,
    dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """See `mpmae.kernels.unfilter.classify_maps`."""
    raw = view_of(decode_maps(data, offsets, stored), views, out_side)
    in_table = (raw >= 0) & (raw < 256)
    values = table[torch.where(in_table, raw, 0).to(torch.int64)].to(dtype)
    return values, values >= 0
