"""How do tests get a network of their own, with slow links, delays, cuts and partitions?

`NetworkLab` makes network namespaces with iproute2: one per host, joined by a bridge in one more. Rates come
from `tc tbf`, partitions from links that are taken down. The kernel's netem is not everywhere, so delay
and cut connections come from `TcpProxy`, a process in the host's namespace through which all connections
to the host go:

    lab.inside("a"): what is started there, processes and threads, lives in the namespace of host a
    host a:  45.77.0.2:PROXY_PORT --proxy--> 127.0.0.1:PEER_PORT, where the peer listens

The proxy alone:

    python -m tests.netns --listen 45.77.0.2:5000 --target 127.0.0.1:4000 --delay-seconds 0.025
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

PEER_PORT = 4000
PROXY_PORT = 5000
_SUBNET = "45.77.0"  # no packet leaves the lab; libp2p's relays do not serve at addresses meant for LANs
_PREFIX = "cold"  # of a namespace's name: cold-PID-HOST
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_COMMAND_SECONDS = 20.0
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_BUFFER_BYTES = 64 * 1024


@dataclass(frozen=True)
class Host:
    name: str
    namespace: str
    address: str  # on the lab's subnet
    port: str  # its end of the link in the bridge's namespace


@dataclass
class NetworkLab:
    """Owns namespaces, their processes and proxies. Leaving it removes all of it, also after a failure."""

    hosts: dict[str, Host] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _switch: str = ""

    def __enter__(self) -> NetworkLab:
        _remove_stale()
        with ExitStack() as stack:
            self._switch = _add_namespace(stack, "switch")
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add_host(self, name: str) -> Host:
        number = len(self.hosts) + 2
        namespace = _add_namespace(self._stack, name)
        host = Host(name, namespace, f"{_SUBNET}.{number}", f"p{number}")
        link = ("type", "veth", "peer", "name", host.port, "netns", self._switch)
        _ip("-n", namespace, "link", "add", "eth0", *link)
        _ip("-n", namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        _ip("-n", self._switch, "link", "set", host.port, "master", "br0")
        _ip("-n", self._switch, "link", "set", host.port, "up")
        self.hosts[name] = host
        return host

    def limit_rate(self, name: str, *, upload_mbit: float, download_mbit: float) -> None:
        """What the host can send, and what it can be sent."""
        host = self.hosts[name]
        _shape(host.namespace, "eth0", upload_mbit)
        _shape(self._switch, host.port, download_mbit)

    def cut(self, *names: str) -> None:
        """These hosts reach nobody, and nobody reaches them, until `heal`."""
        for name in names:
            _ip("-n", self._switch, "link", "set", self.hosts[name].port, "down")

    def split(self, *names: str) -> None:
        """These hosts reach each other only, and so do the rest, until `heal`."""
        _ip("-n", self._switch, "link", "add", "br1", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br1", "up")
        for name in names:
            _ip("-n", self._switch, "link", "set", self.hosts[name].port, "master", "br1")

    def heal(self) -> None:
        for host in self.hosts.values():
            _ip("-n", self._switch, "link", "set", host.port, "master", "br0")
            _ip("-n", self._switch, "link", "set", host.port, "up")
        bridges = _ip("-n", self._switch, "-o", "link", "show", "type", "bridge")
        if " br1:" in bridges:
            _ip("-n", self._switch, "link", "delete", "br1")

    @contextmanager
    def inside(self, name: str) -> Iterator[Host]:
        """Move this thread to the host: sockets, threads and processes that begin in the block stay there."""
        host = self.hosts[name]
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(Path("/run/netns") / host.namespace)
            try:
                yield host
            finally:
                _set_namespace(home)
        finally:
            os.close(home)

    def add_proxy(
        self, name: str, *, delay_seconds: float = 0.0, cut_every_seconds: float = 0.0, seed: int = 0
    ) -> subprocess.Popen[bytes]:
        """In front of the host's PEER_PORT, at PROXY_PORT; SIGSTOP stalls all connections to the host."""
        host = self.hosts[name]
        flags = ["--listen", f"{host.address}:{PROXY_PORT}", "--target", f"127.0.0.1:{PEER_PORT}"]
        flags += ["--delay-seconds", str(delay_seconds), "--cut-every-seconds", str(cut_every_seconds)]
        command = [sys.executable, "-m", "tests.netns", *flags, "--seed", str(seed)]
        with self.inside(name):
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._stack.callback(_kill, process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        return process


def skip_unless_possible() -> None:
    """Skips the calling test, with the reason, where namespaces cannot be made."""
    if sys.platform != "linux" or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs Linux and iproute2 (`ip` and `tc`): apt-get install iproute2")
    name = f"{_PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"needs network namespaces (root or CAP_SYS_ADMIN): {made.stderr.strip()}")
    _ip("netns", "delete", name)


def listening_address() -> str:
    """Where a peer behind a proxy listens: it is to be reached in its own namespace only."""
    return f"/ip4/127.0.0.1/tcp/{PEER_PORT}"


def announced_address(host: Host) -> str:
    """Where others find a peer behind a proxy."""
    return f"/ip4/{host.address}/tcp/{PROXY_PORT}"


def _add_namespace(stack: ExitStack, name: str) -> str:
    namespace = f"{_PREFIX}-{os.getpid()}-{name}"
    _ip("netns", "add", namespace)
    stack.callback(_delete_namespace, namespace)
    return namespace


def _delete_namespace(namespace: str) -> None:
    """With its processes: links vanish with the last of them."""
    pids = subprocess.run(
        ["ip", "netns", "pids", namespace],
        capture_output=True,
        text=True,
        timeout=_COMMAND_SECONDS,
        check=False,
    )
    for pid in map(int, pids.stdout.split()):
        if pid != os.getpid():  # a thread of ours may be in it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.CalledProcessError):
        _ip("netns", "delete", namespace)


def _remove_stale() -> None:
    """Namespaces of test runs that were killed."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        parts = name.split("-")
        if parts[0] == _PREFIX and len(parts) == 3 and not psutil.pid_exists(int(parts[1])):
            _delete_namespace(name)


def _shape(namespace: str, device: str, mbit: float) -> None:
    # A burst of 10 ms, at least ten packets; what waits longer than 200 ms is dropped, as in a home router.
    burst_bytes = max(15_000, int(mbit * 1e6 / 8 * 0.01))
    rate = ("rate", f"{mbit}mbit", "burst", str(burst_bytes), "latency", "200ms")
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *rate)


def _enter(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _set_namespace(descriptor)
    finally:
        os.close(descriptor)


def _set_namespace(descriptor: int) -> None:
    """Of the calling thread only (setns(2)); os.setns comes with Python 3.12."""
    assert _LIBC is not None
    if _LIBC.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "setns")


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    if ended.returncode != 0:
        raise subprocess.CalledProcessError(ended.returncode, command, ended.stdout, ended.stderr.strip())
    return ended.stdout


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(_COMMAND_SECONDS)
    if process.stdout is not None:
        process.stdout.close()


# --- the proxy


class TcpProxy:
    """Forwards connections, each byte `delay_seconds` later; now and then it breaks all of them."""

    def __init__(self, target: tuple[str, int], delay_seconds: float) -> None:
        self._target, self._delay_seconds = target, delay_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target_reader, target_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, target_writer}
        self._start(self._forward(reader, target_writer))
        self._start(self._forward(target_reader, writer))

    def cut_all(self) -> None:
        """A reset, as by a router that has forgotten them."""
        for writer in self._writers:
            connection = writer.get_extra_info("socket")
            if connection.fileno() >= 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)  # 16 MB on the line
        sender = asyncio.create_task(self._send(waiting, writer))
        try:
            while True:
                data = await reader.read(_BUFFER_BYTES)
                await waiting.put((loop.time() + self._delay_seconds, data))
                if not data:
                    await sender
                    return
        except OSError:
            writer.transport.abort()
        finally:
            sender.cancel()
            self._writers.discard(writer)

    async def _send(self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_at, data = await waiting.get()
            await asyncio.sleep(max(0.0, due_at - loop.time()))
            if not data:
                writer.close()
                return
            writer.write(data)
            with contextlib.suppress(OSError):
                await writer.drain()


async def _serve(args: argparse.Namespace) -> None:
    import random

    proxy = TcpProxy(_host_and_port(args.target), args.delay_seconds)
    host, port = _host_and_port(args.listen)
    server = await asyncio.start_server(proxy.on_connection, host, port)
    print("listening", flush=True)
    generator = random.Random(args.seed)
    async with server:
        while True:
            await asyncio.sleep(generator.uniform(0.5, 1.5) * (args.cut_every_seconds or 3600.0))
            if args.cut_every_seconds:
                proxy.cut_all()


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--delay-seconds", type=float, default=0.0)
    parser.add_argument("--cut-every-seconds", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
