"""Files from wheels of a Python package index.

A wheel is downloaded without its dependencies; nothing in it is installed or run. One file is extracted and checked against its
sha256 (the file's, since wheels differ between platforms).
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from replaceme.base.errors import ResourceError
from replaceme.base.files import temporary_folder
from replaceme.base.progress import logger


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a wheel, or split over several wheels, pinned by the sha256 of its content.

    Attributes:
        requirement: the package and its version.
        member: the file, or its first part, inside the wheel; None is the wheel itself, if it is the same for all platforms.
        sha256: of the whole file.
        further_parts: the other parts, in order: package and member.
        whole_name: the whole file's name, where the first part's says nothing of it.
    """

    requirement: str
    member: str | None
    sha256: str
    further_parts: tuple[tuple[str, str], ...] = ()
    whole_name: str = ""

    @property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """Package and member of each part, in order."""
        return (self.requirement, self.member), *self.further_parts

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.whole_name or Path(self.member or f"{self.requirement}.whl").name.removesuffix(".part00")


@contextmanager
def downloaded_file(file: PackagedFile) -> Iterator[Path]:
    """Yield the path of a packaged file, downloaded and checked; it is deleted when the block ends."""
    with temporary_folder("replaceme-") as folder:
        path = folder / file.name
        with path.open("wb") as whole:
            for requirement, member in file.parts:
                _append_part(whole, requirement, member)
        with path.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        if digest != file.sha256:
            packages = " and ".join(requirement for requirement, _ in file.parts)
            raise ResourceError(f"{file.name} in {packages} has sha256 {digest}, not {file.sha256}.")
        yield path


def _append_part(whole: BinaryIO, requirement: str, member: str | None) -> None:
    """Append a file from a package's wheel to an open file; the member None is the wheel itself."""
    logger.info("fetching %s from the package %s (once)", Path(member).name if member else "text", requirement)
    with temporary_folder("replaceme-") as folder:
        download_wheel(requirement, folder)
        (wheel,) = folder.glob("*.whl")
        if member is None:
            whole.write(wheel.read_bytes())
        else:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, whole)


def download_wheel(requirement: str, folder: Path) -> None:
    """Download a package's wheel into a folder. Raises ResourceError when pip fails."""
    # One fixed platform: only data is extracted, so the same wheel serves everywhere.
    platform = ["--python-version", "3.11", "--implementation", "cp", "--only-binary=:all:"]
    for tag in ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "any"):
        platform += ["--platform", tag]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *platform, "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ResourceError(
            f"{requirement} could not be downloaded from the package index ({reason}); "
            "connect once, or give a local model folder and text files in model_path, dataset and tasks."
        )
