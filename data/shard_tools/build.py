"""A dataset in, a shard set out.

The samples of each split are shuffled as a whole by a permutation that is a pure function of the seed and the rows, so the
same source and options give the same bytes, with any number of workers and however often the build was interrupted. Format:
`mpmae.shard_format`.

Memory: below 2 GB at any size of MMEarth, since tiles pass through: 0.6 KB a tile of the source (1.2 million tiles: 0.7 GB)
and at most 12 tiles a worker in flight, of up to a few MB each.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from mpmae.errors import ShardError, SourceError
from mpmae.files import TEMP_SUFFIX, sync, write_whole
from mpmae.in_order import num_cores
from mpmae.shard_codecs import encode_pixels
from mpmae.shard_files import load_manifest
from mpmae.shard_format import MANIFEST_NAME, BandStats, Manifest, ShardEntry
from mpmae.shard_tools import output
from mpmae.shard_tools.build_plan import BuildOptions, chosen_splits, empty_manifest, shuffled
from mpmae.shard_tools.encode import BadTile, Sample, TileEncoder
from mpmae.shard_tools.journal import JOURNAL_NAME, Journal
from mpmae.shard_tools.lock import locked
from mpmae.shard_tools.progress import MB, Meter, say
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.stats import StatsPass
from mpmae.shard_tools.tile import TileError
from mpmae.shard_tools.tile_source import TileSource
from mpmae.tar_members import TAR_END

NUM_TRIAL_TILES = 16
ESTIMATE_MARGIN = 1.1
STATS_SPLIT = "train"
GO_ON = "go on with --resume"


def build(source_dir: str | Path, output_dir: str | Path, **options: Any) -> Manifest:
    """Write the shard set of an MMEarth folder; see `build_from`."""
    chosen = BuildOptions(**options)
    chosen.check()
    with MMEarthSource(source_dir, chosen.modalities) as source:
        return build_from(source, output_dir, **options)


def build_from(source: TileSource, output_dir: str | Path, **options: Any) -> Manifest:
    """Write the shard set of a source's tiles; the manifest, written last, is returned. `options`: see `BuildOptions`.

    Where the source has no band statistics they are computed on the way, over the tiles of `train` (without such a split:
    over all).

    Raises SourceError for a source that is not as it must be (tile and modality named), ShardError for an output folder
    that is not empty or that another build writes into, too small a disk, or a failed write. An interrupted build leaves no
    manifest; its finished shards are kept and `resume` goes on behind them.
    """
    chosen, folder = BuildOptions(**options), Path(output_dir)
    chosen.check()
    if folder.resolve() == source.folder.resolve():
        raise ShardError(f"{folder} is the source folder; give another folder for the shard set")
    orders = {split: shuffled(source.splits[split], chosen.seed) for split in chosen_splits(source, chosen.splits)}
    manifest = empty_manifest(source, chosen)
    tell = say if chosen.progress else lambda text: None
    for note in source.notes():
        tell(note)
    with ExitStack() as stack:
        with output.disk_errors(str(folder), folder):
            stack.enter_context(locked(folder, tell))
        return _Build(source, folder, manifest, orders, chosen, tell).run()


class _Build:
    """One run of a build; `orders` are the rows of each split in the order of its samples."""

    def __init__(
        self,
        source: TileSource,
        folder: Path,
        manifest: Manifest,
        orders: Mapping[str, np.ndarray],
        options: BuildOptions,
        tell: Callable[[str], None],
    ):
        self.source, self.folder, self.manifest = source, folder, manifest
        self.orders, self.options, self.tell = orders, options, tell
        self.stats = None
        if source.band_stats is None:
            self.stats = StatsPass({name: source.no_data(name) for name in manifest.modalities})

    def run(self) -> Manifest:
        if self.options.resume and (self.folder / MANIFEST_NAME).is_file():
            return self._finished_set()
        if self.options.resume and self._is_begun():
            self._resume()
        else:
            self._begin()
        skipped = [tile for split in self.orders for tile in self._write(split)]
        return self._finish(skipped)

    def _is_begun(self) -> bool:
        with self._disk_errors(JOURNAL_NAME):
            # Left by a build that was killed before anything else was written.
            (self.folder / (JOURNAL_NAME + TEMP_SUFFIX)).unlink(missing_ok=True)
        return bool(output.own_files(self.folder))

    def _finished_set(self) -> Manifest:
        manifest = load_manifest(self.folder)
        made = {"band_stats", "splits"}
        old, new = (m.model_dump(mode="json", exclude=made) for m in (manifest, self.manifest))
        different = [name for name in new if old[name] != new[name]]
        if list(manifest.splits) != list(self.orders):
            different.append("splits")
        if different:
            raise ShardError(
                f"{self.folder} holds a finished set that differs in {', '.join(different)} from what is asked for; give "
                "another folder or --overwrite"
            )
        with self._disk_errors(JOURNAL_NAME):
            (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
        self.tell(f"{self.folder} is finished already: nothing to do")
        return manifest

    def _begin(self) -> None:
        old_files, old_bytes = output.prepare(self.folder, self.options.overwrite)
        self._check_space(old_bytes, dict.fromkeys(self.orders, 0))
        with self._disk_errors(JOURNAL_NAME):
            for path in old_files:
                path.unlink()
            self.journal = Journal.begin(self.folder, self._journal_options(), self._encoder_digest())

    def _resume(self) -> None:
        self.journal = Journal.resume(self.folder, self._journal_options(), self._encoder_digest())
        num_skipped = sum(len(state.skipped) for state in self.journal.splits.values())
        if num_skipped and not self.options.skip_bad:
            raise ShardError(f"{self.folder}: the interrupted build left out {num_skipped} bad tiles; add --skip-bad")
        shards = [shard.name for state in self.journal.splits.values() for shard in state.shards]
        kept = {JOURNAL_NAME, *(file for name in shards for file in output.files_of_shard(name))}
        with self._disk_errors("an unfinished shard"):
            for name in output.own_files(self.folder):
                if name not in kept:
                    (self.folder / name).unlink()
        done = {split: self.journal.state(split).num_rows for split in self.orders}
        self._check_space(0, done)
        if self.stats is not None:
            self.stats.restore(self.journal.stats)
        num_rows = sum(len(order) for order in self.orders.values())
        self.tell(f"{self.folder}: {len(shards)} shards with {sum(done.values()):,} of {num_rows:,} tiles are finished")

    def _journal_options(self) -> dict[str, Any]:
        """All that decides the bytes of the set, but the compressor."""
        options, source = self.options, self.manifest.source
        return {
            "source": source.name,
            "fingerprint of the source": source.fingerprint,
            "modalities": self.manifest.modalities,
            "splits": {split: len(order) for split, order in self.orders.items()},
            "codec": options.codec,
            "quantise_sentinel1": options.quantise_sentinel1,
            "seed": options.seed,
            "shard_size_mb": options.shard_size_mb,
            "max_samples_per_shard": options.max_samples_per_shard,
        }

    def _encoder_digest(self) -> str:
        """Changes where another version of the compressor makes other bytes of the same values."""
        digest = hashlib.sha256()
        for entry in self.manifest.pixels:
            values = np.arange(np.prod(entry.shape)) % 251 % 127
            digest.update(encode_pixels(entry, values.astype(entry.dtype).reshape(entry.shape)))
        return digest.hexdigest()

    def _stats_of(self, split: str) -> StatsPass | None:
        return self.stats if split == STATS_SPLIT or not len(self.orders.get(STATS_SPLIT, ())) else None

    def _write(self, split: str) -> list[dict[str, Any]]:
        """Write what is left of a split; its skipped tiles, those of the interrupted build among them."""
        order, options, state = self.orders[split], self.options, self.journal.state(split)
        skipped: list[dict[str, Any]] = []
        position = state.num_rows

        def record(shard: ShardEntry) -> None:
            stats = self.stats.state() if self.stats is not None else {}
            with self._disk_errors(JOURNAL_NAME):
                self.journal.add(split, shard, position, skipped, stats)
            skipped.clear()

        encoder = TileEncoder(self.source, self.manifest, self._stats_of(split))
        samples = encoder.ordered(order[position:], options.workers or num_cores())
        max_bytes = int(options.shard_size_mb * MB)
        writer = output.ShardWriter(
            self.folder, split, self.manifest, max_bytes, options.max_samples_per_shard, state.shards, record, GO_ON
        )
        meter = Meter(f"build {split}", len(order), num_done=position, enabled=options.progress)
        with writer, meter, closing(samples):
            for sample in samples:
                if isinstance(sample, BadTile):
                    if not options.skip_bad:
                        raise self._stopped_at(sample)
                    skipped.append(sample.describe(self.source, split))
                    meter.advance()
                else:
                    meter.advance(num_bytes=self._add(writer, sample))
                position += 1
        return state.skipped + skipped

    def _add(self, writer: output.ShardWriter, sample: Sample) -> int:
        num_bytes = writer.add(sample.row, sample.presence, sample.members, self.source.describe(sample.row))
        if sample.moments:
            self.stats.merge(sample.moments)
        return num_bytes

    def _stopped_at(self, tile: BadTile) -> TileError:
        hint = (
            f"{self.folder}: finished shards are kept; mend the tile and {GO_ON}, or add --skip-bad to leave such tiles out"
        )
        return TileError([*tile.error.problems, hint], getattr(tile.error, "modality", None))

    def _finish(self, skipped: list[dict[str, Any]]) -> Manifest:
        shards = {split: tuple(self.journal.state(split).shards) for split in self.orders}
        if not any(shards.values()):
            raise SourceError(f"{self.source.where}: none of the {len(skipped)} tiles can be read: {skipped[0]['error']}")
        made: dict[str, Any] = {"splits": shards}
        if self.stats is not None:
            made["band_stats"] = {key: BandStats(**columns) for key, columns in self.stats.result().items()}
        manifest = self.manifest.model_copy(update=made)
        with self._disk_errors(MANIFEST_NAME):
            if skipped:
                report = {"format": output.SKIPPED_FORMAT, "source": self.source.name, "tiles": skipped}
                write_whole(self.folder / output.SKIPPED_NAME, json.dumps(report, indent=1) + "\n")
            sync(self.folder)
            write_whole(self.folder / MANIFEST_NAME, manifest.dump())
            sync(self.folder)
            self.journal.remove()
        return manifest

    def _disk_errors(self, name: str) -> AbstractContextManager[None]:
        return output.disk_errors(str(self.folder / name), self.folder, GO_ON)

    def _check_space(self, freed_bytes: int, num_done: dict[str, int]) -> None:
        """ShardError when the set does not fit on the disk, by an estimate from a few tiles spread over what is left."""
        left = np.concatenate([order[num_done[split] :] for split, order in self.orders.items()])
        trial = left[np.linspace(0, len(left) - 1, min(NUM_TRIAL_TILES, len(left))).astype(int)]
        encoder = TileEncoder(self.source, self.manifest)
        samples = [encoder.one(row) for row in trial.tolist()]
        per_sample = [output.tar_bytes([len(d) for d in s.members]) for s in samples if isinstance(s, Sample)]
        if not per_sample:
            return
        needed_bytes = int(np.mean(per_sample) * len(left) * ESTIMATE_MARGIN) + len(TAR_END)
        free_bytes = shutil.disk_usage(self.folder).free + freed_bytes
        if needed_bytes > free_bytes:
            raise ShardError(
                f"{self.folder}: the shard set needs about {needed_bytes / MB:,.0f} MB (from {len(trial)} of {len(left)} "
                f"tiles, plus {ESTIMATE_MARGIN - 1:.0%}), the disk has {free_bytes / MB:,.0f} MB; free some space, give a "
                "folder elsewhere or take fewer modalities"
            )
