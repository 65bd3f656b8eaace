"""Readers against files that are damaged in any way: a ShardError that names the shard and the place, or right values.

The hashes of the manifest are made to agree with the damage (or are not looked at), so that what lies below them is tested.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mpmae.errors import ShardError
from mpmae.loader import Augmentation
from mpmae.loader.read import ShardReader
from mpmae.loader.transform import Assembler, draw_views
from mpmae.modalities import TARGETS
from mpmae.shard_codecs import decode_pixels
from mpmae.shard_files import load_manifest, parse_index, parse_manifest
from mpmae.shard_format import Manifest, index_bytes, index_name
from mpmae.shard_tools.build import build
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.synth import synth
from mpmae.shard_tools.tar_walk import walk_samples
from mpmae.shard_tools.verify import verify
from mpmae.tar_members import tar_member

NAME = "train-00000.tar"
fuzz = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A set of two samples of 16 px a shard."""
    folder = tmp_path_factory.mktemp("fuzz")
    synth(folder / "source", num_tiles=10, tile_size_px=16, seed=9, progress=False)
    build(folder / "source", folder / "set", splits=["train"], max_samples_per_shard=2, progress=False)
    return folder / "set"


@pytest.fixture
def own(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "set"))


@st.composite
def damage(draw) -> list[tuple]:
    """A few changes to bytes: where (as a fraction), what kind, with what."""
    kinds = st.sampled_from(["flip", "write", "cut", "splice", "insert"])
    one = st.tuples(kinds, st.floats(0, 1), st.floats(0, 1), st.binary(min_size=1, max_size=12))
    return draw(st.lists(one, min_size=1, max_size=4))


def damaged(data: bytes, changes: list[tuple]) -> bytes:
    for kind, where, other, new in changes:
        at, to = int(where * len(data)), int(other * len(data))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << new[0] % 8)]) + data[at + 1 :]
        elif kind == "write":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "splice":
            data = data[:at] + data[to : to + 600] + data[at:]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
    return data


def check_named(problems: list[str], name: str) -> None:
    assert all(name in problem for problem in problems), problems


@contextmanager
def shard_errors_that_name(name: str) -> Iterator[None]:
    """Lets the block end by a ShardError, whose problems must all hold `name`; any other exception is a failure."""
    try:
        yield
    except ShardError as error:
        check_named(error.problems, name)


def read_everything(folder: Path) -> None:
    """Every sample through both readers, some through the compiled loops of the loader."""
    shard_set = ShardSet(folder)
    for _ in shard_set.tiles(None):
        pass
    for split in shard_set.manifest.splits:
        reader = ShardReader(folder, split)
        for sample_id in range(len(reader)):
            reader.sample(sample_id)
        if len(reader):
            ids = np.arange(min(len(reader), 4))
            size_px = min(reader.manifest.tile_size_px, 12)
            views = draw_views(Augmentation(), 0, 0, ids, reader.manifest.tile_size_px, size_px)
            names = [name for name in TARGETS if name in reader.manifest.modalities]
            Assembler(reader, names, size_px).batch(ids, views, {}, len(ids))
        reader.close()


