"""`mpmae-runs`: states, table, differences and curves of run folders."""

import fcntl
import json
import os
import re

import numpy as np
import pytest
from rich.console import Console

from mpmae.errors import ReportError
from mpmae.runs import cli
from mpmae.runs.curves import hours_of, run_curves, short_names, smoothed
from mpmae.runs.folder import find_runs, open_run, state_of
from mpmae.runs.listing import ago, difference_table, run_table
from mpmae.runs.picture import _MAX_POINTS, _thinned, draw
from tests.runs.made import NOW, make_run


def told(renderable) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def state(folder, now=NOW):
    found = state_of(open_run(folder), now)
    return found.name, found.why


def touched(path, text=""):
    path.write_text(text)
    os.utime(path, (NOW, NOW))


def test_states_of_a_run_that_is_held(tmp_path):
    folder = make_run(tmp_path / "run", num_steps=3)
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state(folder) == ("running", "")
        assert state(folder, NOW + 700) == ("stalled", "no step for 705 s")  # guard.stall_s is 600
    assert state(folder, NOW + 700) == ("failed", "ended without a word")


def test_states_of_a_run_that_has_ended(tmp_path):
    assert state(make_run(tmp_path / "whole")) == ("complete", "")
    folder = make_run(tmp_path / "part", num_steps=3)
    touched(folder / "stopped.json", json.dumps({"reason": "SIGTERM", "requeue": True}))
    assert state(folder) == ("preempted", "SIGTERM")
    touched(folder / "stopped.json", json.dumps({"reason": "the loss is nan", "requeue": False}))
    assert state(folder) == ("failed", "the loss is nan")
    (folder / "stopped.json").unlink()
    (folder / "stacks").mkdir()
    touched(folder / "stacks" / "rank-1.txt")
    assert state(folder) == ("failed", "stalled")
    touched(folder / "bad_batch.json")
    assert state(folder) == ("failed", "no finite loss or gradient")
    os.utime(folder / "run.json", (NOW + 1, NOW + 1))  # launched again since
    assert state(folder) == ("failed", "ended without a word")


