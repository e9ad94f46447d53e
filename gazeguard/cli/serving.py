"""Command that serves a guarded model: serve."""

from __future__ import annotations

import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from gazeguard.cli.app import Outcome, app, command
from gazeguard.cli.console import STOPPED, Verbosity, configure, next_step, note, verbosity
from gazeguard.cli.options import BatchOption, GuardOptions
from gazeguard.errors import InputError, extra

if TYPE_CHECKING:
    from gazeguard.serving.model import Model

KEY = "GAZEGUARD_API_KEY"  # the environment variable, so that the key stands in no list of processes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIMITS, MIB = "Limits", 2**20


@command(app, panel="Serve")
def serve(
    guarded: GuardOptions,
    host: Annotated[
        str, typer.Option("--host", help="Address of the server; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of the server.")] = 8000,
    batch_size: BatchOption = 8,
    queue: Annotated[int, typer.Option(min=64, help="Captions that may wait; more get 429.", rich_help_panel=LIMITS)] = 256,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to read a request, and to answer it.", rich_help_panel=LIMITS)
    ] = 60.0,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.", rich_help_panel=LIMITS)] = 32,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest image, in pixels.", rich_help_panel=LIMITS)] = 32_000_000,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest caption that may be asked for, in tokens.", rich_help_panel=LIMITS)
    ] = 1024,
) -> Outcome:
    """Serve a guarded model over HTTP, in the forms of OpenAI's and LiteLLM's interfaces.

    Routes: /v1/check, /v1/chat/completions, LiteLLM's Generic Guardrail, /healthz, /metrics, /docs. Requests need the key
    of the environment variable GAZEGUARD_API_KEY if it is set. SIGTERM and Ctrl-C finish what waits, and end.
    """
    try:
        import uvicorn

        from gazeguard.serving.app import create_app
        from gazeguard.serving.limits import Limits
        from gazeguard.serving.process import ModelProcess
    except ImportError as error:
        raise InputError(
            f"gazeguard serve needs {error.name}, which is not installed. Install it: {extra('serve')}."
        ) from error
    key = os.environ.get(KEY) or None
    if key is None and host not in LOOPBACK:
        note(f"anybody who reaches {host} may use the server: {KEY} is not set.")
    limits = Limits(max_body * MIB, max_pixels, timeout, queue, batch_size, max_new_tokens)
    bound = _bind(host, port)  # before the model, which takes its time
    worker = ModelProcess(partial(_load, guarded, verbosity()), batch_size)
    config = uvicorn.Config(
        create_app(worker, guarded.model or "lab", limits, key),
        log_level="warning",
        timeout_graceful_shutdown=int(timeout) + 1,
    )
    address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    next_step(f"{address}/docs has the requests; curl {address}/healthz says whether it is ready.")
    try:
        uvicorn.Server(config).run(sockets=[bound])
    except KeyboardInterrupt:
        return Outcome("the same command starts the server again.", STOPPED + 2)
    return Outcome("the same command starts the server again.")


def _bind(host: str, port: int) -> socket.socket:
    """A socket with the server's address, on which nothing is accepted before the model is loaded."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if os.name == "posix":  # elsewhere it would share the port with another server
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InputError(f"Port {port} of {host} cannot be taken: {error.strerror}. Choose others: --port, --host.") from error
    return bound


def _load(guarded: GuardOptions, level: Verbosity) -> Model:
    """The model, in the process that it has to itself."""
    configure(*level)
    from gazeguard.serving.model import Model

    return Model(guarded.guard())
