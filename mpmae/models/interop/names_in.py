"""Names and layouts of other programs' ConvNeXt V2, and the way into ours; `names_out` has the way back.

Names and axes only: every value keeps its bits. Ours ("canonical") are the parameter names of `mpmae.models.MPMAE`, the
encoder always below `encoder.`; the dense classifier's last layers are `norm.*` and `head.*`. R = kernel side, C channels:

| weight                              | elsewhere                                                | ours                 |
|-------------------------------------|----------------------------------------------------------|----------------------|
| sparse convolution                  | `kernel` [R*R, C_in, C_out], row offset fastest          | [C_out, C_in, R, R]  |
| same with R = 1                     | `kernel` [C_in, C_out]                                   | [C_out, C_in, 1, 1]  |
| sparse depthwise convolution        | `kernel` [R*R, C], row offset fastest                    | [C, 1, R, R]         |
| bias of a sparse convolution        | [1, C]                                                   | [C]                  |
| GRN                                 | [1, D], dense [1, 1, 1, D]; timm weight and bias [D]     | gamma, beta [1, D]   |
| pointwise layers, small timm models | [C_out, C_in, 1, 1]                                      | [C_out, C_in]        |
| projection, pixel heads             | [C_out, C_in, 1, 1]                                      | [C_out, C_in]        |
| mask token                          | [1, C, 1, 1]                                             | [1, 1, C]            |

Source: MMEarth-train `models/fcmae.py`, `models/convnextv2*.py`, `helpers.py` (`remap_checkpoint_keys`); facebookresearch
ConvNeXt-V2 `models/`; timm `models/convnext.py`.
"""

import math
import re
from collections.abc import Iterable

from torch import Tensor

from mpmae.modalities import ALL_TARGETS, MODALITIES
from mpmae.models.interop.multimae_names import MULTIMAE_SCHEMES, multimae_scheme

SCHEMES = ("mpmae", "mmearth-sparse", "mmearth-dense", "facebook-sparse", "facebook-dense", "timm", *MULTIMAE_SCHEMES)
_WRAPPERS = ("module.", "_orig_mod.")
BLOCK = r"stages\.(\d+)\.(\d+)\."
TIMM_BLOCK = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
TIMM_GRN = {"gamma": "weight", "beta": "bias"}


def strip_wrappers(name: str) -> str:
    """A parameter name without what DDP, DeepSpeed or torch.compile put before it."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def scheme_of(names: Iterable[str]) -> str | None:
    """Which of SCHEMES the names follow; None for none of them."""
    names = list(names)
    multimae = multimae_scheme(names)
    if multimae is not None:
        return multimae
    names = {name.removeprefix("encoder.") for name in names}
    kernels = any(name.endswith(".kernel") for name in names)
    if any(name.startswith("downsamples.") for name in names):
        return "mpmae"
    if any(".blocks." in name and ".conv_dw." in name for name in names):
        return "timm"
    if any(name.startswith("downsample_layers.3.") for name in names):
        return "facebook-sparse" if kernels else "facebook-dense"
    if any(name.startswith(("initial_conv.", "stem_orig.")) for name in names):
        return "mmearth-sparse" if kernels else "mmearth-dense"
    return None


def canonical_name(name: str, scheme: str, original_stem: bool) -> str | None:
    """Our name of a foreign parameter; None where the scheme gives it none. original_stem: the stem is ConvNeXt's."""
    if scheme == "mpmae":
        bare = name.removeprefix("encoder.")
        return f"encoder.{bare}" if bare.startswith(("stem.", "downsamples.", "stages.")) else name
    if scheme == "timm":
        return _from_timm(name)
    name = re.sub(r"\.kernel$", ".weight", re.sub(r"\.(?:ln|linear)\.", ".", name))
    bare = name.removeprefix("encoder.")
    if bare.startswith(("norm.", "head.")):
        return bare
    if bare.startswith(("upsample_layers.", "initial_conv_upsample.")):
        return _from_unet(bare)
    encoder = _from_facebook(bare) if scheme.startswith("facebook") else _from_mmearth(bare, original_stem)
    if encoder is not None:
        return f"encoder.{encoder}"
    return None if name.startswith("encoder.") else _from_rest(name)


def _from_mmearth(name: str, original_stem: bool) -> str | None:
    rules = [("stem_orig.0.", "stem.conv."), ("stem_orig.1.", "stem.norm."), ("initial_conv.0.", "stem.conv.")]
    rules += (
        []
        if original_stem
        else [("initial_conv.1.", "stem.conv_norm."), ("stem.0.", "stem.pool."), ("stem.1.", "stem.norm.")]
    )
    for old, new in rules:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return _from_trunk(name)


def _from_facebook(name: str) -> str | None:
    match = re.match(r"downsample_layers\.(\d)\.(\d)\.(.+)", name)
    if not match:
        return _from_trunk(name)
    layer, part, leaf = int(match[1]), int(match[2]), match[3]
    if layer > 3 or part > 1:
        return None
    if layer == 0:  # the stem: convolution, then norm
        return f"stem.{('conv', 'norm')[part]}.{leaf}"
    return f"downsamples.{layer - 1}.{('norm', 'conv')[part]}.{leaf}"


def _from_unet(name: str) -> str | None:
    if name.startswith("upsample_layers."):
        return name.replace("upsample_layers.", "upsamples.")
    match = re.match(r"initial_conv_upsample\.([01])\.(.+)", name)
    return f"upsamples.4.{('conv', 'norm')[int(match[1])]}.{match[2]}" if match else None


