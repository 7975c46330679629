"""`videoar serve`."""

import secrets
import socket

from videoar.checks import import_extra
from videoar.cli import options
from videoar.cli.generate import loaded
from videoar.cli.progress import say

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(args: options.Serve) -> None:
    """Load the model, say where the page is, and serve until Ctrl-C."""
    uvicorn = import_extra("uvicorn", "serving needs more: `pip install -e '.[app]'` ({})")
    # Bound before the model is loaded, so that a port in use is told at once.
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        bound = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        raise ValueError(
            f"{args.host} cannot be listened to at port {args.port} ({error.strerror}): choose"
            " another --port, or --host"
        ) from error
    with bound:
        from videoar.serve.app import SOCKETS, make_app
        from videoar.serve.engine import Engine

        pipe = loaded(args, "base", "lora", "preset", "dtype", "device", "graphs", "compile")
        token = "" if args.host in LOOPBACK else secrets.token_urlsafe(24)
        app = make_app(Engine(pipe, limit=args.sessions), token=token)
        host = f"[{args.host}]" if ":" in args.host else args.host
        query = f"?token={token}" if token else ""
        say(f"open http://{host}:{bound.getsockname()[1]}/{query} in a browser; Ctrl-C ends it")
        config = uvicorn.Config(app, log_level="warning", **SOCKETS)
        uvicorn.Server(config).run(sockets=[bound])
