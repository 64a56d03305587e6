"""Links between processes of one machine, each with a bandwidth of its own.

Every place is a network namespace with one Ethernet port; all ports meet in a bridge.  What a
place sends passes a token bucket (``tc … tbf``), so its link is full duplex, and as fast as it is
told to be however many others send; or one bucket for each of the others (``tc … htb``), as if it
had a wire to each.  It takes Linux, root, ``ip`` and ``tc``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
"""The port of every place; what ``GLOO_SOCKET_IFNAME`` names."""
_NEW_NETWORK = 0x40000000
_TOOL_LIMIT_S = 10.0
_BUCKET = "128kb"
"""What passes at once after a pause: two of the kernel's segments."""
_SETTINGS = (
    "tcp_congestion_control=reno",
    "tcp_slow_start_after_idle=0",
    # Connections take turns: as much of each waits at the port, and no whole message of one.
    "tcp_limit_output_bytes=131072",
    # Windows that a slow way back for acknowledgements does not exhaust.
    "tcp_rmem=4096 4194304 16777216",
    "tcp_wmem=4096 4194304 16777216",
)


class NoLinksError(RuntimeError):
    """This machine cannot shape links; the message says why."""


@dataclass(frozen=True)
class Place:
    """A network namespace, held by a process."""

    pid: int

    def enter(self) -> None:
        """Move this thread, and threads that it starts from now on, into the namespace."""
        handle = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(handle, _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(handle)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    def run(self, *command: str) -> None:
        """Run a command in the namespace."""
        run("nsenter", "-t", str(self.pid), "-n", *command)

    def shape(self, kind: str, *settings: str) -> None:
        """Add to what shapes the port."""
        self.run("tc", kind, "add", "dev", INTERFACE, *settings)


def run(*command: str) -> None:
    """Run a tool.

    Raises:
        NoLinksError: it failed.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_TOOL_LIMIT_S
    )
    if done.returncode:
        raise NoLinksError(f"{' '.join(command)}: {done.stderr.strip()}")


def obstacle() -> str:
    """Why links cannot be shaped here; "" where they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces take root"
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]
    return f"there is no {', '.join(missing)}" if missing else ""


@contextlib.contextmanager
def shaped(
    bits_per_s: Sequence[float], seconds: float = 900.0, own_wires: bool = False
) -> Iterator[list[Place]]:
    """One place per rate, joined while the context is entered, and for ``seconds`` at most.

    ``own_wires``: a place sends to each of the others at its rate, to all of them at once.

    Raises:
        NoLinksError: this machine cannot.
    """
    reason = obstacle()
    if reason:
        raise NoLinksError(f"links cannot be shaped: {reason}")
    holders: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(len(bits_per_s) + 1):
            holders.append(subprocess.Popen(["unshare", "-n", "sleep", str(seconds)]))
        for holder in holders:
            _wait_for_namespace(holder)
        middle, *places = (Place(holder.pid) for holder in holders)
        middle.run("ip", "link", "add", "bridge0", "type", "bridge")
        middle.run("ip", "link", "set", "bridge0", "up")
        for number, (place, rate) in enumerate(zip(places, bits_per_s, strict=True)):
            others = [n for n in range(len(places)) if own_wires and n != number]
            _join(middle, place, number, rate, others)
        yield places
    finally:
        for holder in holders:
            holder.kill()
        for holder in holders:
            holder.wait(_TOOL_LIMIT_S)


def _address(number: int) -> str:
    return f"10.83.0.{number + 1}"


def _wait_for_namespace(holder: subprocess.Popen[bytes]) -> None:
    own = os.readlink("/proc/self/ns/net")
    limit = time.monotonic() + _TOOL_LIMIT_S
    while time.monotonic() < limit and holder.poll() is None:
        with contextlib.suppress(OSError):
            program = Path(f"/proc/{holder.pid}/comm").read_text().strip()
            if program == "sleep" and os.readlink(f"/proc/{holder.pid}/ns/net") != own:
                return
        time.sleep(0.01)
    raise NoLinksError("links cannot be shaped: unshare -n gave no namespace")


def _join(
    middle: Place, place: Place, number: int, bits_per_s: float, others: Sequence[int]
) -> None:
    port, peer = f"port{number}", str(place.pid)
    middle.run("ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", peer)
    middle.run("ip", "link", "set", port, "master", "bridge0", "up")
    place.run("ip", "link", "set", "lo", "up")
    place.run("ip", "address", "add", f"{_address(number)}/24", "dev", INTERFACE)
    place.run("ip", "link", "set", INTERFACE, "up")
    rate, bucket = ("rate", f"{bits_per_s:.0f}bit"), ("burst", _BUCKET)
    if not others:
        place.shape("qdisc", "root", "handle", "1:", "tbf", *rate, *bucket, "latency", "2s")
    else:
        place.shape("qdisc", "root", "handle", "1:", "htb")
    for other in others:
        wire = f"1:{other + 1}"
        place.shape(
            "class", "parent", "1:", "classid", wire, "htb", *rate, *bucket, "cburst", _BUCKET
        )
        to = ("match", "ip", "dst", _address(other))
        place.shape("filter", "parent", "1:", "protocol", "ip", "u32", *to, "flowid", wire)
    for setting in _SETTINGS:
        place.run("sysctl", "-qw", f"net.ipv4.{setting}")


__all__ = ["INTERFACE", "NoLinksError", "Place", "obstacle", "shaped"]
