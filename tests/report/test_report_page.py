"""The page as a whole: complete, self-contained, safe with hostile names, and what a browser makes of it."""

import math
import os
import re
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpmae.errors import ReportError
from mpmae.modalities import MODALITIES, TARGETS
from mpmae.report import ClassGuess, MapTriple, ReportData, RunSummary, TilePicture, VectorPair, write_report

CHROMIUM = Path("/usr/bin/chromium")
G, PATCH = 4, 7
P = G * PATCH
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Collects tags and visible text, and checks that tags nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style"} & set(self.open):
            self.text.append(data)


def make_tile(tile_id: str = "tile_7") -> TilePicture:
    rng, maps, vectors = np.random.default_rng(0), {}, {}
    visible = rng.random((G, G)) < 0.4
    for name in TARGETS:
        spec = MODALITIES[name]
        if spec.scope == "tile":
            if spec.kind == "categorical":
                vectors[name] = ClassGuess(f"{name} 3", [(f"{name} 3", 0.5), (f"{name} 5", 0.2)])
            else:
                values = rng.random(len(spec.bands))
                vectors[name] = VectorPair(spec.bands, values, values + 0.1, np.ones(values.shape, bool))
        elif spec.kind == "categorical":
            ids = rng.integers(-1, len(spec.classes), (P, P))
            maps[name] = MapTriple(spec.bands, ids, np.abs(ids), ids >= 0)
        else:
            values = rng.random((len(spec.model_bands), P, P)) * 100
            maps[name] = MapTriple(spec.model_bands, values, values + 1, np.ones(values.shape, bool))
    return TilePicture(tile_id, "l1c", "val", visible, PATCH, maps, vectors, lat=-25.3, lon=-48.1)


def make_data(**changes) -> ReportData:
    history = [
        {
            "step": s,
            "epoch": s / 10,
            "loss": 10 / s,
            "losses": dict.fromkeys(TARGETS, 1 + 1 / s),
            "lr": 1e-4 * s,
            "grad_norm": 1.0,
        }
        | {"images_per_s": 100.0 + s, "data_wait_percent": 1.0, "memory_bytes": 5.12e8}
        for s in range(1, 41)
    ]
    validation = [
        {"step": s, "losses": dict.fromkeys(TARGETS, 1.1), "trivial": dict.fromkeys(TARGETS, 1.5), "num_samples": 64}
        for s in (20, 40)
    ]
    run = RunSummary(
        config={"train": {"seed": 7, "betas": (0.9, 0.95)}},
        environment={"torch": "2.11"},
        model={"name": "mpmae_atto", "num_parameters": 3_700_000},
        shard_set={"name": "demo"},
        num_steps=40,
        wall_time_s=90,
    )
    fields = {"title": "A run", "run": run, "history": history, "validation": validation, "tiles": [make_tile()]} | changes
    return ReportData(**fields)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_report(make_data(), tmp_path_factory.mktemp("report") / "deep" / "report.html")


def test_page_is_well_formed_and_shows_every_modality(page):
    text = " ".join(Reader(page.read_text()).text)
    titles = {MODALITIES[n].title for n in TARGETS}
    assert all(text.count(title) >= 2 for title in titles), titles  # in the comparison and among the curves
    for row in ("true colour", "false colour", "ascending pass", "descending pass", "Elevation", "Slope", "Canopy height"):
        assert row in text
    for fact in (
        "Yes: on all 12 modalities",
        "mpmae_atto (3.70 M parameters)",
        "train.betas",
        "0.9, 0.95",
        "1 min 30 s",
        "25.30° S",
    ):
        assert fact in text


def test_page_loads_nothing(page):
    reader = Reader(page.read_text())
    assert not [tag for tag, _ in reader.tags if tag in {"script", "iframe", "object", "embed", "base", "form"}]
    for tag, attributes in reader.tags:
        for key in ("src", "href", "srcset", "action", "data", "xlink:href"):
            target = attributes.get(key)
            assert target is None or target.startswith(("data:", "#")), (tag, key, target[:80])
    assert not re.search(r"@import|url\(", page.read_text())
    assert "http://" not in page.read_text()
    assert "https://" not in page.read_text()


