"""The two ways out of stored maps.

On CUDA the fused Triton kernel runs, elsewhere the PyTorch reference (see `mpmae.kernels.backends`); `backend` asks for one
explicitly. Inputs are checked for shape and type alone: what `offsets` and `views` point to must lie inside `data` and the
tile.

Shapes: N samples, C bands, P tile side, H image side (pixels), L product levels, K no-data codes.
"""

from typing import Literal

import torch
from torch import Tensor

from mpmae.kernels import backends
from mpmae.kernels.unfilter import reference
from mpmae.kernels.unfilter.reference import StoredMaps

Backend = Literal["triton", "reference"]


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
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised values [N, C, H, H] of `dtype`, 0 where there is no data, and valid bool [N, C, H, H].

    data: uint8, contiguous. offsets: int64 [N], where each sample's map begins in it. views: int32 [N, 4] (top, left,
    horizontal flip, vertical flip). level: int32 [N], row of mean and std, float32 [L, C]. codes: int64 [K], values that
    mean no data; non_finite: NaN and infinities do, too. `(raw - mean) / std` is computed in float32 with IEEE division.
    """
    _check(data, offsets, views, stored)
    options = {"level": level, "mean": mean, "std": std, "codes": codes, "non_finite": non_finite}
    if _chosen(backend, data) == "reference":
        return reference.normalise_maps(data, offsets, views, stored, out_side=out_side, dtype=dtype, **options)
    from mpmae.kernels.unfilter import triton

    return triton.launch(data, offsets, views, stored, out_side, dtype, **options)


def classify_maps(
    data: Tensor,
    offsets: Tensor,
    views: Tensor,
    stored: StoredMaps,
    *,
    table: Tensor,
    out_side: int,
    dtype: torch.dtype = torch.int64,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Class ids [N, C, H, H] of `dtype` (signed), -1 where there is no data, and valid bool [N, C, H, H].

    table: int8 [256], from stored code to class id or -1; a code outside of it counts as code 0. The rest as in
    `normalise_maps`.
    """
    _check(data, offsets, views, stored)
    if _chosen(backend, data) == "reference":
        return reference.classify_maps(data, offsets, views, stored, table=table, out_side=out_side, dtype=dtype)
    from mpmae.kernels.unfilter import triton

    return triton.launch(data, offsets, views, stored, out_side, dtype, table=table)


def _chosen(backend: Backend | None, data: Tensor) -> str:
    # What is inflated on the host is decoded there, whatever MPMAE_KERNELS asks of the model.
    asked = backend or (None if data.is_cuda else "reference")
    return backends.choose("unfilter", data.device, None, {"triton": None}, asked=asked)


def _check(data: Tensor, offsets: Tensor, views: Tensor, stored: StoredMaps) -> None:
    num_samples = len(offsets)
    problems = [
        f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected contiguous {dtype} {shape}"
        for name, tensor, dtype, shape in (
            ("data", data, torch.uint8, (data.numel(),)),
            ("offsets", offsets, torch.int64, (num_samples,)),
            ("views", views, torch.int32, (num_samples, 4)),
        )
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous()
    ]
    if problems:
        raise ValueError("; ".join(problems))
    stored.word_bytes  # noqa: B018 - raises for a dtype that is not known
