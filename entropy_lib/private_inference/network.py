"""What a network adds to computation, and a wire to try it on: a loopback relay that delays and records."""

from __future__ import annotations

import math
import queue
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True)
class Network:
    """seconds = computation + bytes / bandwidth + rounds × latency.

    `bandwidth` in bits a second and one direction at a time; `latency` in seconds one way. A round is one message
    that the other party waits for.
    """

    name: str
    bandwidth: float
    latency: float

    def __post_init__(self):
        for name, kind in (("bandwidth", "positive"), ("latency", "not negative and finite")):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not (value > 0 if name == "bandwidth" else 0 <= value < math.inf):
                raise ValueError(f"{name} must be a number, {kind}, got {value!r}")

    def seconds(self, communicated: float, rounds: float) -> float:
        """What `communicated` bytes (both ways) in `rounds` messages add, in seconds."""
        return communicated * 8 / self.bandwidth + rounds * self.latency


NETWORKS = {
    network.name: network
    for network in (
        Network("LAN", bandwidth=1e9, latency=0.5e-3),
        Network("WAN", bandwidth=1e8, latency=40e-3),  # the paper's 100 Mbit/s and 80 ms, as the time of a ping
    )
}


class Relay:
    """Listens on loopback in front of another loopback port and passes bytes on, `delay` seconds later.

    `received` collects what went to the target, if `record`. Use as a context manager: its sockets close at the end.
    """

    def __init__(self, port: int, delay: float = 0.0, record: bool = False):
        self.target, self.delay, self.record, self.received = port, delay, record, bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for open_socket in self._sockets:
            with suppress(OSError):  # the other end has closed it
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                target = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                caller.close()  # nobody listens there yet: the engine tries again
                continue
            self._sockets += [caller, target]
            for source, sink, recorded in ((caller, target, self.record), (target, caller, False)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                line = queue.SimpleQueue()
                threading.Thread(target=self._read, args=(source, line, recorded), daemon=True).start()
                threading.Thread(target=self._write, args=(sink, line), daemon=True).start()

    def _read(self, source: socket.socket, line: queue.SimpleQueue, recorded: bool) -> None:
        data = b"open"
        while data:
            try:
                data = source.recv(1 << 18)
            except OSError:
                data = b""
            if recorded:
                self.received += data
            line.put((time.monotonic() + self.delay, data))

    def _write(self, sink: socket.socket, line: queue.SimpleQueue) -> None:
        while True:
            due, data = line.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                return
