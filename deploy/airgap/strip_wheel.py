"""Write a wheel without some of its files: `python strip_wheel.py IN.whl OUT_DIRECTORY --drop PATTERN --keep PATTERN`.

A file goes when a --drop pattern matches it and no --keep pattern does. The name, the version and the metadata stay, so
that pip and importlib.metadata see the package it was; RECORD is written anew. The standard library is enough.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, strip, say what it saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("directory", type=Path, help="where the smaller wheel goes, under the same name")
    parser.add_argument("--drop", action="append", default=[], help="like sglang/test/*; * also crosses slashes")
    parser.add_argument("--keep", action="append", default=[], help="of what --drop matches")
    options = parser.parse_args(argv)
    target = options.directory / options.wheel.name
    dropped = strip_wheel(options.wheel, target, drop=options.drop, keep=options.keep)
    megabytes = [file.stat().st_size / 1e6 for file in (options.wheel, target)]
    print(f"{target.name}: {dropped} files left out, {megabytes[0]:.1f} -> {megabytes[1]:.1f} MB")


def strip_wheel(wheel: Path, target: Path, *, drop: Sequence[str], keep: Sequence[str]) -> int:
    """Copy `wheel` to `target` without what the patterns leave out; return how many files that was.

    Raises:
        ValueError: nothing was dropped: the wheel is not laid out as the patterns say.
    """
    lines: list[str] = []
    dropped = 0
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        record = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        for member in source.infolist():
            name = member.filename
            if name == record or member.is_dir():
                continue
            if _matches(name, drop) and not _matches(name, keep):
                dropped += 1
                continue
            content = source.read(member)
            out.writestr(member, content, zipfile.ZIP_DEFLATED, 9)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}\n")
        out.writestr(record, "".join([*lines, f"{record},,\n"]))
    if not dropped:
        target.unlink()
        raise ValueError(f"{wheel.name}: nothing matches {list(drop)}; its layout is another one")
    return dropped


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


if __name__ == "__main__":
    main()
