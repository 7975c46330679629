"""The server without a browser: same bits, fair turns, bounded memory, and who may come in."""

import contextlib
import gc
import itertools
import json
import random
import socket as sockets
import struct
import sys
import threading
import urllib.error
import urllib.request
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from serving import serving
from tiny import MENU, tiny_pipeline, tiny_router
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as open_socket

from videoar.checks import Note
from videoar.client import Watched, connect
from videoar.core.schemes import KINDS
from videoar.data.fragments import encode
from videoar.generation.pipeline import VideoPipeline
from videoar.serve import app
from videoar.serve import engine as engines
from videoar.serve.engine import Engine
from videoar.serve.messages import Branch, Pause, Seek, Seen, Start

pytestmark = pytest.mark.xdist_group("serve")
PROMPT, OTHER = "a red ball", "a blue square"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Engine]]:
    """A server of the tiny model."""
    with serving(tiny_pipeline()) as found:
        yield found


@pytest.fixture
def url(served: tuple[str, Engine]) -> str:
    """Where the server of the tiny model is."""
    return served[0]


@pytest.fixture
def engine(served: tuple[str, Engine]) -> Engine:
    """Its engine."""
    return served[1]


@pytest.fixture
def wait() -> Callable[[Callable[[], object]], None]:
    """Wait until something holds."""

    def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
        pause = threading.Event()
        for _ in range(int(seconds / 0.05)):
            if holds():
                return
            pause.wait(0.05)
        raise AssertionError("it did not come to hold")

    return until


