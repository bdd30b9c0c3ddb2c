"""A PostgreSQL server of a test's own, on a free port of this machine, with a password that must never be seen.

`python -m lissom.tests.workflow.postgres COMMAND…` runs a command with such a server in LISSOM_STORAGE.
"""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SECRET = "s3cr3t-{of}-the-test"  # braces mean something to Optuna, and must not here
USERS = ("postgres", "nobody")  # the server refuses to run as root


def binaries() -> Path | None:
    """Where initdb and pg_ctl are: on PATH, or where Debian puts them."""
    found = shutil.which("pg_ctl")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((p for p in places if (p / "initdb").exists() and (p / "pg_ctl").exists()), None)


class Server:
    """Can be stopped and started again. Skips the test where it cannot run here."""

    def __init__(self, *, durable: bool = False) -> None:
        """durable: writes wait for the disk, as they do in a real database."""
        pytest.importorskip("psycopg", reason="psycopg is not installed (pip install 'psycopg[binary]')")
        found = binaries()
        if found is None:
            pytest.skip("no PostgreSQL server here (apt-get install postgresql)")
        self._bin, self._as = found, self._user()
        self.folder = Path(tempfile.mkdtemp(prefix="lissom-pg-", dir="/tmp"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        password = self.folder / "password"
        password.write_text(SECRET)
        if self._as:
            entry = pwd.getpwnam(self._as)
            for path in (self.folder, password):
                os.chown(path, entry.pw_uid, entry.pw_gid)
        self._run(
            "initdb", "-D", self._data, "-U", "me", "-A", "scram-sha-256", "--pwfile", password, "--no-sync", "-E", "UTF8"
        )
        (self.folder / "data" / "postgresql.auto.conf").open("a").write(
            f"port = {self.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{self.folder}'\n"
            f"fsync = {'on' if durable else 'off'}\nmax_connections = 60\nshared_buffers = '16MB'\n"
        )

    @property
    def url(self) -> str:
        """Without a driver, as users write it."""
        return f"postgresql://me:{SECRET}@127.0.0.1:{self.port}/postgres"

    @property
    def shown(self) -> str:
        """How messages may name it."""
        return f"postgresql://me:***@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-w", "-l", self.folder / "log", "start")

    def stop(self, mode: str = "fast") -> None:
        """fast: connections are cut; immediate: as if the machine had lost its power."""
        self._run("pg_ctl", "-D", self._data, "-w", "-m", mode, "stop")

    def remove(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _user(self) -> str | None:
        if os.geteuid() != 0:
            return None
        for name in USERS:
            try:
                pwd.getpwnam(name)
            except KeyError:
                continue
            if shutil.which("setpriv"):
                return name
        pytest.skip("PostgreSQL does not run as root, and there is no other user or no setpriv here")

    def _run(self, name: str, *arguments: object) -> None:
        words = [str(self._bin / name), *map(str, arguments)]
        if self._as:
            words = ["setpriv", f"--reuid={self._as}", f"--regid={pwd.getpwnam(self._as).pw_gid}", "--clear-groups", *words]
        ended = subprocess.run(
            words, cwd=self.folder, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60
        )
        assert ended.returncode == 0, (words, ended.stderr)


def main() -> None:
    server = Server(durable=True)
    try:
        server.start()
        ended = subprocess.run(sys.argv[1:], check=False, env=os.environ | {"LISSOM_STORAGE": server.url})
    finally:
        server.remove()
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