def test_looking_at_a_run_does_not_keep_its_folder_locked(tmp_path):
    folder = make_run(tmp_path / "run", num_steps=3)
    state(folder)
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_table_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zero = {"ds_config": {"zero_optimization": {"stage": 2}}, "world_size": 8, "dirty": True}
    make_run(tmp_path / "runs" / "deep" / "zero", num_steps=1500, total_steps=9000, idle_s=200, **zero)
    make_run(tmp_path / "runs" / "plain")
    with (tmp_path / "runs" / "plain" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # a writer in the middle of a line
    os.utime(tmp_path / "runs" / "plain" / "metrics.jsonl", (NOW, NOW))
    runs = find_runs([tmp_path / "runs"])
    lines = told(run_table(runs, NOW)).splitlines()
    assert lines[1].split()[:5] == ["runs/plain", "complete", "40", "/", "40"]
    row = lines[2].split()
    assert row[:2] == ["runs/deep/zero", "failed:"]
    assert "1,500 / 9,000" in lines[2]
    assert "at 1,500" in lines[2]
    assert row[-7:] == ["101", "3", "min", "ZeRO-2", "x", "8", "01234567+"]
    assert [ago(s) for s in (0.4, 119, 120, 7300, 200_000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]


def test_a_run_that_has_not_made_a_step(tmp_path):
    folder = make_run(tmp_path / "run", num_steps=1)
    (folder / "metrics.jsonl").unlink()
    (folder / "validation.jsonl").unlink()
    assert "0 / 40" in told(run_table([open_run(folder)], NOW))
    with pytest.raises(ReportError, match=r"run has no metric record yet"):
        run_curves([open_run(folder)], "step")


def test_differences(tmp_path):
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", settings=("optim.lr=2e-3",), num_parameters=8)
    same = make_run(tmp_path / "same", settings=("run.name=other",))
    lines = told(difference_table(open_run(first), open_run(second))).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["optim.lr", "num_parameters"]
    assert lines[1].split()[1:] == ["None", "0.002"]
    assert difference_table(open_run(first), open_run(same)) is None


PROBES = {step: {"knn_5": 0.2 + step / 100, "linear": 0.3 + step / 100, "metric": "accuracy"} for step in (0, 4, 8)}


def test_probes_are_known_to_every_command(tmp_path):
    first = open_run(make_run(tmp_path / "first", num_steps=600, total_steps=600, probes=PROBES))
    second = open_run(make_run(tmp_path / "second", num_steps=10, probes={0: PROBES[0]}))
    third = open_run(make_run(tmp_path / "third", num_steps=10))
    assert (tmp_path / "first" / "metrics.jsonl").stat().st_size > 1 << 16, "more than the lines that are read of the end"
    assert [run.last_probe().get("step") for run in (first, second, third)] == [8, 0, None]
    lines = told(run_table([first, second, third], NOW)).splitlines()
    assert "Linear probe" in lines[0]
    assert [text in line for text, line in zip(("38.0 % at 8", "30.0 % at 0"), lines[1:3], strict=True)] == [True, True]
    assert "%" not in lines[3]
    assert "Linear probe" not in told(run_table([third], NOW))
    differences = told(difference_table(first, second))
    assert re.search(r"last kNN-5 +28.0 % at 8 +20.0 % at 0", differences)
    (of_steps, of_others), (of_hours, _) = (run_curves([first, third], axis) for axis in ("step", "hours"))
    assert of_steps.curves["loss"].x[0] == 1
    assert of_steps.probes["linear"].x.tolist() == [0, 4, 8]
    np.testing.assert_allclose(of_steps.probes["linear"].raw, [30, 34, 38])
    np.testing.assert_allclose(of_hours.probes["linear"].x, [0, 0.04, 0.08])
    assert of_others.probes == {}
    titles = [axes.get_title("left") for axes in draw([of_steps, of_others], "step").get_axes() if axes.get_visible()]
    assert titles[-2:] == ["kNN-5, %", "Linear probe, %"]


def test_a_run_that_has_a_probe_alone(tmp_path):
    run = open_run(make_run(tmp_path / "run", num_steps=1, probes=PROBES))
    (run.path / "metrics.jsonl").write_text(json.dumps({"step": 0, "probe": PROBES[0]}) + '\n{"step": 1, "probe": {"lin')
    assert run.last_probe()["step"] == 0
    assert "0 / 40" in told(run_table([run], NOW))
    with pytest.raises(ReportError, match=r"run has no metric record yet"):
        run_curves([run], "hours")


def test_curves_over_each_axis(tmp_path):
    run = open_run(make_run(tmp_path / "run", num_steps=10, resumed_at=6, modalities=("biome", "canopy_height_eth")))
    (of_steps,), (of_images,), (of_hours,) = (run_curves([run], axis, window=3) for axis in ("step", "images", "hours"))
    assert of_steps.curves["loss"].x.tolist() == list(range(1, 11))
    assert of_images.curves["loss"].x.tolist() == list(range(64, 641, 64))
    np.testing.assert_allclose(of_hours.curves["loss"].x, np.arange(1, 11) / 100)  # the clock starts anew at step 7
    assert (of_steps.resumed_at, of_images.resumed_at, of_steps.num_dropped) == ([6], [384], 3)
    assert list(of_steps.curves) == ["loss", "biome", "canopy_height_eth"]
    assert of_steps.curves["biome"].points_x.tolist() == [2, 4, 6, 8, 10]
    missing = np.isnan(of_steps.curves["canopy_height_eth"].raw).nonzero()[0]
    assert missing.tolist() == [6]  # no tile of step 7 has it


def test_hours_leave_out_the_time_between_launches():
    assert (hours_of([3600, 7200, 1800, 3600]) == [1, 2, 2.5, 3]).all()


def test_smoothing():
    values = np.array([1, 2, np.nan, 4, 100, 6, 7], float)
    assert smoothed(values, 1).tolist()[3:] == [4, 100, 6, 7]
    calm = smoothed(values, 3)
    assert np.isnan(calm[2])
    assert calm[3:].max() < 10  # the spike is gone
    ramp = np.arange(100, dtype=float)
    np.testing.assert_allclose(smoothed(ramp, 11)[10:-10], ramp[10:-10])
    assert np.isnan(smoothed(np.full(4, np.nan), 3)).all()


def test_short_names_tell_runs_apart():
    assert short_names(["runs/a/one", "runs/b/one"]) == ["a/one", "b/one"]
    assert short_names(["runs/a"]) == ["a"]


@pytest.mark.parametrize(("modalities", "num_panels"), [(("biome",), 1), (None, 12)])
def test_a_picture_has_a_panel_for_each_modality(tmp_path, modalities, num_panels):
    given = {} if modalities is None else {"modalities": modalities}
    runs = [open_run(make_run(tmp_path / name, seed=seed, resumed_at=20, **given)) for seed, name in enumerate("ab")]
    figure = draw(run_curves(runs, "step"), "step")
    shown = [axes for axes in figure.get_axes() if axes.get_visible()]
    assert len(shown) == 1 + num_panels
    assert [text.get_text().split()[0] for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert "dotted: resumed" in shown[0].get_title("right")
    for axes in shown:
        assert len([line for line in axes.get_lines() if line.get_linewidth() == 1.8]) == 2
        assert axes.get_title("left")


def test_the_targets_of_a_multimae_have_titles(tmp_path):
    names, settings = ("rgb", "norm_rgb", "depth", "sentinel1"), ("model.name=multimae_tiny",)
    run = open_run(make_run(tmp_path / "run", modalities=names, settings=settings))
    figure = draw(run_curves([run], "step"), "step")
    titles = [axes.get_title("left") for axes in figure.get_axes() if axes.get_visible()]
    assert titles == [
        "training loss, all targets",
        "Sentinel-2 true colour (rgb)",
        "Sentinel-2 colour per patch (norm_rgb)",
        "Elevation (depth)",
        "Sentinel-1",
    ]
    assert "40 / 40" in told(run_table([run], NOW))
    differences = told(difference_table(run, open_run(make_run(tmp_path / "other", modalities=names))))
    assert re.search(r"model.name +multimae_tiny +mpmae_atto", differences)


def test_a_long_series_keeps_its_spikes_and_gaps():
    x, values = np.arange(100_000.0), np.ones(100_000)
    values[[77, 99_999]], values[500:900] = (9, -3), np.nan
    thin_x, thin = _thinned(x, values)
    assert len(thin) <= _MAX_POINTS
    assert set(thin_x[[np.nanargmax(thin), np.nanargmin(thin)]]) == {77, 99_999}
    assert np.isnan(thin[(thin_x >= 550) & (thin_x < 850)]).all()
    assert _thinned(x[:100], values[:100])[1].tolist() == values[:100].tolist()


def test_a_picture_of_losses_that_are_not_finite(tmp_path):
    folder = make_run(tmp_path / "run", num_steps=4, modalities=("biome",))
    lines = [{"step": step, "loss": None, "losses": {"biome": None}} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "validation.jsonl").unlink()
    figure = draw(run_curves([open_run(folder)], "step"), "step")
    assert [text.get_text() for axes in figure.get_axes() for text in axes.texts] == ["no finite values"] * 2


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", num_steps=5, resumed_at=2, modalities=("biome",))
    make_run(tmp_path / "b", num_steps=5, modalities=("biome",), settings=("train.seed=9",))
    assert cli.main(["list", "."]) == 0
    assert cli.main(["diff", "a", "b"]) == 0
    assert cli.main(["compare", "a", "b", "-o", "two.svg", "--x", "images"]) == 0
    out = capsys.readouterr().out
    assert "train.seed" in out
    assert "a: 3 records are not drawn, since a resumed run did their steps again" in out
    assert "curves: two.svg" in out
    assert "<svg" in (tmp_path / "two.svg").read_text()[:1000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "nowhere"], "nowhere is not a folder; give run folders, or folders of runs"),
        (["diff", "a", "nowhere"], "nowhere is not a run folder: its run.json cannot be read"),
        (["compare", "a", "-o", "curves.gif"], "curves.gif: expected a name that ends in .png, .svg, .pdf"),
        (["compare", "a", "-o", "no/curves.png"], "there is no folder no"),
        (["compare", "old", "--x", "hours"], "old has records without running_s"),
        (["list", "torn"], "torn/run.json is not the record of a run"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", num_steps=2)
    old = make_run(tmp_path / "old", num_steps=1)
    (old / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text("[]")
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
