"""The page, its WebSocket, and who may come in."""

import asyncio
import hmac
import importlib.resources
import re
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from videoar.data.video import Frames
from videoar.data.workers import perform
from videoar.generation.pipeline import VideoPipeline
from videoar.serve.decoding import decoder
from videoar.serve.engine import Engine, Full, Live
from videoar.serve.messages import Control, Event, Refused, Start, plain

FILES = {"/": "index.html", "/app.js": "app.js", "/style.css": "style.css"}
KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
MAX_UPLOAD = 32 * 2**20
"""Bytes of a picture or clip."""
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
CONTROL: TypeAdapter[Any] = TypeAdapter(
    Annotated[Control, Field(discriminator="type")], config=STRICT
)
POLICY = "default-src 'self'; media-src blob:; img-src 'self' blob: data:"
SOCKETS = {"ws_max_size": 2**16, "ws_ping_timeout": 120.0}
"""Limits of uvicorn: bytes of a message, and seconds in which a viewer that is there answers."""
NONE = "there is no such session: begin one"
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Door:
    """Lets in who has the token, from a page of this server.

    Without a token the server listens to its own machine alone; then the name that a browser asked
    for must be one of that, so that no other name can be pointed here.
    """

    def __init__(self, app: Any, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and not self.allows(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 4403})
            else:
                words = "not allowed: use the address that `videoar serve` printed"
                await Response(words, status_code=403)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def allows(self, scope: Any) -> bool:
        """Say whether a request may come in."""
        asked = HTTPConnection(scope)
        host, origin = asked.headers.get("host", ""), asked.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return False
        if not self.token:
            return re.sub(r":\d+$", "", host) in LOCAL
        given = asked.query_params.get("token", "")
        known = hmac.compare_digest(given.encode(), self.token.encode())
        return known or scope["path"] in FILES  # which say nothing of a session


class Connection:
    """A viewer at the other end of a WebSocket."""

    def __init__(self, socket: WebSocket):
        self.socket, self.loop = socket, asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, Event | bytes]] = asyncio.Queue()
        self.way = 0

    @property
    def unsent(self) -> int:
        return self.queue.qsize()

    def send(self, way: int, message: Event | bytes) -> None:
        self.way = way
        with suppress(RuntimeError):  # the server has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (way, message))

    async def pump(self) -> None:
        """Send what waits."""
        while True:
            way, message = await self.queue.get()
            if way != self.way:
                continue
            if isinstance(message, bytes):
                await self.socket.send_bytes(message)
            else:
                await self.socket.send_json(plain(message))


def make_app(engine: Engine, *, token: str = "") -> FastAPI:
    """Return the application around an engine.

    Args:
        engine: runs as long as the application does.
        token: what the address must say; none for a server that only its own machine reaches.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.end()

    # The pages of FastAPI on its interface would load scripts from elsewhere.
    app = FastAPI(title="VideoAR", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Door, token=token)
    for path, name in FILES.items():
        app.get(path, include_in_schema=False)(partial(_file, name))

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValueError)
    async def refused(_: Request, error: Exception) -> Response:
        """Answer what a request cannot have with the reason, be it of its form or its values."""
        wrong = isinstance(error, RequestValidationError)
        says = sentence(error.errors()) if wrong else str(error)
        return JSONResponse({"detail": says}, status_code=503 if isinstance(error, Full) else 422)

    _add_sessions(app, engine)
    app.websocket("/api/sessions/{session}")(partial(_watched, engine))
    return app


def _file(name: str) -> Response:
    data = (importlib.resources.files("videoar.serve") / "page" / name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
    return Response(data, media_type=KINDS[name.rpartition(".")[2]], headers=headers)


async def _called(engine: Engine, function: Any, *args: Any) -> Any:
    """Call a function in the thread of the engine."""
    return await asyncio.wrap_future(engine.call(function, *args))


def _add_sessions(app: FastAPI, engine: Engine) -> None:
    decoding = asyncio.Lock()

    @app.post("/api/sessions", status_code=201)
    async def begin(start: Start) -> dict[str, str]:
        """Begin a session; its video comes over the WebSocket `/api/sessions/{session}`."""
        return {"session": await _called(engine, engine.open, start)}

    @app.put("/api/sessions/{session}/beginning")
    async def give(session: str, request: Request) -> dict[str, int]:
        """Give a picture or clip, as the body, for a `Start` that says `given`."""
        if (live := engine.lives.get(session)) is None:
            raise HTTPException(404, NONE)
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MAX_UPLOAD:
                raise HTTPException(413, f"the file is larger than {MAX_UPLOAD >> 20} MiB: cut it")
        async with decoding:
            frames = await asyncio.to_thread(decoded, bytes(data), engine.pipe)
        live.given = {"video": frames}
        return {"frames": len(frames)}

    @app.delete("/api/sessions/{session}", status_code=204)
    async def end(session: str) -> None:
        """End a session."""
        if await _called(engine, engine.lives.pop, session, None) is None:
            raise HTTPException(404, NONE)

    app.get("/api/model")(engine.model)

    @app.get("/api/messages")
    async def messages() -> dict[str, Any]:
        """Return the JSON schema of what a viewer and the server say on the WebSocket."""
        return {"control": CONTROL.json_schema(), "event": TypeAdapter(Event).json_schema()}


async def _watched(engine: Engine, socket: WebSocket, session: str) -> None:
    """Show a session to a viewer until it leaves."""
    await socket.accept()
    viewer, live = Connection(socket), engine.lives.get(session)
    if live is None:
        gone = Refused(message="the session has ended: begin another", fatal=True)
        await socket.send_json(plain(gone))
        await socket.close()
        return
    await _called(engine, live.watch, viewer)
    tasks = [asyncio.create_task(each) for each in (viewer.pump(), listened(engine, live, viewer))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if live.viewer is viewer:
            await _called(engine, live.watch, None)


def sentence(errors: Sequence[Any]) -> str:
    """Say what is wrong with a message, of the first that was found."""
    place = ".".join(map(str, errors[0]["loc"]))
    return f"{place or 'the message'}: {errors[0]['msg']}"


async def listened(engine: Engine, live: Live, viewer: Connection) -> None:
    """Pass on what a viewer says, until it leaves."""
    while True:
        message = await viewer.socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        try:
            asked = CONTROL.validate_json(message.get("text") or "")
        except ValidationError as error:
            viewer.send(viewer.way, Refused(message=sentence(error.errors())))
            continue
        engine.call(engine.obey, live, asked)


def decoded(data: bytes, pipe: VideoPipeline) -> Frames:
    """Decode a picture or clip in a process of its own, as `prepare` does, to the model's size.

    Raises:
        ValueError: it is none, too large, or takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "given"
        file.write_bytes(data)
        job = (file, pipe.height, pipe.width, float(pipe.sampling.fps))
        events = perform([job], decoder, workers=1, timeout=20, preload="videoar.serve.decoding")
        with closing(events):
            event = next(event for event in events if event.kind != "beat")
    if event.kind == "lost" or isinstance(event.value, str):
        raise ValueError(str(event.value))
    return event.value
