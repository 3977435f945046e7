"""A server in a process of its own, for programs that start one and talk to it."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from vla.serve.client import PolicyClient, PolicyServerError
from vla.serve.server import Settings
from vla.types import problem

LOG_TAIL_CHARS = 2000


class ServerProcess:
    """`vla serve` as a context manager: entering waits until it answers, leaving stops it.

        with ServerProcess(Settings(policy=folder, port=0), log=run_dir / "server.log") as server:
            policy = RemotePolicy(server.url)

    Args:
        settings: port 0 picks a free one; `url` says which.
        log: file for the server's output; its end is shown if the server does not come up.
        start_timeout_s: for importing torch and loading the weights.

    The server also stops when this process dies, however it dies.
    """

    def __init__(self, settings: Settings, log: Path, start_timeout_s: float = 300.0) -> None:
        port = settings.port or free_port(settings.host)
        self.settings = dataclasses.replace(settings, port=port, stop_with_stdin=True)
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait for /health. VlaError with the end of its log if it exits or takes too long."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "vla.cli", "serve", *flags(self.settings)]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout_s: float = 15.0) -> None:
        """SIGTERM, and SIGKILL if it has not ended in time. Harmless if it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def _wait_until_ready(self) -> None:
        client = PolicyClient(self.url, timeout_s=2.0, retries=0)
        deadline_s = time.monotonic() + self._start_timeout_s
        assert self._process is not None
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise problem(f"a server that exited with code {self._process.returncode}: {self._tail()}",
                              "a running server", f"see {self._log}")  # fmt: skip
            try:
                client.health()
                client.close()
                return
            except PolicyServerError:
                time.sleep(0.1)
        raise problem(f"no answer from {self.url} after {self._start_timeout_s:g} s: {self._tail()}",
                      "a running server", f"see {self._log}")  # fmt: skip

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARS:].strip()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def flags(settings: Settings) -> list[str]:
    """The command line that gives these settings; defaults are left out."""
    parts = []
    for field in dataclasses.fields(settings):
        value = vars(settings)[field.name]
        if value == field.default:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no-{name}")
        else:
            parts += [f"--{name}", os.fspath(value) if isinstance(value, Path) else str(value)]
    return parts