def _ask(url: str, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
    request = urllib.request.Request(url + path, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


def _begin(url: str, **fields: Any) -> str:
    body = json.dumps({"prompt": PROMPT, "units": "frame", **fields}).encode()
    return _ask(url, "POST", "/api/sessions", body, **{"Content-Type": "application/json"})[
        "session"
    ]


# ---------------------------------------------------------------- what is served


@pytest.mark.parametrize("units", ["frame", "cube:2x2x1/wavefront", "key-detail:3"])
def test_what_is_served_is_what_is_generated_offline(url: str, units: str) -> None:
    """To the bit, with a change on the way: the fragments are those of the offline frames."""
    with connect(url, PROMPT, units=units, seed=3) as watched:
        served, changed = [], None
        for fragment in watched.fragments():
            if any(event["type"] == "changed" for event in watched.events):
                changed = changed or len(served)
            served.append(fragment)
            watched.say(Seen(seconds=99))
            if len(served) == 3:
                watched.change(prompt=OTHER, units="chunk:2")
            if changed and len(served) == changed + 3:
                break
    offline = tiny_pipeline().session(PROMPT, units=units, seed=3)
    shown, generated = 0, []
    # The unit before which the change came is the one that the server says.
    for index, frames in enumerate(offline):
        place = {"first": shown, "index": index, "lossless": False}
        generated.append(encode(frames, fps=16, **place).body)
        shown += len(frames)
        if index + 1 == changed:
            break
    assert changed is not None
    assert served[:changed] == generated


def test_a_client_changes_what_follows(url: str, engine, monkeypatch) -> None:
    """Frames come as arrays; a change is answered, a wrong one refused in a sentence.

    Words that the model never read are said, too.
    """
    monkeypatch.setitem(engine.pipe.meta, "words", f"{PROMPT} {OTHER}".split())
    recorded = warnings.catch_warnings(record=True, action="always")
    with recorded as notes, connect(url, PROMPT, units="frame") as watched:
        events, shown = [], 0
        for frames in watched:
            shown += len(frames)
            events += watched.events
            if shown == 9:
                watched.change(id=7, prompt=f"{OTHER} zebra", recompute=True)
                watched.change(id=8, units="frames")
                watched.change(id=9, prompt="")
            if shown > 60:
                break
    assert frames.shape == (4, 64, 64, 3)
    kinds = [event["type"] for event in events]
    assert kinds[0] == "begin"
    changes = [event for event in events if event["type"] == "changed"]
    ((ids, (doubt,)),) = [(event["ids"], event["notes"]) for event in changes]
    assert ids == [7]
    assert "zebra" in doubt
    refused = {e["id"]: e["message"] for e in events if e["type"] == "refused"}
    assert "Did you mean frame" in refused[8]
    said = [str(n.message) for n in notes if n.category is Note]
    assert said == [refused[8], refused[9], doubt]
    assert "prompt is empty" in refused[9]
    units = [event for event in events if event["type"] == "unit"]
    assert units[5]["next"][0][0] == units[5]["cells"][0][0] + 1
    assert {run[0] for run in units[9]["cached"]} <= set(range(10))


def test_who_finds_no_server_is_told() -> None:
    """None that listens, and one that has gone while the session was watched."""
    with pytest.raises(ConnectionError, match="no server at"), connect("http://127.0.0.1:9", "a"):
        pass
    with serving(tiny_pipeline()) as (url, _):
        watching = connect(url, PROMPT, units="frame")
        next(iter(watching.__enter__()))
    watching.__exit__(None, None, None)


def test_back_and_reset_begin_another_way(url: str) -> None:
    """Each with a video of its own, from where it says."""
    with connect(url, PROMPT, units="frame") as watched:
        begun, shown = [], 0
        for frames in watched:
            shown += len(frames)
            begun += [e["seconds"] for e in watched.events if e["type"] == "begin"]
            if shown == 33:
                watched.say(Seek(seconds=1.1))
            if shown == 65:
                watched.say(Start(prompt=OTHER, seed=2, units="chunk:2"))
            if len(begun) == 3:
                break
    assert begun[0] == begun[2] == 0
    assert 1 <= begun[1] <= 1.1


def test_a_branch_is_a_session_of_its_own(url: str, engine, wait) -> None:
    """It goes on where the first one was, for whoever opens it."""
    with connect(url, PROMPT, units="frame") as watched:
        name = None
        for count, _ in enumerate(watched):
            found = [e["session"] for e in watched.events if e["type"] == "branched"]
            name = found[0] if found else name
            if count == 6:
                watched.say(Branch())
            if name and count > 9:
                break
        assert name != watched.name
        with open_socket(f"{url.replace('http', 'ws')}/api/sessions/{name}") as socket:
            begin = json.loads(socket.recv())
            assert begin["seconds"] > 1
            assert len(next(iter(Watched(socket, name)))) > 0
    _ask(url, "DELETE", f"/api/sessions/{name}")
    wait(lambda: not engine.lives)


def test_a_session_begins_with_a_picture_that_was_sent(url: str) -> None:
    """Decoded in another process; what is no picture, or too large, is a sentence."""
    picture = BytesIO()
    Image.new("RGB", (96, 64), (200, 30, 30)).save(picture, "PNG")
    with connect(url, PROMPT, units="frame") as watched:
        place = f"/api/sessions/{watched.name}/beginning"
        assert _ask(url, "PUT", place, picture.getvalue()) == {"frames": 1}
        watched.say(Start(prompt=PROMPT, given=True))
        second = (
            frames
            for frames in watched
            if any(e["type"] == "begin" and e["seconds"] == 0 for e in watched.events)
        )
        first, frames = next(second), next(second)
        assert first.shape == frames.shape
        assert np.abs(frames[0].astype(int) - (200, 30, 30)).max() < 12
        with pytest.raises(urllib.error.HTTPError, match="422") as error:
            _ask(url, "PUT", place, b"<html>" * 100)
        assert "cannot be used" in json.loads(error.value.read())["detail"]
        with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)):
            _ask(url, "PUT", place, bytes(app.MAX_UPLOAD + 1))


# ---------------------------------------------------------------- turns and memory


def test_sessions_take_turns(url: str) -> None:
    """Unit by unit: whoever began first is not ahead; more than the limit are refused."""
    with connect(url, PROMPT, units="frame") as one, connect(url, OTHER, units="frame") as two:
        both = zip(itertools.islice(one, 12), itertools.islice(two, 12), strict=True)
        counts = [(one._frames, two._frames) for _ in both]
        assert all(abs(first - second) <= 4 for first, second in counts)
    with serving(tiny_pipeline(), limit=1) as (place, _), connect(place, PROMPT):
        with pytest.raises(ValueError, match="1 sessions already: try again later"):
            connect(place, PROMPT).__enter__()
        with pytest.raises(urllib.error.HTTPError, match="503"):
            _begin(place)


