"""The command `mpmae-embed`: feature vectors of every tile of a set, as GeoParquet, and a map of them."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mpmae.embed.opening import StoredImages, StoredShards, open_stored
from mpmae.embed.picture import draw_map
from mpmae.embed.run import Done, embed
from mpmae.embed.storage import STORED_DTYPES
from mpmae.errors import ConfigError, MpmaeError
from mpmae.eval.config import DatasetSection, EncoderSection, ImageSection
from mpmae.eval.devices import find_device
from mpmae.eval.encoders import ImageEncoder
from mpmae.models.interop import Weights, as_weights
from mpmae.shard_tools.progress import say

_KEYS = re.compile(
    r"\b(?:dataset|image|encoder)\.(partition|product_level|normalise|size|fit|domains|pooling|bands)(?:_in)?\b"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is returned (2: an error, told on stderr)."""
    options = _parser().parse_args(argv)
    try:
        _run(options)
    except MpmaeError as error:
        print("\n".join(f"error: {in_options(problem)}" for problem in error.problems), file=sys.stderr)
        return 2
    return 0


def in_options(text: str) -> str:
    """A message of an evaluation, with this command's options instead of configuration keys."""
    text = text.replace("dataset.path: ", "").replace(" (dataset.format=auto)", "")
    return _KEYS.sub(lambda key: "--" + key[1].replace("_", "-"), text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpmae-embed",
        description="Write the feature vector of every tile of a set as GeoParquet. Stopped at any moment, the same command "
        "goes on where it was.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run, a checkpoint, an export")
    parser.add_argument(
        "source", metavar="SOURCE", help="shard set (folder or URL), GEO-Bench folder, HDF5 file, GeoTIFF table"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on with")
    parser.add_argument("--dtype", choices=STORED_DTYPES, default="float16", help="of the vectors (default: float16)")
    parser.add_argument("--split", action="append", default=[], metavar="NAME", help="again for more (default: all splits)")
    parser.add_argument("--max-samples", type=_count, metavar="N", help="so many tiles, evenly spread (default: all)")
    parser.add_argument(
        "--map", choices=("pca", "umap", "none"), default="pca", help="the map of the vectors (default: pca)"
    )

    image = parser.add_argument_group("image")
    fields = ImageSection.model_fields
    image.add_argument("--size", type=_count, metavar="PX", help="side that the encoder sees (default: the stored one)")
    image.add_argument("--fit", choices=("resize", "crop", "tile"), default="resize", help="what makes images fit --size")
    image.add_argument(
        "--normalise", choices=("auto", "pretraining", "dataset"), default="auto", help=fields["normalise"].description
    )
    image.add_argument(
        "--bands", type=_names, metavar="B2,B3,...", help="what the encoder reads, if its checkpoint does not say"
    )

    multimae = parser.add_argument_group("MultiMAE")
    multimae.add_argument(
        "--domains", type=_names, metavar="rgb,depth,...", help="what it reads (default: all it can that the source has)"
    )
    multimae.add_argument(
        "--pooling", choices=("mean", "global"), default="mean", help=EncoderSection.model_fields["pooling"].description
    )

    labelled = parser.add_argument_group("labelled sets")
    labelled.add_argument("--partition", default="default", metavar="NAME", help="of a GEO-Bench task (default: default)")
    labelled.add_argument(
        "--product-level", choices=("auto", "l1c", "l2a", "none"), default="auto", help="auto: what the set says"
    )

    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=_count, default=64, metavar="N", help="(default: 64)")
    running.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    running.add_argument("--num-workers", type=_count, default=4, metavar="N", help="threads that read tiles (default: 4)")
    return parser


def _run(options: argparse.Namespace) -> None:
    weights = as_weights(options.checkpoint)
    stored = open_stored(options.source, DatasetSection(partition=options.partition, product_level=options.product_level))
    encoder = _encoder(options, weights, stored)
    image = ImageSection(normalise=options.normalise, size=options.size, fit=options.fit)
    source = stored.tiles(encoder.input, image, options.split, options.max_samples)
    say(f"{source.title}: {', '.join(f'{num:,} tiles {split}' for split, num in source.num_tiles.items())}")
    unread = set(weights.domains_in or ()) - set(encoder.facts.get("domains", ()))
    if unread and options.domains is None:
        say(f"not read, since the source lacks their bands: {', '.join(sorted(unread))}")
    for what, fact in {**encoder.facts, **source.facts}.items():
        say(f"{what}: {in_options(_told(fact))}")
    started_s = time.monotonic()
    try:
        done = embed(
            encoder,
            source,
            options.output,
            dtype=options.dtype,
            batch_size=options.batch_size,
            device=find_device(options.device, "--device"),
            num_workers=options.num_workers,
            origin={"checkpoint": weights.source, "step": weights.recorded("step")},
            progress=True,
        )
    finally:
        source.close()
    _tell(done, options.output, time.monotonic() - started_s)
    if options.map != "none":
        for path in draw_map(options.output, options.map):
            say(f"picture: {path}")


def _encoder(options: argparse.Namespace, weights: Weights, stored: StoredShards | StoredImages) -> ImageEncoder:
    if options.bands is None and weights.family == "convnext" and weights.bands_in is None:
        raise ConfigError(
            f"nothing beside {weights.source} says which Sentinel-2 bands it reads; name them in the order of its channels, "
            "such as --bands B2,B3,B4"
        )
    section = EncoderSection(
        checkpoint=options.checkpoint, bands_in=options.bands, domains=options.domains, pooling=options.pooling
    )
    return stored.encoder(section, weights)


def _tell(done: Done, folder: Path, seconds: float) -> None:
    for name in done.redone:
        say(f"{folder / name} had changed since it was written; it was made again")
    num_new = done.num_tiles - done.num_before
    if not num_new:
        say(f"{folder} is complete: {done.num_tiles:,} vectors, nothing to do")
    else:
        before = f", {done.num_before:,} were there" if done.num_before else ""
        say(f"{num_new:,} tiles in {seconds:.1f} s: {num_new / seconds:,.1f} tiles/s{before}")
        say(f"{folder}: {done.num_tiles:,} vectors")
    if done.num_without_location:
        say(f"{done.num_without_location:,} tiles have no known location: latitude, longitude and geometry are null")
    if done.num_without_data:
        say(f"{done.num_without_data:,} tiles have no data at all (valid_fraction 0): their vectors say nothing")


def _told(fact: object) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{key}: {value}" for key, value in fact.items())
    return ", ".join(map(str, fact)) if isinstance(fact, list | tuple) else str(fact)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
