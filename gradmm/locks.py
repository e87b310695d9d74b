"""One run at a time in an output folder, whatever ends the run.

Knows no run. The lock is `filelock`'s: the operating system takes it back when the process ends, even by SIGKILL, and a
lock file that a killed run has left keeps nobody out. Of the processes that share the work of one run the leading one
holds it for all.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gradmm import files
from gradmm.errors import UserError

NAME = ".lock"
logging.getLogger("filelock").setLevel(logging.INFO)  # below, it logs addresses in memory, which differ from run to run


@contextmanager
def lock(folder: str | Path | None) -> Iterator[None]:
    """Hold a folder for as long as this context lasts, and take away what runs that were killed in it left unfinished.

    A folder that does not exist is made. One that cannot be written, such as finished results on a read-only disk, and
    one on a file system without locks are used unheld: reading needs no lock, and a write says itself what is wrong.

    Args:
        folder: None, a run in memory, holds nothing.

    Raises:
        UserError: another run holds the folder.
    """
    path = None if folder is None else files.as_path(folder, "the output folder")
    held = None if path is None else _acquire(path)
    if path is None or held is None:
        yield
        return
    with held:
        try:
            files.remove_unfinished(path)
            yield
        finally:
            with suppress(OSError):  # while it is held: a later run takes no lock on a file without a name
                (path / NAME).unlink()


def _acquire(folder: Path) -> AbstractContextManager | None:
    """The lock, already held, to be let go at the end of the context; None where there can be none."""
    try:
        return FileLock(folder / NAME).acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another run: wait for its end, or choose another output folder"
        ) from error
    except OSError:
        return None
