"""The text: Python's own standard library, a fixed list of its files, split file by file.

The files are chosen so that every machine with Python 3.11 has the same text: Debian's 3.11.2 and python.org's 3.11.7
have the same bytes of all of them, and what is mended for safety now and then (parsers of HTML and XML, clients of the
network) is left out. The hash covers names, split and text. Another one means another text: another minor version, a
patch release that touched one of the files, or a changed list. Bits per byte of two texts cannot be compared, and no
table takes records of both.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TRAINING = """
_pydecimal _pyio pickletools difflib logging/__init__ pickle optparse unittest/case statistics multiprocessing/managers
os functools multiprocessing/pool random _collections_abc pstats uuid socketserver tokenize _strptime modulefinder
concurrent/futures/_base tomllib/_parser wsgiref/handlers warnings email/headerregistry compileall asyncio/locks
multiprocessing/shared_memory tracemalloc posixpath csv re/__init__ xml/sax/handler wsgiref/validate _markupbase
asyncio/futures multiprocessing/util json/__init__ json/decoder unittest/suite lzma runpy stringprep xml/sax/xmlreader
xml/dom/xmlbuilder xml/sax/saxutils multiprocessing/queues bz2 hashlib xml/dom/pulldom multiprocessing/heap
multiprocessing/context queue importlib/util unittest/main pyclbr tabnanny operator asyncio/transports code
email/contentmanager email/policy symtable numbers filecmp types graphlib multiprocessing/reduction urllib/robotparser
unittest/runner asyncio/base_subprocess concurrent/futures/thread glob copy unittest/result asyncio/queues
http/__init__ rlcompleter hmac copyreg zipapp getopt _threading_local asyncio/protocols netrc asyncio/runners
multiprocessing/sharedctypes importlib/__init__ fnmatch getpass
"""
VALIDATION = """
fractions heapq json/scanner bisect _weakrefset json/encoder cmd shelve reprlib
"""
TEST = """
pprint weakref textwrap shlex string sched linecache wsgiref/util
"""
SPLIT = {"training": TRAINING.split(), "validation": VALIDATION.split(), "test": TEST.split()}


@dataclass(frozen=True)
class Text:
    """The bytes of each part of the split, a vector of uint8 each, and the hash of the names and of the text."""

    parts: Mapping[str, Tensor]
    digest: str

    def batch(self, context: int, size: int, generator: torch.Generator) -> Tensor:
        """Windows at random places of the training text: (size, context + 1), int64."""
        text = self.parts["training"]
        starts = torch.randint(len(text) - context, (size, 1), generator=generator)
        return text[starts + torch.arange(context + 1)].long()

    def windows(self, part: str, context: int, most: int) -> Tensor:
        """Windows of a part at equal distances, always the same: (count, context + 1), int64.

        There are as many as do not overlap, and at most so many.
        """
        text = self.parts[part]
        count = min(most, (len(text) - 1) // context)
        starts = torch.linspace(0, len(text) - 1 - context, count).long()[:, None]
        return text[starts + torch.arange(context + 1)].long()


def load(folder: Path | None = None, split: Mapping[str, Sequence[str]] = SPLIT) -> Text:
    """Read the text.

    Args:
        folder: where the standard library stands; by default that of the Python that runs.
        split: the modules of each part, as paths without their suffix.

    Raises:
        ValueError: if a file is missing.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    digest, parts = hashlib.sha256(), {}
    for part, names in split.items():
        content = b""
        for name in names:
            path = folder / f"{name}.py"
            if not path.is_file():
                raise ValueError(f"the standard library in {folder} has no {name}.py: use Python 3.11 to 3.13")
            text = path.read_bytes().replace(b"\r\n", b"\n")  # as on Windows
            digest.update(f"{part} {name} {len(text)}\n".encode() + text)
            content += text
        parts[part] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return Text(parts, digest.hexdigest()[:16])
