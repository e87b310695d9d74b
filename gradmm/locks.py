"""One run at a time in an output folder, whatever ends the run.

Knows no run. The lock belongs to the operating system, which takes it back when the process ends, even by SIGKILL; a lock
file that a killed run has left keeps nobody out. Of the processes that share the work of one run the leading one holds it for
all.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradmm import files
from gradmm.errors import UserError

NAME = ".lock"


@contextmanager
def alone(folder: str | Path | None) -> Iterator[None]:
    """Hold a folder for as long as this context lasts, and take away what runs that were killed in it left unfinished.

    A folder that does not exist is made. One that cannot be written, such as finished results on a read-only disk, and one
    on a file system without locks are used unheld: reading needs no lock, and a write says itself what is wrong.

    Args:
        folder: None, a run in memory, holds nothing.

    Raises:
        UserError: another run holds the folder.
    """
    handle = None if folder is None else _acquire(files.as_path(folder, "the output folder"))
    if handle is None:
        yield
        return
    try:
        files.remove_unfinished(Path(folder))
        yield
    finally:
        (Path(folder) / NAME).unlink(missing_ok=True)  # while it is held: nobody may hold a file that lost its name
        os.close(handle)


def _acquire(folder: Path) -> int | None:
    """The open lock file, or None where there can be none."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                return handle
            os.close(handle)  # its last holder took the name away after we had opened it: take the next file of that name
        except BlockingIOError as error:
            os.close(handle)
            raise UserError(f"{folder} is in use by another run: wait for its end, or choose another output folder") from error
        except OSError:
            os.close(handle)
            return None
