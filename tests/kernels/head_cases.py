"""Pixel heads with their targets, of every kind, and today's losses as the oracle.

Shapes as in `mpmae.kernels.heads.targets`; D channels of the features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mpmae.modalities import spec_of
from mpmae.models import blocks, losses

SAMPLES, SIDE, HIDDEN, DIM = 5, 3, 4, 6
KINDS = ("sentinel1", "aster", "dem", "sentinel2", "sentinel2 of 13", "esa_worldcover", "dynamic_world")


class Head(NamedTuple):
    """The arguments of `head_loss`: tensors, then options; name: of the modality."""

    name: str
    tensors: tuple[Tensor, ...]
    options: dict


def draw(kind: str, dtype=torch.float64, *, patch_size=8, samples=SAMPLES, dim=DIM, gaps=True, device="cpu") -> Head:
    """Random features, weights and targets; with gaps: pixels, a patch, a sample, NaN and infinities, and padding."""
    name, _, of = kind.partition(" of ")
    spec = spec_of(name)
    torch.manual_seed(3)
    num_classes = spec.num_classes or 0
    num_bands = 1 if num_classes else int(of or len(spec.model_bands))
    channels = num_classes or len(spec.model_bands)
    side = SIDE * patch_size
    x = torch.randn(samples, HIDDEN, dim, dtype=torch.float64)
    weight = torch.randn(patch_size**2 * channels, dim, dtype=torch.float64) / dim**0.5
    bias = torch.randn(len(weight), dtype=torch.float64)
    hidden = torch.stack([torch.randperm(SIDE**2)[:HIDDEN].sort().values for _ in range(samples)])
    shape = (samples, num_bands, side, side)
    values = torch.randint(0, num_classes, shape) if num_classes else torch.randn(shape) * 2 + 1
    valid, counted = torch.ones(shape, dtype=torch.bool), torch.ones(samples, dtype=torch.bool)
    if gaps:
        bad = (-1, 1_000_000) if num_classes else (float("nan"), 1e30)
        valid[0, :, 2:13, 5:side] = False
        values[0, :, 2:13, 5:9], values[0, :, 2:13, 9:side] = bad[0], bad[1]
        row, column = int(hidden[1, 2]) // SIDE * patch_size, int(hidden[1, 2]) % SIDE * patch_size
        valid[1, :, row : row + patch_size, column : column + patch_size] = False
        valid[2] = False
        if num_classes:
            values[-2, 0, ::3, ::2] = -1
        else:
            values[-2, 0, ::3, ::2], values[-2, -1, 1::3, 1::2] = float("nan"), float("inf")
        counted[-1] = False
    bands = torch.randperm(num_bands)[:channels] if of else None
    options = {
        "patch_size": patch_size,
        "num_present": samples - 1,
        "num_classes": num_classes,
        "normalise": name == "sentinel2",
        "bands": bands if bands is None else bands.to(device),
    }
    floats = (t.to(device, dtype).requires_grad_() for t in (x, weight, bias))
    return Head(name, (*floats, *(t.to(device) for t in (values, valid, hidden, counted))), options)


def composite(head: Head, dtype: torch.dtype | None = None) -> Tensor:
    """The share by `losses.modality_share` of all predictions at once; the product in `dtype` if given."""
    x, weight, bias, values, valid, hidden, counted = head.tensors
    options = head.options
    if options["bands"] is not None:
        values, valid = values[:, options["bands"]], valid[:, options["bands"]]
    values, valid = (blocks.pack_patches(t, hidden, options["patch_size"]).flatten(2) for t in (values, valid))
    if dtype is not None:
        x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    return losses.modality_share(
        spec_of(head.name),
        torch.nn.functional.linear(x, weight, bias),
        values,
        valid & (values >= 0 if options["num_classes"] else values.isfinite()),
        counted,
        num_present=options["num_present"],
        global_batch_size=len(x),
        norm_pix=True,
        quirks=False,
    )


REGISTER_CAP = 104
# channels to predict, bands of the image, class ids, normalised, patch size
COMPILED = {
    "sentinel2 p8": (12, 13, False, True, 8),
    "sentinel2 p16": (12, 13, False, True, 16),
    "sentinel2 p32": (12, 13, False, True, 32),
    "sentinel1 p8": (8, 8, False, False, 8),
    "aster p16": (2, 2, False, False, 16),
    "esa_worldcover p8": (11, 1, True, False, 8),
    "dynamic_world p16": (9, 1, True, False, 16),
}


def resources(name: str, architecture: int, logits: str = "bf16") -> dict:
    """What both kernels of a case of COMPILED take on a GPU of an architecture: kernel -> `offline.Usage`."""
    import triton

    from mpmae.kernels.heads import triton as kernels
    from tests.kernels.offline import compile_for

    channels, bands, is_class, normalise, size = COMPILED[name]
    block = triton.next_power_of_2(channels)
    signature = {"logits": f"*{logits}", "values": "*i64" if is_class else "*fp32", "valid": "*u8", "hidden": "*i64"}
    signature |= {"bands": "*i64"} if bands != channels and not is_class else {}
    signature |= {"counted": "*u8", "per_value": "*fp32", "partials": "*fp32", "gain": "fp32"}
    signature |= {"mean": "*fp32", "rstd": "*fp32"} if normalise else {}
    signature |= dict.fromkeys(("num_sites", "first_sample", "first_partial", "num_hidden", "grid_side", "num_bands"), "i32")
    found = {}
    stats_width = 1 if is_class else block
    sizes = {
        kernels._statistics: (stats_width, kernels.statistics_pixels(stats_width, size**2 * (1 if normalise else 30))),
        kernels._errors: (block, kernels.error_pixels(block, is_class)),
    }
    for kernel, (width, pixels) in sizes.items():
        constants = {"EPS": 1e-6, "P": size, "CHANNELS": channels if kernel is kernels._errors or not is_class else 1}
        constants |= {"BLOCK": width, "PIXELS": pixels, "IS_CLASS": is_class, "NORMALISE": normalise, "WITH_GRADIENT": True}
        constants |= {"bands": None, "mean": None, "rstd": None}
        types = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
        places = {name: value for name, value in constants.items() if name in kernel.arg_names and name not in types}
        found[kernel.fn.__name__] = compile_for(kernel, architecture, types, places, num_warps=kernels.NUM_WARPS)
    return found
