"""A client of `videoar serve` in Python: frames as they come, and what follows changed on the way.

with connect("http://127.0.0.1:8000", "a red ball moves left") as session:
    for frames in session:
        session.change(prompt="a blue ball moves up")
"""

import json
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import av
import numpy as np
from jaxtyping import UInt8

from videoar.checks import Note, check_names
from videoar.serve.messages import Change, Control, Seen, Start, plain


class Watched:
    """A session on a server: iterate for newly finished frames, `frames height width 3`.

    A change that is refused is warned of, and the stream goes on as it was; so are words and
    settings that the model's training did not know.
    """

    def __init__(self, socket: Any, name: str):
        self.socket, self.name = socket, name
        self.events: list[dict[str, Any]] = []
        """All messages since the last frames, but the video."""
        self._head, self._frames, self._fps = b"", 0, 16

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        for fragment in self.fragments():
            with av.open(BytesIO(self._head + fragment), "r") as container:
                shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            self._frames += len(shown)
            yield np.stack(shown)
            self.say(Seen(seconds=self._frames / self._fps))
            self.events.clear()

    def fragments(self) -> Iterator[bytes]:
        """Yield fragments of MP4 as they are; the head is the first after each beginning.

        Raises:
            ValueError: the server says that the session is over.
        """
        for message in self.socket:
            if isinstance(message, bytes):
                if not self._head:
                    self._head = message
                    continue
                yield message
                continue
            event = json.loads(message)
            self.events.append(event)
            if event["type"] == "begin":
                self._head, self._frames, self._fps = b"", 0, event["fps"]
            if event.get("fatal"):
                raise ValueError(event["message"])
            refused = [event["message"]] if event["type"] == "refused" else []
            for line in [*refused, *event.get("notes", ())]:
                warnings.warn(line, Note, stacklevel=3)

    def say(self, message: Control) -> None:
        """Send a message, such as `Pause` or `Seek`."""
        self.socket.send(json.dumps(plain(message)))

    def change(self, **changes: Any) -> None:
        """Ask for something else: the fields of `Change`."""
        check_names(changes, vars(Change()))
        self.say(Change(**changes))


@contextmanager
def connect(url: str, prompt: str, *, token: str = "", **options: Any) -> Iterator[Watched]:
    """Begin a session on a server, and end it.

    Args:
        url: as `http://127.0.0.1:8000`.
        prompt: what to show.
        token: of a server that is not on this machine.
        options: fields of `Start`.

    Raises:
        ValueError: the server refuses it.
        ConnectionError: there is no server.
    """
    from websockets.sync.client import connect as open_socket

    check_names(options, vars(Start(prompt=prompt)))
    query, body = f"?token={token}", json.dumps(plain(Start(prompt=prompt, **options))).encode()
    where = f"{url.rstrip('/')}/api/sessions"
    kind = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(where + query, body, kind)) as answer:
            name = json.load(answer)["session"]
    except HTTPError as error:
        raise ValueError(json.load(error)["detail"]) from error
    except URLError as error:
        raise ConnectionError(f"no server at {url} ({error.reason}): `videoar serve`") from error
    socket = f"ws://{urlsplit(url).netloc}/api/sessions/{name}{query}"
    try:
        # Who reads slowly has the answers to its own pings in the queue, and that to a goodbye.
        how: dict[str, Any] = {"max_size": None, "max_queue": None, "ping_interval": None}
        with open_socket(socket, **how) as opened:
            yield Watched(opened, name)
    finally:
        end = urllib.request.Request(f"{where}/{name}{query}", method="DELETE")
        with suppress(URLError):  # the server is gone, and the session with it
            urllib.request.urlopen(end).close()
