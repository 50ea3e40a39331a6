"""A forked child leaves the connections of its parent's store client alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import gc, http.server, os, re, sys, threading, weakref
from engine.storage.open import open_storage

class Store(http.server.BaseHTTPRequestHandler):
    "Takes every PUT and keeps the connection, as real stores do and moto does not."
    protocol_version = "HTTP/1.1"
    timeout = 100

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
options = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "key": "k", "secret": "s"}
storage = open_storage("s3://bucket/run", options)
storage.publish("a", b"1", exclusive=False)
about = [info.weakref() for info in weakref.finalize._registry.values()]
fs = storage._client.fs
assert any(found is fs for found in about), "s3fs has no finalizer: this shows nothing"
del about

def watched():
    "The descriptors in the event loop's epoll set, by the kernel's word."
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "eventpoll" in os.readlink(f"/proc/self/fd/{fd}"):
                text = open(f"/proc/self/fdinfo/{fd}").read()
                found |= {(fd, tfd) for tfd in re.findall(r"tfd: *([0-9]+)", text)}
        except FileNotFoundError:
            pass
    return found

before = watched()
assert len(before) >= 2, "no connection is kept: this shows nothing"
for _ in range(3):
    child = os.fork()
    if child == 0:
        if any(info.weakref() is fs for info in weakref.finalize._registry.values()):
            os._exit(9)  # s3fs's finalizer would wait for a thread that is not there
        del storage
        type(fs).clear_instance_cache()  # as fsspec does itself when a child makes its first file system
        del fs
        gc.collect()
        sys.exit(3)  # with everything that Python does at the end
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert watched() == before, "the child took a connection of the parent's out of the set"
storage.publish("b", b"2", exclusive=False)
os._exit(0)
"""


def test_a_kept_connection_is_not_disturbed() -> None:
    """aiohttp's collection would take its socket out of the set that parent and child share."""
    pytest.importorskip("s3fs")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
