"""Checkpoints in every published layout, names and shapes as their code has them, filled by the golden set's recipe."""

from torch import Tensor

from mpmae.modalities import MODALITIES, TARGETS
from mpmae.models.presets import SIZES
from tests.golden_cases import fill

SEED = 1
PIXEL = ("sentinel2", "sentinel1", "aster", "dynamic_world", "canopy_height_eth", "esa_worldcover")
VARIANTS = {  # the published folders' input names -> modalities out
    "all_mod": TARGETS,
    "pix_mod": tuple(name for name in TARGETS if name in PIXEL),
    "img_mod": ("sentinel2", *(name for name in TARGETS if name not in PIXEL)),
    "S2": ("sentinel2",),
}


def out_channels(modality: str, num_bands: int = 12) -> int:
    spec = MODALITIES[modality]
    return num_bands if modality == "sentinel2" else spec.num_classes or len(spec.model_bands)


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The recipe's values for every name."""
    return {name: fill(SEED, name, shape, 0.0, 0.1) for name, shape in shapes.items()}


def block(prefix: str, dim: int, sparse: bool, grn: tuple[int, ...]) -> dict[str, list[int]]:
    wrapper, linear = (".ln", ".linear") if sparse else ("", "")
    convolution = {"kernel": [49, dim], "bias": [1, dim]} if sparse else {"weight": [dim, 1, 7, 7], "bias": [dim]}
    return {
        **{f"{prefix}.dwconv.{leaf}": shape for leaf, shape in convolution.items()},
        f"{prefix}.norm{wrapper}.weight": [dim],
        f"{prefix}.norm{wrapper}.bias": [dim],
        f"{prefix}.pwconv1{linear}.weight": [4 * dim, dim],
        f"{prefix}.pwconv1{linear}.bias": [4 * dim],
        f"{prefix}.pwconv2{linear}.weight": [dim, 4 * dim],
        f"{prefix}.pwconv2{linear}.bias": [dim],
        f"{prefix}.grn.gamma": [*grn, 4 * dim],
        f"{prefix}.grn.beta": [*grn, 4 * dim],
    }


def convolution(prefix: str, dim_in: int, dim_out: int, side: int, sparse: bool) -> dict[str, list[int]]:
    if not sparse:
        return {f"{prefix}.weight": [dim_out, dim_in, side, side], f"{prefix}.bias": [dim_out]}
    taps = [] if side == 1 else [side * side]
    return {f"{prefix}.kernel": [*taps, dim_in, dim_out], f"{prefix}.bias": [1, dim_out]}


def norm(prefix: str, dim: int, sparse: bool) -> dict[str, list[int]]:
    wrapper = ".ln" if sparse else ""
    return {f"{prefix}{wrapper}.weight": [dim], f"{prefix}{wrapper}.bias": [dim]}


def trunk(size: str, sparse: bool, grn: tuple[int, ...], first: int) -> dict[str, list[int]]:
    """Downsampling layers, numbered from `first`, and stages."""
    dims, depths = SIZES[size]
    shapes = {}
    for i in range(3):
        shapes |= norm(f"downsample_layers.{i + first}.0", dims[i], sparse)
        shapes |= convolution(f"downsample_layers.{i + first}.1", dims[i], dims[i + 1], 2, sparse)
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        for index in range(depth):
            shapes |= block(f"stages.{stage}.{index}", dim, sparse, grn)
    return shapes