def agree(folder: Path, name: str = NAME) -> None:
    """Make the manifest agree with a changed tar and index."""
    tree = json.loads((folder / "manifest.json").read_text())
    for shard in tree["splits"]["train"]:
        if shard["name"] == name:
            data, index = (folder / name).read_bytes(), (folder / index_name(name)).read_bytes()
            shard |= {
                "num_bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "index_sha256": hashlib.sha256(index).hexdigest(),
            }
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_a_tar_cut_at_every_block(own):
    """Whether the manifest knows of it or not, and with or without the index."""
    path, manifest = own / NAME, load_manifest(own)
    data, shard = path.read_bytes(), manifest.shards("train")[0]
    assert len(data) % 512 == 0
    for num_bytes in range(0, len(data), 512):
        path.write_bytes(data[:num_bytes])
        for read in (ShardReader, lambda folder, split: list(ShardSet(folder).tiles(split))):
            with pytest.raises(ShardError, match=rf"{NAME}.*{num_bytes} bytes, the manifest says {len(data)}"):
                read(own, "train")
        problems = verify(own, fast=True).problems
        assert f"{path}: {num_bytes} bytes, the manifest says {len(data)}" in problems
        is_whole = num_bytes >= len(data) - 1024
        assert is_whole or any("the tar is cut off in" in p and f"at byte {num_bytes}" in p for p in problems[1:])
        with pytest.raises(ShardError, match=r"byte \d+"):
            list(walk_samples(io.BytesIO(data[:num_bytes]), manifest, shard.num_samples, 0))
        agreeing = shard.model_copy(update={"num_bytes": num_bytes})
        index = (own / index_name(NAME)).read_bytes()
        with pytest.raises(ShardError, match=rf"its members end the tar at byte {len(data)}, the manifest says {num_bytes}"):
            parse_index(index, own / index_name(NAME), manifest, agreeing)


def members_of(folder: Path) -> list[bytes]:
    rows = np.load(folder / index_name(NAME))
    data = (folder / NAME).read_bytes()
    starts = [int(offset) - 512 for offset in rows["offset"].ravel()]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data) - 1024], strict=True)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.pop(3), "sample 00000000: byte"),
        (lambda m: m.insert(3, m[3]), "sample 00000000: byte"),
        (lambda m: m.insert(4, m.pop(3)), "sample 00000000: byte"),
        (lambda m: m.pop(), "sample 00000001: byte"),
        (lambda m: m.append(m[-1]), "does not end after its 2 samples"),
        (lambda m: m.append(tar_member("00000002.sentinel2.lz4", b"x")), "does not end after its 2 samples"),
    ],
    ids=["missing", "doubled", "out of order", "last missing", "last doubled", "one more"],
)
def test_members_that_are_not_the_layout(change, expected, own):
    members = members_of(own)
    change(members)
    (own / NAME).write_bytes(b"".join(members) + bytes(1024))
    agree(own)
    problems = verify(own).problems
    assert any(NAME in p and expected in p for p in problems), problems
    assert "index.npy does not fit" in problems[0] or "sample 0000000" in problems[0]
    if "does not fit" in problems[0]:
        with pytest.raises(ShardError, match=f"does not fit {NAME}"):
            read_everything(own)


@fuzz
@given(changes=damage())
def test_any_damage_to_a_tar(changes, own, shards):
    """Reading never fails but by a ShardError that names the tar; verify always finds it."""
    data = (shards / NAME).read_bytes()
    changed = damaged(data, changes)
    (own / NAME).write_bytes(changed)
    shutil.copy(shards / "manifest.json", own)
    if changed != data:
        assert any(NAME in p for p in verify(own, fast=True).problems)
    agree(own)
    with shard_errors_that_name("train-00000"):
        read_everything(own)
    check_named(verify(own).problems, "train-00000")
    manifest = load_manifest(own)
    with shard_errors_that_name("byte"):
        for walked in walk_samples(io.BytesIO(changed), manifest, 2, 0):
            assert sum(walked.sizes) <= len(changed)