def test_page_is_accessible(page):
    reader = Reader(page.read_text())
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert all("alt" in attributes for attributes in images)
    assert sum(bool(attributes["alt"]) for attributes in images) >= 20
    assert all(a.get("scope") in {"row", "col"} for tag, a in reader.tags if tag == "th")
    assert all(a.get("aria-label") or a.get("aria-hidden") for tag, a in reader.tags if tag == "svg")
    identifiers = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert {a["href"][1:] for tag, a in reader.tags if tag == "a"} <= set(identifiers)


def test_hostile_names_are_escaped(tmp_path):
    evil = "</style><script>alert('x')</script><img src=http://example.org/a onerror=alert(1)>\"'&"
    tile = make_tile(evil)
    tile.place = tile.split = tile.product_level = evil
    tile.vectors = {"biome": ClassGuess(evil, [(evil, 1.0)])}
    tile.maps["sentinel2"].note = evil
    data = make_data(title=evil, tiles=[tile], notes=[evil])
    data.run = RunSummary(config={evil: {evil: evil}}, model={"name": evil}, environment={evil: evil}, finished=evil)
    data.history = [{"step": 1, "loss": 1.0, "losses": {evil: 1.0}}]
    data.validation = [{"step": 1, "losses": {evil: 1.0}, "trivial": {evil: 2.0}, "num_samples": 1}]
    reader = Reader(write_report(data, tmp_path / "r.html").read_text())
    assert not [tag for tag, _ in reader.tags if tag == "script"]
    assert not [a for _, a in reader.tags if "onerror" in a]
    assert all(a["src"].startswith("data:image/png") for tag, a in reader.tags if tag == "img")
    assert "".join(reader.text).count("<script>alert('x')</script>") >= 10


@pytest.mark.parametrize(
    "data",
    [
        ReportData("empty"),
        ReportData("no validation", history=[{"step": 1, "loss": 2.0, "losses": {"lat": 1.0}}]),
        ReportData("bare objects", history=[{"step": 1}], validation=[{"step": 1}]),
        ReportData("only validation", validation=[{"step": 1, "losses": {"lat": 1.0}, "trivial": {}}]),
        ReportData(
            "not finite",
            history=[
                {"step": s, "loss": math.nan, "losses": {"lat": math.inf, "lon": None}, "lr": math.nan} for s in (1, 2)
            ],
            validation=[{"step": 2, "losses": {"lat": math.nan}, "trivial": {"lat": math.nan}, "num_samples": 4}],
        ),
    ],
    ids=lambda data: data.title,
)
def test_little_or_broken_data_still_gives_a_page(data, tmp_path):
    text = write_report(data, tmp_path / "r.html").read_text()
    Reader(text)
    assert "This page cannot say" in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()


def probe(score: float | None, **changes) -> dict:
    scores = {"knn_5": score, "linear": score, "metric": "accuracy", "num_train": 60, "num_val": 25, "elapsed_s": 1.0}
    return {"probe": scores | changes}


def test_a_probe_is_shown_beside_random_init(tmp_path):
    history = make_data().history
    history = [
        {"step": 0, **probe(0.25)},
        *history[:19],
        history[19] | probe(0.5),
        *history[20:-1],
        history[-1] | probe(0.75),
    ]
    data = make_data(history=history)
    data.run.config = {"probe": {"dataset": "/sets/crops.h5"}}
    reader = Reader(write_report(data, tmp_path / "r.html").read_text())
    text = " ".join(" ".join(reader.text).split())
    assert "60 labelled images of crops.h5 train kNN and a linear probe, 25 others judge them, in accuracy" in text
    assert "the test split is not read. With 25 images a point has a standard error of about 8.4 %." in text
    assert text.count("last 75.0 % · random init 25.0 %") == 2
    assert "Linear probe 25.0 % → 75.0 % of 25 images, before the first step and at step 40" in text
    labels = [tag["aria-label"] for name, tag in reader.tags if name == "svg" and "aria-label" in tag]
    assert [label.split(":")[0] for label in labels if "random init" in label] == [
        "kNN-5 over steps 0 to 40",
        "Linear probe over steps 0 to 40",
    ]
    assert "Total loss over steps 1 to 40" in " ".join(labels), "the record of step 0 has no loss"


