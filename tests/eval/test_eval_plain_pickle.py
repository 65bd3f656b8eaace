"""Pickles as plain data: what is read, and that nothing else is."""

import collections
import contextlib
import datetime
import os
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmae.errors import DatasetError
from mpmae.eval.plain_pickle import MAX_BYTES, Record, loads, loads_text
from tests.eval.geobench_files import dumps, stand_in


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [4, 5])
def test_plain_data_comes_back(protocol):
    value = {
        "none": None,
        "numbers": [1, -(2**70), 2.5, True],
        "text": ("a", b"b"),
        "sets": [{1, 2}, frozenset("x")],
        "ordered": collections.OrderedDict(a=1),
        "date": datetime.date(2019, 11, 5),
        "time": datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone.utc),
        "scalars": [np.int64(7), np.float32(0.5), np.bool_(True)],
    }
    assert loads(pickle.dumps(value, protocol), "x") == value


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.array(["ab", "c"]), np.arange(3, dtype=">i2")]
)
def test_arrays_are_rebuilt(array, protocol):
    found = loads(pickle.dumps(array, protocol), "x")
    assert type(found) is np.ndarray
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_shared_and_recursive_parts_stay_shared():
    inner = [np.int8(1)]
    inner.append(inner)
    found = loads(pickle.dumps([inner, inner], 4), "x")
    assert found[0] is found[1]
    assert found[0][1] is found[0]


def key_of_tuples(num_levels: int, protocol: int) -> bytes:
    """A dict whose key is a tuple of the same tuple twice, and so on, as opcodes: building it here would take for ever."""
    number = (lambda i: b"q" + bytes([i])) if protocol < 4 else (lambda i: b"\x94")
    levels = b"".join(b"h%bh%b\x86%b0" % (bytes([i]), bytes([i]), number(i + 1)) for i in range(num_levels))
    return b"\x80%bK\x01\x85%b0%b}h%bNs." % (bytes([protocol]), number(0), levels, bytes([num_levels]))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_few_bytes_that_unfold_to_a_lot_are_refused_at_once(protocol):
    started = time.monotonic()
    for pair in (lambda one: (one, one), lambda one: [one, one], lambda one: {1: one, 2: one}):
        bomb = pair("x")
        for _ in range(60):
            bomb = pair(bomb)
        with pytest.raises(DatasetError, match="unfolds to more than"):
            loads(pickle.dumps(bomb, protocol), "x")
    with pytest.raises(DatasetError, match="a tuple unfolds to more than"):
        loads(key_of_tuples(60, protocol), "x")
    assert time.monotonic() - started < 2
    assert list(loads(key_of_tuples(2, protocol), "x")) == [(((1,), (1,)), ((1,), (1,)))]


@pytest.mark.parametrize("module", ["geobench.dataset", "geobench.io.dataset", "ccb.io.dataset"])
def test_known_classes_become_inert_records(module):
    band = stand_in(module, "Sentinel2")
    found = loads(dumps({"band": band(name="02 - Blue"), "class": band}, band), "x")
    assert isinstance(found["band"], Record)
    assert (found["band"].kind, found["band"].get("name"), found["band"].get("other", 3)) == ("Sentinel2", "02 - Blue", 3)
    assert found["class"].kind == "Sentinel2"


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (Call(os.system, "true"), "posix.system"),
        (Call(eval, "1"), "builtins.eval"),
        (Call(getattr, "a", "upper"), "builtins.getattr"),
        (os.system, "posix.system"),
        (np.array([object()]), "the numpy dtype 'O8'"),
        (np.dtype([("a", "i4")]), "the numpy dtype 'V4'"),
        (np.ma.masked_array([1]), "numpy.ma.core._mareconstruct"),
        (Call(np.load, "x"), "numpy.load"),
        (collections.Counter("a"), "collections.Counter"),
    ],
)
def test_anything_else_is_refused(value, asked):
    if asked == "posix.system":
        asked = f"{os.name}.system"
    with pytest.raises(DatasetError, match=r"file\.hdf5") as caught:
        loads(pickle.dumps(value, 4), "file.hdf5")
    assert f"asks for {asked}" in str(caught.value)


def test_geobench_modules_open_no_other_door():
    for name in ("os", "os.system", "h5py", "load_sample"):
        data = b"\x80\x04\x8c\x10geobench.dataset\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
        with pytest.raises(DatasetError, match=f"asks for geobench.dataset.{name}"):
            loads(data, "x")


def test_state_put_on_a_stand_in_does_not_last():
    """BUILD may change what a global name gave; the next pickle must not see it."""
    poison = b"\x80\x04cnumpy\ndtype\n}\x8c\x05dtype\x8c\x03badsb."
    with pytest.raises(DatasetError):
        loads(poison, "x")
    assert loads(pickle.dumps(np.float32(2), 4), "x") == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        b"junk",
        pickle.dumps([1, 2, 3], 4)[:-3],
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # LONG_BINPUT with a memo number of 2**31
        b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x00.",  # a bytearray of 2**56 bytes
        b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",  # lists in lists
        b"\x80\x04cnumpy.core.multiarray\nscalar\n)R.",
    ],
)
def test_broken_pickles_say_so(data):
    with pytest.raises(DatasetError, match=r"file\.pkl"):
        loads(data, "file.pkl")


@pytest.mark.parametrize("opcode", [b"\x80\x02U\x01aQ.", b"\x80\x02\x82\x01.", b"\x80\x05N\x97\x98."])
def test_other_opcodes_are_refused(opcode):
    with pytest.raises(DatasetError, match="opcode"):
        loads(opcode, "x")


def test_size_is_bounded():
    with pytest.raises(DatasetError, match="at most"):
        loads(b"\x80" * (MAX_BYTES + 1), "x")


@pytest.mark.parametrize("text", [None, 3, "__import__('os')", "[1]", "b'a' + b'b'", "b'" + "\\", "'abc'"])
def test_only_the_text_of_bytes_is_read(text):
    with pytest.raises(DatasetError, match="x"):
        loads_text(text, "x")


def test_text_of_bytes():
    assert loads_text(str(pickle.dumps({"label": 3})), "x") == {"label": 3}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_give_plain_data_or_the_error(data):
    whole = bytearray(pickle.dumps({"a": [np.arange(3), np.float32(1)], "b": datetime.date(2020, 1, 1)}, 4))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DatasetError):
        loads(bytes(whole), "x")
