"""What a step's record says: rates, the slowest of two real ranks, the profile of a window, the progress line."""

import gzip
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mpmae.config import validate
from mpmae.cost import Cost, Part
from mpmae.cost.operators import Work
from mpmae.cost.peaks import Peak, device_peak, measured_peak, sheet_peak
from mpmae.engine import create_engine, init_world
from mpmae.loader import BatchPlan
from mpmae.train.meter import Meter
from mpmae.train.profile import StepProfile
from mpmae.train.progress import describe, duration, make_console
from mpmae.train.slow_ranks import SlowRanks
from mpmae.train.speed import Speed
from tests.engine.spawn import run_ranks

COST = Cost({"all": Part(Work(10, 1000, 500), Work(20, 2500), 7, 100)}, "fp32", 100)
RECORD = {
    "step": 5,
    "loss": 1.23456,
    "left_s": 3723.0,
    "images_per_s": 400.0,
    "images_per_s_per_rank": 100.0,
    "data_wait_percent": 4.0,
    "tflops_per_rank": 0.0213,
    "gb_per_s_per_rank": 3.21,
    "memory_bytes": 2.5e9,
    "lr": 1e-4,
    "grad_norm": 0.5,
}


def test_rates_follow_from_the_count():
    batch = BatchPlan(24, 4, 3, 2)  # 12 images a rank in 3 micro steps
    rates = Speed(COST, batch, Peak(1e6, "a data sheet"), 2, True).rates(0.5)
    assert rates["images_per_s"] == 48
    assert rates["images_per_s_per_rank"] == 24
    assert rates["tflops_per_rank"] == pytest.approx(12 * 4000 / 0.5 / 1e12)
    assert rates["gb_per_s_per_rank"] == pytest.approx((12 * 30 + 3 * 7 + 10 * 4 * 100 // 2) / 0.5 / 1e9)
    assert rates["mfu_percent"] == pytest.approx(9.6)
    assert "mfu_percent" not in Speed(COST, batch, None, 1, False).rates(0.5)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
    ],
)
def test_peaks_of_data_sheets(name, bf16, fp32):
    assert (sheet_peak(name, "bf16").flops_per_s, sheet_peak(name, "fp32").flops_per_s) == (bf16 * 1e12, fp32 * 1e12)
    assert "data sheet" in sheet_peak(name, "bf16").source


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GH200 480GB"])
def test_a_peak_that_no_data_sheet_says(name):
    assert sheet_peak(name, "bf16") is None


def test_a_cpu_has_no_peak_and_a_product_can_be_measured():
    assert device_peak(torch.device("cpu"), "fp32") is None
    peak = measured_peak(torch.device("cpu"), "fp32", side=64)
    assert peak.flops_per_s > 0
    assert peak.source == "measured, products of 64 x 64"


class Line(nn.Linear):
    """A model of one layer whose forward may take long."""

    delay_s = 0.0

    def forward(self, x):
        time.sleep(self.delay_s)
        return super().forward(x).square().mean()


def steps_of(case: dict) -> list[dict]:
    """The records of some steps of a rank that is slow where `case` says so."""
    world = init_world("ddp")
    config = validate({"train": {"global_batch_size": 4}}, "test")
    engine = create_engine(config, Line(3, 3), world, None, 2, 1)
    found = []
    for phase, slow_rank in case["slow"]:
        meter = Meter(engine, ("a",), Speed(COST, BatchPlan(4, 1, 2, world.world_size), None, 1, False), 5)
        late_s = case["late_s"] if slow_rank == world.rank else 0.0
        engine.module.delay_s = 0.01 + (late_s if phase == "forward" else 0.0)
        for step in range(5):
            for _ in range(2):
                with meter.phase("data"):
                    time.sleep(0.01 + (late_s if phase == "data" else 0.0))
                with meter.phase("forward"):
                    loss = engine.forward(torch.ones(1, 3))
                with meter.phase("backward"):
                    engine.backward(loss)
                meter.add(loss, {"a": loss}, {}, {"a": 1})
            with meter.phase("optimizer"):
                norm = engine.step(1e-3)
            meter.finish_step(step + 1, 0, 1e-3, norm)
            records = meter.ready()
        found.append(records[-1].record)
    engine.close()
    world.close()
    return found


