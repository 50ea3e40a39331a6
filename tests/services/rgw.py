"""A real S3 server on loopback: Ceph's RADOS Gateway over a cluster of one monitor and one disk."""

from __future__ import annotations

import shutil
import subprocess
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from tests.services.ceph_conf import ceph_conf
from tests.services.daemons import Daemon, ServiceError, free_port, plain_environment
from tests.services.s3 import Account

PROGRAMS = {
    "ceph-mon": "ceph-mon",
    "monmaptool": "ceph-base",
    "ceph": "ceph-common",
    "ceph-osd": "ceph-osd",
    "radosgw": "radosgw",
    "radosgw-admin": "ceph-common",
}
"""What must be installed, program -> Debian package."""

OWNER = Account("rgw-tests-access", "rgw-tests-secret-that-no-text-may-show")
"""The account that may do everything."""

COMMAND_SECS = 60.0


class Gateway:
    """The server, in a folder and on ports of its own.

    Args:
        folder: takes data, logs and sockets; a short path, for the sockets' names are limited.
        store: "memstore" is quick and forgets everything with its process; "bluestore" survives a kill.
    """

    def __init__(self, folder: Path, store: str = "memstore") -> None:
        self.folder, self.store = folder, store
        self.port, self._mon_port = free_port(), free_port()
        self._conf = folder / "ceph.conf"
        self._daemons: dict[str, Daemon] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start all daemons, on the first call with a new cluster. ServiceError when one does not come up."""
        fresh = not self._conf.exists()
        if fresh:
            self._make_monitor()
        self._daemons["mon"] = self._daemon("ceph-mon", "-i", "a")
        if fresh:
            self._make_disk()
        self._daemons["osd"] = osd = self._daemon("ceph-osd", "-i", "0")
        osd.wait_until(
            lambda: "1 up" in self._run("ceph", "--connect-timeout", "30", "osd", "stat"), "the disk"
        )
        if fresh:
            self.add_user("owner", OWNER)
        self.start_gateway()

    def start_gateway(self) -> None:
        """Start the gateway alone, and wait until it answers."""
        self._daemons["rgw"] = rgw = self._daemon("radosgw", "-n", "client.rgw.a")
        rgw.wait_until(self._answers, "the gateway")

    def kill_gateway(self) -> None:
        """SIGKILL to the gateway alone: what it has not stored is lost, the disk goes on."""
        self._daemons.pop("rgw").kill()

    def kill(self) -> None:
        """SIGKILL to every daemon, as when the machine dies."""
        for name in ("rgw", "osd", "mon"):
            if name in self._daemons:
                self._daemons.pop(name).kill()

    def stop(self) -> None:
        """Stop what runs and remove the folder."""
        for name in ("rgw", "osd", "mon"):
            if name in self._daemons:
                # Nothing in here is worth an orderly shutdown of the disk, which takes seconds.
                self._daemons.pop(name).kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def admin(self, *args: str) -> str:
        """Run radosgw-admin; its output."""
        return self._run("radosgw-admin", "-n", "client.rgw.a", "--log-to-stderr=false", *args)

    def add_user(self, name: str, account: Account) -> None:
        """A user of its own, with its own buckets."""
        self.admin("user", "create", f"--uid={name}", f"--display-name={name}", *_keys(account))

    def add_reader(self, account: Account) -> None:
        """Credentials that may read and list what the owner has, and nothing else."""
        name = f"--subuser=owner:{account.access_key}"
        self.admin(
            "subuser", "create", "--uid=owner", name, "--access=read", "--key-type=s3", *_keys(account)
        )

    def limit_buckets(self, user: str, *, objects: int) -> None:
        """Give each bucket of a user a quota, in objects."""
        scope = (f"--uid={user}", "--quota-scope=bucket")
        self.admin("quota", "set", *scope, f"--max-objects={objects}")
        self.admin("quota", "enable", *scope)

    def _make_monitor(self) -> None:
        for name in ("mon", "osd", "rgw", "log", "run"):
            (self.folder / name).mkdir(parents=True)
        fsid = str(uuid.uuid4())
        self._conf.write_text(
            ceph_conf(
                self.folder, fsid=fsid, store=self.store, mon_port=self._mon_port, gateway_port=self.port
            )
        )
        monmap = str(self.folder / "monmap")
        address = f"[v1:127.0.0.1:{self._mon_port}]"
        self._run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)

    def _make_disk(self) -> None:
        identity = str(uuid.uuid4())
        # Again and again: a monitor that has just come up lets clients connect, and may refuse what they ask.
        new = ("ceph", "--connect-timeout", "30", "osd", "new", identity, "0")
        self._daemons["mon"].wait_until(lambda: self._succeeds(*new), "the monitor")
        place = ("osd.0", "1.0", "root=default", "host=local")
        self._run("ceph", "--connect-timeout", "30", "osd", "crush", "add", *place)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity)

    def _daemon(self, program: str, *args: str) -> Daemon:
        return Daemon([program, "-c", str(self._conf), "-f", *args], self.folder / "log" / f"{program}.out")

    def _run(self, program: str, *args: str) -> str:
        conf = [] if program == "monmaptool" else ["-c", str(self._conf)]
        ran = subprocess.run(
            [program, *conf, *args],
            env=plain_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECS,
            check=False,
        )
        if ran.returncode != 0:
            raise ServiceError(
                f"{program} {' '.join(args[:4])} ended with {ran.returncode}: {ran.stderr[-500:]}"
            )
        return ran.stdout

    def _succeeds(self, program: str, *args: str) -> bool:
        try:
            self._run(program, *args)
        except ServiceError:
            return False
        return True

    def _answers(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            direct.open(self.endpoint, timeout=2.0).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


def _keys(account: Account) -> tuple[str, str]:
    return f"--access-key={account.access_key}", f"--secret-key={account.secret_key}"
