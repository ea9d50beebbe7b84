"""The one exception whose message is meant for the person at the keyboard, and what an exception was raised from."""

import errno
from collections.abc import Iterator

__all__ = ["UserError", "barred", "chain", "unwritten"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WAY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class UserError(ValueError):
    """Something the user can put right: a wrong path, a data set of another shape, a foreign checkpoint.

    The message is one sentence that names what was found, what was expected and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


def chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from, newest first."""
    seen = set[int]()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def unwritten(error: BaseException) -> str | None:
    """What a full disk, or a limit on what may be written there, has kept from being written; None if nothing did."""
    for link in chain(error):
        if isinstance(link, OSError) and link.errno in _NO_ROOM:
            return f"{link.filename or 'a file'} could not be written ({link.strerror})"
    return None


def barred(error: BaseException) -> str | None:
    """Which place, and why, could be neither read nor written as it was wanted; None if it was none of that."""
    for link in chain(error):
        if isinstance(link, OSError) and link.errno in _NO_WAY and link.filename is not None:
            return f"{link.filename} cannot be used ({link.strerror})"
    return None
