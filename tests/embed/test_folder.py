"""The folder of embeddings: right, whole after any death, and nobody else's."""

import errno
import functools
import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mpmae.embed import read_embeddings
from mpmae.embed.folder import LOCK_NAME, claimed
from mpmae.embed.parquet import own_metadata
from mpmae.errors import EmbeddingError
from mpmae.eval.windows import window_means
from tests.embed.made import MadeTiles, run, small_encoder
from tests.train.write_calls import restore, states_during, tree_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def direct() -> np.ndarray:
    """The vectors, tile by tile."""
    with torch.no_grad():
        return torch.cat([small_encoder()(image) for image in MadeTiles().images]).numpy()


def test_what_is_read_back_is_what_the_encoder_gives(whole):
    table, vectors = read_embeddings(whole)
    expected = direct()
    assert vectors.dtype == np.float32
    assert (vectors == expected.astype(np.float16)).mean() > 0.95, "rounding may differ in the last bit"
    np.testing.assert_allclose(vectors, expected, rtol=2**-10, atol=1e-6)
    source = MadeTiles()
    names = [None, *source.columns[0].class_names]
    assert table.column("id").to_pylist() == [f"tile {i}" for i in range(10)]
    assert table.column("split").to_pylist() == ["train"] * 7 + ["val"] * 3
    assert table.column("product_level").to_pylist() == [None, "l2a"] * 5
    assert table.column("valid_fraction").to_pylist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert table.column("cover").to_pylist() == [names[k + 1] for k in source.classes]
    assert table.column("labels").to_pylist() == [
        [n for n, is_on in zip("ab", row, strict=True) if is_on] for row in source.several
    ]
    facts = own_metadata(table)
    assert facts["encoder"]["fingerprint"] == small_encoder().fingerprint()
    assert facts["source"]["fingerprint"] == source.fingerprint
    assert facts["prepared"] == source.facts


def test_parts_have_one_row_group_and_the_promised_types(whole):
    files = sorted(whole.glob("part-*.parquet"))
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [1, 1, 1]
    assert [pq.read_metadata(file).num_rows for file in files] == [4, 4, 2]
    assert str(pq.read_schema(files[0]).field("embedding").type) == "fixed_size_list<element: halffloat not null>[8]"


def test_int8_comes_with_its_scale(tmp_path):
    run(tmp_path, dtype="int8")
    schema = pq.read_schema(tmp_path / "part-00000.parquet")
    assert str(schema.field("embedding").type) == "fixed_size_list<element: int8 not null>[8]"
    stored = pq.read_table(tmp_path / "part-00000.parquet").to_pylist()
    table, vectors = read_embeddings(tmp_path)
    assert "scale" not in table.column_names
    by_hand = np.array([np.float32(row["scale"]) * np.float32(row["embedding"]) for row in stored])
    np.testing.assert_array_equal(vectors[:4], by_hand)
    expected = direct()
    assert (np.abs(vectors - expected) <= np.abs(expected).max(axis=1, keepdims=True) / 127 * 0.501 + 1e-6).all()


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 64, "num_workers": 3}])
def test_batches_and_workers_change_nothing_but_rounding(whole, tmp_path, options):
    run(tmp_path / "out", **options)
    table, vectors = read_embeddings(tmp_path / "out")
    expected_table, expected = read_embeddings(whole)
    assert table.equals(expected_table)
    np.testing.assert_allclose(vectors, expected, rtol=2**-9, atol=1e-6)


def test_windows_are_averaged(tmp_path):
    source = MadeTiles(4)
    source.images = [torch.cat([source.images[0], source.images[1]]), *source.images[1:].unbind()]
    source.read = lambda positions, read=source.read: read_list(source, read, positions)
    run(tmp_path, source, batch_size=3)
    np.testing.assert_allclose(read_embeddings(tmp_path)[1], [direct()[:2].mean(0), *direct()[1:4]], rtol=2**-10, atol=1e-3)


def read_list(source, read, positions):
    images = source.images
    source.images = torch.zeros(4)
    tiles = read(positions)
    source.images = images
    return type(tiles)(**{**vars(tiles), "images": [images[i] for i in positions]})


def test_killed_at_every_write_it_goes_on_to_the_same_bytes(tmp_path):
    here = tmp_path / "all"
    trees = states_during(functools.partial(run, here), here)
    final = tree_of(here)
    assert len(trees) > 15
    kept = set()
    for call, tree in trees.items():
        folder = tmp_path / str(call)
        restore(tree, folder)
        kept.add(run(folder).num_before)
        assert tree_of(folder) == final, call
        shutil.rmtree(folder)
    assert kept == {0, 4, 8, 10}, "what is written is not computed again"