def test_a_probe_without_its_start_or_without_numbers(tmp_path):
    data = ReportData("resumed", history=[{"step": 9, **probe(None)}, {"step": 10, **probe(0.5, metric="map_macro")}])
    text = " ".join(Reader(write_report(data, tmp_path / "r.html").read_text()).text)
    assert "in map macro" in text
    assert "standard error" not in text
    assert "last 50.0 %" in text
    assert "→" not in text


def test_inconsistent_tiles_are_reported_all_at_once(tmp_path):
    first, second = make_tile("first"), make_tile("second")
    first.maps["aster"].prediction = first.maps["aster"].prediction[:, 1:]
    first.maps["lat"] = first.maps["aster"]
    second.visible = np.ones((G, G + 1), bool)
    with pytest.raises(ReportError) as error:
        write_report(make_data(tiles=[first, second], history=[{"loss": 1.0}]), tmp_path / "r.html")
    text = str(error.value)
    assert len(error.value.problems) == 4
    assert "tile first: aster prediction has shape [2, 27, 28], expected [2, 28, 28]" in text
    assert "'lat' is not a pixel modality" in text
    assert "tile second: `visible`" in text
    assert "history: 1 objects have no whole `step`" in text
    assert list(tmp_path.iterdir()) == []


def test_write_replaces_the_old_page_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_report(ReportData("old"), tmp_path / "r.html")

    def fail(self, target):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(ReportError, match=r"r\.html cannot be written \(disk full\)"):
            write_report(ReportData("new"), path)
    assert "old" in path.read_text()
    assert write_report(ReportData("new"), path) == path
    assert "<h1>new</h1>" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def chromium(url: str, *flags: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
        quiet = [
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
        ]
        command = [str(CHROMIUM), *fixed, *quiet, *flags, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(not os.access(CHROMIUM, os.X_OK), reason=f"no headless browser at {CHROMIUM}")
@pytest.mark.parametrize("width", [1280, 400])
def test_browser_draws_the_page(page, tmp_path, width):
    picture = tmp_path / "page.png"
    chromium(page.as_uri(), f"--screenshot={picture}", f"--window-size={width},4000")
    pixels = np.array(Image.open(picture).convert("RGB"))
    assert pixels.shape == (4000, width, 3)
    for part in np.array_split(pixels[:3600], 3):  # head, curves and tiles all hold something
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 20


@pytest.mark.skipif(not os.access(CHROMIUM, os.X_OK), reason=f"no headless browser at {CHROMIUM}")
def test_browser_decodes_every_picture(page, tmp_path):
    # The page forbids scripts, so a copy without its policy counts what the browser could not decode or had to clip.
    probe = """<script>addEventListener("load", () => {
      const images = [...document.images];
      document.body.dataset.images = images.length;
      document.body.dataset.missing = images.filter(i => !i.complete || !i.naturalWidth).length;
      document.body.dataset.clipped = document.documentElement.scrollWidth > innerWidth;
    })</script></body>"""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = tmp_path / "probe.html"
    copy.write_text(text.replace("</body>", probe))
    dump = chromium(copy.as_uri(), "--dump-dom", "--window-size=500,900").stdout
    assert int(re.search(r'data-images="(\d+)"', dump)[1]) == page.read_text().count("<img ")
    assert re.search(r'data-missing="(\d+)"', dump)[1] == "0"
    assert re.search(r'data-clipped="(\w+)"', dump)[1] == "false"
