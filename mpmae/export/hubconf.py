"""Entry points of `torch.hub` for the model in this folder.

    model = torch.hub.load("path/to/this/folder", "encoder", source="local")

Needs torch and safetensors. Everything about the model stands in config.json.
"""

import importlib.util
import json
import sys
import zlib
from pathlib import Path

from safetensors.torch import load_file

dependencies = ["torch", "safetensors"]
_FOLDER = Path(__file__).resolve().parent
_CODE = _FOLDER / "mpmae_convnextv2.py"
# by its path: an import by name would find the code of another such folder that this process has loaded before
_spec = importlib.util.spec_from_file_location(f"{_CODE.stem}_{zlib.crc32(str(_CODE).encode()):08x}", _CODE)
_code = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _code  # where pickle looks for the class
_spec.loader.exec_module(_code)
ConvNeXtV2 = _code.ConvNeXtV2
_ADDED = ("norm.", "head.")  # what a pretrained encoder has no weights of


def encoder(pretrained: bool = True, num_classes: int | None = None, **options) -> ConvNeXtV2:
    """The encoder of this folder: a dense ConvNeXt V2 in the conventions of timm.

    pretrained: with its weights, else random ones. num_classes: a linear classifier of so many classes, 0 for none, None for
    that of the weights; one of another size than that starts anew. options: further arguments of `ConvNeXtV2`, such as
    drop_path_rate. Raises RuntimeError if the weights do not fit.
    """
    config = json.loads((_FOLDER / "config.json").read_text())
    num_classes = config["num_classes"] if num_classes is None else num_classes
    arguments = {key: config[key] for key in ("in_chans", "patch_size", "stem", "stem_padding", "grn_eps")}
    size = config["architecture"]
    model = ConvNeXtV2(size["dims"], size["depths"], **{**arguments, "num_classes": num_classes, **options})
    if not pretrained:
        return model
    state = load_file(_FOLDER / "model.safetensors")
    if num_classes != config["num_classes"]:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    result = model.load_state_dict(state, strict=False)
    absent = [name for name in result.missing_keys if not name.startswith(_ADDED)]
    if absent or result.unexpected_keys:
        raise RuntimeError(f"{_FOLDER}: weights absent: {absent}, without a place: {result.unexpected_keys}; export again")
    return model