def test_an_unfinished_folder_is_told(tmp_path):
    trees = states_during(functools.partial(run, tmp_path / "all"), tmp_path / "all")
    restore(list(trees.values())[-6], tmp_path / "cut")
    with pytest.raises(EmbeddingError, match=r"unfinished: [012] of 3 parts; run the same mpmae-embed"):
        read_embeddings(tmp_path / "cut")


def test_a_finished_output_is_left_alone(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    done = run(copy)
    assert (done.num_tiles, done.num_before) == (10, 10)
    assert (done.num_without_location, done.num_without_data) == (4, 1)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_changed_part_is_refused_and_made_again(copy, whole, damage):
    part = copy / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-9]) if damage == "cut" else part.unlink()
    with pytest.raises(EmbeddingError, match=r"part-00001\.parquet is absent or its sha256"):
        read_embeddings(copy)
    assert run(copy).redone == ("part-00001.parquet",)
    assert tree_of(copy) == tree_of(whole)


OTHERS = {
    "encoder": ({"encoder": small_encoder(5)}, r"its encoder is small 0 \(\w{16}\), now it is small 5 \("),
    "source": ({"source": MadeTiles(10, seed=2)}, r"its source is made \(made 10 1\), now it is made \(made 10 2\)"),
    "dtype": ({"dtype": "int8"}, 'its dtype is "float16", now it is "int8"'),
    "parts": ({"tiles_per_part": 5}, "its num_tiles_per_part is 4, now it is 5"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_something_else_is_refused(copy, whole, name):
    options, told = OTHERS[name]
    with pytest.raises(EmbeddingError, match=told):
        run(copy, **options)
    assert tree_of(copy) == tree_of(whole)


def test_the_same_under_other_names_is_the_same(copy):
    source, encoder = MadeTiles(), small_encoder()
    source.title = encoder.label = "seen from elsewhere"
    assert run(copy, source, encoder).num_before == 10


def test_splits_in_another_order_are_another_set(copy):
    source = MadeTiles()
    source.num_tiles = {"val": 3, "train": 7}
    with pytest.raises(EmbeddingError, match="its num_tiles is"):
        run(copy, source)


def test_every_difference_is_told_at_once(copy):
    with pytest.raises(EmbeddingError) as caught:
        run(copy, MadeTiles(7), small_encoder(5), dtype="int8")
    assert len(caught.value.problems) == 4


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EmbeddingError, match=r"holds notes\.txt and no manifest\.json"):
        run(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "mpmae-shards"}',
        '{"format": "mpmae-embeddings", "format_version": 1, "num_tiles": {"a": "b"}}',
    ],
)
def test_a_manifest_that_is_something_else(copy, content):
    (copy / "manifest.json").write_text(content)
    for action in (run, read_embeddings):
        with pytest.raises(EmbeddingError, match=r"manifest\.json"):
            action(copy)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(EmbeddingError, match=r"is no folder of embeddings"):
        read_embeddings(tmp_path / "none")


def test_two_writers_do_not_share_a_folder(whole, copy):
    facts = json.loads((whole / "manifest.json").read_text())
    with claimed(copy, facts), pytest.raises(EmbeddingError, match="another mpmae-embed writes here"):
        run(copy)
    assert run(copy).num_before == 10


def test_a_full_disk_is_told_and_gone_on_from(tmp_path, monkeypatch):
    plain, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:  # the manifest, a part, the manifest, a part
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EmbeddingError, match=r"No space left.*goes on from there"):
        run(tmp_path / "out")
    assert run(tmp_path / "out").num_before == 4


def test_a_set_without_tiles(tmp_path):
    done = run(tmp_path, MadeTiles(0))
    assert done.num_tiles == 0
    table, vectors = read_embeddings(tmp_path)
    assert len(table) == 0
    assert vectors.shape == (0, 8)
    assert {"id", "latitude", "geometry", "cover", "labels"} <= set(table.column_names)


def test_a_vector_that_is_no_number_stops_it(tmp_path):
    source = MadeTiles()
    source.images[5] = torch.inf
    with pytest.raises(EmbeddingError, match=r"tiles tile 5 .*overflows"):
        run(tmp_path, source)
    assert not (tmp_path / "part-00001.parquet").exists()
    assert LOCK_NAME in {path.name for path in tmp_path.iterdir()}


def test_windows_of_unequal_numbers_go_through_the_encoder_together(monkeypatch):
    encoder, images = small_encoder(), [torch.rand(1 + i % 2, 3, 16, 16) for i in range(6)]
    with torch.no_grad():
        expected = torch.stack([encoder(image).mean(0) for image in images]).numpy()
    sizes, forward = [], type(encoder).forward
    monkeypatch.setattr(type(encoder), "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    np.testing.assert_allclose(window_means(encoder, images, "cpu", 8), expected, atol=1e-6)
    assert sizes == [8, 1]
