"""The synthetic shard set that a run uses when nothing else is given."""

from pathlib import Path

from mpmae.config import DataSection
from mpmae.shard_format import MANIFEST_NAME
from mpmae.shard_tools.build import build
from mpmae.shard_tools.synth import synth

NUM_TILES = 640


def ensure_demo_shards(shards: Path) -> None:
    """Make the demo set where the default configuration looks for it; does nothing for any other folder."""
    if shards != DataSection().shards or (shards / MANIFEST_NAME).is_file():
        return
    source = shards.parent / "synthetic_mmearth"
    print(f"no shards given: making a synthetic MMEarth-layout set of {NUM_TILES} tiles in {shards.parent}")
    if not (source / f"{source.name}.h5").is_file():  # the folder appears whole or not at all
        synth(source, num_tiles=NUM_TILES)
    build(source, shards, overwrite=True)
