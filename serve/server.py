"""`vla serve`: answer observations over HTTP from a policy directory.

vla serve --policy runs/demo/merged --quantization int8 --port 8000
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI

from vla.serve.app import make_app
from vla.types import VlaError, problem

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Settings of `vla serve`."""

    policy: Path
    """Policy directory, or OWNER/NAME of one on the Hub."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for other machines (then set api_key_env)."""
    port: int = 8000
    """TCP port; 0 takes any free one."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Weights as trained, 8-bit, or 4-bit; /metadata says what was really done."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of what is not quantized."""
    unnorm_key: str | None = None
    """Dataset whose statistics turn tokens into actions; None takes the policy's default."""
    temperature: float = 0.0
    """0 is greedy; above, each query's `key` decides the draw."""
    api_key_env: str | None = None
    """Environment variable that holds the API key; None serves everyone who can reach the port."""
    threads: int = 0
    """CPU threads the model computes with; 0: torch's own choice."""
    max_batch: int = 16
    """Observations per model call; concurrent requests share a call."""
    batch_window_ms: float = 3.0
    """Wait for further observations while requests overlap; a lone client never waits."""
    max_waiting: int = 256
    """Observations that may wait for the model; above, requests get 503."""
    max_body_mb: float = 64.0
    """Larger request bodies are refused."""
    stop_with_stdin: bool = False
    """Stop when standard input closes, so that the server never outlives the program that started it."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise problem(f"port {self.port}", "0..65535", "pass --port 8000")
        if self.max_batch < 1 or self.max_waiting < 1:
            raise problem(f"max_batch {self.max_batch}, max_waiting {self.max_waiting}", "1 or more", "correct them")
        if self.batch_window_ms < 0 or self.max_body_mb <= 0:
            raise problem(f"batch_window_ms {self.batch_window_ms}, max_body_mb {self.max_body_mb}",
                          "a window of 0 or more, a body limit above 0", "correct them")  # fmt: skip


def run(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish the requests in flight.

    Raises VlaError before the policy is loaded if the port is taken or the API key is missing.
    """
    with reserve_port(settings.host, settings.port) as listener:
        api_key = _api_key(settings.api_key_env)
        if api_key is None and settings.host not in LOOPBACK:
            print(
                f"warning: anyone who reaches {settings.host} can use this policy; set --api-key-env", file=sys.stderr
            )
        app = _load_app(settings, api_key)
        print(_greeting(settings, listener.getsockname()[1], api_key is not None), flush=True)
        serve(app, listener, stop_with_stdin=settings.stop_with_stdin)


def reserve_port(host: str, port: int) -> socket.socket:
    """A bound socket. VlaError naming port and remedy if it is in use, or the host is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # The protocol must be TCP's number and not 0: asyncio turns Nagle's delay off only for sockets that name it.
        listener = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
    except socket.gaierror as error:
        raise problem(f"host {host!r} ({error})", "an address of this machine", "pass --host 127.0.0.1") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        listener.close()
        raise _port_problem(host, port, error) from error


def serve(app: FastAPI, listener: socket.socket, stop_with_stdin: bool = False) -> None:
    """Run the application on a bound socket until a signal; returns normally then."""
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(2048)
    except OSError as error:
        raise _port_problem(host, port, error) from error
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75, lifespan="on",
                            timeout_graceful_shutdown=10)  # fmt: skip
    server = uvicorn.Server(config)
    if stop_with_stdin:
        threading.Thread(target=_stop_at_end_of_input, args=(server,), daemon=True).start()
    previous = signal.signal(signal.SIGTERM, _interrupt)  # uvicorn raises the signal again once it has shut down
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _load_app(settings: Settings, api_key: str | None) -> FastAPI:
    import torch  # slow: the port and the settings are checked first

    from vla.policy import load_policy

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    print(f"loading {settings.policy} ...", flush=True)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    policy = load_policy(
        settings.policy, device=settings.device, dtype=settings.dtype, quantization=settings.quantization,
        unnorm_key=settings.unnorm_key, temperature=settings.temperature,
    )  # fmt: skip
    return make_app(
        policy, api_key=api_key, max_body_mb=settings.max_body_mb, max_batch=settings.max_batch,
        batch_window_ms=settings.batch_window_ms, max_waiting=settings.max_waiting,
        quantization=settings.quantization,
    )  # fmt: skip


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise problem(f"no environment variable {variable}", "the API key in it", f"export {variable}=...")
    return os.environ[variable]


def _port_problem(host: str, port: int, error: OSError) -> VlaError:
    if error.errno == errno.EADDRINUSE:
        return problem(f"port {port}, which is in use on {host}", "a free port",
                       f"stop the other server, or pass --port {port + 1 if port < 65535 else 8000}")  # fmt: skip
    return problem(f"{host}:{port} ({error.strerror})", "an address and port this user may listen on",
                   "pass --host 127.0.0.1 --port 8000")  # fmt: skip


def _greeting(settings: Settings, port: int, has_key: bool) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = f' -H "Authorization: Bearer ${settings.api_key_env}"' if has_key else ""
    return (
        f"serving {settings.policy} at {url}   (try it: {url}/docs, stop it: Ctrl-C)\n"
        f"  curl{key} {url}/metadata\n"
        f"  curl{key} {url}/v1/act -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"instruction": "pick up the cup", "images": {{"CAMERA": "\'$(base64 -w0 frame.png)\'"}}}}\''
    )


def _interrupt(_number: int, _frame: FrameType | None) -> Any:
    raise KeyboardInterrupt


def _stop_at_end_of_input(server: uvicorn.Server) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.read: its lock, held at exit, aborts the interpreter
        pass
    server.should_exit = True
