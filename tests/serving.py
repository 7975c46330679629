"""A server in this process, for the tests that speak to one; without the extra they are skipped."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from videoar.generation.pipeline import VideoPipeline

pytest.importorskip("fastapi", reason="the extra `app` is not installed")

import uvicorn

from videoar.serve.app import SOCKETS, make_app
from videoar.serve.engine import Engine


@contextmanager
def serving(
    pipe: VideoPipeline, *, token: str = "", limit: int = 8, unsent: int | None = None
) -> Iterator[tuple[str, Engine]]:
    """Serve a model; return where, and the engine. The system keeps `unsent` bytes for a viewer."""
    engine = Engine(pipe, limit=limit)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as bound:
        if unsent is not None:  # connections have it from the socket that accepts them
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, unsent)
        app = make_app(engine, token=token)
        config = uvicorn.Config(app, log_level="error", lifespan="on", **SOCKETS)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                thread.join(0.02)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join()
            engine.join()