def test_the_slow_one_of_two_real_ranks_is_named(tmp_path):
    """Two micro steps each of 20 ms; 60 ms more in the data of rank 1, then in the forward of rank 0, then nowhere."""
    case = {"late_s": 0.06, "slow": [("data", 1), ("forward", 0), ("data", None)]}
    first, second = run_ranks(steps_of, 2, case, tmp_path, timeout_s=120)
    for records in (first, second):  # every rank knows
        data, forward, even = (record.get("ranks") for record in records)
        assert (data["slowest"], forward["slowest"]) == (1, 0)
        assert data["data_wait_s"] > 0.13 > data["others_data_wait_s"]
        assert forward["forward_s"] > 0.13 > forward["others_forward_s"]
        assert data["behind_percent"] > 50
        assert even is None or even["behind_percent"] < data["behind_percent"]


class Event:
    """An event of a GPU that runs behind: what was recorded before `now` has happened."""

    now, clock = 0, 0

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self):
        Event.clock += 1
        self.at = Event.clock

    def query(self):
        return self.at <= Event.now

    def elapsed_time(self, end):
        assert self.query()
        assert end.query()
        return 1000.0 * (end.at - self.at)

    def synchronize(self):
        Event.now = max(Event.now, self.at)


def test_on_a_gpu_nothing_waits_for_the_step_that_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "now", 0)
    monkeypatch.setattr(Event, "clock", 0)
    engine = SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=2, sum_over_ranks=lambda tensor: tensor.clone())
    meter = Meter(engine, ("a",), Speed(COST, BatchPlan(4, 2, 1, 2), None, 1, False), 9)
    meter._on_gpu, meter.lag = True, 2
    steps, waited_for, forwards = [], [], []
    for step in range(1, 5):
        with meter.phase("forward"):
            meter.add(torch.tensor(float(step)), {"a": torch.tensor(0.0)}, {}, {"a": 1})
        meter.finish_step(step, 0, 0.1, torch.tensor(1.0))
        forwards.append(meter._known_times[1])
        steps += [(done.record["step"], done.record["loss"]) for done in meter.ready()]
        waited_for.append(Event.now)
    assert steps == [(1, 1.0), (2, 2.0)]  # two steps late
    assert waited_for == [0, 0, 3, 6]  # three events a step: around the forward, and after the copy of its numbers
    assert forwards == [0.0, 0.0, 0.0, 1.0]  # of the last step that is known to be over
    assert [done.record["step"] for done in meter.ready(everything=True)] == [3, 4]


def judged(rows, elapsed_s=1.0, num=3):
    ranks = SlowRanks(0, len(rows))
    return [ranks.judge(torch.tensor(rows, dtype=torch.float64).flatten(), elapsed_s) for _ in range(num)][-1]


def test_when_a_rank_counts_as_slow():
    found = judged([[0.1, 0.2], [0.1, 0.2], [0.1, 0.3], [0.0, 0.3]])
    assert found["slowest"] == 2
    assert found["behind_percent"] == pytest.approx(100 / 3)
    assert (found["forward_s"], found["others_forward_s"]) == pytest.approx((0.3, 0.2))
    assert judged([[0.1, 0.2], [0.1, 0.2], [0.1, 0.3]], num=2) is None  # a step or two say nothing
    assert judged([[0.1, 0.2], [0.1, 0.22]]) is None  # within 10 %
    assert judged([[0.0, 0.002], [0.0, 0.004]]) is None  # twice as much of nearly nothing
    assert judged([[0.0, 0.0], [0.0, 0.5]])["behind_percent"] == float("inf")


