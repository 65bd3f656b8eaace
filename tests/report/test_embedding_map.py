"""The report's section of embeddings."""

import pytest

from mpmae.errors import ReportError
from mpmae.report import ReportData, RunSummary
from mpmae.report.embedding_map import MAP_NAME, EmbeddingMap, Grouping, load_map
from mpmae.report.page import render_report
from tests.report.test_report_page import Reader, make_data

HOSTILE = '<script>alert(1)</script> & "more"'


def make_map(num: int = 30, **changes) -> EmbeddingMap:
    grouping = Grouping(
        title=HOSTILE,
        names=("wood", HOSTILE),
        colours=("#00ff00", "#0000ff"),
        counts=(num // 2, num - num // 2 - 1),
        num_unknown=1,
        classes=tuple(i % 3 - 1 for i in range(num)),
    )
    values = {
        "method": "pca",
        "explained_percent": (50.0, 20.0, 5.0),
        "checkpoint": HOSTILE,
        "step": 10,
        "source": "a set",
        "num_tiles": num,
        "points": tuple((i % 7, i * 0.5) for i in range(num)),
        "rgb": ("#102030",) * num,
        "locations": tuple((i * 2.0, i * 3.0) if i % 2 else None for i in range(num)),
        "groupings": (grouping,),
    }
    return EmbeddingMap(**values | changes)


def page_data(**changes) -> ReportData:
    return make_data(tiles=(), **changes)


def section(page: str) -> str:
    return page[page.index('<section id="embeddings">') : page.index('<section id="run">')]


def test_the_section_is_there_with_its_pictures():
    page = render_report(page_data(embeddings=make_map()))
    Reader(page)
    part = section(page)
    assert part.count("<svg") == 2
    assert part.count('role="img"') == 2
    assert "<script" not in page
    assert "principal component 1 (50 % of the variance)" in part
    assert ">unknown <" in part
    assert '<a href="#embeddings">' in page


def test_no_embeddings_no_section():
    page = render_report(page_data())
    assert "mbedding" not in page.replace("--", "")


def test_another_step_than_the_rest_of_the_page_is_told():
    assert "vectors are of step 10" in render_report(page_data(embeddings=make_map(), run=RunSummary(num_steps=20)))
    assert "vectors are of step" not in render_report(page_data(embeddings=make_map(), run=RunSummary(num_steps=10)))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "umap", "explained_percent": ()},
        {"points": ((1.0, 1.0),) * 30},
        {"groupings": ()},
        {"locations": (None,) * 30},
        {"num_tiles": 10**6},
        {"points": ((1.0, 1.0),) * 29 + ((1e30, -1e30),)},
        {"points": (), "rgb": (), "locations": (), "groupings": (), "num_tiles": 0},
    ],
)
def test_odd_maps_are_drawn_too(changes):
    page = render_report(page_data(embeddings=make_map(**changes)))
    Reader(page)
    assert "nan" not in section(page).lower()


def test_a_sample_of_the_tiles_is_told():
    assert "30 of 1,000,000 tiles, evenly spread" in render_report(page_data(embeddings=make_map(num_tiles=10**6)))


def test_a_map_comes_back(tmp_path):
    assert load_map(tmp_path) is None
    make_map().save(tmp_path)
    assert load_map(tmp_path) == make_map()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"#102030"', '"red"', "rgb.0"),
        ('"pca"', '"tsne"', "method"),
        ("[50.0,20.0,5.0]", '[50.0,20.0,5.0],"more":1', "more"),
        ("[0.0,0.0],", "", "30 entries"),
        ('"names":["wood",', '"names":[', "without a name"),
        ("}", "", "JSON"),
    ],
)
def test_a_file_that_is_no_map_is_told(tmp_path, old, new, told):
    make_map().save(tmp_path)
    text = (tmp_path / MAP_NAME).read_text()
    assert old in text
    (tmp_path / MAP_NAME).write_text(text.replace(old, new, 1))
    with pytest.raises(ReportError, match=r"map\.json is not a map of embeddings") as caught:
        load_map(tmp_path)
    assert told in str(caught.value)
