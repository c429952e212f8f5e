"""A real S3 server for tests: Ceph's radosgw on one node, durable, with real signatures.

It needs Debian packages: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd. It
listens on the loopback interface only, keeps its data in a temporary folder, and starts in about 20
seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.s3 import ACCESS_KEY, SECRET_KEY, S3Server

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
_START_SECONDS = 120.0
_MAX_STARTS = 3

_CONFIGURATION = """
[global]
fsid = {cluster}
mon host = [v1:127.0.0.1:{mon_port}]
auth cluster required = none
auth service required = none
auth client required = none
auth supported = none
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv4 = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
# The starting storage daemon would ask the monitor for its place, at times before it knows the
# cluster's id, and then ends ("wrong fsid").
osd crush update on start = false
osd class update on start = false
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 1
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/log/$name.log
pid file = {folder}/run/$name.pid
crash dir = {folder}/run
osd memory target = 939524096
osd objectstore = bluestore
bluestore block size = 4294967296
bluestore fsck on mount = false
osd max object name len = 256
rgw dns name =
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw thread pool size = 32
rgw bucket default quota max objects = -1

[mon.a]
mon data = {folder}/mon

[osd.0]
osd data = {folder}/osd
"""


@contextlib.contextmanager
def serve_radosgw() -> Iterator[S3Server]:
    """Start monitor, storage daemon and gateway; kill them by their process ids on exit."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise RuntimeError(
            f"not installed: {', '.join(missing)}; run apt-get install --no-install-recommends "
            "radosgw ceph-mon ceph-osd"
        )
    for attempt in range(_MAX_STARTS):
        # A short path: it holds the daemons' sockets, whose paths may have 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="rgw-"))
        try:
            try:
                port = _start(folder)
            except RuntimeError:
                # Another process may have taken one of the ports meanwhile.
                if attempt + 1 == _MAX_STARTS:
                    raise
                continue
            yield S3Server(f"http://127.0.0.1:{port}")
            return
        finally:
            _stop(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path) -> int:
    for name in ("mon", "osd", "run", "log", "rgw"):
        (folder / name).mkdir()
    cluster, osd = str(uuid.uuid4()), str(uuid.uuid4())
    port, mon_port = _free_ports()
    configuration = folder / "ceph.conf"
    configuration.write_text(
        _CONFIGURATION.format(cluster=cluster, folder=folder, port=port, mon_port=mon_port)
    )

    def call(*command: object) -> None:
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, "CEPH_CONF": str(configuration)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")

    given = ("-c", configuration)
    address = f"[v1:127.0.0.1:{mon_port}]"
    monitor_map = folder / "map"
    call("monmaptool", "--create", "--fsid", cluster, "--addv", "a", address, monitor_map)
    call("ceph-mon", *given, "-i", "a", "--mkfs", "--monmap", monitor_map)
    call("ceph-mon", *given, "-i", "a")
    call("ceph-osd", *given, "-i", "0", "--mkfs", "--osd-uuid", osd)
    call("ceph", *given, "osd", "new", osd)
    call("ceph", *given, "osd", "crush", "add", "osd.0", 1.0, "root=default", "host=a")
    call("ceph-osd", *given, "-i", "0")
    call("radosgw", *given, "-n", "client.rgw.a")
    call(
        *("radosgw-admin", *given, "user", "create", "--uid", "t", "--display-name", "t"),
        *("--access-key", ACCESS_KEY, "--secret", SECRET_KEY),
    )
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return port
        time.sleep(0.1)
    raise RuntimeError(f"radosgw did not listen on port {port} within {_START_SECONDS:.0f} s")


def _stop(folder: Path) -> None:
    for file in sorted((folder / "run").glob("*.pid")):
        process = int(file.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    # They daemonized, so they are not our children and cannot be waited for.
    time.sleep(0.5)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])
