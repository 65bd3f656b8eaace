"""What a MultiMAE's inputs are worth: probes that one modality alone can solve, and the sweep over inputs."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from mpmae.config_tree import load_tree
from mpmae.errors import ConfigError, DatasetError
from mpmae.eval.finetune import finetune
from mpmae.eval.finetune_config import load_config
from mpmae.eval.probe import probe
from mpmae.eval.probe_config import ProbeConfig
from mpmae.eval.scores import read_scores
from mpmae.eval.sweep_picture import draw_sweep
from mpmae.eval.sweep_table import SubsetScores
from tests.eval.many_modalities import hidden_in, write_checkpoint

REPO = Path(__file__).resolve().parents[2]
QUICK = ("probe.methods=[ridge]", "probe.strengths=[0.01, 1.0]", "output.num_workers=0", "output.device=cpu")


def configured(folder, *overrides, config=None):
    return load_tree(ProbeConfig, config, [*QUICK, "output.seeds=[0]", f"output.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multimae")
    write_checkpoint(folder, domains_in=["rgb", "depth", "semseg", "ired"])
    return folder


@pytest.mark.parametrize(("modality", "domain"), [("elevation", "depth"), ("land cover", "semseg"), ("colour", "rgb")])
def test_what_one_modality_shows_only_its_domain_finds(tmp_path, checkpoint, modality, domain):
    labelled, found = hidden_in(modality, sizes=(40, 20, 40)), {}
    for name in ("rgb", "depth", "semseg"):
        options = (f"encoder.checkpoint={checkpoint}", f"encoder.domains=[{name}]", "probe.baselines=[]")
        (score,) = probe(configured(tmp_path / name, *options), labelled=labelled)
        found[name] = score.value
    assert found.pop(domain) > 0.9
    assert max(found.values()) < 0.75


SUBSETS = "inputs.subsets={RGB: [rgb], RGB + DEM: [rgb, depth], S2: [rgb, ired], RGB + S1: [rgb, sentinel1]}"


@pytest.fixture(scope="module")
def swept(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("sweep")
    config = configured(folder, SUBSETS, f"encoder.checkpoint={checkpoint}")
    labelled = hidden_in("elevation", sizes=(40, 20, 40))
    return folder, config, labelled, probe(config, labelled=labelled)


def test_a_sweep_has_a_score_for_each_input(swept):
    folder, _, _, scores = swept
    labels = ["RGB", "RGB, random init", "image statistics", "random convolutions"]
    labels += ["RGB + DEM", "RGB + DEM, random init", "S2", "S2, random init"]
    assert [score.encoder for score in scores] == labels
    values = {score.encoder: score.value for score in scores}
    assert values["RGB + DEM"] > 0.9 > 0.75 > values["RGB"]
    kept, facts = read_scores(folder / "scores.json")
    assert kept == scores
    assert facts["inputs"]["RGB + DEM"] == {"domains": ["rgb", "depth"], "evaluated": True, "remark": ""}
    assert facts["inputs"]["RGB + S1"]["remark"] == "the encoder does not read sentinel1"
    assert yaml.safe_load((folder / "config.yaml").read_text())["encoder"]["pooling"] == "mean"


def test_the_table_of_a_sweep_names_what_was_left_out_and_filled_in(swept):
    text = (swept[0] / "results.md").read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "| gain on RGB |" in rows["input"]
    assert "| rgb, depth | linear-ridge | 40 |" in rows["RGB + DEM"]
    (stand_ins,) = [line for line in text.splitlines() if line.startswith("S2: ")]
    assert "B5 from B4, B6 from B4, B7 from B4" in stand_ins
    assert rows["RGB + S1"].startswith("| RGB + S1 | rgb, sentinel1 | not possible | – |")
    assert "RGB + S1, not possible: the encoder does not read sentinel1." in text.splitlines()
    assert rows["image statistics"].startswith("| image statistics | all stored bands |")
    assert "An image's vector is the mean over the tokens of all patches with data" in text
    assert (swept[0] / "results.png").read_bytes().startswith(b"\x89PNG")
    inner = (swept[0] / "inputs" / "rgb-+-dem" / "results.md").read_text()
    assert "reads rgb, depth; an image's vector is the mean over the tokens of all patches with data" in inner


def test_the_picture_of_a_sweep_has_room_for_every_bar(swept):
    one = [score for score in swept[3] if score.encoder == "RGB"]
    better = [dataclasses.replace(score, method="better", metrics={"accuracy": 1.0}) for score in one]
    figure = draw_sweep([SubsetScores("RGB", ("rgb",), (*one, *better))])
    assert len(figure.axes) == 2
    for panel in figure.axes:
        assert panel.get_xlim()[1] > 100
        assert all(bar.get_width() < panel.get_xlim()[1] for bar in panel.patches)


def test_a_sweep_goes_on_with_what_is_there(swept, monkeypatch):
    folder, config, labelled, scores = swept
    with pytest.raises(ConfigError, match="is not empty; pass --resume auto"):
        probe(config, labelled=labelled)
    subsets = dict(config.inputs.subsets) | {"DEM": ("depth",)}
    more = config.model_copy(update={"inputs": config.inputs.model_copy(update={"subsets": subsets})})
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("inputs/*/features/*")}
    again = probe(more, resume=True, labelled=labelled)
    assert [score for score in again if not score.encoder.startswith("DEM")] == scores
    assert next(score for score in again if score.encoder == "DEM").value > 0.9
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "features are kept"


def test_a_sweep_of_fine_tuning(tmp_path, checkpoint):
    overrides = ["finetune.epochs=1", "finetune.warmup_epochs=0.5", "finetune.baselines=[]", "finetune.batch_size=8"]
    overrides += ["inputs.subsets={RGB: [rgb], DEM: [depth]}", f"encoder.checkpoint={checkpoint}", "output.seeds=[0]"]
    config = load_config(None, [*overrides, f"output.dir={tmp_path}", "output.num_workers=0", "output.device=cpu"])
    scores = finetune(config, labelled=hidden_in("elevation", sizes=(8, 4, 4)))
    assert [(score.encoder, score.method) for score in scores] == [("RGB", "finetune"), ("DEM", "finetune")]
    weights = tmp_path / "inputs" / "dem" / "runs" / "pretrained-labels100-seed0"
    assert json.loads((weights / "config.json").read_text())["domains_in"] == ["depth"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["inputs.subsets={a: [rgb]}"], "the encoder is a ConvNeXt V2, which always reads the same bands"),
        (["encoder.name=multimae_tiny", "inputs.subsets={a: [rgb, dept]}"], "unknown domain 'dept'; did you mean depth"),
        (["encoder.name=multimae_tiny", "inputs.subsets={a: []}"], "expected at least one domain, each once"),
        (["encoder.name=multimae_tiny", "inputs.subsets={a b: [rgb], a-b: [depth]}"], "expected different ones"),
        (["encoder.name=multimae_tiny", "encoder.domains=[rgb]", "inputs.subsets={a: [rgb]}"], "give one of the two"),
    ],
)
def test_subsets_that_mean_nothing(tmp_path, overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        probe(configured(tmp_path, *overrides), labelled=hidden_in("colour"))


def test_a_set_that_can_do_no_subset(tmp_path):
    overrides = ("encoder.name=multimae_tiny", "inputs.subsets={a: [sentinel1], b: [canopy_height_eth]}")
    with pytest.raises(DatasetError, match=r"a cannot be evaluated: .*no sentinel1") as error:
        probe(configured(tmp_path, *overrides), labelled=hidden_in("colour"))
    assert len(error.value.problems) == 2


def test_what_would_end_a_sweep_halfway_is_said_before_it_begins(tmp_path, checkpoint):
    settings = (f"encoder.checkpoint={checkpoint}", "inputs.subsets={RGB: [rgb], all: [rgb, semseg]}", "image.size=16")
    config = load_config(None, [*settings, f"output.dir={tmp_path}/mixed", "augment.mixup_alpha=0.8", "output.device=cpu"])
    with pytest.raises(ConfigError, match=r"inputs.subsets: all: augment.mixup_alpha: the class ids of esa_worldcover"):
        finetune(config, labelled=hidden_in("colour"))
    assert not (tmp_path / "mixed" / "inputs").exists()


def test_an_input_without_statistics_is_left_out(tmp_path):
    write_checkpoint(tmp_path / "weights", domains_in=["rgb", "depth"])
    path = tmp_path / "weights" / "config.json"
    beside = json.loads(path.read_text())
    path.write_text(json.dumps(beside | {"statistics": {"sentinel2_l2a": beside["statistics"]["sentinel2_l2a"]}}))
    overrides = ["inputs.subsets={RGB: [rgb], DEM: [depth]}", "image.normalise=pretraining", "probe.baselines=[]"]
    config = configured(tmp_path / "out", *overrides, f"encoder.checkpoint={path.parent}")
    assert [score.encoder for score in probe(config, labelled=hidden_in("colour"))] == ["RGB"]
    assert "the checkpoint has no statistics of aster; use auto or dataset." in (tmp_path / "out/results.md").read_text()


def test_the_configuration_that_comes_with_it_serves_both_commands():
    path = REPO / "configs" / "eval" / "multimae_inputs.yaml"
    assert next(iter(configured("x", config=path).inputs.subsets)) == "S2"
    assert load_config(path).inputs.subsets["all"][-1] == "sentinel1"


def test_what_a_resumed_evaluation_must_share_names_no_setting_that_an_older_one_lacks(tmp_path):
    options = ("probe.methods=[ridge]", "probe.baselines=[image_statistics]", f"output.dir={tmp_path}")
    probe(configured(tmp_path, *options), labelled=hidden_in("colour"))
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert {key for key in kept if key.startswith(("encoder.", "inputs."))} == {
        *(f"encoder.{name}" for name in ("checkpoint", "name", "patch_size", "bands_in", "domains"))
    }
    assert kept["encoder.domains"] is None
