"""The entries of a JSON object in a file, one at a time, in memory bounded by the largest entry.

What `json` takes is taken here too: NaN and Infinity among it, which Python writes and strict parsers refuse.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WINDOW_BYTES = 1 << 20
MAX_ENTRY_CHARS = 1 << 26
SHOWN_CHARS = 20
_SPACES = " \t\n\r"
_AFTER_VALUE = tuple(_SPACES + ":,}")


class ObjectStream:
    """Key and value of each entry of the one object that a file holds; afterwards `sha256` is that of the file's bytes.

    Iterating raises OSError, or ValueError where the file is not JSON, not UTF-8 or not an object.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sha256 = ""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        with self.path.open("rb") as file:
            digest = hashlib.sha256()
            yield from _Parser(file, digest).entries()
        self.sha256 = digest.hexdigest()


class _Parser:
    """Text is decoded window by window; `text[start:]` is what is not parsed yet."""

    def __init__(self, file, digest):
        self._file, self._digest = file, digest
        self._text_of = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._start, self._at_end = "", 0, False

    def entries(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        more = self._next_char() != "}"
        while more:
            if self._next_char() != '"':
                raise self._error("a key in double quotes")
            key = self._value()
            self._expect(":")
            yield key, self._value()
            more = self._next_char() == ","
            self._start += more
        self._expect("}")
        if self._next_char():
            raise self._error("the end of the file")

    def _grow(self) -> bool:
        """Append one window; False at the end of the file."""
        if self._at_end:
            return False
        data = self._file.read(WINDOW_BYTES)
        self._digest.update(data)
        self._at_end = not data
        self._text = self._text[self._start :] + self._text_of.decode(data, final=not data)
        self._start = 0
        return True

    def _next_char(self) -> str:
        """The next character that is no space, where `start` then is; empty at the end of the file."""
        while True:
            while self._start < len(self._text) and self._text[self._start] in _SPACES:
                self._start += 1
            if self._start < len(self._text):
                return self._text[self._start]
            if not self._grow():
                return ""

    def _expect(self, char: str) -> None:
        if self._next_char() != char:
            raise self._error(repr(char))
        self._start += 1

    def _error(self, expected: str) -> ValueError:
        while len(self._text) - self._start < SHOWN_CHARS and self._grow():
            pass
        found = repr(self._text[self._start : self._start + SHOWN_CHARS]) if self._next_char() else "nothing"
        return ValueError(f"expected {expected}, found {found}")

    def _value(self) -> Any:
        self._next_char()
        while True:
            try:
                value, end = self._decode(self._text, self._start)
                # A number that the window cuts short is a number too: what follows a value tells.
                if self._text[end : end + 1] in _AFTER_VALUE or not self._grow():
                    self._start = end
                    return value
            except json.JSONDecodeError:
                if len(self._text) - self._start > MAX_ENTRY_CHARS or not self._grow():
                    raise
