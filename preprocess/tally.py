"""Counts of keys on the disk: memory does not grow with their number."""

from __future__ import annotations

import sqlite3

CACHE_KIB = 64 << 10  # of a database in memory, at most


def open_database(schema: str) -> sqlite3.Connection:
    """A database without a name, in memory until it is large."""
    database = sqlite3.connect("", isolation_level=None)
    database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA cache_size = -{CACHE_KIB}; {schema}")
    return database


class Tally:
    """How often each key has come, with the first names that it came with; on the disk.

    Args:
        names: to keep of each key.
    """

    def __init__(self, names: int = 0) -> None:
        self._names = names
        self._database = open_database(
            "CREATE TABLE seen (row INTEGER PRIMARY KEY, key TEXT UNIQUE, times INTEGER);"
            "CREATE TABLE names (key TEXT, name TEXT); CREATE INDEX by_key ON names (key); BEGIN;"
        )

    def add(self, key: str, name: str = "") -> int:
        """Note a key. Returns how often it had come before."""
        query = (
            "INSERT INTO seen VALUES (NULL, ?, 1) ON CONFLICT (key) DO UPDATE SET times = times + 1 RETURNING times - 1"
        )
        ((before,),) = self._database.execute(query, (key,)).fetchall()
        if before < self._names:
            self._database.execute("INSERT INTO names VALUES (?, ?)", (key, name))
        return int(before)

    def repeated(self, keys: int) -> tuple[int, list[tuple[str, int, list[str]]]]:
        """How many keys came more than once; and of the first of them: key, how often, and names."""
        (count,) = self._database.execute("SELECT count(*) FROM seen WHERE times > 1").fetchone()
        query = "SELECT key, times FROM seen WHERE times > 1 ORDER BY row LIMIT ?"
        found = []
        for key, times in self._database.execute(query, (keys,)).fetchall():
            names = self._database.execute("SELECT name FROM names WHERE key = ? ORDER BY rowid", (key,))
            found.append((key, times, [name for (name,) in names]))
        return int(count), found
