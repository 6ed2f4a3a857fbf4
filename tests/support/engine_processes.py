"""The processes of a server, found in /proc."""

from __future__ import annotations

from pathlib import Path

from benchmarks.local_server import LocalServer


def engine_pids(server: LocalServer) -> list[int]:
    """Processes below the server's that have the engine's connection: children of the fork server."""
    parents = _parents()
    children = [pid for pid, parent in parents.items() if parent == server.process.pid]
    return [pid for pid, parent in parents.items() if parent in children]


def descriptors(pid: int) -> list[str]:
    """What a process has open: files, pipes and sockets by the kernel's names."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(path.readlink()))
        except OSError:
            continue
    return found


def process_state(pid: int) -> str:
    """The kernel's letter: R runs, S sleeps, T is stopped, Z is dead and not yet reaped. Empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _parents() -> dict[int, int]:
    """Of each process that lives the one that it came from."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    return parents