def test_slots_of_the_ranks_add_up():
    parts = [SlowRanks(rank, 3).slots(rank + 0.5, 10.0 * rank) for rank in range(3)]
    assert sum(parts).tolist() == [0.5, 0, 1.5, 10, 2.5, 20]
    assert SlowRanks(0, 1).num_slots == 0
    assert SlowRanks(0, 1).judge(torch.zeros(0), 1.0) is None


def test_progress_line():
    assert describe(RECORD) == (
        "1:02:03 left  loss 1.2346  400 images/s (100 a rank)  data wait 4 %  21.3 GFLOP/s, 3.21 GB/s a rank  "
        "memory 2.50 GB  lr 1.00e-04  grad norm 0.5"
    )
    ranks = {"slowest": 3, "behind_percent": 35.2, "data_wait_s": 0.2, "forward_s": 0.1}
    ranks |= {"others_data_wait_s": 0.0, "others_forward_s": 0.1}
    on_gpu = describe(RECORD | {"tflops_per_rank": 212.0, "mfu_percent": 21.4, "memory_reserved_bytes": 3e9, "ranks": ranks})
    assert "212.0 TFLOP/s (MFU 21.4 %), 3.21 GB/s a rank" in on_gpu
    assert "memory 2.50 GB (reserved 3.00)" in on_gpu
    assert "rank 3 is 35 % slower (data 0.200 s, forward 0.100 s; others 0.000, 0.100)" in on_gpu
    assert [duration(s) for s in (59.6, 3600, 200_000)] == ["1:00", "1:00:00", "2 days 7:33:20"]


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """A function: the profile folder after some steps of one rank, with phases as in the loop."""
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)

    def run(first_last, start_step, num_steps):
        config = validate({"run": {"dir": str(tmp_path)}, "log": {"profile_steps": first_last}}, "test")
        world = init_world("ddp")
        engine = create_engine(config, Line(3, 3), world, None, 1, 4)
        meter = Meter(engine, ("a",), Speed(COST, BatchPlan(4, 4, 1, 1), None, 1, False), 99)
        written = []
        with StepProfile(config, world, start_step, make_console(quiet=False)) as profile:
            for step in range(start_step, start_step + num_steps):
                with meter.phase("data"):
                    x = torch.ones(4, 3)
                with meter.phase("forward"):
                    loss = engine.forward(x)
                with meter.phase("backward"):
                    engine.backward(loss)
                with meter.phase("optimizer"):
                    engine.step(1e-3)
                if profile.step_done():
                    written.append(step + 1)
        engine.close()
        world.close()
        return written

    return run


def test_a_profile_holds_the_phases_of_its_steps(traced, tmp_path, capsys):
    assert traced([4, 5], 2, 4) == [5]
    assert f"profile of steps 4-5: {tmp_path}/profile/rank-*.json.gz" in capsys.readouterr().out.replace("\n", "")
    events = json.loads(gzip.decompress((tmp_path / "profile" / "rank-0.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in ("data", "forward", "backward", "optimizer")} == dict.fromkeys(
        ("data", "forward", "backward", "optimizer"), 2
    )
    table = (tmp_path / "profile" / "rank-0.txt").read_text()
    assert "aten::addmm" in table
    assert "Self CPU Mem" in table
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-0.json.gz", "rank-0.txt"]


def test_a_run_that_ends_in_the_window_still_writes_it(traced, tmp_path):
    assert traced([2, 9], 1, 2) == []
    assert (tmp_path / "profile" / "rank-0.json.gz").exists()


def test_a_window_that_is_over_is_told(traced, tmp_path, capsys):
    assert traced([1, 2], 2, 1) == []
    assert "no profile: step 2 is done" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_ends_nothing(traced, tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    assert traced([2, 2], 0, 3) == [2]
    assert "the profile is not written" in caplog.text