def test_what_is_misspelt_is_named(url: str) -> None:
    """Before anything is sent; and a session that is not there is not ended."""
    with pytest.raises(TypeError, match="no keyword 'unit'; did you mean units"):
        connect(url, PROMPT, unit="frame").__enter__()
    with connect(url, PROMPT) as session, pytest.raises(TypeError, match="did you mean prompt"):
        session.change(promt=PROMPT)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _ask(url, "DELETE", "/api/sessions/none")


def test_who_does_not_read_is_not_computed_for(url: str, engine, wait) -> None:
    """A viewer that sees nothing costs a second of video and no more, however long it waits."""
    name = _begin(url)
    where = f"{url.replace('http', 'ws')}/api/sessions/{name}"
    with open_socket(where, close_timeout=0.5) as socket:
        live = engine.lives[name]
        wait(lambda: live.frames >= 16)
        made = live.frames
        wait(lambda: not live.waits)
        socket.send(json.dumps({"type": "seen", "seconds": 1e300}))
        wait(lambda: live.frames > made)
        wait(lambda: not live.waits)
        assert live.frames <= 2 * 16 + 8
    made = live.frames
    wait(lambda: live.viewer is None)
    assert not live.waits
    assert live.frames <= made + 4
    _ask(url, "DELETE", f"/api/sessions/{name}")


def test_a_session_that_nobody_watches_ends(url: str, engine, wait, monkeypatch) -> None:
    """And says so to who comes late; one that is watched stays."""
    name = _begin(url)
    with connect(url, PROMPT, units="frame") as watched:
        next(iter(watched))
        monkeypatch.setattr(engines, "IDLE", 0.05)
        wait(lambda: name not in engine.lives)
        assert watched.name in engine.lives
    with open_socket(f"{url.replace('http', 'ws')}/api/sessions/{name}") as socket:
        assert json.loads(socket.recv())["message"].startswith("the session has ended")


def test_a_session_that_stands_still_ends_with_a_word(url: str, monkeypatch) -> None:
    """A page that is paused, or in the background, does not keep a place for ever."""
    with connect(url, PROMPT, units="frame") as watched:
        shown = iter(watched)
        next(shown)
        watched.say(Pause(paused=True))
        monkeypatch.setattr(engines, "PAUSED", 0.5)
        with pytest.raises(ValueError, match="the session stood still"):
            list(shown)


def test_a_viewer_that_stops_reading_costs_no_memory(wait) -> None:
    """Through a real WebSocket whose buffers fill: computing stops, and few messages wait."""
    with serving(tiny_pipeline(), unsent=4096) as (url, engine), sockets.socket() as small:
        name, place = _begin(url), urlsplit(url)
        small.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        small.connect((place.hostname, place.port))
        where = f"ws://{place.netloc}/api/sessions/{name}"
        few = {"max_queue": 1, "ping_interval": None, "compression": None, "close_timeout": 0.1}
        with open_socket(where, sock=small, **few) as socket:
            live, made = engine.lives[name], [-1, 0]

            def stands() -> bool:  # though the viewer says that it has seen all
                socket.send(json.dumps({"type": "seen", "seconds": 1e300}))
                threading.Event().wait(0.2)
                made.append(live.frames)
                full = live.viewer.unsent >= engines.MAX_UNSENT
                return full and made[-1] == made[-5:][0]

            wait(stands)
            assert live.viewer.unsent <= engines.MAX_UNSENT + 16
            assert not live.waits


def test_a_picture_of_too_many_pixels_is_not_decoded(url: str) -> None:
    """A few bytes that would be gigabytes are refused by what their head says."""
    picture = BytesIO()
    Image.new("L", (64, 64)).save(picture, "PNG")
    bomb = bytearray(picture.getvalue())
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with connect(url, PROMPT, units="frame") as watched:
        with pytest.raises(urllib.error.HTTPError, match="422") as error:
            _ask(url, "PUT", f"/api/sessions/{watched.name}/beginning", bytes(bomb))
    assert "above 67 million pixels" in json.loads(error.value.read())["detail"]


