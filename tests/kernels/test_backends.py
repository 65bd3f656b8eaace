"""Which backend an op gets, what is logged and what is refused; a GPU is pretended where one matters."""

import logging

import pytest
import torch

from mpmae.kernels import backends, checks, cuda_driver
from mpmae.kernels.backends import BackendError, choose

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BOTH = {"cuda": None, "triton": None}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_logged", set())


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of compute capability 9.0, cuda-bindings and triton."""
    monkeypatch.setattr(backends, "_too_old", lambda index: None)
    monkeypatch.setattr(cuda_driver, "missing", lambda: None)
    monkeypatch.setattr(backends, "_triton_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_a_cpu_gets_the_reference_and_no_word(caplog):
    assert choose("op", CPU, torch.float32, BOTH) == "reference"
    assert not caplog.records


def test_a_gpu_gets_the_first_that_the_op_has(gpu):
    assert choose("op", GPU, torch.bfloat16, BOTH) == "cuda"
    assert choose("op", GPU, torch.bfloat16, {"triton": None}) == "triton"
    assert choose("op", GPU, torch.bfloat16, {}) == "reference"
    assert choose("op", GPU, None, {"triton": None}) == "triton"


def test_what_is_skipped_is_logged_once_for_each_op_and_cause(gpu, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        assert choose("one", GPU, torch.float16, {"cuda": "tiles of 3 sites", "triton": None}) == "triton"
    assert [record.getMessage() for record in caplog.records] == [
        "one: cuda can't run: tiles of 3 sites; the next backend runs instead"
    ]
    choose("two", GPU, torch.float16, {"cuda": "tiles of 3 sites", "triton": None})
    choose("one", GPU, torch.float64, BOTH)
    messages = [record.getMessage() for record in caplog.records[1:]]
    assert [message.split(":")[0] for message in messages] == ["two", "one", "one"]
    assert "dtype torch.float64, expected one of torch.bfloat16" in messages[1]

    monkeypatch.setattr(cuda_driver, "missing", lambda: "no cuda-bindings")
    monkeypatch.setattr(backends, "_triton_missing", lambda: "no triton")
    assert choose("one", GPU, torch.float16, BOTH) == "reference"


def test_asked_for_and_there(gpu, monkeypatch):
    for name in backends.BACKENDS:
        monkeypatch.setenv(backends.VARIABLE, name)
        assert choose("op", GPU, torch.float32, BOTH) == name
        monkeypatch.setenv(backends.VARIABLE, "cuda")
    assert choose("op", GPU, torch.float32, BOTH, asked="triton") == "triton"
    assert choose("op", GPU, torch.float32, {"triton": None}) == "triton"  # it has no version in CUDA C++


@pytest.mark.parametrize(
    ("device", "dtype", "refusal", "missing", "cause"),
    [
        (CPU, torch.float32, None, None, "tensors are on the cpu device, expected a CUDA GPU"),
        (GPU, torch.float64, None, None, "dtype torch.float64, expected one of"),
        (GPU, torch.float32, "3 channels, expected a multiple of 8", None, "3 channels, expected a multiple of 8"),
        (GPU, torch.float32, None, "no cuda-bindings; install it", "no cuda-bindings; install it"),
    ],
)
def test_asked_for_and_not_there(gpu, monkeypatch, device, dtype, refusal, missing, cause):
    monkeypatch.setattr(cuda_driver, "missing", lambda: missing)
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    with pytest.raises(
        BackendError, match=r"^op: backend cuda was asked for and can't run: .*MPMAE_KERNELS unset"
    ) as caught:
        choose("op", device, dtype, {"cuda": refusal, "triton": None})
    assert cause in str(caught.value)


def test_all_causes_at_once(monkeypatch):
    monkeypatch.setattr(cuda_driver, "missing", lambda: "no cuda-bindings")
    assert backends.unavailable("cuda", CPU, None).startswith("no cuda-bindings; the tensors are on the cpu device")


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_the_oldest_gpu(monkeypatch, capability, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    cause = backends._too_old.__wrapped__(0)
    assert (cause is None) == taken
    assert taken or "Some GPU has compute capability 7.5, expected 8.0 or newer" in cause


def test_an_unknown_backend(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "fast")
    with pytest.raises(BackendError, match="MPMAE_KERNELS='fast', expected one of cuda, triton, reference; or unset it"):
        choose("op", CPU, torch.float32, BOTH)
    with pytest.raises(BackendError, match="backend 'tritn', expected one of cuda, triton, reference"):
        choose("op", CPU, torch.float32, BOTH, asked="tritn")


def test_the_interpreter_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(backends, "_triton_missing", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("op", CPU, torch.float32, BOTH) == "reference"
    monkeypatch.setenv(backends.VARIABLE, "triton")
    assert choose("op", CPU, torch.float32, BOTH) == "triton"


def test_too_many_elements_for_32_bits():
    assert checks.int32_refusal("elements", (2**31 - 1,)) is None
    refusal = checks.int32_refusal("elements", (2**12, 2**10, 512))
    assert refusal.startswith("elements: 4096 x 1024 x 512 = 2147483648, expected fewer than 2**31")


def test_aligned_copies_only_what_it_must():
    x = torch.empty(64, dtype=torch.float16)
    assert checks.aligned(x) is x
    for other in (x[1:], x.view(8, 8).t()):
        copy = checks.aligned(other)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert copy.data_ptr() != other.data_ptr()