def mmearth(
    size="atto",
    patch=8,
    variant="all_mod",
    uncertainty=True,
    *,
    bands=12,
    original_stem=False,
    sparse=True,
    old_shapes=False,
    decoder_dim=512,
) -> dict[str, Tensor]:
    """A checkpoint of MMEarth-train. old_shapes: GRN and biases of the sparse encoder without their leading axes."""
    dim, modalities = SIZES[size][0][0], VARIANTS[variant]
    stride = patch // 8
    encoder = trunk(size, sparse, (1,) if sparse else (1, 1, 1), 0)
    if original_stem:
        encoder |= convolution("stem_orig.0", bands, dim, stride, sparse) | norm("stem_orig.1", dim, sparse)
    else:
        encoder |= convolution("initial_conv.0", bands, dim, 3, sparse) | norm("initial_conv.1", dim, sparse)
        pool = (
            {"kernel": [stride**2, dim], "bias": [1, dim]} if sparse else {"weight": [dim, 1, stride, stride], "bias": [dim]}
        )
        encoder |= {f"stem.0.{leaf}": shape for leaf, shape in pool.items()} | norm("stem.1", dim, sparse)
    if not sparse:
        encoder |= {"norm.weight": [SIZES[size][0][3]], "norm.bias": [SIZES[size][0][3]]}
        encoder |= {"head.weight": [1000, SIZES[size][0][3]], "head.bias": [1000]}
    if old_shapes:
        flat = (".bias", ".gamma", ".beta")
        encoder = {name: shape[-1:] if name.endswith(flat) else shape for name, shape in encoder.items()}
    shapes = {"mask_token": [1, decoder_dim, 1, 1]} | {f"encoder.{name}": shape for name, shape in encoder.items()}
    if uncertainty:
        shapes |= {"loss_fn.log_vars": [len(modalities)]}
    shapes |= {"proj.weight": [decoder_dim, SIZES[size][0][3], 1, 1], "proj.bias": [decoder_dim]}
    shapes |= {f"decoder.{name}": shape for name, shape in block("0", decoder_dim, False, (1, 1, 1)).items()}
    for modality in modalities:
        pixel = modality in PIXEL
        rows = out_channels(modality, bands) * (patch**2 if pixel else 1)
        shapes |= {f"pred_dict.{modality}.weight": [rows, decoder_dim, *([1, 1] if pixel else [])]}
        shapes |= {f"pred_dict.{modality}.bias": [rows]}
    if any(name not in PIXEL for name in modalities):
        shapes |= {"layer_norm_tmp.weight": [decoder_dim], "layer_norm_tmp.bias": [decoder_dim]}
    state = filled(shapes)
    for name in [name for name in state if name.startswith("decoder.")]:
        value = state.pop(name)
        state |= {f"decoder_dict.{modality}.{name.removeprefix('decoder.')}": value for modality in modalities}
    return state


def facebook(size="atto", *, num_classes=0, pretraining=False) -> dict[str, Tensor]:
    """A checkpoint of facebookresearch/ConvNeXt-V2: encoder, classifier, or (`pretraining`) the sparse FCMAE itself."""
    dims = SIZES[size][0]
    shapes = trunk(size, pretraining, (1,) if pretraining else (1, 1, 1), 1)
    shapes |= convolution("downsample_layers.0.0", 3, dims[0], 4, pretraining)
    shapes |= norm("downsample_layers.0.1", dims[0], pretraining)
    if pretraining:
        shapes = {f"encoder.{name}": shape for name, shape in shapes.items()} | {"mask_token": [1, 512, 1, 1]}
        shapes |= {"proj.weight": [512, dims[3], 1, 1], "proj.bias": [512]}
        shapes |= {"pred.weight": [32 * 32 * 3, 512, 1, 1], "pred.bias": [32 * 32 * 3]}
        shapes |= {f"decoder.{name}": shape for name, shape in block("0", 512, False, (1, 1, 1)).items()}
    elif num_classes:
        shapes |= {"norm.weight": [dims[3]], "norm.bias": [dims[3]]}
        shapes |= {"head.weight": [num_classes, dims[3]], "head.bias": [num_classes]}
    return filled(shapes)


def timm(size="atto", *, bands=3, stride=4, num_classes=0) -> dict[str, Tensor]:
    """A ConvNeXt V2 of timm."""
    dims, depths = SIZES[size]
    pointwise = [1, 1] if size in ("atto", "femto", "pico", "nano") else []
    shapes = {"stem.0.weight": [dims[0], bands, stride, stride], "stem.0.bias": [dims[0]]}
    shapes |= norm("stem.1", dims[0], False)
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        if stage:
            shapes |= norm(f"stages.{stage}.downsample.0", dims[stage - 1], False)
            shapes |= convolution(f"stages.{stage}.downsample.1", dims[stage - 1], dim, 2, False)
        for index in range(depth):
            prefix = f"stages.{stage}.blocks.{index}"
            shapes |= {f"{prefix}.conv_dw.weight": [dim, 1, 7, 7], f"{prefix}.conv_dw.bias": [dim]}
            shapes |= norm(f"{prefix}.norm", dim, False)
            shapes |= {f"{prefix}.mlp.fc1.weight": [4 * dim, dim, *pointwise], f"{prefix}.mlp.fc1.bias": [4 * dim]}
            shapes |= {f"{prefix}.mlp.grn.weight": [4 * dim], f"{prefix}.mlp.grn.bias": [4 * dim]}
            shapes |= {f"{prefix}.mlp.fc2.weight": [dim, 4 * dim, *pointwise], f"{prefix}.mlp.fc2.bias": [dim]}
    shapes |= norm("head.norm", dims[3], False)
    if num_classes:
        shapes |= {"head.fc.weight": [num_classes, dims[3]], "head.fc.bias": [num_classes]}
    return filled(shapes)