def test_a_session_has_one_viewer(url: str) -> None:
    """Who comes later has it, and the first is told so, and not left waiting."""
    with connect(url, PROMPT, units="frame") as first:
        shown = iter(first)
        next(shown)
        with open_socket(f"{url.replace('http', 'ws')}/api/sessions/{first.name}") as socket:
            assert len(next(iter(Watched(socket, first.name)))) > 0
            with pytest.raises(ValueError, match="watched from elsewhere"):
                list(shown)


def test_sessions_that_come_and_go_leave_nothing(url: str, engine, wait) -> None:
    """Neither in the engine nor in what holds tensors."""
    gone = []
    for _ in range(8):
        with connect(url, PROMPT, units="frame") as watched:
            next(iter(watched))
            gone.append(weakref.ref(engine.lives[watched.name]))
    wait(lambda: not engine.lives)
    gc.collect()
    assert sum(live() is not None for live in gone) <= 1  # the loop of the engine has the last


# ---------------------------------------------------------------- hostile


def _hostile(rng: random.Random) -> Any:
    deep = rng.randint(10, 20_000)
    kind = rng.choice(
        ["start", "change", "pause", "seek", "seen", "branch", "begin", "", "x" * 999]
    )
    value = rng.choice(
        [None, True, -1, 2**70, -1e308, "NaN", "", "\0", "é" * 500, [], {}, [[]] * 99, "../../etc"]
    )
    name = rng.choice(["prompt", "units", "seed", "seconds", "paused", "id", "over", "given", "y"])
    return rng.choice(
        [
            rng.randbytes(rng.randint(0, 300)),
            "[" * deep,
            '{"a":' * deep,
            "1" * deep,
            f'{{"type": "{kind}", "{name}": NaN}}',
            f'{{"type": "{kind}", "{name}": 1e999}}',
            json.dumps({"type": kind, name: value}),
            json.dumps({"type": "change", name: value}),
            json.dumps({"type": "start", "prompt": PROMPT, name: value}),
            json.dumps({"type": rng.choice(["change", "seek"]), "units": "cube:1x999999x1"}),
            json.dumps({"type": "change", "num_inference_steps": rng.choice([10**9, 2**80, -1])}),
            "",
        ]
    )


def _too_large(message: str | bytes) -> bool:
    """Whether a server ends the connection without reading it."""
    return len(message if isinstance(message, bytes) else message.encode()) > 65_536


def test_hostile_messages_are_refused_and_others_do_not_notice(url: str, engine) -> None:
    """500 of them: the server stands, answers in sentences, and another session is to the bit."""
    rng, sent, answers = random.Random(0), 0, []
    with connect(url, OTHER, units="frame", seed=1) as other:
        served: list[bytes] = []
        bystander = other.fragments()
        while sent < 500:
            name = _begin(url)
            place = f"{url.replace('http', 'ws')}/api/sessions/{name}"
            with open_socket(place, max_queue=None, close_timeout=0.5) as socket:
                told = sorted((_hostile(rng) for _ in range(50)), key=_too_large)
                sent += len(told)
                try:
                    for message in told[: sum(not _too_large(each) for each in told)]:
                        socket.send(message)
                    socket.send("over")
                    while True:
                        got = socket.recv(timeout=30)
                        answers += [got] if isinstance(got, str) and "refused" in got else []
                        if isinstance(got, str) and "the message: Invalid JSON" in got:
                            break
                    for message in filter(_too_large, told):  # these end the connection
                        socket.send(message)
                except ConnectionClosed:
                    pass
            with contextlib.suppress(urllib.error.HTTPError):  # it has ended, by what was said
                _ask(url, "DELETE", f"/api/sessions/{name}")
            served.append(next(bystander))
            other.say(Seen(seconds=99))
    assert answers
    assert all("Traceback" not in answer and "\\n" not in answer for answer in answers)
    frames = itertools.islice(tiny_pipeline().session(OTHER, units="frame", seed=1), len(served))
    shown = 0
    for index, (part, ours) in enumerate(zip(served, frames, strict=True)):
        assert part == encode(ours, fps=16, first=shown, index=index, lossless=False).body
        shown += len(ours)
    assert engine.is_alive()


