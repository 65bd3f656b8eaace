"""Our weights under the names and in the layouts of other programs. Sources and layouts: see `names_in`."""

import re

from torch import Tensor

from mpmae.models.interop.names_in import BLOCK, TIMM_BLOCK, TIMM_GRN, heads_of, is_depthwise, loss_order

# timm's models up to nano use 1x1 convolutions for the pointwise layers, the larger ones linear layers
_TIMM_CONV_WIDTHS = (40, 48, 64, 80)
# a pattern on our name without `encoder.`, and what MMEarth-train calls it in its dense code
_MMEARTH_ENCODER = (
    (r"^stem\.conv_norm\.", "initial_conv.1."),
    (r"^stem\.pool\.", "stem.0."),
    (r"^downsamples\.(\d)\.norm\.", r"downsample_layers.\1.0."),
    (r"^downsamples\.(\d)\.conv\.", r"downsample_layers.\1.1."),
)
_MMEARTH_REST = (
    (r"^log_vars$", "loss_fn.log_vars"),
    (r"^decoder\.proj\.", "proj."),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^heads\.tile_norm\.", "layer_norm_tmp."),
    (r"^heads\.(?:pixel|tile)\.", "pred_dict."),
    (r"^upsamples\.([0-3])\.", r"upsample_layers.\1."),
    (r"^upsamples\.4\.conv\.", "initial_conv_upsample.0."),
    (r"^upsamples\.4\.norm\.", "initial_conv_upsample.1."),
)


def to_kernel(weight: Tensor, depthwise: bool) -> Tensor:
    """Our convolution weight as a sparse kernel, see the table in `names_in`."""
    taps = weight.permute(3, 2, 1, 0).flatten(0, 1)  # [R*R, C_in, C_out]
    if depthwise:
        return taps[:, 0].contiguous()
    return (taps[0] if len(taps) == 1 else taps).contiguous()


def to_mmearth(state: dict[str, Tensor], *, sparse: bool = True) -> dict[str, Tensor]:
    """A canonical state in the layout that MMEarth-train's models load, with every copy of the shared decoder.

    sparse: the pretraining code's sparse encoder; else its dense one.
    """
    original_stem = "encoder.stem.pool.weight" not in state
    modalities = loss_order(heads_of(state))
    # the heads in the order of the log variances, which is how that code registers them
    heads = [name for modality in modalities for name in state if re.match(rf"heads\.(?:pixel|tile)\.{modality}\.", name)]
    result = {}
    for name in [*(name for name in state if name not in heads), *heads]:
        value = state[name]
        block = name.removeprefix("decoder.blocks.")
        if block != name:
            shaped = value.reshape(1, 1, 1, -1) if ".grn." in name else value
            result |= {f"decoder_dict.{modality}.{block}": shaped for modality in modalities}
        elif name.startswith(("norm.", "head.")) and "decoder.proj.weight" in state:
            result[f"encoder.{name}"] = value  # the dense encoder's classifier, which its pretraining carries along
        elif name.startswith("encoder."):
            result |= dict([_mmearth_encoder(name, value, sparse, original_stem)])
        else:
            new = next((re.sub(old, new, name) for old, new in _MMEARTH_REST if re.match(old, name)), name)
            result[new] = _mmearth_rest(name, value)
    return result


def _mmearth_encoder(name: str, value: Tensor, sparse: bool, original_stem: bool) -> tuple[str, Tensor]:
    bare = name.removeprefix("encoder.")
    stem = ("stem_orig.0.", "stem_orig.1.") if original_stem else ("initial_conv.0.", "stem.1.")
    for old, new in ((r"^stem\.conv\.", stem[0]), (r"^stem\.norm\.", stem[1]), *_MMEARTH_ENCODER):
        bare, count = re.subn(old, new, bare)
        if count:
            break
    convolution = re.search(r"\.conv\.|\.pool\.|\.dwconv\.", name)
    if not sparse:
        return f"encoder.{bare}", value.reshape(1, 1, 1, -1) if ".grn." in name else value
    owner, leaf = bare.rsplit(".", 1)
    if convolution:
        if leaf == "weight":
            return f"encoder.{owner}.kernel", to_kernel(value, is_depthwise(name))
        return f"encoder.{bare}", value[None]
    wrapper = "linear" if ".pwconv" in name else "ln" if "norm." in name else ""
    return f"encoder.{owner}.{wrapper}.{leaf}" if wrapper else f"encoder.{bare}", value


def _mmearth_rest(name: str, value: Tensor) -> Tensor:
    if name == "decoder.mask_token":
        return value.reshape(1, -1, 1, 1)
    if re.match(r"(?:decoder\.proj|heads\.pixel\..+)\.weight$", name):
        return value[:, :, None, None]
    return value


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder (and classifier) of a canonical state under timm's names; ConvNeXt's own stem only."""
    assert "encoder.stem.pool.weight" not in state, "timm has no such stem"
    convolutional = state["encoder.stem.conv.weight"].shape[0] in _TIMM_CONV_WIDTHS
    result = {}
    for name, value in state.items():
        bare = name.removeprefix("encoder.")
        match = re.match(BLOCK + r"(\w+)\.(\w+)", bare)
        if bare == name:
            if name.startswith(("norm.", "head.")):
                result[{"norm": "head.norm.", "head": "head.fc."}[name.split(".")[0]] + name.split(".")[1]] = value
        elif match:
            stage, block, layer, leaf = match.groups()
            if layer == "grn":
                result[f"stages.{stage}.blocks.{block}.mlp.grn.{TIMM_GRN[leaf]}"] = value.reshape(-1)
                continue
            pointwise = layer.startswith("pwconv") and leaf == "weight" and convolutional
            result[f"stages.{stage}.blocks.{block}.{TIMM_BLOCK[layer]}.{leaf}"] = (
                value[:, :, None, None] if pointwise else value
            )
        else:
            module, index, rest = re.match(r"(stem|downsamples)\.?(\d?)\.(.+)", bare).groups()
            part, leaf = rest.rsplit(".", 1)
            if module == "stem":
                result[f"stem.{int(part == 'norm')}.{leaf}"] = value
            else:
                result[f"stages.{int(index) + 1}.downsample.{int(part == 'conv')}.{leaf}"] = value
    return result
