"""Stands between JAX's client and process 0's coordinator, so that the client does not see how process 0 dies.

JAX's client ends its process with a stack trace that names nobody in the moment in which the coordinator's connection
ends, and nothing turns that off. Through a relay it sees no more than silence, and `watch` says what happened. Little
goes this way (addresses, barriers, a sign of life now and then), none of it devices' data. Knows no JAX.
"""

import contextlib
import os
import socket
import threading

HERE = "127.0.0.1"
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # as gRPC looks for them


def start(host: str, port: int) -> str:
    """The address at which JAX's client of this process finds what listens at `host`:`port`."""
    if any(map(os.environ.get, PROXIES)):  # gRPC would ask a proxy even for this host
        around_proxies = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy", "")
        os.environ["no_grpc_proxy"] = f"{around_proxies},{HERE}".lstrip(",")
    server = socket.create_server((HERE, 0))
    threading.Thread(target=_serve, args=[server, (host, port)], daemon=True, name="relay").start()
    return f"{HERE}:{server.getsockname()[1]}"


def _serve(server: socket.socket, coordinator: tuple[str, int]) -> None:
    kept = []  # a socket that nobody holds is closed
    while True:
        client, _ = server.accept()
        try:
            upstream = socket.create_connection(coordinator)
        except OSError:  # it does not listen yet, and the client tries again
            client.close()
            continue
        kept.append((client, upstream))
        for source, sink in ((client, upstream), (upstream, client)):
            threading.Thread(target=_copy, args=[source, sink], daemon=True, name="relay").start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Until either ends, which the other does not hear."""
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            sink.sendall(content)
