"""The scaling model's predictions, check and page on made-up measurements, the engines' page, and both commands."""

import itertools
import re
import subprocess
import sys

import pytest
import torch

ENVIRONMENT = {"gpu": None, "cores": 2, "python": "3.11", "packages": {"torch": "2.13.0"}}
STAMP = {"date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "environment": ENVIRONMENT}


@pytest.fixture(scope="module")
def points(repo):
    sys.path.insert(0, str(repo / "benchmarks"))
    try:
        from scaling_predict import predictions

        from mpmae.models.presets import list_mpmae

        return predictions(list_mpmae(), 3000.0)
    finally:
        sys.path.remove(str(repo / "benchmarks"))


def test_every_cell_is_predicted(points):
    from scaling_hardware import CLUSTERS
    from scaling_model import ENGINES, TERMS
    from scaling_predict import GPU_COUNTS

    from mpmae.models.presets import list_mpmae

    cells = [(p["cluster"], p["scaling"], p["model"], p["num_gpus"]) for p in points]
    names = [cluster.name for cluster in CLUSTERS]
    assert sorted(cells) == sorted(itertools.product(names, ("weak", "strong"), list_mpmae(), GPU_COUNTS))
    assert (GPU_COUNTS[0], GPU_COUNTS[-1]) == (1, 1024)
    for point in points:
        assert point["bottleneck"] in TERMS
        assert point["engine"] in ENGINES
        assert point["step_s"] == pytest.approx(sum(point["terms_s"].values()))
        num_images = point["micro_batch"] * point["num_micro_steps"] * point["num_gpus"]
        assert num_images == (4096 if point["scaling"] == "strong" else 256 * point["num_gpus"])
        assert point["images_per_s"] == pytest.approx(num_images / point["step_s"])
        assert 0 < point["efficiency_percent"] < 105 or not point["fits"]


def test_the_small_is_bound_by_the_loader_and_the_huge_does_not_fit(points):
    by_cell = {(p["cluster"][4:8], p["scaling"], p["model"], p["num_gpus"]): p for p in points}
    assert by_cell["H200", "weak", "mpmae_atto", 8]["bottleneck"] == "loader"
    # 112 cores x 0.8 x 3000
    assert by_cell["H200", "weak", "mpmae_atto", 8]["images_per_s"] == pytest.approx(268_800)
    assert not by_cell["A100", "weak", "mpmae_huge", 1]["fits"]
    assert by_cell["A100", "strong", "mpmae_base", 1024]["bottleneck"] == "gradient reduction"


def test_a_part_is_bound_by_operations_or_by_bytes():
    from scaling_hardware import ASSUMED, Gpu, work_s

    from mpmae.cost.operators import Work

    gpu = Gpu("g", 9, 100.0 / ASSUMED["matrix units"], 10.0 / ASSUMED["vector units"], 20.0 / ASSUMED["device memory"], 1.0)
    # three images: 300 / 100 + 30 / 10 s of operations, (3 x 35 + 14) / 20 of bytes
    term, seconds = work_s(gpu, Work(35, 100, 10), 3, 14)
    assert (term, seconds) == ("compute", pytest.approx(6.0))
    term, seconds = work_s(gpu, Work(35, 100, 10), 3, 16)
    assert (term, seconds) == ("memory bandwidth", pytest.approx(6.05))


def test_activations_are_about_what_autograd_keeps():
    from scaling_hardware import activation_bytes
    from synthetic import random_visible, synthetic_batch

    from mpmae.models.presets import create_model

    model = create_model("mpmae_atto")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept_bytes(num_samples: int) -> int:
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage
            return tensor

        batch = synthetic_batch(model, num_samples, torch.device("cpu"))
        visible = random_visible(num_samples, model.num_patches, 0.6, torch.device("cpu"))
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(batch, visible)
        return sum(storage.nbytes() for storage in storages.values())

    assert activation_bytes(model) == pytest.approx(kept_bytes(2) - kept_bytes(1), rel=0.15)


def steps(*seconds: float):
    return {"2": [list(seconds)] * 3}


def fabric():
    from scaling_links import KINDS, Link, SharedCores

    return SharedCores(dict.fromkeys(KINDS, Link(0.001, 1e9)), 2)


def test_compute_is_a_line_through_the_fitted_batches():
    from scaling_check import compute_summary

    ranks = [{"steps": {"1": [[1.0, 3.0, 0.5]], "4": [[2.5, 6.0, 0.5]], "2": [[9.0, 9.0, 9.0]]}}]
    summary = compute_summary(ranks, (1, 4))
    assert summary["update_s"] == 0.5
    assert summary["forward"] == pytest.approx({"fixed_s": 0.5, "per_sample_s": 0.5})
    assert summary["backward"] == pytest.approx({"fixed_s": 2.0, "per_sample_s": 1.0})


def test_the_check_is_exact_where_the_machine_is_the_model():
    from engine_cases import Case
    from scaling_check import check, workload_of
    from scaling_links import Group

    phase = {"fixed_s": 0.1, "per_sample_s": 0.2}
    case = Case("atto", "ddp", 4, 2)
    work = workload_of(case, {"update_s": 0.3, "forward": phase, "backward": phase})
    bucket = fabric().cost("all_reduce", 4 * work.num_parameters, Group(4, 4)).total_s
    # four ranks on two cores; 30 MB of gradients are one bucket
    measured = [{"steps": steps(1.0, 1.0 + bucket, 0.6)}, {"steps": steps(0.9, 0.9, 0.6)}]
    entry = check(case, measured, work, fabric(), {"1": 1.0, "4": 2.2})
    assert entry["predicted"]["cores"]["error_percent"] == pytest.approx(0.0, abs=1e-9)
    assert entry["predicted"]["cores"]["collectives_s"] == pytest.approx(bucket)
    assert entry["predicted"]["copies"]["step_s"] == pytest.approx(2.2 * 1.3 + bucket)


def scaling_record(points):
    from engine_cases import Case
    from scaling_check import check, link_summary, workload_of
    from scaling_hardware import assumptions
    from scaling_links import KINDS, Group, Timing

    pairs = [(n, size) for n in (2, 3, 4) for size in (2**12, 2**24)]
    timings = [Timing(k, n, s, fabric().cost(k, s, Group(n, n)).total_s) for k in KINDS for n, s in pairs]
    phase = {"fixed_s": 0.1, "per_sample_s": 0.2}
    case = Case("atto", "ddp", 2, 2)
    work = workload_of(case, {"update_s": 0.3, "forward": phase, "backward": phase})
    results = {
        "links": link_summary(timings, 2), "checks": [check(case, [{"steps": steps(1, 2, 3)}], work, fabric(), {})],
        "left_out": {"tiny, fsdp": "no engine"}, "assumptions": assumptions(), "predictions": points,
        "loader": {"case": "cpu", "date": STAMP["date"], "images_per_core_s": 3000.0},
    }  # fmt: skip
    case = {"img_size": 56, "patch_size": 8, "num_cores": 2, "fit_batches": [1, 4], "check_batch": 2, "steps": 3}
    return {**STAMP, "what": "scaling model", "case": case, "results": results}


def test_the_page_says_model_wherever_a_cluster_is_predicted(points):
    import results_scaling

    page = results_scaling.section(scaling_record(points))
    assert page.startswith("## Scaling: a model, not a measurement")
    tables = re.findall(r"(.*)\n\n\| model \| 1 GPU \|", page)
    assert len(tables) == 4
    assert all(line.startswith("**A model**: 8 x ") for line in tables)
    assert page.count("| atto |") == page.count("| huge |") == 4
    assert "does not fit: " in page
    assert "| all-reduce | 1000 | 1,000 | 0 / 0 % | 0 / 0 % |" in page
    assert "| atto, ddp, 2 ranks | 6.000 / **6.000** / 6.000 |" in page
    assert "| tiny, fsdp | left out: no engine |" in page
    assert "A MODEL, not measured" in results_scaling.plot(scaling_record(points))


def test_the_page_of_the_engines():
    import results_engines
    from engine_cases import Case
    from engines import summarise

    def rank(seconds: float, gigabytes: float):
        memory = {"before": 3e8, "settled": 1e9, "peak": gigabytes * 1e9}
        return {"steps": [[seconds, seconds, 0.0]] * 2, "memory": memory}

    cases = [Case("atto", "ddp", 1, 4), Case("atto", "ddp", 2, 4), Case("atto", "zero2", 2, 4)]
    runs = [[[rank(1.0, 2.0)]], [[rank(1.0, 2.0), rank(2.0, 2.5)]], [[rank(1.0, 1.5), rank(1.0, 1.5)]]]
    results = {
        "cases": {case.name: summarise(case, run) for case, run in zip(cases, runs, strict=True)},
        "left_out": {"large, ddp, 2 ranks": "needs about 12 GB, 3 are free"},
    }
    facts = {"precision": "fp32", "img_size": 56, "patch_size": 8, "threads_per_rank": 1}
    page = results_engines.section({**STAMP, "case": facts, "results": results})
    ddp = "| atto | ddp | 4 | 2.00 / **2.00** / 2.00 | 1.00 | 2.00 | 2.00 / **2.00** / 2.00 | 1.00 | 2.50 |"
    assert ddp in page
    assert "| atto | zero2 | 4 | - | - | - | 4.00 / **4.00** / 4.00 | 2.00 | 1.50 |" in page
    assert "Left out: large, ddp, 2 ranks (needs about 12 GB, 3 are free)." in page


def test_the_engines_are_all_planned_and_what_does_not_fit_is_left_out(monkeypatch):
    import engines
    from engine_cases import ENGINES

    turns = engines.planned(quick=False)
    cases = {(turn.case.model, turn.case.engine, turn.case.num_ranks) for turn in turns}
    assert cases == set(itertools.product(("atto", "nano", "tiny", "base", "large"), ENGINES, (1, 2)))
    assert [turn.case.activation_checkpointing for turn in turns[-2:]] == [False, True]
    monkeypatch.setattr(engines, "available_bytes", lambda: 8 * 10**9)
    reasons = {turn.case.name: engines.left_out(turn) for turn in turns}
    assert reasons["large, ddp, 2 ranks"] == "needs about 13 GB, 8 are free"
    assert reasons["atto, ddp, 2 ranks"] is None


def test_an_engine_that_is_not_there_is_named(monkeypatch):
    import engine_cases

    monkeypatch.setattr(engine_cases, "_has", lambda module: False)
    assert engine_cases.absent(engine_cases.Case("atto", "fsdp", 2, 1)) == "this version has no fsdp engine"
    assert engine_cases.absent(engine_cases.Case("atto", "zero1", 2, 1)) == "deepspeed is not installed"
    assert engine_cases.absent(engine_cases.Case("atto", "ddp", 2, 1)) is None


def test_a_rank_that_fails_or_hangs_ends_the_others():
    import ranks
    from torch.multiprocessing import ProcessRaisedException

    with pytest.raises(ProcessRaisedException, match="ZeroDivisionError"):
        ranks.run_ranks(fail_on_rank_1, 2, 0)
    with pytest.raises(TimeoutError, match="sleep_long on 2 ranks: no end after 3 s"):
        ranks.run_ranks(sleep_long, 2, 0, timeout_s=3)


def fail_on_rank_1(zero):
    import os
    import time

    if os.environ["RANK"] == "1":
        return 1 / zero
    return time.sleep(60)


def sleep_long(_):
    import time

    time.sleep(60)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("scaling.py", ("| atto, ddp, 2 ranks | ", "**A model**: 8 x H200")),
        pytest.param("engines.py", ("| atto | zero2 | 4 | - | - | - | ",), marks=pytest.mark.slow),
    ],
)
def test_the_commands_run(repo, script, expected):
    command = [sys.executable, str(repo / "benchmarks" / script), "--quick"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in expected)
    assert "record" not in done.stdout
