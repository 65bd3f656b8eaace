"""Logs -> headline numbers, verdicts, curves, and vectors in people's units."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mpmae.report import ClassGuess, ReportData, VectorPair, charts, numbers, vectors


def validation(**pairs: tuple[float, float]) -> dict:
    return {
        "step": 10,
        "num_samples": 64,
        "losses": {name: pair[0] for name, pair in pairs.items()},
        "trivial": {name: pair[1] for name, pair in pairs.items()},
    }


@pytest.mark.parametrize(
    ("ratio", "mark"), [(0.5, "better"), (0.99, "equal"), (1.019, "equal"), (1.03, "worse"), (math.nan, "unknown")]
)
def test_marks(ratio, mark):
    assert numbers.mark_of(ratio) == mark


def test_comparison_takes_the_last_validation_in_the_table_s_order():
    late = validation(lat=(0.5, 1.0), sentinel2=(2.0, 1.0), aster=(math.nan, 1.0), era5=(0.1, 0.0))
    early = validation(lat=(9.0, 1.0)) | {"step": 1}
    rows = numbers.comparisons(ReportData("t", validation=[late, early]))
    assert [(row.name, row.mark) for row in rows] == [
        ("sentinel2", "worse"),
        ("aster", "unknown"),
        ("era5", "unknown"),
        ("lat", "better"),
    ]
    assert rows[3].ratio == 0.5


def test_domains_are_known_by_title_order_and_kind_of_loss():
    names = ("sentinel1", "ebands", "norm_rgb", "depth", "semseg", "rgb", "later")
    data = ReportData("t", validation=[validation(**dict.fromkeys(names, (0.5, 1.0)))])
    assert [(row.title, row.loss_kind) for row in numbers.comparisons(data)] == [
        ("Sentinel-2 true colour (rgb)", "mean squared error"),
        ("Sentinel-2 colour per patch (norm_rgb)", "mean squared error"),
        ("Elevation (depth)", "mean absolute error"),
        ("ESA WorldCover (semseg)", "cross entropy"),
        ("Sentinel-2 near infrared (ebands)", "mean squared error"),
        ("Sentinel-1", "mean squared error"),
        ("later", ""),
    ]
    assert numbers.verdict(data) == "Yes: on all 7 targets it beats a predictor that sees no image."
    assert numbers.headlines(data)[0].detail == "targets, at step 10 on 64 samples"
    assert numbers.noun(ReportData("t", validation=[validation(sentinel1=(1, 1), later=(1, 1))])) == "modalities"


@pytest.mark.parametrize(
    ("pairs", "start"),
    [
        ({"lat": (0.5, 1)}, "Yes"),
        ({"lat": (0.5, 1), "lon": (2, 1)}, "In part: it beats a predictor that sees no image on 1 of 2"),
        ({"lat": (1.0, 1), "lon": (2, 1)}, "No"),
        ({"lat": (math.nan, 1)}, "This page cannot say: the validation holds"),
    ],
)
def test_verdict(pairs, start):
    assert numbers.verdict(ReportData("t", validation=[validation(**pairs)])).startswith(start)


def test_a_modality_in_no_validation_tile_is_neither_judged_nor_warned_about():
    losses = {"lat": 0.5, "era5": None}
    data = ReportData("t", validation=[{"step": 1, "losses": losses, "trivial": {"lat": 1.0, "era5": None}}])
    assert numbers.verdict(data) == (
        "Yes: on all 1 modalities it beats a predictor that sees no image. In no validation tile: ERA5 climate."
    )
    assert [row.mark for row in numbers.comparisons(data)] == ["absent", "better"]
    assert numbers.warnings(data) == []


def test_no_validation_is_no_verdict():
    data = ReportData("t", history=[{"step": 1, "loss": 9.0}, {"step": 2, "loss": 1.0}])
    assert numbers.verdict(data).startswith("This page cannot say: no validation was recorded")


def test_non_finite_losses_are_warned_about():
    history = [
        {"step": s, "loss": math.nan if s == 3 else 1.0, "losses": {"lat": math.inf if s > 3 else 1.0}} for s in range(1, 6)
    ]
    texts = numbers.warnings(ReportData("t", history=history))
    assert texts == [
        "The total loss is not finite in 1 of 5 logged steps, first at step 3.",
        "Latitude: no finite training loss in 2 of 5 entries, first at step 4.",
    ]


def test_steps_logged_again_after_a_resume_count_once():
    history = [{"step": s, "loss": 1.0} for s in (1, 2, 3)] + [{"step": s, "loss": 5.0} for s in (2, 3, 4)]
    assert numbers.series(history, "loss") == [(1, 1.0), (2, 5.0), (3, 5.0), (4, 5.0)]


def test_headlines_skip_what_is_unknown():
    assert numbers.headlines(ReportData("t")) == []
    cards = {card.label: card for card in numbers.headlines(ReportData("t", history=[{"step": 7, "loss": 2.0}]))}
    assert cards["Optimizer steps"].value == "7"
    assert cards["Total loss"].value == "2.00 → 2.00"
    assert set(cards) == {"Optimizer steps", "Total loss"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min"), (3700, "1 h 1 min"), (86400, "1 d"), (93600, "1 d 2 h"), (310, "5 min 10 s")],
)
def test_durations(seconds, text):
    assert numbers.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4123, "0.412"), (12.34, "12.3"), (1234.5, "1,234"), (0, "0"), (-3.25, "−3.25"), (math.inf, "not finite")],
)
def test_compact(value, text):
    assert numbers.compact(value) == text


def test_buckets_keep_extremes_and_break_at_gaps():
    values = [(s, math.nan if 40 <= s < 60 else float(s)) for s in range(100)]
    runs = charts.buckets(values, max_buckets=10)
    assert [len(run) for run in runs] == [4, 4]
    assert (runs[0][0].low, runs[0][0].mean, runs[0][0].high) == (0, 4.5, 9)
    assert max(b.high for run in runs for b in run) == 99


def coordinates(svg: str) -> list[float]:
    return [float(x) for d in re.findall(r' d="([^"]*)"', svg) for x in re.findall(r"-?[\d.]+", d)]


@pytest.mark.parametrize(
    "train",
    [
        [(1, 2.0)],
        [(1, 2.0), (2, 2.0)],
        [(s, 1000.0 / s) for s in range(1, 400)],
        [(s, float(s - 5)) for s in range(10)],
        [(1, math.nan), (2, 1.0), (3, math.inf), (4, 0.5)],
        [(s, 1e-9 * s) for s in range(10)],
    ],
)
def test_charts_are_well_formed_and_inside_their_box(train):
    chart = charts.line_chart("a < b", train, validation=[(2, 1.5), (3, math.nan)], trivial=[(2, 1.8)])
    root = ElementTree.fromstring(chart.svg)
    assert root.get("aria-label").startswith("a < b over steps")
    assert "nan" not in chart.svg.lower()
    assert coordinates(chart.svg)
    assert all(-1 <= x <= charts.WIDTH + 1 for x in coordinates(chart.svg))
    assert len(root.findall("circle[@class='point']")) == 1
    assert len(root.findall("path[@class='trivial']")) == 1


def test_chart_marks_steps_without_a_finite_value():
    chart = charts.line_chart("x", [(1, math.nan), (2, 1.0), (3, 2.0)])
    assert "1 not finite" in chart.caption
    assert len(ElementTree.fromstring(chart.svg).findall("path[@class='broken']")) == 1
    assert charts.line_chart("x", [(1, math.nan)]).caption == "no finite values"
    assert charts.line_chart("x", []).caption == "no finite values"


def test_log_scale_only_for_wide_positive_ranges():
    assert "log scale" in charts.line_chart("x", [(1, 100.0), (2, 1.0)]).caption
    assert "log scale" not in charts.line_chart("x", [(1, 100.0), (2, -1.0)]).caption
    assert "log scale" not in charts.line_chart("x", [(1, 10.0), (2, 1.0)]).caption


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.48, 1.15), (0, 5500), (7e-9, 8e-9), (-3, 3), (0, 9.99), (1, 2000)])
def test_linear_ticks_are_few_and_inside(low, high):
    found = charts.ticks(low, high, log=False)
    slack = 1e-6 * (high - low)
    assert 3 <= len(found) <= 7
    assert all(low - slack <= value <= high + slack for value in found)


def test_vectors_are_shown_in_people_s_units():
    def angle(degrees, guess):
        pair = [np.array([np.sin(np.deg2rad(a)), np.cos(np.deg2rad(a))]) for a in (degrees, guess)]
        return VectorPair(("sin", "cos"), *pair, np.ones(2, bool))

    era5 = VectorPair(
        ("month_temperature_mean", "year_precipitation_sum"),
        np.array([273.15, 0.8]),
        np.array([268.15, np.nan]),
        np.array([True, True]),
    )
    guess = ClassGuess("Tundra", [("Desert", 0.6), ("Tundra", 0.3)])
    tables = vectors.vector_tables(
        {"lat": angle(-25.3, -20.3), "lon": angle(179, -179), "month": angle(330, 340), "biome": guess, "era5": era5}
    )
    assert [(r.target, r.prediction, r.difference) for r in tables.place] == [
        ("25.30° S", "20.30° S", "5.0°"),
        ("179.00° E", "179.00° W", "2.0°"),
        ("Tundra", "Desert (60 %), Tundra (30 %)", "~ likeliest no. 2"),
        ("November", "November (11.3)", "0.3 months"),
    ]
    assert [(row.title, row.unit, row.cells) for row in tables.climate] == [
        ("Temperature, mean", "°C", [None, ("0.0", "−5.0"), None]),
        ("Precipitation", "mm", [None, None, ("800", "–")]),
    ]


def test_vector_without_data_shows_the_prediction_alone():
    pair = VectorPair(("sin", "cos"), np.array([-np.inf, -np.inf]), np.array([0.0, 1.0]), np.zeros(2, bool))
    (row,) = vectors.vector_tables({"lat": pair}).place
    assert (row.target, row.prediction, row.difference) == ("–", "0.00° N", "")
