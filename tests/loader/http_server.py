"""A web server on the loopback for a folder of files, with Range requests and faults on demand."""

import re
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class Faults:
    """What goes wrong next, by file name: each request takes one entry of its file's queue.

    Entries: an int is a status to answer with; "truncate" ends the body half way under the right Content-Length; "reset"
    resets the connection half way; "hang" sends half and then nothing; "wrong" flips the body's first byte; "unsized" sends
    a byte too many, without Content-Length.
    """

    def __init__(self):
        self.queues: dict[str, deque] = defaultdict(deque)
        self.requests: list[tuple[str, str]] = []  # (file name, Range header)
        self.ranges = True
        self.pause_s = 0.0  # before each body
        self.bytes_per_s = 0.0
        self.over = threading.Event()

    def add(self, name: str, *faults: int | str) -> None:
        self.queues[name].extend(faults)

    def num_requests(self, name: str) -> int:
        return sum(found == name for found, _ in self.requests)


def _handler(folder: Path, faults: Faults):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = Path(urlsplit(self.path).path).name
            wanted = self.headers.get("Range", "")
            faults.requests.append((name, wanted))
            fault = faults.queues[name].popleft() if faults.queues[name] else ""
            if isinstance(fault, int) or not (folder / name).is_file():
                self._send(fault or 404, b"", {})
                return
            body, headers, status = (folder / name).read_bytes(), {}, 200
            match = re.fullmatch(r"bytes=(\d+)-", wanted)
            if match and faults.ranges:
                start = int(match[1])
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                body, status = body[start:], 206
            faults.over.wait(faults.pause_s)
            if fault == "wrong":
                body = bytes([body[0] ^ 1]) + body[1:]
            if fault == "unsized":
                body += b"x"
            self._send(status, body, headers, fault)

        def _send(self, status: int, body: bytes, headers: dict[str, str], fault: str = "") -> None:
            self.send_response(status)
            if fault == "unsized":
                self.close_connection = True
            else:
                headers["Content-Length"] = str(len(body))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            broken = fault in ("truncate", "reset", "hang")
            self._write(body[: len(body) // 2] if broken else body)
            if broken:
                self.close_connection = True
                self.wfile.flush()
                time.sleep(0.1)  # the reader has the first half before the connection breaks
            if fault == "hang":
                faults.over.wait(30)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def _write(self, body: bytes) -> None:
            if not faults.bytes_per_s:
                self.wfile.write(body)
                return
            step = max(1, int(faults.bytes_per_s * 0.01))
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                if faults.over.wait(0.01):
                    return

        def log_message(self, *args):
            pass

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        """Broken connections are what the tests are about."""


@contextmanager
def serve(folder: Path):
    """(URL of the folder, its faults) while the context lasts."""
    faults = Faults()
    server = _Server(("127.0.0.1", 0), _handler(Path(folder), faults))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/sets/one", faults
    finally:
        faults.over.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
