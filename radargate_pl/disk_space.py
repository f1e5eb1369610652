"""How much room is left where files are written (layer 0: standard library only)."""

import shutil
from pathlib import Path

_UNITS = ("B", "kB", "MB", "GB", "TB")


class Disk:
    """A place that is written to, and how much room there is.

    Args:
        label: what the place is for.
        path: a folder that need not exist yet.

    Attributes:
        folder: the folder itself, or the nearest one above it that exists.
        device: number of the file system.
        free: bytes that this user may still write, as far as the file system knows (it knows no quotas).
    """

    def __init__(self, label: str, path: Path) -> None:
        self.label, self.path = label, path
        self.folder = path.absolute()
        while not self.folder.is_dir():
            self.folder = self.folder.parent
        self.device = self.folder.stat().st_dev
        self.free = shutil.disk_usage(self.folder).free

    def __str__(self) -> str:
        return f"{self.label} {self.path}: {format_bytes(self.free)} free"


def format_bytes(count: int) -> str:
    """A number of bytes in decimal units, three digits or so.

    Args:
        count: bytes.

    Example:
        >>> format_bytes(999), format_bytes(1_240), format_bytes(269_030_016)
        ('999 B', '1.24 kB', '269 MB')
    """
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"
