"""The passes of wide blocks compile for sm_80 and sm_90 without spilling; wide loads where channels are multiples of 16."""

import importlib
import importlib.util

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed")

SIZES = dict.fromkeys(
    ("num_sites", "num_rows", "num_columns", "sites_per_strip", "rows_per_strip", "num_strips", "num_blocks", "num_norms"),
    "i32",
) | dict.fromkeys(("num_row_blocks", "norms_per_strip"), "i32")
ONES = ("num_strips", "num_blocks", "num_norms", "num_row_blocks", "norms_per_strip")  # Triton bakes in what is 1
ACTIVATIONS = (
    "x", "a", "h", "grad", "slope", "normed", "grad_x", "kept", "response", "out", "residual",
)  # fmt: skip
FLOAT32 = (
    "weight", "bias", "addend", "mean", "rstd", "weight_sums", "bias_sums", "sums", "square_sums", "product_sums", "factor",
    "pull", "norm", "gamma", "products", "grad_gamma", "outer", "grad_weight",
)  # fmt: skip
TILE = {"ROWS": 8, "COLUMNS": 256}
# kernel -> constants, options, most registers; a row of 4096 channels is what `supports` allows
CASES = [
    ("row_passes", "_layer_norm_kernel", {"ROWS": 16, "COLUMNS": 128}, {}, 80),
    ("row_passes", "_layer_norm_kernel", {"ROWS": 1, "COLUMNS": 2048}, {"num_warps": 8}, 80),
    ("row_passes", "_layer_norm_kernel", {"ROWS": 1, "COLUMNS": 4096}, {"num_warps": 16}, 80),
    ("row_passes", "_layer_norm_backward_kernel", {"ROWS": 16, "COLUMNS": 128}, {}, 128),
    ("row_passes", "_layer_norm_backward_kernel", {"ROWS": 1, "COLUMNS": 2048}, {"num_warps": 8}, 96),
    ("row_passes", "_layer_norm_backward_kernel", {"ROWS": 1, "COLUMNS": 4096}, {"num_warps": 16}, 112),
    ("row_passes", "_column_sums_kernel", TILE, {}, 80),
    ("row_passes", "_add_row_kernel", TILE, {}, 64),
    ("hidden_passes", "_gelu_kernel", {"GELU": "erf", **TILE}, {}, 128),
    ("hidden_passes", "_gelu_kernel", {"GELU": "tanh", **TILE}, {}, 128),
    ("hidden_passes", "_scale_kernel", TILE, {}, 80),
    ("hidden_passes", "_product_sums_kernel", TILE, {}, 80),
    ("hidden_passes", "_hidden_backward_kernel", TILE, {}, 128),
    ("hidden_passes", "_hidden_backward_kernel", TILE | {"response": None}, {}, 128),
    ("norm_passes", "_factor_kernel", {"COLUMNS": 1024}, {}, 80),
    ("norm_passes", "_pull_kernel", {"COLUMNS": 1024}, {}, 80),
    ("norm_passes", "_fold_kernel", {"ROWS": 16, "COLUMNS": 128}, {}, 80),
    ("norm_passes", "_unfold_kernel", {"ROWS": 16, "COLUMNS": 128}, {}, 128),
]


def usage_of(module: str, name: str, constants: dict, options: dict, architecture: int, dtype: str, gaps: bool):
    from tests.kernels.offline import compile_for

    kernel = getattr(importlib.import_module(f"mpmae.kernels.pointwise.{module}"), name)
    pointers = dict.fromkeys(ACTIVATIONS, f"*{dtype}") | dict.fromkeys(FLOAT32, "*fp32") | {"valid": "*u8"}
    if name == "_fold_kernel":
        pointers["out"] = f"*{dtype}"
    absent = {} if gaps else dict.fromkeys(("valid", "kept")) | dict.fromkeys(ONES, 1)
    constants = {k: v for k, v in (constants | absent).items() if k in kernel.arg_names}
    types = {n: (pointers | SIZES | {"eps": "fp32"})[n] for n in kernel.arg_names if n not in constants}
    aligned = tuple(n for n in types if n in pointers or n in ("num_columns", "rows_per_strip", "sites_per_strip"))
    return compile_for(kernel, architecture, types, constants, aligned=aligned, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{'x'.join(map(str, case[2].values()))}")
@pytest.mark.parametrize(("dtype", "gaps"), [("bf16", True), pytest.param("fp32", False, marks=pytest.mark.slow)])
def test_no_spills(case, dtype, gaps, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    *which, cap = case
    for architecture in (80, 90):
        usage = usage_of(*which, architecture, dtype, gaps)
        print(case[1], case[2], architecture, dtype, gaps, usage)
        assert usage.local_bytes == 0, (architecture, dtype, usage)
        assert usage.registers <= cap, (architecture, dtype, usage)
