"""Directories and files that nobody else can have written: the cache's file-system rules.

Whatever the cache executes was reached through these functions.  They walk by directory
descriptor, never by path twice, so what was checked is what is read: a link swapped in between
changes nothing.  Inside the cache root there are no symbolic links, every owner is this user and
nobody else may read or write.  The root itself may be a link (home directories on clusters often
are), but its target must be this user's and writable by nobody else.

An attacker with this user's own uid is out of scope: such a process needs no cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "REJECTED_PREFIX",
    "CacheWarning",
    "Untrusted",
    "discard",
    "is_same",
    "open_directory",
    "open_root",
    "read_file",
    "remove",
    "sync_directory",
    "write_file",
]

REJECTED_PREFIX = ".rejected-"
_OTHERS_MAY_DO_ANYTHING = 0o077
_OTHERS_MAY_WRITE = 0o022


class CacheWarning(UserWarning):
    """The cache refused something that it found, or could not keep what was compiled."""


class Untrusted(Exception):
    """A check failed: what lies at ``path`` must not be executed.

    A verdict that the store acts on; users never see it raised.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


@contextlib.contextmanager
def open_root(root: Path) -> Iterator[int]:
    """Descriptor of the cache root.

    Raises:
        FileNotFoundError: there is none yet.
        Untrusted: somebody else owns it or may write to it.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _check(os.fstat(descriptor), root, stat.S_IFDIR, _OTHERS_MAY_WRITE)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_directory(name: str, parent: int, path: Path) -> Iterator[int]:
    """Descriptor of the directory ``name`` inside the descriptor ``parent``.

    ``path`` is how messages call it.

    Raises:
        FileNotFoundError: there is none.
        Untrusted: a link, no directory, somebody else's, or open to others.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    descriptor = _open_checked(name, parent, path, flags, stat.S_IFDIR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_file(name: str, parent: int, path: Path, *, max_bytes: int) -> bytes:
    """The content of the file ``name`` inside ``parent``, read once.

    Raises:
        Untrusted: missing, a link, no regular file, somebody else's, open to others, or longer
            than ``max_bytes``.
    """
    # O_NONBLOCK: a FIFO in the file's place must not hang the reader.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = _open_checked(name, parent, path, flags, stat.S_IFREG)
    except FileNotFoundError:
        raise Untrusted(path, "is missing") from None
    with open(descriptor, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise Untrusted(path, f"is longer than its {max_bytes} bytes")
    return content


def write_file(name: str, parent: int, content: bytes) -> None:
    """Create ``name`` inside ``parent``, 0600, and wait until it is on the disk.

    Raises:
        OSError: it exists, the disk is full, the file system is read-only …
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(descriptor: int) -> None:
    """Make renames and new names in the directory durable, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as obstacle:
        if obstacle.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def discard(name: str, parent: int) -> bool:
    """Take ``name`` out of ``parent`` in one step, then delete it; links are not followed.

    Returns:
        Whether all of it is deleted; what could not be is out of the way all the same.

    Raises:
        OSError: it could not be moved out of the way.
    """
    aside = f"{REJECTED_PREFIX}{os.urandom(8).hex()}"
    try:
        os.rename(name, aside, src_dir_fd=parent, dst_dir_fd=parent)
        remove(aside, parent)
    except FileNotFoundError:  # another process was faster
        return True
    except OSError:
        if _exists(name, parent):
            raise
        return False  # verify() reports the rest and prune() tries again
    return True


def is_same(name: str, parent: int, directory: int) -> bool:
    """Whether ``name`` in ``parent`` is what was opened as ``directory``: nobody moved it since."""
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(directory))


def remove(name: str, parent: int) -> None:
    """Delete a file, a link (not its target) or a whole directory.

    Raises:
        OSError: something in it could not be deleted.
    """
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        shutil.rmtree(name, dir_fd=parent)
    else:
        os.unlink(name, dir_fd=parent)


def _exists(name: str, parent: int) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open_checked(name: str, parent: int, path: Path, flags: int, kind: int) -> int:
    """Open ``name`` and hold the opened thing, not the name, to the rules."""
    # The first look is for the message only: opening a link or a stranger's file fails anyway,
    # but with an errno that does not say which of the two it was.
    look = os.stat(name, dir_fd=parent, follow_symlinks=False)
    _check(look, path, kind, _OTHERS_MAY_DO_ANYTHING)
    try:
        descriptor = os.open(name, flags, dir_fd=parent)
    except OSError as obstacle:
        if obstacle.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM):
            raise  # gone meanwhile, or out of descriptors: no verdict on what lies there
        raise Untrusted(path, f"cannot be opened ({obstacle.strerror})") from obstacle
    try:
        _check(os.fstat(descriptor), path, kind, _OTHERS_MAY_DO_ANYTHING)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(status: os.stat_result, path: Path, kind: int, forbidden_mode: int) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise Untrusted(path, "is a symbolic link")
    if stat.S_IFMT(status.st_mode) != kind:
        wanted = "directory" if kind == stat.S_IFDIR else "regular file"
        raise Untrusted(path, f"is not a {wanted}")
    if status.st_uid != os.getuid():
        raise Untrusted(path, f"belongs to uid {status.st_uid}, not to this user")
    if status.st_mode & forbidden_mode:
        mode = stat.S_IMODE(status.st_mode)
        raise Untrusted(path, f"has mode {mode:04o}, which lets other users in")