def test_only_who_was_let_in_comes_in(url: str) -> None:
    """Another origin, another name for this machine, no token or a wrong one: not allowed."""
    assert _ask(url, "GET", "/api/messages")["control"]
    bad = [{"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}]
    for headers in bad:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            _ask(url, "GET", "/api/messages", **headers)
    name = _begin(url)
    with pytest.raises(InvalidStatus):
        open_socket(
            f"{url.replace('http', 'ws')}/api/sessions/{name}", origin="http://evil.example"
        )
    _ask(url, "DELETE", f"/api/sessions/{name}")
    with serving(tiny_pipeline(), token="secret") as (place, _):
        for query in ("", "?token=", "?token=secre", "?token=secrets", "?x=secret"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                _ask(place, "GET", f"/api/messages{query}")
        assert _ask(place, "GET", "/api/messages?token=secret")["event"]
        with connect(place, PROMPT, token="secret", units="frame") as watched:
            assert len(next(iter(watched))) == 1


@pytest.mark.parametrize("units", ["antigravity:Flying", "os:Rows/frames=2"])
def test_no_module_is_imported_for_a_client(url: str, units: str) -> None:
    """The command line takes classes of one's own; from outside that would run code."""
    with pytest.raises(urllib.error.HTTPError, match="422") as error:
        _begin(url, units=units)
    assert "none that a client may name" in json.loads(error.value.read())["detail"]
    with connect(url, PROMPT, units="frame") as watched:
        watched.change(id=1, units=units)
        with pytest.raises(Note, match="none that a client may name"):  # here it is an error
            for _ in watched:
                pass
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "path", ["/../cli/main.py", "/page/app.js", "/etc/passwd", "/app.js/..", "/%2e%2e/engine.py"]
)
def test_no_path_is_opened(url: str, path: str) -> None:
    """Three files are shown, and no name that is sent is ever that of a file."""
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _ask(url, "GET", path)


def test_the_model_says_what_can_be_asked_for(url: str) -> None:
    """Words that it knows, its kinds of unit, and how it samples if nothing else is said."""
    assert _ask(url, "GET", "/api/model")["prompts"] == []  # it never learned any
    toy = VideoPipeline.from_pretrained("toy")
    model = Engine(toy).model()
    assert model.prompts
    assert not toy.unknown_words(" ".join(model.prompts))
    assert model.kinds == toy.meta["units"]
    assert (model.units, model.num_inference_steps) == ("cube:1x2x2", toy.sampling.steps)


def test_units_that_a_router_chooses_are_offered_and_served() -> None:
    """Beside the other kinds; every unit says of which kind it is, and the frames are the same."""
    routed, kinds, served = tiny_pipeline(), list[str](), list[bytes]()
    routed.router = tiny_router()
    assert Engine(routed).model().kinds == [*KINDS, "auto"]
    offline = itertools.islice(routed.session(PROMPT, units="auto", seed=3), 8)
    with serving(routed) as (url, _), connect(url, PROMPT, units="auto", seed=3) as watched:
        for fragment in watched.fragments():
            watched.say(Seen(seconds=99))
            kinds += [event["units"] for event in watched.events if event["type"] == "unit"]
            if len(served := [*served, fragment]) == 8:
                break
    shown = 0
    for index, frames in enumerate(offline):
        place = {"first": shown, "index": index, "lossless": False}
        assert served[index] == encode(frames, fps=16, **place).body
        shown += len(frames)
    assert set(kinds) <= set(MENU)
    assert len(set(kinds)) > 1


def test_the_interface_is_described(url: str) -> None:
    """OpenAPI for requests, JSON schema for messages; nothing of it from elsewhere."""
    paths = _ask(url, "GET", "/openapi.json")["paths"]
    assert {"/api/sessions", "/api/messages", "/api/sessions/{session}/beginning"} <= paths.keys()
    with pytest.raises(urllib.error.HTTPError, match="422") as error:
        _begin(url, seed="x")
    assert json.loads(error.value.read())["detail"].startswith("body.seed: Input should be a valid")
    with pytest.raises(urllib.error.HTTPError, match="422") as error:
        _begin(url, units="cbe")
    assert "Unknown units 'cbe'" in json.loads(error.value.read())["detail"]
