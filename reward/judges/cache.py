"""Replies of judges by the content of the question, in memory or in a folder that several processes share.

A reply is kept as the model wrote it and read again by the same strict reader, so a wrong entry can at worst be a miss.
"No verdict" is never kept: the next run asks again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from posttrain.config.errors import UserError

_LOG = logging.getLogger(__name__)


def content_key(template: str, payload: Mapping[str, Any]) -> str:
    """SHA-256 of the kind of judge, the version of its wording, and the request (model, messages, settings of sampling).

    The endpoint's address is left out: the same model elsewhere is the same judge.
    """
    return hashlib.sha256(json.dumps([template, payload], sort_keys=True).encode()).hexdigest()


class ReplyCache(Protocol):
    """Text by key."""

    def get(self, key: str) -> str | None:
        """The text kept under a key, or None."""
        ...

    def put(self, key: str, text: str) -> None:
        """Keep a text."""
        ...


class MemoryCache:
    """Replies of this process; of more than `limit`, those unused for longest go first."""

    def __init__(self, limit: int = 65_536) -> None:
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._limit, self._lock = limit, threading.Lock()

    def get(self, key: str) -> str | None:
        """The text kept under a key, or None."""
        with self._lock:
            if key in self._texts:
                self._texts.move_to_end(key)
            return self._texts.get(key)

    def put(self, key: str, text: str) -> None:
        """Keep a text."""
        with self._lock:
            self._texts[key] = text
            self._texts.move_to_end(key)
            while len(self._texts) > self._limit:
                self._texts.popitem(last=False)


class FolderCache:
    """One JSON file a reply, written whole or not at all, so that processes need no lock.

    Args:
        folder: made if it is not there.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            problem = f"the folder of judges' verdicts cannot be written ({error.strerror})"
            raise UserError(problem, where=str(folder), instead="name another folder in the judge's `cache`") from error
        self._warned = False

    def get(self, key: str) -> str | None:
        """The text kept under a key; None where there is none, or where the file is damaged in any way."""
        try:
            entry = json.loads(self._path(key).read_bytes())
            text = entry["text"]
            return text if entry["check"] == _check(key, text) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def put(self, key: str, text: str) -> None:
        """Keep a text. A disk that fails is warned about once; the verdict in hand still counts."""
        try:
            self._write(self._path(key), json.dumps({"text": text, "check": _check(key, text)}))
        except OSError as error:
            if not self._warned:
                _LOG.warning("verdicts are no longer kept in %s: %s", self.folder, error)
                self._warned = True

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"  # a level between, as folders of a million files are slow

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _check(key: str, text: str) -> str:
    """Ties a text to its key, so that neither a flipped bit nor a renamed file goes unnoticed."""
    return hashlib.sha256(json.dumps([key, text]).encode()).hexdigest()
