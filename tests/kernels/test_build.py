"""The cache filled ahead of a run, and what of the kernels a wheel holds."""

import fnmatch
import sys
from types import ModuleType

import pytest
import torch

from mpmae.kernels import build, cuda_driver
from mpmae.kernels.cuda_runtime import Specialisation, compiled_for
from tests.kernels.test_cuda_runtime import needs_nvrtc


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """A plan in the place of an op's: two kernels per number of channels, whatever else the case says; notes the cases."""
    source = tmp_path / "op.cu"
    source.write_text(
        'extern "C" __global__ void one(float* x) { x[0] = CHANNELS; }\n'
        'extern "C" __global__ void two(float* x) { x[1] = CHANNELS; }\n'
    )
    module = ModuleType("plan")
    module.seen = []

    def specialisations(case, architecture):
        module.seen.append((case, architecture))
        return [Specialisation(source, name, {"CHANNELS": case.channels}) for name in ("one", "two")]

    module.specialisations = specialisations
    monkeypatch.setitem(sys.modules, "op_plan", module)
    monkeypatch.setattr(build, "PLANS", ("op_plan",))
    return module


def test_the_cases_of_a_model():
    sizes = {"num_samples": 64, "num_visible": 19, "num_patches_side": 7}
    found = list(build.cases((40, 80), 512, **sizes, dtypes=[torch.bfloat16, torch.float32]))
    assert [(case.channels, case.tile_side, case.num_visible) for case in found[:3]] == [
        (40, 8, 19),
        (80, 4, 19),
        (512, 1, 49),
    ]
    assert [case.dtype for case in found] == [torch.bfloat16] * 3 + [torch.float32] * 3


@needs_nvrtc
def test_what_is_built_is_found(plan, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "cache"
    options = ["--arch", "sm_80", "sm_90", "--folder", str(folder), "--dims", "40", "80", "80", "--decoder-dim", "40"]
    build.main(options)
    assert "8 kernels for sm_80 sm_90" in capsys.readouterr().out  # 2 numbers of channels x 2 kernels x 2 architectures
    assert len(list(folder.iterdir())) == 4
    assert [(case.tile_side, arch) for case, arch in plan.seen] == [(s, arch) for arch in (80, 90) for s in (8, 4, 2, 1)]
    monkeypatch.setattr(cuda_driver, "compile_source", None)
    for item in build.specialisations([case for case, _ in plan.seen], "sm_90"):
        assert compiled_for(item, "sm_90", folder).cubin


@needs_nvrtc
def test_an_unknown_architecture(plan, capsys):
    with pytest.raises(SystemExit):
        build.main(["--arch", "sm_90", "sm_12"])
    assert "--arch sm_12: known ahead of a run are sm_80 sm_90" in capsys.readouterr().err


def test_cuda_sources_are_in_the_wheel(repo):
    tomllib = pytest.importorskip("tomllib")
    patterns = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    assert any(fnmatch.fnmatch("depthwise.cu", pattern) for pattern in patterns)
    for path in (repo / "kernels").rglob("*.cu*"):
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path
        assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package, so its sources are not installed"


def test_every_stage_has_its_kernels():
    sizes = {"num_samples": 64, "num_visible": 19, "num_patches_side": 7, "dtypes": [torch.bfloat16]}
    for target in ("sm_80", "sm_90"):
        names = [item.kernel_name for item in build.specialisations(build.cases((40, 80, 160, 320), 512, **sizes), target)]
        for stage, side in enumerate((8, 4, 2, 1)):
            for op in ("forward", "backward_input", "backward_input_residual", "backward_weight"):
                assert f"depthwise_{op}_s{side}_c{40 << stage}" in names
        assert sum("sum" in name for name in names) >= 1
