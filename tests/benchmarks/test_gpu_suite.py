"""What runs on a GPU machine, without one: on bare Python packages, at tiny sizes, and refusing what it must refuse."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mpmae.cost.operators import Work

# what a machine with torch, Triton and numpy may lack, of all that mpmae needs
ABSENT = ("pydantic", "yaml", "rich", "h5py", "cramjam", "numba", "isal", "fsspec", "safetensors", "matplotlib", "PIL")


@pytest.fixture
def bare(tmp_path):
    """The environment of a process without these packages."""
    folder = tmp_path / "absent"
    folder.mkdir()
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is blocked', name='{name}')\n")
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def test_the_benchmarks_import_on_a_bare_machine(repo, bare):
    names = (
        "mpmae.kernels",
        "mpmae.models",
        "mpmae.loader.batch",
        "kernels",
        "gpu_step",
        "multimae_step",
        "step_gates",
        "sanitize",
    )
    code = f"import sys; sys.path.insert(0, 'benchmarks'); import {', '.join(names)}; mpmae.models.create_model"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, env=bare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_lazy_packages_export_what_they_say():
    import mpmae
    import mpmae.loader
    import mpmae.models

    for package in (mpmae, mpmae.loader, mpmae.models):
        for name in package.__all__:
            assert getattr(package, name) is not None
            assert name in dir(package)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = package.nothing


def test_the_script_is_well_formed(repo):
    subprocess.run(["bash", "-n", "benchmarks/gpu_suite.sh"], cwd=repo, check=True)
    done = subprocess.run(["benchmarks/gpu_suite.sh", "--fast"], cwd=repo, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown argument --fast; known: --dry-run, --no-record" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_script_runs_nothing(repo, tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        ["benchmarks/gpu_suite.sh"], cwd=repo, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "sees no CUDA GPU" in done.stderr


@pytest.mark.slow
def test_a_dry_run_on_a_bare_machine_is_green(repo, bare, tmp_path):
    environment = bare | {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = subprocess.run(
        ["benchmarks/gpu_suite.sh", "--dry-run"], cwd=repo, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = done.stdout[done.stdout.index("outcome") :]
    assert outcomes.count("green") == 6
    assert "stem, atto" in done.stdout
    assert "\npublished code " in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"suite.log", "pytest.xml"}


def run_main(monkeypatch, name, *arguments):
    module = __import__(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cpu", *arguments])
    return module.main()


def test_kernels_at_a_tiny_size(monkeypatch, capsys):
    assert run_main(monkeypatch, "kernels", "--tiny", "--only", "s=2") == 0
    printed = capsys.readouterr().out
    assert "depthwise weight gradient, tiny, s=2" in printed
    assert "downsample, atto, s=2" in printed
    assert "RED" not in printed


def test_steps_at_a_tiny_size(monkeypatch, capsys):
    assert run_main(monkeypatch, "gpu_step", "--tiny") == 0
    printed = capsys.readouterr().out
    assert all(f"\n{kind} " in printed for kind in ("step   ", "encoder", "block  "))
    assert run_main(monkeypatch, "step_gates", "--tiny") == 0
    assert "green" in capsys.readouterr().out


def test_time_that_ends_leaves_a_list(monkeypatch, capsys):
    assert run_main(monkeypatch, "kernels", "--tiny", "--only", "depthwise forward", "--seconds", "-1") == 0
    assert "not reached in -1 s: depthwise forward, tiny, s=8; " in capsys.readouterr().out


def case_of(run, expected, ours=True):
    from kernel_cases import Case, Way

    case = Case(Work(8, 8), lambda: expected, {})
    case.add("kernel", lambda: Way(run, ours=ours))
    return case


def measured(case):
    from gpu_timing import Timer

    import kernels

    timer = Timer(torch.device("cpu"), seconds=0, min_runs=2)
    return kernels.entry_of("x", lambda: case, timer, {"copy_bytes_per_s": 1.0, "matrix_flops_per_s": 2.0})


def test_what_is_wrong_is_not_timed():
    one = torch.ones(3)
    right = measured(case_of(lambda: one, (one,)))
    assert (right["failed"], right["floor_ms"], right["bound"]) == ({}, 8e3, "memory")
    assert right["ways"]["kernel"]["ms"]["repeats"] == 2
    off = measured(case_of(lambda: one * 1.1, (one,)))
    assert off["ways"] == {}
    assert off["failed"]["kernel"].startswith("output 0: relative error 0.1, expected at most 0.02")
    assert "nan" in measured(case_of(lambda: one * torch.nan, (one,), ours=False))["missing"]["kernel"]
    values = iter([one, one + 1e-6])
    assert measured(case_of(lambda: next(values), (one,)))["failed"] == {"kernel": "a second run gave other bits"}
    assert "ValueError" in measured(case_of(lambda: [one, one], (one,)))["failed"]["kernel"]
    assert measured(case_of(lambda: one, None))["failed"]["case"].startswith("TypeError")


def test_a_replay_that_differs_is_named():
    from step_gates import differences

    one = torch.ones(2)
    assert differences("a replay", [one, one], (one, one), ("w",)) == []
    wrong = differences("a replay", [one, one], (one, one * torch.nan), ("w",))
    assert wrong == ["a replay gives other bits for 1 of 2: w"]


def test_a_forced_backend_is_given_back(monkeypatch):
    from kernel_cases import forced

    monkeypatch.setenv("MPMAE_KERNELS", "cuda")
    with forced("reference"):
        assert os.environ["MPMAE_KERNELS"] == "reference"
    with forced(None):
        assert "MPMAE_KERNELS" not in os.environ
    assert os.environ["MPMAE_KERNELS"] == "cuda"


@pytest.fixture
def carried(monkeypatch):
    """Sets MPMAE_COMMIT to a commit with this digest."""
    return lambda digest: monkeypatch.setenv("MPMAE_COMMIT", f"{'a' * 40}+{digest}")


def test_a_carried_commit_must_fit_the_sources(carried, monkeypatch):
    import record

    carried(record.source_digest())
    assert record.clean_commit() == {"commit": "a" * 40, "dirty": False}
    carried("0" * 16)
    with pytest.raises(SystemExit, match="the sources here have the digest"):
        record.clean_commit()
    monkeypatch.setenv("MPMAE_COMMIT", "abc")
    with pytest.raises(SystemExit, match=r"expected what `python benchmarks/record\.py` prints"):
        record.clean_commit()
    monkeypatch.delenv("MPMAE_COMMIT")
    monkeypatch.setattr(record, "commit", lambda ignored: {"commit": None, "dirty": None})
    with pytest.raises(SystemExit, match="has no git"):
        record.clean_commit()


def test_the_digest_sees_every_source(tmp_path):
    import record

    (tmp_path / "kernels").mkdir()
    digests = [record.source_digest(tmp_path)]
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.cu", "2"), ("notes.md", "x")):
        (tmp_path / "kernels" / name).write_text(text)
        digests.append(record.source_digest(tmp_path))
    assert len(set(digests)) == 4
    assert digests[-1] == digests[-2]


def test_figures_of_a_red_gate_are_no_record(carried, monkeypatch, tmp_path):
    import record

    carried(record.source_digest())
    monkeypatch.setenv("MPMAE_RED_GATES", "tests memcheck")
    with pytest.raises(SystemExit, match="a gate is red: tests, memcheck"):
        record.write_record("x", {}, {})
    path = record.write_record("x", {}, {}, tmp_path / "records", failed=["stem"])
    assert path.parent == tmp_path / "red"
    assert json.loads(path.read_text())["red_gates"] == ["tests", "memcheck", "stem"]
    with pytest.raises(ValueError, match="made while a gate was red"):
        record.load_records(folder=tmp_path / "red")
