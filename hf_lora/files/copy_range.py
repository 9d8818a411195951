"""Copying a range of bytes from one open file to another without bringing it into this process."""

import errno
import os

_BLOCK = 1 << 20
_CANNOT = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
    errno.ETXTBSY,
}
"""What a kernel or a file system says that does not do it so."""


def copy_range(source: int, start: int, target: int, at: int, count: int) -> None:
    """Copy bytes from a place in one file to a place in another.

    The kernel copies, where it can: on some file systems no byte is written at all.

    Args:
        source: A descriptor that can be read.
        start: Where the range begins in it.
        target: A descriptor that can be written.
        at: Where the range goes.
        count: How many bytes.

    Raises:
        OSError: The disk is full, or the source is shorter than that.
    """
    done = _by_kernel(source, start, target, at, count)
    while done < count:
        block = os.pread(source, min(_BLOCK, count - done), start + done)
        if not block:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        write_all(target, memoryview(block), at + done)
        done += len(block)


def write_all(target: int, data: memoryview, at: int) -> None:
    """Write all of some bytes at a place in a file."""
    while data.nbytes:
        written = os.pwrite(target, data, at)
        data, at = data[written:], at + written


def read_all(source: int, data: memoryview, start: int) -> None:
    """Fill some memory with a file's bytes from a place on.

    Raises:
        OSError: The file ends before that.
    """
    while data.nbytes:
        count = os.preadv(source, [data], start)
        if not count:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        data, start = data[count:], start + count


def _by_kernel(source: int, start: int, target: int, at: int, count: int) -> int:
    """Return how many bytes the kernel has copied."""
    copy = getattr(os, "copy_file_range", None)
    done = 0
    while copy is not None and done < count:
        try:
            copied = copy(source, target, count - done, start + done, at + done)
        except OSError as error:
            if error.errno in _CANNOT:
                break
            raise
        if not copied:  # some say so of files that they cannot do it for
            break
        done += copied
    return done
