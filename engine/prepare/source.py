"""What sources hand to the writer: samples whose image is still where it was, or refusals with a reason."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..data.members import UNSAFE_EXTENSIONS, is_unsafe_path
from ..data.schema import BadSample, Reason, Sample

# No photograph has so large a file; reading it whole would be the harm.
_MAX_FILE = 1 << 29


class Extent(NamedTuple):
    """A file, or ``size`` bytes of it from ``offset`` on."""

    path: str
    offset: int = 0
    size: int = -1


class Refused(NamedTuple):
    """Something that is left out."""

    source: str
    reason: str
    detail: str = ""


@dataclass(slots=True)
class Item:
    """One sample to write. ``sample.image`` is empty: ``image`` says where it is; so for ``arrays`` (.npy)."""

    source: str
    sample: Sample
    image: Extent
    arrays: dict[str, Extent] = field(default_factory=dict)


def read_extent(extent: Extent) -> bytes:
    """The bytes of an extent.

    Raises:
        BadSample: missing, unreadable, not a regular file, too large, or shorter than it should be.
    """
    try:
        with open(extent.path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSample(Reason.NOT_A_FILE, extent.path)
            size = status.st_size if extent.size < 0 else extent.size
            if size > _MAX_FILE:
                raise BadSample(Reason.IMAGE_TOO_LARGE, f"{size} bytes")
            file.seek(extent.offset)
            data = file.read(size)
    except FileNotFoundError:
        raise BadSample(Reason.MISSING_MEMBER, f"no file {extent.path}") from None
    except IsADirectoryError:
        raise BadSample(Reason.NOT_A_FILE, extent.path) from None
    except (OSError, ValueError) as error:
        raise BadSample(Reason.UNREADABLE, str(error)) from None
    if len(data) < size:
        raise BadSample(Reason.TRUNCATED_TAR if extent.size >= 0 else Reason.UNREADABLE, "shorter than expected")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    """A named pipe among the images must not stop the run."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def path_inside(root: Path, name: str, allow_outside: bool) -> Path:
    """The file that a table or folder names, which must lie below ``root`` after links are followed.

    Raises:
        BadSample: the path is absolute, has "..", or leads out through a link ("unsafe path"); or it has the
            extension of a program or a pickle ("unsafe file type").
    """
    if Path(name).suffix.lower().lstrip(".") in UNSAFE_EXTENSIONS:
        raise BadSample(Reason.UNSAFE_TYPE, name)
    path = root / Path(name).expanduser() if allow_outside else root / name
    if allow_outside:
        return path
    try:
        inside = not is_unsafe_path(name) and path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a null byte
        inside = False
    if not inside:
        raise BadSample(Reason.UNSAFE_PATH, name)
    return path
