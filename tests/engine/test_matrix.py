"""The table of docs/engines.md: every `yes` runs on two ranks, every `refused` is seen to be refused."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpmae.engine import check_engine, load_ds_config, resolve_ds_config
from mpmae.engine.deepspeed import _set_up_moments
from mpmae.errors import CheckpointError, ConfigError
from tests.engine.spawn import REPO, run_ranks
from tests.engine.test_engines import BF16_BOUND, BF16_GRAD_NORM_BOUND, CLIP, FP32_BOUND, IDS, assert_close
from tests.engine.toy import DS_FOLDER, Case, reference, run_cases, run_config

STEPS, SAVE_AT = 4, 2
COMPILE_BOUND = 1e-5
ROWS = {
    "ddp": Case("ddp"),
    **{f"zero{stage}": Case("deepspeed", stage) for stage in range(4)},
    "zero3_offload": Case("deepspeed", 3, ds_file="zero3_offload"),
    "zero3_nvme": Case("deepspeed", 3, ds_file="zero3_nvme", options={"nvme_path": "absent"}),
    "fsdp": Case("fsdp"),
    "fsdp, shard_size": Case("fsdp", options={"shard_size": 1}),
    "fsdp, cpu_offload": Case("fsdp", options={"cpu_offload": True}),
}
COLUMNS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "accumulation": {"num_micro_steps": 2},
    "clipping": {"clip": CLIP},
    "activation checkpointing": {"options": {"activation_checkpointing": True}},
    "compile": {"options": {"compile": True}},
    "resume, same ranks": {"save_at": SAVE_AT},
    "resume, other ranks": {"save_at": SAVE_AT},
    "background saving": {"save_at": SAVE_AT, "in_background": True},
}
LONG = ("compile", "resume, other ranks")  # the columns of the slow test


def table() -> dict[tuple[str, str], str]:
    """Cell by (row, column)."""
    text = (REPO / "docs" / "engines.md").read_text().split("<!-- matrix -->")[1].split("<!-- /matrix -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    (_, *columns), _, *body = rows
    return {(name, column): cell for name, *cells in body for column, cell in zip(columns, cells, strict=True)}


TABLE = table()


def case_of(row: str, column: str) -> Case:
    case, change = ROWS[row], dict(COLUMNS[column])
    options = {**(case.options or {}), **change.pop("options", {})}
    return dataclasses.replace(case, steps=STEPS, **change, options=options)


def cells(wanted: str, columns) -> list[tuple[str, str]]:
    return [key for key, cell in TABLE.items() if cell == wanted and key[1] in columns]


def is_run_elsewhere(row: str, column: str) -> bool:
    """Whether the default tests of test_engines.py have that cell, among more: it is left to them."""
    return row in IDS and column in ("bf16", "accumulation", "clipping", "resume, same ranks")


def run_columns(columns, num_ranks: int, folder: Path) -> dict[tuple[str, str], list[dict]]:
    """By cell what each run of it gave: one, or two where it was to resume."""
    runs = []
    for row, column in cells("yes", columns):
        if is_run_elsewhere(row, column):
            continue
        case, at = case_of(row, column), str(folder / f"{row} {column}")
        runs.append(((row, column), case, at))
        if case.save_at:
            runs.append(((row, column), dataclasses.replace(case, load_from=at), None))
    ranks = run_ranks(run_cases, num_ranks, [run[1:] for run in runs], folder / "processes", timeout_s=500)
    results: dict[tuple[str, str], list[dict]] = {}
    for (key, *_), result in zip(runs, ranks[0], strict=True):
        results.setdefault(key, []).append(result)
    return results


def test_the_table_is_whole():
    assert list(TABLE) == list(itertools.product(ROWS, COLUMNS))
    assert set(TABLE.values()) == {"yes", "refused", "untested"}
    assert {path.stem for path in DS_FOLDER.glob("*.json")} <= {row for row, _ in TABLE}


@pytest.mark.parametrize(("row", "column"), cells("refused", COLUMNS))
def test_refused(row, column):
    case = case_of(row, column)
    if column == "resume, other ranks":
        with pytest.raises(CheckpointError, match="moments on NVMe cannot be filled"):
            _set_up_moments(SimpleNamespace(swap_optimizer=True), case.stage, SAVE_AT)
        return
    raw, config = load_ds_config(DS_FOLDER / f"{row}.json"), run_config(case)
    if column == "fp32":
        with pytest.raises(ConfigError, match=r"float32 weights .* set train\.precision=bf16"):
            resolve_ds_config(raw, config, 2, 8, 1)
        return
    checkpoint = {"background saving": {"background": True}, "resume, same ranks": {"resume": "auto"}}.get(column, {})
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=checkpoint)})
    key = {"compile": "engine.compile = true", "background saving": "checkpoint.background = true"}
    with pytest.raises(ConfigError, match=key.get(column, "checkpoint.resume = auto")) as caught:
        check_engine(config, raw, 2)
    assert "engine.name=fsdp" in str(caught.value)


def test_what_works(tmp_path):
    results = run_columns([column for column in COLUMNS if column not in LONG], 2, tmp_path)
    assert len(results) >= 2 * len(ROWS) - 2
    for (row, column), runs in results.items():
        expected, first = reference(COLUMNS[column].get("clip"), steps=10), runs[0]
        print(row, column)
        if column == "bf16":
            assert_close(first["loss"], expected["loss"][:STEPS], BF16_BOUND)
            assert_close(first["grad_norm"], expected["grad_norm"][:STEPS], BF16_GRAD_NORM_BOUND)
        elif column in ("resume, same ranks", "background saving"):
            assert runs[1]["loss"] == first["rest_loss"]
            assert all((runs[1]["state"][name] == tensor).all() for name, tensor in first["state"].items())
        elif column == "activation checkpointing":
            plain = results[row, "fp32"][0]
            assert first["loss"] == plain["loss"]
            assert first["grad_norm"] == plain["grad_norm"]
        else:
            assert_close(first["loss"], expected["loss"][:STEPS], FP32_BOUND)
            assert_close(first["grad_norm"], expected["grad_norm"][:STEPS], FP32_BOUND)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.timeout(1200)
def test_what_works_after_compiling(tmp_path):
    expected = reference(None)
    for (row, _), (run,) in run_columns(["compile"], 2, tmp_path).items():
        print(row)
        assert_close(run["loss"], expected["loss"][:STEPS], COMPILE_BOUND)
        assert_close(run["grad_norm"], expected["grad_norm"][:STEPS], COMPILE_BOUND)


@pytest.mark.slow
def test_what_resumes_at_another_number_of_ranks(tmp_path):
    """Saved by two ranks, continued by one (without the sharding of two)."""
    saved = run_columns(["resume, other ranks"], 2, tmp_path)
    loads = []
    for row, column in saved:
        at = str(tmp_path / f"{row} {column}")
        loads.append((dataclasses.replace(case_of(row, column), load_from=at), None))
    alone = run_ranks(run_cases, 1, loads, tmp_path / "alone", timeout_s=200)[0]
    for (row, _), result in zip(saved, alone, strict=True):
        print(row)
        assert_close(result["loss"], reference(None)["loss"][SAVE_AT:STEPS], FP32_BOUND)