def _from_trunk(name: str) -> str | None:
    match = re.match(r"downsample_layers\.(\d)\.([01])\.(.+)", name)
    if match:
        return f"downsamples.{match[1]}.{('norm', 'conv')[int(match[2])]}.{match[3]}"
    return name if re.match(BLOCK, name) else None


def _from_rest(name: str) -> str | None:
    """Decoder, heads and loss; `decoder.*`, `pred.*` are facebook's single decoder and head."""
    fixed = {"loss_fn.log_vars": "log_vars", "mask_token": "decoder.mask_token"}
    if name in fixed:
        return fixed[name]
    for old, new in (("proj.", "decoder.proj."), ("layer_norm_tmp.", "heads.tile_norm."), ("pred.", "heads.pixel.rgb.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    match = re.match(r"(?:decoder_dict\.[^.]+|decoder)\.(\d+\..+)", name)
    if match:
        return f"decoder.blocks.{match[1]}"
    match = re.match(r"pred_dict\.([^.]+)\.(.+)", name)
    if match:
        spec = MODALITIES.get(match[1])
        return f"heads.{'tile' if spec is not None and spec.scope == 'tile' else 'pixel'}.{match[1]}.{match[2]}"
    return None


def _from_timm(name: str) -> str | None:
    match = re.match(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name)
    if match:
        rest = match[3]
        for ours, theirs in TIMM_GRN.items():
            rest = f"grn.{ours}" if rest == f"mlp.grn.{theirs}" else rest
        for ours, theirs in TIMM_BLOCK.items():
            rest = f"{ours}.{rest.removeprefix(theirs + '.')}" if rest.startswith(theirs + ".") else rest
        return f"encoder.stages.{match[1]}.{match[2]}.{rest}"
    match = re.match(r"stages\.([123])\.downsample\.([01])\.(.+)", name)
    if match:
        return f"encoder.downsamples.{int(match[1]) - 1}.{('norm', 'conv')[int(match[2])]}.{match[3]}"
    match = re.match(r"stem\.([01])\.(.+)", name)
    if match:
        return f"encoder.stem.{('conv', 'norm')[int(match[1])]}.{match[2]}"
    for old, new in (("head.norm.", "norm."), ("head.fc.", "head.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def loss_order(modalities: Iterable[str]) -> list[str]:
    """Modalities in the order of our losses and log variances; those that we have no spec of come last."""
    return sorted(modalities, key=lambda name: ALL_TARGETS.index(name) if name in ALL_TARGETS else len(ALL_TARGETS))


def heads_of(names: Iterable[str]) -> list[str]:
    """The modalities that have a head among canonical `names`, in their order there."""
    found = (re.match(r"heads\.(?:pixel|tile)\.([^.]+)\.", name) for name in names)
    return list(dict.fromkeys(match[1] for match in found if match))


def in_our_order(log_vars: Tensor, names: Iterable[str]) -> tuple[Tensor, str | None]:
    """`log_vars` of MMEarth-train in our order, and what is wrong with them.

    They follow its list of output modalities, which anyone may write in another order; the heads are registered in that
    order, and so they stand in the file (unless it is one that sorts its names). names: canonical, in the file's order.
    """
    heads = heads_of(names)
    if not heads:  # taken out of the file to keep its encoder
        return log_vars, None
    if len(heads) != len(log_vars):
        return log_vars, f"{len(log_vars)} log variances for {len(heads)} heads ({', '.join(heads)})"
    return log_vars[[heads.index(name) for name in loss_order(heads)]], None


def is_depthwise(name: str) -> bool:
    """Whether our name is of a depthwise convolution's weight."""
    return name.endswith((".dwconv.weight", ".stem.pool.weight"))


def canonical_layout(name: str, value: Tensor, sparse_kernel: bool) -> Tensor:
    """`value` in our layout; `name` is ours. Raises ValueError for a shape that no known layout has."""
    if sparse_kernel:
        return _from_kernel(value, is_depthwise(name))
    if name.endswith((".grn.gamma", ".grn.beta")):
        return _vector(value)[None]
    if name == "decoder.mask_token":
        return _vector(value)[None, None]
    if name.endswith(".bias") or name == "log_vars":
        return _vector(value)
    linear = re.search(r"\.pwconv[12]\.weight$|^decoder\.proj\.weight$|^heads\.", name)
    if linear and value.ndim == 4 and value.shape[2:] == (1, 1):
        return value.flatten(1)
    return value


def _vector(value: Tensor) -> Tensor:
    """[C] from a tensor whose other sides are 1."""
    if value.ndim == 0 or max(value.shape) != value.numel():
        raise ValueError("expected a vector: one side longer than 1")
    return value.reshape(-1)


def _from_kernel(value: Tensor, depthwise: bool) -> Tensor:
    if value.ndim == 2 and not depthwise:
        return value.t()[:, :, None, None].contiguous()
    if value.ndim != (2 if depthwise else 3):
        raise ValueError(f"{value.ndim} dimensions, expected {2 if depthwise else 3} of a sparse kernel")
    side = math.isqrt(value.shape[0])
    if side * side != value.shape[0]:
        raise ValueError(f"{value.shape[0]} taps are no square kernel")
    taps = value.unflatten(0, (side, side))  # column, row
    if depthwise:
        return taps.permute(2, 1, 0).unsqueeze(1).contiguous()
    return taps.permute(3, 2, 1, 0).contiguous()