@fuzz
@given(changes=damage())
@example(changes=[("cut", 0.0, 0.0, b"x")])
def test_any_damage_to_an_index(changes, own, shards):
    """What is accepted below the hash lays out the tar exactly, so that no read can be out of range."""
    manifest = load_manifest(shards)
    data = damaged((shards / index_name(NAME)).read_bytes(), changes)
    shard = manifest.shards("train")[0].model_copy(update={"index_sha256": hashlib.sha256(data).hexdigest()})
    good = np.load(shards / index_name(NAME))
    with shard_errors_that_name("X"):
        rows = parse_index(data, "X", manifest, shard)
        np.testing.assert_array_equal(rows["offset"], good["offset"])
        padded = (rows["size"].astype(int) + 511) // 512
        np.testing.assert_array_equal(padded, (good["size"].astype(int) + 511) // 512)


@fuzz
@given(field=st.sampled_from(["row", "presence", "offset", "size"]), data=st.data())
def test_any_number_in_an_index(field, data, own, shards):
    """The fields themselves, hash agreeing: refused, or read without an error but a ShardError."""
    rows = np.load(shards / index_name(NAME)).copy()
    values = rows[field].reshape(-1)
    limit = int(np.iinfo(values.dtype).max)
    position = data.draw(st.integers(0, values.size - 1))
    value = data.draw(
        st.integers(0, limit) | st.sampled_from([0, limit, int(values[position]) ^ 1, int(values[position]) ^ 512])
    )
    changed = rows[field].copy()
    changed.reshape(-1)[position] = value
    rows[field] = changed
    (own / index_name(NAME)).write_bytes(index_bytes(rows))
    shutil.copy(shards / "manifest.json", own)
    agree(own)
    with shard_errors_that_name("train-00000"):
        read_everything(own)
    check_named(verify(own).problems, "train-0000")


def paths_of(tree, path=()):
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from paths_of(value, (*path, key))


HUGE = [2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, -1, 0, 1.5, 1e308, float("nan"), float("inf"), True, None]
json_values = st.recursive(
    st.sampled_from(HUGE)
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["<u2", "|O", "<f8", "raw", "../x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def check_usable(folder: Path, manifest: Manifest) -> None:
    """An accepted manifest has its derived types, and reading with it ends in values or a ShardError."""
    assert manifest.index_dtype.itemsize > 0
    assert manifest.scalars_dtype.itemsize > 0
    assert len(manifest.fingerprint) == 64
    with suppress(ShardError):
        read_everything(folder)


@settings(fuzz, max_examples=250)
@given(data=st.data())
def test_any_field_of_a_manifest(data, own, shards):
    tree = json.loads((shards / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in paths_of(tree) if p]))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        action = data.draw(st.sampled_from(["set", "set", "set", "remove", "add", "swap"]))
        if action == "set":
            parent[path[-1]] = data.draw(json_values)
        elif action == "remove":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, list):
            parent.append(parent[path[-1]])
        elif action == "add":
            parent["extra"] = 1
        elif isinstance(parent, list):
            parent.reverse()
    text = json.dumps(tree)
    (own / "manifest.json").write_text(text)
    with shard_errors_that_name("X"):
        check_usable(own, parse_manifest(text.encode(), "X"))


@fuzz
@given(changes=damage())
def test_any_damage_to_a_manifest(changes, own, shards):
    data = damaged((shards / "manifest.json").read_bytes(), changes)
    (own / "manifest.json").write_bytes(data)
    with shard_errors_that_name("manifest.json"):
        check_usable(own, load_manifest(own))


@settings(fuzz, max_examples=300)
@given(changes=damage(), which=st.integers(0, 8))
def test_any_damage_to_a_member(changes, which, shards):
    """A block that the codec cannot undo is a ShardError; one that it can has the right shape."""
    manifest, rows = load_manifest(shards), np.load(shards / index_name(NAME))
    entry = manifest.pixels[which % len(manifest.pixels)]
    at, size = int(rows["offset"][0, which % len(manifest.pixels)]), int(rows["size"][0, which % len(manifest.pixels)])
    data = damaged((shards / NAME).read_bytes()[at : at + size], changes)
    with shard_errors_that_name(entry.name):
        values = decode_pixels(entry, data)
        assert (values.shape, values.dtype) == (entry.shape, np.dtype(entry.dtype))


def test_pipes_in_place_of_files_do_not_hang(own):
    for name in ("manifest.json", index_name(NAME), NAME):
        path = own / name
        data = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ShardError):
            read_everything(own)
        if name != "manifest.json":
            assert not verify(own).ok
        path.unlink()
        path.write_bytes(data)
    assert verify(own).ok
