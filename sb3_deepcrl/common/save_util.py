import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove_leftovers(path: pathlib.Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote this file."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        pid = leftover.name.split(".")[-3]
        if pid.isdecimal() and not _is_running(int(pid)):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: str | pathlib.Path, suffix: str) -> Iterator[pathlib.Path]:
    """
    Write a file as a whole or not at all: the body of the ``with`` statement writes to a temporary file in the same folder,
    which takes the place of the real one when it is complete. Whatever happens before, the previous file stays as it was.

    :param path: Where the file goes. Missing folders are created; if it is a folder, ``_2`` is
        appended to its name (as Stable-Baselines3 does)
    :param suffix: Ending to append if the path has none, with its dot
    :return: Path of the temporary file
    """
    path = pathlib.Path(path)
    if path.suffix == "":
        path = path.with_name(path.name + suffix)
    if path.is_dir():
        path = path.with_name(path.name + "_2")
    # Write through a link, not over it
    path = pathlib.Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "posix":
        _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
