"""What removes the p2p daemon and its sockets when this process is gone, even by SIGKILL?

hivemind's end of the daemon's socket stays in /tmp when its process is killed, and a daemon that is
frozen at that moment stays, too. So the sockets lie in a folder of their own, readable by nobody else, and a
shell waits for the end of a pipe whose other end only this process holds: the kernel closes it
however we end. The shell then removes the folder and kills its own process group, which is the daemon's;
as the shell is a member of it, the number of the group cannot belong to anybody else by then.
Where the shell is killed together with us, the next start on this machine removes the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_PREFIX = f"cold-swarm-{os.getuid()}-"
_MAX_FOLDER_BYTES = 60  # the kernel takes 107 bytes for a socket's whole path, macOS 103
_LOCK = "lock"  # held for as long as the owner of the folder lives
_SCRIPT = 'trap "" HUP INT TERM; while read -r _; do :; done; rm -rf -- "$1"; kill -s KILL 0'


class Janitor:
    """Owns the folder of the sockets and the process group of the daemon, from `start` to `close`."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._lock: int | None = None
        self._shell: subprocess.Popen[bytes] | None = None

    def start(self) -> Path:
        """Raises OSError when there is no room for a folder, or no shell."""
        parent = _parent()
        remove_stale(parent)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = _lock(self.folder)
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "cold-swarm-janitor", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
            cwd="/",
        )
        return self.folder

    @property
    def process_group(self) -> int:
        """Of the daemon; 0, a new one, when somebody has killed the shell."""
        return self._shell.pid if self._shell is not None and self._shell.poll() is None else 0

    def close(self, timeout_seconds: float) -> None:
        """Kill what is left in the process group and remove the folder; may be called again."""
        if self._shell is not None and self._shell.stdin is not None:
            self._shell.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._shell.wait(timeout_seconds)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self.folder = self._lock = self._shell = None


class DaemonLoop(asyncio.SelectorEventLoop):
    """Starts children in the janitor's process group: what a terminal's Ctrl-C kills is another one.

    The daemon must not die of it before our goodbye.
    """

    def __init__(self, janitor: Janitor) -> None:
        super().__init__()
        self._janitor = janitor
        self._children: list[asyncio.SubprocessTransport] = []
        self._kept: set[asyncio.Task[Any]] = set()
        self.set_task_factory(self._kept_task)

    def _kept_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
    ) -> asyncio.Task[Any]:
        """asyncio keeps no strong reference, nor does hivemind: a DHT search would be collected at random."""
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        return task

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        options = {**kwargs, "stdin": subprocess.DEVNULL, "process_group": self._janitor.process_group}
        transport, protocol = await super().subprocess_exec(*args, **options)
        self._children.append(transport)
        return transport, protocol

    async def end_children(self, timeout_seconds: float) -> None:
        """By SIGTERM; by SIGKILL those that do not follow in time (one may be frozen)."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            ends_at = self.time() + timeout_seconds
            for child in self._children:
                if child.get_returncode() is None:
                    with contextlib.suppress(ProcessLookupError):
                        child.send_signal(number)
            while any(child.get_returncode() is None for child in self._children) and self.time() < ends_at:
                await asyncio.sleep(0.01)
        for child in self._children:
            child.close()
        self._children.clear()


def remove_stale(parent: Path) -> None:
    """Folders whose owner is gone."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # removed meanwhile, or just being made: without a lock as yet
            descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its owner lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _lock(folder: Path) -> int:
    """A file that is locked from the first moment at which others can see it."""
    descriptor = os.open(folder / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(folder / "new", folder / _LOCK)
    return descriptor


def _parent() -> Path:
    """The machine's folder for temporary files, or /tmp where its name leaves no room for a socket's."""
    parent = Path(tempfile.gettempdir())
    return parent if len(os.fsencode(parent)) + len(_PREFIX) + 8 <= _MAX_FOLDER_BYTES else Path("/tmp")
