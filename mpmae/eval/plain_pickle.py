"""Pickles of GEO-Bench read as plain data: no class is imported, and nothing runs but what is written here.

A pickle names callables and arguments, so reading one with Python's `pickle` gives its author control of the process. Here a
name stands for an inert `Record`, an array that is rebuilt from its bytes, a date, or an error. The opcodes are looked over
before anything is built.
Source: the names are those that ServiceNow/geo-bench writes, `geobench/dataset.py`, `task.py` and `label.py`.
"""

import ast
import datetime
import io
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from mpmae.errors import DatasetError

MAX_BYTES = 8 * 2**20  # genuine ones reach about 170 kB
MAX_PARTS, MAX_TUPLE_PARTS = 1_000_000, 10_000  # parts of parts, those that are shared counted wherever they stand


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_MODULES = tuple(
    f"{package}{part}"
    for package in ("geobench", "geobench.io", "ccb", "ccb.io")
    for part in ("", ".dataset", ".label", ".task", ".bandstats")
)
_CLASSES = _words(
    """TaskSpecifications Classification MultiLabelClassification SemanticSegmentation SegmentationClasses Regression
    Detection PointAnnotation LabelType Accuracy MultilabelAccuracy SegmentationAccuracy BandInfo Band SpectralBand Sentinel1
    Sentinel2 Landsat8 Mask CloudProbability ElevationBand Height MultiBand HyperSpectralBands Stats"""
)
_RECORDS = {(module, name) for module in _MODULES for name in _CLASSES}
_RECORDS |= {("affine", "Affine"), ("rasterio.crs", "CRS"), ("rasterio._crs", "CRS")}
_NUMPY = ("numpy.core", "numpy._core")
_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|[SU][0-9]{1,6})")
_OPCODES = _words(
    """PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING
    BINSTRING SHORT_BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST
    APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_SET ADDITEMS FROZENSET GLOBAL STACK_GLOBAL REDUCE NEWOBJ
    BUILD"""
)


