"""From a model's name to a server that listens, and its end."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.adapters.adapted import load
from trimtab.controls import without_controls
from trimtab.data.manifests import read_class_names
from trimtab.errors import TrimtabError
from trimtab.precision import return_large_blocks
from trimtab.serve.http.connections import Unread, watched
from trimtab.serve.http.guards import LOOPBACK_NAMES
from trimtab.serve.http.options import ServeOptions

logger = logging.getLogger("trimtab.serve")

_KEEP_ALIVE = 10  # seconds that a connection stays open without a request, or with the beginning of one
_BACKLOG = 1024
_LOOKED_UP = 5  # pictures of the index, at the start


def serve(
    model: str,
    *,
    index: str | Path | None = None,
    pictures: str | Path | None = None,
    classes: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_env: str | None = None,
    allow_hosts: Sequence[str] = (),
    root_path: str = "",
    options: ServeOptions | None = None,
    device: str = "auto",
    tell: Callable[[str], None] = print,
) -> None:
    """Serve a model until Ctrl-C, SIGTERM or SIGHUP; requests that came before are answered first.

    Args:
        model: what `trimtab.load` takes.
        index: an index folder that this model made.
        pictures: the folder of the indexed pictures, to show small copies of them.
        classes: a file of names for `/v1/classify`, one a line.
        port: 0 takes any that is free.
        api_key_env: name of the environment variable with the key that clients must show.
        allow_hosts: further names that a server for this machine alone answers to, such as that of a proxy on it.
        root_path: where a proxy has the server, such as ``/clip``; it takes that away before it asks.
        tell: gets lines for people.

    Raises:
        TrimtabError: the port is taken, the key is not set, model, index or classes cannot be used, there is no folder
            for temporary files, or a package of the extra `serve` is missing.
    """
    _check_temporary_folder()
    return_large_blocks()
    options = options or ServeOptions()
    if root_path and not root_path.startswith("/"):
        raise TrimtabError(f"--root-path {root_path} must begin with /, such as /clip")
    if wrong := [name for name in allow_hosts if not re.fullmatch(r"[\w.-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", name)]:
        raise TrimtabError(f"--allow-host {wrong[0]!r} must be a name alone, without scheme, brackets or port")
    uvicorn = _import_uvicorn()
    key = _key(api_key_env)
    names = None if classes is None else read_class_names(classes)
    if pictures is not None and index is None:
        raise TrimtabError("--pictures needs --index: pictures are shown as what a search finds")
    listener = bind(host, port)  # before minutes are spent on loading
    host_names = called(listener, allow_hosts)
    unread = Unread()
    try:
        if allow_hosts and host_names is None:
            raise TrimtabError(f"--allow-host is for a server of this machine alone: with --host {host} all names do")
        _log_to_stderr()
        app, service = _build(model, index, pictures, names, options, device, key, host_names, root_path, unread)
        config = uvicorn.Config(
            app,
            http=watched(begin_within=_KEEP_ALIVE, read_within=options.timeout, unread=unread),
            log_config=None,
            access_log=False,
            lifespan="on",
            limit_concurrency=options.connections + 1,  # uvicorn counts the one that asks as well
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(options.timeout)),
            server_header=False,
        )
        address = _address(listener)
        tell(f"{service.name} on {address} (Ctrl-C stops it)")
        if key is None and host_names is None:
            logger.warning("whoever reaches this machine may use the server: set --api-key-env to ask for a key")
        _run(uvicorn.Server(config), listener)
        tell("stopped")
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address; it does not listen yet.

    Raises:
        TrimtabError: with what is in the way.
    """
    if not 0 <= port <= 65535:
        raise TrimtabError(f"--port {port} must be between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise TrimtabError(f"--host {host!r} is not an address of this machine ({error})") from error
    found = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share the port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.set_inheritable(True)
    except OSError as error:
        found.close()
        reasons = {
            errno.EADDRINUSE: "is in use: stop the program that has it, or choose another with --port",
            errno.EACCES: "needs rights that this user has not: choose one above 1023 with --port",
            errno.EADDRNOTAVAIL: "is not of this machine: choose another --host, such as 127.0.0.1 or 0.0.0.0",
        }
        what = f"{host}" if error.errno == errno.EADDRNOTAVAIL else f"port {port} on {host}"
        raise TrimtabError(f"{what} {reasons.get(error.errno or 0, f'cannot be used ({error})')}") from error
    return found


def _build(
    model_name: str,
    index_folder: str | Path | None,
    pictures: str | Path | None,
    classes: list[str] | None,
    options: ServeOptions,
    device: str,
    key: str | None,
    host_names: frozenset[str] | None,
    root_path: str,
    unread: Unread,
) -> tuple[Any, Any]:
    from trimtab.serve.http.app import create_app
    from trimtab.serve.http.service import Service, check_index
    from trimtab.serve.http.thumbnails import Thumbnails
    from trimtab.serve.index import Index

    index = None if index_folder is None else Index.open(index_folder)
    model = load(model_name, device=device)
    thumbnails = None
    if index is not None and index_folder is not None:
        check_index(index, model, index_folder)
        if pictures is not None:
            if not Path(pictures).is_dir():
                raise TrimtabError(f"--pictures {pictures}: no such folder")
            thumbnails = Thumbnails(index.find, pictures)
            first = [index.metadata(row) for row in range(min(_LOOKED_UP, len(index)))]
            if not any(map(thumbnails.path_of, first)):
                image = first[0].get("image")
                logger.warning(
                    "--pictures %s: the first items of the index cannot be shown, as %s; name the folder that "
                    "`trimtab embed` was given, or that of its table (what lies in tar files is not shown)",
                    pictures, f"{Path(pictures) / image} is not there" if image else "they have no pictures",
                )  # fmt: skip
    service = Service(
        model, name=served_name(model_name), options=options, classes=classes, index=index, thumbnails=thumbnails
    )
    app = create_app(service, api_key=key, host_names=host_names, root_path=root_path, unread=unread)
    return app, service


def served_name(model: str) -> str:
    """What clients call a model: the last part of its name or path."""
    return Path(model).resolve().name if Path(model).exists() else model


def _run(server: Any, listener: socket.socket) -> None:
    """Run until a signal; uvicorn raises it once more when all is answered, which then only ends the waiting."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:  # as `nohup` leaves it
        signal.signal(hang_up, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    if not server.started:
        raise TrimtabError("the server did not start; the lines above say why")


def _check_temporary_folder() -> None:
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:  # torch's compiler, which models bring in, asks for one as it is imported
        raise TrimtabError(
            "there is no folder for temporary files: mount one at /tmp (docker run --tmpfs /tmp), or set TMPDIR to a "
            "folder that can be written"
        ) from error


def _import_uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise TrimtabError(f"serving needs more packages ({error.name}): pip install 'trimtab[serve]'") from error
    return uvicorn


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise TrimtabError(f"--api-key-env {variable}: this environment variable is not set, or is empty")
    if not value.isascii() or any(letter.isspace() for letter in value):
        raise TrimtabError(f"the key in {variable} must be ASCII without spaces, since it is sent in a header")
    return value


def called(listener: socket.socket, more: Sequence[str] = ()) -> frozenset[str] | None:
    """The only names that a server which this machine alone can reach answers to, so that no web page elsewhere reaches
    it by a name of its own; None for one that others can reach."""
    host = listener.getsockname()[0]
    return LOOPBACK_NAMES | {host, *map(str.lower, more)} if ipaddress.ip_address(host).is_loopback else None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _log_to_stderr() -> None:
    """Faults with their tracebacks, each time; and no line for every long text of every request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s"))
    for name in ("trimtab.serve", "uvicorn.error"):
        chosen = logging.getLogger(name)
        chosen.addHandler(handler)
        chosen.setLevel(logging.WARNING)
        chosen.propagate = False
    logging.getLogger("trimtab.towers.dual_encoder").setLevel(logging.ERROR)


class _Plain(logging.Formatter):
    """Without what steers a terminal: names of files and what clients send stand in messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return without_controls(super().format(record))
