"""The process of a server: its socket, and how it ends."""

import errno
import signal
import socket
from collections.abc import Callable

from ..errors import UsageError, import_optional
from .batcher import Batcher


def require_server() -> None:
    """Raise a `UsageError` where a library of servers is missing."""
    for name in ('fastapi', 'uvicorn', 'prometheus_client', 'python_multipart'):
        import_optional(name, 'servers', 'serve')


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address; port 0 is any that is free.

    Raises:
        UsageError: If another program has it, or there is no such address here.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port whose last server ended a moment ago; not one that a server has.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except (OSError, OverflowError) as error:
        bound.close()
        if getattr(error, 'errno', None) == errno.EADDRINUSE:
            raise UsageError(
                f'port {port} of {host} is in use: end the program that has it, or choose another '
                'with --port'
            ) from None
        raise UsageError(f'{host}, port {port}, cannot be listened to: {error}') from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a bound socket is found."""
    host, port = bound.getsockname()[:2]
    return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def serve(
    batcher: Batcher, bound: socket.socket, limits: object = None, tell: Callable = print
) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted is answered before this returns.

    Args:
        batcher (Batcher): The detector at work.
        bound (socket): See `bind`.
        limits (RequestLimits, optional): What a request may cost.
        tell (Callable): Told in one line where the server is.
    """
    import uvicorn

    from .app import build_app

    app = build_app(batcher, limits, lambda: tell(f'serving on {url_of(bound)}'))
    config = uvicorn.Config(app, log_level='warning', access_log=False, lifespan='on')
    # uvicorn raises the signal that ended it once more, at whatever was there before.
    kept = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