class Record:
    """An object of a class that is not imported: the class's name, what it was called with and its state.

    kind: such as "Sentinel2". args: a tuple. state: what the pickle restores, usually attributes by name; None without.
    """

    kind = ""

    def __new__(cls, *args):
        """A record that was called with `args`."""
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name`, or the default."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"Record({self.kind}, args={self.args!r}, state={self.state!r})"


def loads(data: bytes, where: str) -> Any:
    """The content of a pickle: dicts, lists, tuples, sets, texts, numbers, dates, numpy arrays and scalars, Records.

    where: the file, for messages. Raises DatasetError when the pickle asks for anything else, is malformed, or is too large:
    also where a few bytes unfold to a lot.
    """
    if len(data) > MAX_BYTES:
        raise DatasetError(f"{where}: a pickle of {len(data):,} bytes; expected at most {MAX_BYTES:,}")
    try:
        _look_over(data)
        value = _settle(_Unpickler(data).load(), {})
        if _num_parts(value, {}) > MAX_PARTS:
            raise ValueError(f"it unfolds to more than {MAX_PARTS:,} parts")
        return value
    except _RefusedError as error:
        raise DatasetError(
            f"{where} asks for {error}, which is no plain data: GEO-Bench does not write it. The file is refused; get it "
            "from the dataset's own page"
        ) from error
    except Exception as error:  # a broken pickle fails in any way its bytes lead to
        raise DatasetError(
            f"{where}: not a readable pickle ({type(error).__name__}: {error}); get the file again"
        ) from error


def loads_text(text: Any, where: str) -> Any:
    """As `loads`, of the text of a bytes literal: how GEO-Bench keeps a pickle in an HDF5 attribute."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    if not isinstance(text, str) or text[:2] not in ("b'", 'b"') or len(text) > 4 * MAX_BYTES:
        raise DatasetError(f"{where}: the attribute `pickle` is {str(text)[:40]!r}; expected the text of a bytes literal")
    try:
        data = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DatasetError(f"{where}: the attribute `pickle` is no bytes literal ({error}); get the file again") from error
    if not isinstance(data, bytes):
        raise DatasetError(f"{where}: the attribute `pickle` holds a {type(data).__name__}; expected bytes")
    return loads(data, where)


class _RefusedError(Exception):
    """Something that is no plain data; its text is what the pickle asks for."""


def _look_over(data: bytes) -> None:
    """Refuse opcodes with other uses than plain data, and memo numbers that would make the reader allocate at will.

    So are tuples that hold each other over and over: as a key of a dict their hash would take for ever.
    """
    stack: list[int | None] = []  # as the reader's: the parts of a tuple, 1 for anything else, None for a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name, parts = opcode.name, 1
        if name not in _OPCODES:
            raise _RefusedError(f"the pickle opcode {name}")
        if "PUT" in name and int(argument) > len(data):
            raise ValueError(f"memo number {argument} in {len(data)} bytes")
        taken = _taken(stack, opcode)
        if "TUPLE" in name:
            parts += sum(taken)
        elif "GET" in name:
            parts = memo.get(int(argument), 1)
        elif "PUT" in name:
            memo[int(argument)] = stack[-1]
        elif name in ("MEMOIZE", "DUP"):
            parts = taken[0]
        if name == "MEMOIZE":
            memo[len(memo)] = parts
        if parts > MAX_TUPLE_PARTS:
            raise ValueError(f"a tuple unfolds to more than {MAX_TUPLE_PARTS:,} parts")
        stack += [None] if name == "MARK" else [parts] * len(opcode.stack_after)


def _taken(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int | None]:
    """What an opcode takes off the stack: all above the last mark, or a number of its own."""
    below, taken = list(opcode.stack_before), []
    if pickletools.markobject in below or (opcode.name == "POP" and stack and stack[-1] is None):
        while (top := stack.pop()) is not None:
            taken.append(top)
        below = below[: below.index(pickletools.markobject)] if pickletools.markobject in below else []
    return taken + [stack.pop() for _ in below]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._found = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global name, made afresh for each pickle, which may change what it was given."""
        if (module, name) not in self._found:
            self._found[module, name] = _stand_in(module, name)
        return self._found[module, name]


def _stand_in(module: str, name: str) -> Any:
    if (module, name) in _RECORDS:
        return type("Record", (Record,), {"kind": name})
    if module == "datetime" and name in ("date", "datetime", "time", "timedelta", "timezone"):
        return getattr(datetime, name)
    if (module, name) == ("collections", "OrderedDict"):
        return OrderedDict
    if (module, name) == ("numpy", "dtype"):
        return type("Dtype", (_Dtype,), {})
    if (module, name) == ("numpy", "ndarray"):
        return type("Ndarray", (_Ndarray,), {})
    if name == "scalar" and module in [f"{core}.multiarray" for core in _NUMPY]:
        return type("Scalar", (_Scalar,), {})
    if name == "_reconstruct" and module in [f"{core}.multiarray" for core in _NUMPY]:
        return type("Array", (_Array,), {})
    if name == "_frombuffer" and module in [f"{core}.numeric" for core in _NUMPY]:
        return type("Buffer", (_Buffer,), {})
    raise _RefusedError(f"{module}.{name}")


class _Dtype:
    """`numpy.dtype(text, align, copy)` and its state (version, byte order, no fields, sizes)."""

    def __init__(self, text: str, *flags: Any):
        if not isinstance(text, str) or not _DTYPE.fullmatch(text):
            raise _RefusedError(f"the numpy dtype {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        _, order, subdtype, names, fields, *_ = state
        if (subdtype, names, fields) != (None, None, None) or order not in ("<", ">", "=", "|"):
            raise _RefusedError("a numpy dtype with fields")
        self.dtype = self.dtype.newbyteorder(order)


class _Ndarray:
    """The class `numpy.ndarray` itself, as an argument."""


class _Scalar:
    """`numpy.core.multiarray.scalar(dtype, bytes)`."""

    def __init__(self, dtype: _Dtype, data: bytes):
        self.value = _array(dtype, (), data)[()]


class _Array:
    """`numpy.core.multiarray._reconstruct(ndarray, (0,), b"b")` and its state (version, shape, dtype, Fortran, bytes)."""

    value: np.ndarray | None = None

    def __init__(self, kind: type, shape: tuple, code: bytes):
        if not (isinstance(kind, type) and issubclass(kind, _Ndarray)):
            raise _RefusedError("an array of another class than numpy.ndarray")

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(dtype, shape, data, "F" if fortran else "C")


class _Buffer:
    """`numpy.core.numeric._frombuffer(bytes, dtype, shape, order)`, the array of protocol 5."""

    def __init__(self, data: bytes, dtype: _Dtype, shape: tuple, order: str):
        self.value = _array(dtype, shape, data, "F" if order == "F" else "C")


def _array(dtype: Any, shape: tuple, data: Any, order: str = "C") -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise _RefusedError("an array that is not plain bytes")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order).copy()


_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
)


def _settle(value: Any, done: dict[int, Any]) -> Any:
    """The value with arrays and scalars in the place of what stood for them; shared parts stay shared."""
    if type(value) in _PLAIN or isinstance(value, _PLAIN[-4:]):
        return value
    if id(value) in done:
        return done[id(value)][0]
    if isinstance(value, _Array | _Scalar | _Buffer):
        return value.value
    if isinstance(value, type) and issubclass(value, Record):
        return value()
    if isinstance(value, Record):
        done[id(value)] = (value, value)
        value.args, value.state = _settle(value.args, done), _settle(value.state, done)
        return value
    if isinstance(value, dict):
        fresh = type(value)()
        done[id(value)] = (fresh, value)
        fresh.update((_settle(key, done), _settle(item, done)) for key, item in value.items())
        return fresh
    if isinstance(value, list):
        fresh = []
        done[id(value)] = (fresh, value)
        fresh.extend(_each(value, done))
        return fresh
    if isinstance(value, tuple | set | frozenset):
        done[id(value)] = (type(value)(_each(value, done)), value)
        return done[id(value)][0]
    raise _RefusedError(f"a {type(value).__name__}")


def _num_parts(value: Any, known: dict[int, int]) -> int:
    """How many parts a settled value has, with parts of parts; one that is shared counts wherever it stands."""
    if isinstance(value, Record):
        parts = (value.args, value.state)
    elif isinstance(value, dict):
        parts = (*value.keys(), *value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    else:
        return 1
    if id(value) not in known:
        known[id(value)] = 1  # inside itself
        known[id(value)] = 1 + sum(_num_parts(part, known) for part in parts)
    return known[id(value)]


def _each(values: Any, done: dict[int, Any]) -> Iterator[Any]:
    return (_settle(item, done) for item in values)
