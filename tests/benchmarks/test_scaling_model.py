"""The time of a step by hand, its limits, and where the bottleneck changes."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

FORWARD_S, BACKWARD_S, UPDATE_S = 3.0, 6.0, 4.0
GB = 10**9


def work(num_parameters: int = 25, num_units: int = 5, item_bytes: int = 2, activation_bytes: float = 0.0):
    """100 bytes of gradients; one piece is 20 of them, or 10 of weights. Seconds as above, whatever the micro batch."""
    from scaling_model import Compute, Workload

    compute = Compute({"compute": FORWARD_S}, {"compute": BACKWARD_S}, {"memory bandwidth": UPDATE_S})
    return Workload("w", num_parameters, num_units, item_bytes, lambda _: compute, activation_bytes)


def machine(bytes_per_s: float = 100.0, latency_s: float = 0.0, overlap_fraction: float = 1.0, **more):
    from scaling_links import KINDS, Link, SharedCores
    from scaling_model import Machine

    fabric = SharedCores(dict.fromkeys(KINDS, Link(latency_s, bytes_per_s)), num_cores=10**6)
    return Machine("m", fabric, 8, overlap_fraction, **more)


def terms(engine: str, num_ranks: int, num_micro_steps: int = 1, **more):
    from scaling_model import predict

    found = predict(work(), engine, machine(**more), num_ranks, 1, num_micro_steps).terms_s
    return {name: seconds for name, seconds in found.items() if seconds}


@pytest.mark.parametrize(
    ("compute_s", "num_pieces", "piece_s", "overlap_fraction", "expected_s"),
    [
        (10, 5, 1, 1.0, 1.0),  # hidden but for the last piece
        (10, 5, 2, 1.0, 2.0),  # just kept up with
        (10, 5, 3, 1.0, 7.0),  # first ready after 2 s, then 15 s of sending: ends at 17
        (10, 1, 3, 1.0, 3.0),  # nothing to hide behind
        (10, 5, 3, 0.0, 15.0),
        (10, 5, 3, 0.5, 11.0),
        (10, 5, 0, 0.5, 0.0),
    ],
)
def test_what_collectives_add_to_computation(compute_s, num_pieces, piece_s, overlap_fraction, expected_s):
    from scaling_links import Cost
    from scaling_model import exposed

    cost = exposed(compute_s, num_pieces, Cost(0.25 * piece_s, 0.75 * piece_s), overlap_fraction)
    assert cost == pytest.approx((0.25 * expected_s, 0.75 * expected_s))


def test_one_rank_computes_and_nothing_else():
    from scaling_model import ENGINES

    for engine in ENGINES:
        assert terms(engine, 1, num_micro_steps=3) == {"compute": 27.0, "memory bandwidth": 4.0}


# two ranks at 1 byte/s, one piece where not said otherwise: an all-reduce of 100 bytes takes 100 s, a gather or scatter half
# of its bytes; two micro steps
@pytest.mark.parametrize(
    ("engine", "reduction_s", "gather_s", "update_s"),
    [
        ("ddp", 100.0, 0.0, 4.0),
        ("zero1", 100.0, 25.0, 2.0),
        ("zero2", 2 * 100.0, 25.0, 2.0),
        ("zero3", 2 * 50.0, 4 * 25.0, 2.0),
        ("fsdp", 50.0, 4 * 25.0, 2.0),
        ("hsdp", 50.0, 4 * 25.0, 2.0),
    ],
)
def test_what_each_engine_sends(engine, reduction_s, gather_s, update_s):
    found = terms(engine, 2, num_micro_steps=2, bytes_per_s=1.0, overlap_fraction=0.0)
    expected = {
        "compute": 18.0,
        "memory bandwidth": update_s,
        "gradient reduction": reduction_s,
        "parameter gather": gather_s,
    }
    assert found == pytest.approx({name: seconds for name, seconds in expected.items() if seconds})


def test_a_step_of_fsdp_with_overlap_by_hand():
    # five units at 20 bytes/s: gather 5/20 s, scatter 10/20 s. Forward: 3 s hide all but the first gather. Backward: pieces
    # of 0.75 s behind 6 s: all but the last.
    found = terms("fsdp", 2, bytes_per_s=20.0)
    expected = {"compute": 9.0, "memory bandwidth": 2.0, "parameter gather": 0.25 + 0.25, "gradient reduction": 0.5}
    assert found == pytest.approx(expected)


def test_hsdp_gathers_inside_a_node_and_reduces_between_nodes():
    from scaling_links import Link, Nodes
    from scaling_model import predict

    fabric = Nodes(8, Link(0.0, 1e12), Link(0.0, 8.0), launch_s=0.0)
    near = dataclasses.replace(machine(overlap_fraction=0.0), fabric=fabric)
    found = predict(work(), "hsdp", near, 16, 1)
    # each of the 8 ranks of a node all-reduces its 100 / 8 bytes with one other, at an eighth of 8 bytes/s
    assert found.terms_s["gradient reduction"] == pytest.approx(12.5)
    assert found.terms_s["parameter gather"] == pytest.approx(0.0, abs=1e-9)
    assert predict(work(), "fsdp", near, 16, 1).terms_s["parameter gather"] == pytest.approx(2 * 15 / 16 * 50 / 8)


def test_the_bottleneck_changes_where_it_does_by_hand():
    from scaling_model import predict

    def bottleneck(**more):
        return predict(work(), "ddp", machine(overlap_fraction=0.0, **more), 2, 1).bottleneck

    # 9 s of compute; 100 bytes to reduce, and two hops
    assert bottleneck(bytes_per_s=100 / 8.9) == "compute"
    assert bottleneck(bytes_per_s=100 / 9.1) == "gradient reduction"
    assert bottleneck(latency_s=4.4) == "compute"
    assert bottleneck(latency_s=4.6) == "latency"
    # 9 + 4 + 1 s for the two images of a node
    assert bottleneck(loader_images_per_s=2 / 13.9) == "compute"
    assert bottleneck(loader_images_per_s=2 / 14.1) == "loader"


def test_a_slow_loader_sets_the_step_and_is_shared_by_a_node():
    from scaling_model import predict

    slow = machine(loader_images_per_s=1.0)
    assert [predict(work(), "ddp", slow, n, 100).seconds for n in (1, 8, 16)] == pytest.approx([100, 800, 800])


@settings(max_examples=60, deadline=None)
@given(
    engine=st.sampled_from(["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"]),
    num_ranks=st.sampled_from([1, 2, 8, 16, 64]),
    bytes_per_s=st.floats(1.0, 1e4),
    latency_s=st.floats(0.0, 1.0),
    overlap_fraction=st.floats(0.0, 1.0),
)
def test_better_links_never_take_longer(engine, num_ranks, bytes_per_s, latency_s, overlap_fraction):
    from scaling_model import predict

    def seconds(**more):
        return predict(work(), engine, machine(**{**given_links, **more}), num_ranks, 1, 2).seconds

    given_links = {"bytes_per_s": bytes_per_s, "latency_s": latency_s, "overlap_fraction": overlap_fraction}
    slack = 1 + 1e-9
    base = seconds()
    assert seconds(bytes_per_s=2 * bytes_per_s) <= base * slack
    assert seconds(latency_s=latency_s / 2) <= base * slack
    assert seconds(overlap_fraction=1.0) <= base * slack
    assert seconds(slowdown=lambda ranks: 2.0) * slack >= base
    assert base * slack >= 2 * (FORWARD_S + BACKWARD_S) + UPDATE_S / num_ranks


@pytest.mark.parametrize(
    ("engine", "bytes_a_parameter"),
    [  # bf16 over 4 ranks: weights of the forward + float32 share, gradients, moments
        ("ddp", 4 + 4 + 8),
        ("zero1", (2 + 1) + 4 + 2),
        ("zero2", (2 + 1) + 1 + 2),
        ("zero3", (0.5 + 1) + 1 + 2 + 2 * 2 / 5),
        ("fsdp", 1 + 1 + 2 + 2 * 2 / 5),
    ],
)
def test_memory_by_engine(engine, bytes_a_parameter):
    from scaling_model import memory

    found = memory(work(num_parameters=GB, activation_bytes=100.0), engine, 4, 8, micro_batch=7)
    assert found.activations == 700
    assert found.total - found.activations == pytest.approx(bytes_a_parameter * GB)


def test_gradients_of_fsdp_are_whole_while_they_accumulate():
    from scaling_model import memory

    assert [memory(work(GB), "fsdp", 4, 8, 1, steps).gradients for steps in (1, 2)] == [GB, 4 * GB]
    assert memory(work(GB), "hsdp", 16, 8, 1).moments == GB


def test_what_does_not_fit_is_said():
    from scaling_model import predict

    needs = work(GB)
    assert not predict(needs, "ddp", machine(memory_bytes=15.9 * GB), 2, 1).fits
    assert predict(needs, "ddp", machine(memory_bytes=16.1 * GB), 2, 1).fits
