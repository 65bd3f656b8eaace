"""The pages and plots of GPU records, on made-up numbers that no file of the repository holds."""

import json

import pytest

GIB = 2**30
DEVICE = {"name": "made up", "driver": "1.2"}
ENVIRONMENT = {"gpu": "made up", "cores": 2, "python": "3.12", "packages": {"torch": "2.11.0"}}
HEAD = {"date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "dirty": False, "environment": ENVIRONMENT}


def way(ms, ours, floor_ms=1.0):
    spread = {"p20": ms * 0.9, "median": ms, "p80": ms * 1.1, "repeats": 9}
    fractions = dict.fromkeys(("copy_fraction", "matrix_fraction", "floor_fraction"), floor_ms / ms)
    return {"ms": spread, "timed": "graph", "ours": ours, "relative_error": 0.003, **fractions}


def kernels_record():
    cases = []
    for size, faster in (("tiny", 1.0), ("atto", 1.2), ("base", 0.9)):
        for operation in ("depthwise forward", "depthwise input gradient", "depthwise weight gradient", "pointwise forward"):
            for i, side in enumerate((8, 4, 2, 1)):
                ways = {
                    "cuda": way(1.9 * faster - 0.1 * i, True),
                    "triton": way(2.5, True),
                    "cuDNN on the grid": way(9, False),
                }
                goals = {"memory": 0.5} if operation == "depthwise forward" and side > 1 else {}
                entry = {"name": f"{operation}, {size}, s={side}", "floor_ms": 1.0, "bound": "memory", "goals": goals}
                cases.append({**entry, "ways": ways, "missing": {"per-tap atomics": "no module"}, "failed": {}})
    cases[0]["failed"] = {"reference": "relative error 0.5, expected at most 0.1"}
    cases.append({"name": "stem, atto", "goals": {}, "ways": {}, "missing": {}, "failed": {"case": "ValueError: x"}})
    rate = {"p20": 1, "median": 4.3e12, "p80": 1, "repeats": 3}
    rates = {"copy_bytes_per_s": rate, "matrix_flops_per_s": rate | {"median": 780e12}}
    results = {"device": DEVICE, "rates": rates, "cases": cases, "not_reached": ["stem, tiny"]}
    return {"what": "gpu kernels", **HEAD, "case": {"mask_ratio": 0.6}, "results": results}


def step_entry(kind, name, sparse_ms, dense_ms, **facts):
    def result(side, ms, gib):
        return {"side": side, "ms": {"median": ms}, "images_per_s": 1024e3 / ms, "peak_bytes": gib and gib * GIB}

    ways = {"sparse, graph": result("sparse", sparse_ms, None), "sparse": result("sparse", 2 * sparse_ms, 8)}
    ways["dense masked"] = result("dense", dense_ms, 20)
    best = {"sparse": "sparse, graph", "dense": "dense masked"}
    summary = {"best": best, "speedup": dense_ms / sparse_ms, "memory_ratio": 0.4}
    return {"kind": kind, "name": name, **facts, "ways": ways, "missing": {}, "failed": {}, **summary}


def step_record():
    cases = [
        step_entry("step", f"{size}, {geometry}, batch 1024", ms, 3.3 * ms)
        for size, ms in (("atto", 16.0), ("tiny", 45.0))
        for geometry in ("112/16", "56/8")
    ]
    cases += [step_entry("step", "base, 112/16, batch 256", 40.0, 90.0)]
    cases += [
        step_entry("encoder", f"atto, 112/16, batch 1024, mask ratio {r / 10:g}", 22 - 2 * r, 18.0, mask_ratio=r / 10)
        for r in range(10)
    ]
    cases += [step_entry("block", "tiny, stage 0, batch 1024", 1.0, 4.0)]
    cases[0]["missing"] = {"dense masked, compiled whole": "no time left"}
    goals = {"speedup": 3.0, "memory_ratio": 0.5, "images_per_s": {"atto, 112/16, batch 1024": 50_000}}
    case = {"precision": "bf16 autocast", "mask_ratio": 0.6, "modalities": 12, "optimizer": "AdamW, fused"}
    results = {"device": DEVICE, "cases": cases, "not_reached": [], "goals": goals}
    return {"what": "gpu step", **HEAD, "case": case, "results": results}


def multimae_record():
    rate = {"p20": 900.0, "median": 1000.0, "p80": 1100.0, "repeats": 9}
    ways = {
        name: {"images_per_s": rate, "ms": {"step": rate | {"median": ms}}, "speedup": rate | {"median": 80 / ms}}
        for name, ms in (("published code", 80.0), ("bf16, compiled", 20.0))
    }
    results = {"device": DEVICE, "ways": ways, "failed": {}, "goal": {"way": "bf16, compiled", "least": 2.0}}
    case = {"model": "multimae_base", "img_size": 56, "patch_size": 8, "batch_size": 256}
    return {"what": "multimae step on a GPU", **HEAD, "case": case, "results": results}


def test_the_kernels_page_and_plot():
    import results_kernels

    page = results_kernels.section(kernels_record())
    assert "copy 4,300 GB/s (read and written), bf16 products 780 TFLOP/s" in page
    row = "| depthwise forward, tiny, s=8 | 1.000 | memory | cuda | **1.900** | 53 % | 53 % | yes, 50% | cuDNN on the grid |"
    assert row in page
    assert "depthwise forward, atto, s=8 | 1.000 | memory | cuda | **2.280** | 44 % | 44 % | no, 50%" in page
    assert "- depthwise forward, tiny, s=8, reference: relative error 0.5" in page
    assert "- stem, atto, case: ValueError: x" in page
    assert "per-tap atomics (no module)" in page
    assert "Not reached in the time given: stem, tiny." in page
    plot = results_kernels.plot(kernels_record())
    assert all(f"<!-- {text} -->" in plot for text in ("depthwise forward", "pointwise forward", "ours, tiny", "goal"))


def test_the_steps_page_and_plot():
    import results_gpu_step

    record = step_record()
    page = results_gpu_step.section(record)
    assert "| atto, 112/16, batch 1024 | sparse, graph | 16.0 | **64,000** | 8.0 | dense masked | 52.8 |" in page
    assert "| 3.30 x | 0.40 |" in page
    assert "- Goal, atto, 112/16, batch 1024: 64,000 images/s of at least 50,000, reached." in page
    assert "3.30 x of at least 3 x, reached; memory 0.40 of at most 0.5, reached" in page
    assert "the sparse one is faster from a mask ratio of 0.20 on" in page
    assert "| tiny, stage 0, batch 1024 | 1.000 | 4.000 | 4.00 x |" in page
    assert "dense masked, compiled whole: no time left" in page
    assert "sparse wins from 0.20" in results_gpu_step.plot(record)
    assert "**64,000 images/s**, 3.3 times" in results_gpu_step.readme_sentence([record])
    assert results_gpu_step.readme_sentence([]) == "No GPU figures yet."


@pytest.mark.parametrize(
    ("points", "at"),
    [
        ([(0.0, 3, 2), (0.5, 1, 2)], 0.25),
        ([(0.0, 1, 2), (0.5, 1, 2)], None),
        ([(0.0, 3, 2), (0.5, 3, 2)], float("inf")),
    ],
)
def test_crossover(points, at):
    import results_gpu_step

    assert results_gpu_step.crossover(points) == at


def test_the_page_says_what_no_record_tells(tmp_path):
    import results

    (page,) = [text for path, text in results.outputs(tmp_path).items() if path.name == "RESULTS.md"]
    assert "No record here was made on a GPU" in page
    assert "No record `gpu kernels` yet: what each kernel reaches" in page
    assert "benchmarks/gpu_suite.sh" in page
    (tmp_path / "1.json").write_text(json.dumps(kernels_record()))
    (tmp_path / "2.json").write_text(json.dumps(step_record()))
    (tmp_path / "3.json").write_text(json.dumps(multimae_record()))
    files = {path.name: text for path, text in results.outputs(tmp_path).items()}
    assert {"gpu-kernels.svg", "gpu-step.svg"} <= set(files)
    assert "## Each kernel alone" in files["RESULTS.md"]
    assert "| published code | 900.00 / **1000.00** / 1100.00 | 80.0 |" in files["RESULTS.md"]
    assert "Goal, bf16, compiled: 4.00 x of at least 2 x, reached." in files["RESULTS.md"]
    assert "No record" not in files["RESULTS.md"]
