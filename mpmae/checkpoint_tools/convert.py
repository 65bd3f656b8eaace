"""A checkpoint in another form, made by one process without a run.

Every engine continues from any checkpoint as it is; what is converted here is what leaves a run: `portable`, a checkpoint in
one file without pickles or partitions, which a run resumes from too, and `weights`, the float32 model alone.
"""

import json
import shutil
from pathlib import Path
from typing import Literal

from mpmae.checkpoint_format import ENGINE_FOLDER, LAYOUT_NAME, META_NAME, MODEL_NAME, load_meta
from mpmae.checkpoint_tools.readers import open_state
from mpmae.engine.portable import PORTABLE_NAME, write_state
from mpmae.errors import CheckpointError
from mpmae.files import TEMP_SUFFIX, sync, whole_folder

Target = Literal["portable", "weights"]
_PORTABLE_LAYOUT = {"engine": "portable"}


def convert(checkpoint: Path, target: Target, output: Path) -> Path:
    """Write `checkpoint` (complete) as `output`, which is new: afterwards it is there whole, or not at all.

    Raises CheckpointError: a checkpoint that is torn or unreadable, an output that exists or cannot be written.
    """
    meta = load_meta(checkpoint)
    if output.exists():
        raise CheckpointError(f"{output} exists; give a new name")
    if target == "weights" and output.suffix != ".safetensors":
        raise CheckpointError(f"{output}: the weights become one file; expected a name such as {output.name}.safetensors")
    try:
        if target == "weights":
            _copy_whole(checkpoint / MODEL_NAME, output)
        else:
            with whole_folder(output) as folder:
                _write_portable(checkpoint, meta, folder)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror or error}") from error
    return output


def _write_portable(checkpoint: Path, meta: dict, folder: Path) -> None:
    engine = folder / ENGINE_FOLDER
    engine.mkdir()
    write_state(open_state(checkpoint), engine / PORTABLE_NAME)
    (engine / LAYOUT_NAME).write_text(json.dumps(_PORTABLE_LAYOUT))
    shutil.copyfile(checkpoint / MODEL_NAME, folder / MODEL_NAME)
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / META_NAME).write_text(json.dumps(meta | {"files": files}, indent=2))


def _copy_whole(source: Path, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    temp = output.with_name(output.name + TEMP_SUFFIX)
    try:
        shutil.copyfile(source, temp)
        sync(temp)
        temp.rename(output)
        sync(output.parent)
    finally:
        temp.unlink(missing_ok=True)
