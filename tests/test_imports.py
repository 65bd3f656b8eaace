"""The arrows between packages, read off the source: who may import whom."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
FOLDER_OF = {"mpmae.kernels": "kernels", "mpmae.shard_tools": "data/shard_tools", "mpmae": "mpmae"}
CORE = {
    "mpmae.errors",
    "mpmae.index_checks",
    "mpmae.files",
    "mpmae.in_order",
    "mpmae.lazy",
    "mpmae.modalities",
    "mpmae.pixel_loops",
    "mpmae.shard_codecs",
    "mpmae.shard_files",
    "mpmae.shard_format",
    "mpmae.tar_members",
    "mpmae.manifest_checks",
    "mpmae.counter_rng",
    "mpmae.remote_store",
    "mpmae.retries",
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDER_OF.items():
        for path in (REPO / folder).rglob("*.py"):
            parts = [package, *path.relative_to(REPO / folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    for folder in ("launch", "benchmarks"):
        for path in (REPO / folder).rglob("*.py"):
            found[".".join(path.relative_to(REPO).with_suffix("").parts)] = path
    return found


MODULES = modules()


@cache
def imports(path: Path) -> set[str]:
    """Every imported name, also those inside functions; `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers_of(target: str) -> set[str]:
    return {m for m, path in MODULES.items() for name in imports(path) if name == target or name.startswith(target + ".")}


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_the_walk_sees_all_packages():
    assert {"mpmae.config", "mpmae.shard_tools", "mpmae.kernels", "mpmae.loader.cpu"} <= set(MODULES)


def test_kernels_import_no_mpmae_but_their_own():
    for module in [m for m in MODULES if inside(m, "mpmae.kernels")]:
        for name in imports(MODULES[module]):
            assert not name.startswith("mpmae") or inside(name, "mpmae.kernels"), f"{module} imports {name}"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("mpmae.shard_tools", {*CORE, "mpmae.shard_tools"}),
        ("mpmae.loader", {*CORE, "mpmae.loader", "mpmae.kernels.unfilter"}),
        ("mpmae.modalities", CORE),
        ("mpmae.shard_format", CORE),
    ],
)
def test_package_stays_low(package, allowed):
    for module in [m for m in MODULES if inside(m, package)]:
        for name in imports(MODULES[module]):
            assert not name.startswith("mpmae.") or any(inside(name, a) for a in allowed), f"{module} imports {name}"


def test_only_one_model_module_imports_kernels():
    importers = importers_of("mpmae.kernels")
    assert len([m for m in importers if inside(m, "mpmae.models")]) <= 1
    allowed = ("mpmae.models", "mpmae.kernels", "mpmae.loader.device_batch", "benchmarks")
    assert all(any(inside(m, p) for p in allowed) for m in importers)


def test_engine_never_imports_the_loader():
    assert not [m for m in importers_of("mpmae.loader") if inside(m, "mpmae.engine")]


def test_heavy_packages_have_one_door():
    assert importers_of("deepspeed") <= {"mpmae.engine.deepspeed"}
    assert importers_of("wandb") <= {"mpmae.train.track"}
    assert importers_of("torch.utils.tensorboard") <= {"mpmae.train.track"}
    assert importers_of("terratorch") <= {"mpmae.integrations.terratorch"}
    assert importers_of("torchvision") <= {"mpmae.integrations.torchgeo"}
    assert importers_of("nvidia") <= {"mpmae.loader.dali"}
    assert importers_of("cuda") <= {"mpmae.kernels.cuda_driver"}
    assert all(inside(module, "mpmae.kernels") for module in importers_of("triton"))
    assert importers_of("timm") <= {"mpmae.eval.augment"}
    assert importers_of("torchmetrics") <= {"mpmae.eval.metrics"}
    assert importers_of("zarr") <= {"mpmae.shard_tools.sources.zarr_zip"}
    assert importers_of("numcodecs") <= {"mpmae.shard_tools.sources.zarr_v2"}
    assert importers_of("rasterio") <= {"mpmae.shard_tools.sources.rasters"}
    assert importers_of("pyarrow") <= {"mpmae.shard_tools.sources.major_tom", "mpmae.embed.parquet"}
    assert importers_of("umap") <= {"mpmae.embed.projection"}


def test_nothing_imports_the_integrations():
    assert not [m for m in importers_of("mpmae.integrations") if not inside(m, "mpmae.integrations")]


@pytest.mark.parametrize("module", ["mpmae.models.dense", "mpmae.export.hubconf"])
def test_what_travels_with_an_export_needs_no_mpmae(module):
    assert not [name for name in imports(MODULES[module]) if name.startswith("mpmae.")]


@pytest.mark.parametrize("top", ["launch", "benchmarks", "tests"])
def test_nothing_imports_the_outer_folders(top):
    assert not [m for m in importers_of(top) if not inside(m, top)]


def test_launch_files_shadow_no_module():
    standard = sys.stdlib_module_names
    for path in (REPO / "launch").glob("*.py"):
        assert path.stem not in standard
        assert path.stem not in {"mpmae", "torch", "deepspeed", "numpy", "wandb", "rich", "h5py", "lz4", "yaml"}


def test_the_sources_need_their_packages_only_when_a_set_is_read():
    names = ("zarr", "numcodecs", "rasterio", "pyarrow")
    code = f"import sys, mpmae.shard_tools.sources; sys.exit(any(name in sys.modules for name in {names}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_shard_tools_run_without_torch():
    code = "import sys, mpmae.shard_tools.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_run_without_a_probe_needs_nothing_of_evaluation():
    names = ("torchmetrics", "timm", "rasterio", "pyarrow", "torchvision")
    code = f"import sys, mpmae.train, mpmae.report.cli; sys.exit(any(name in sys.modules for name in {names}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_evaluation_never_imports_training():
    assert not [m for m in importers_of("mpmae.train") if inside(m, "mpmae.eval")]
