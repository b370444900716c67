"""Copies on a local disk: which are kept, that the limit holds, and that nothing half-written is ever taken for one."""

import errno
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.shards import Location
from tests.conftest import ROOT
from train.local_cache import LocalCache, parse_size

SIZE = 1000


def payload_of(number, size=SIZE):
    return random.Random(number).randbytes(size)


def location_of(number, size=SIZE):
    """Where the member of a number lies; every part holds four."""
    part = f"{number // 4 * 0x9E3779B97F4A7C15 % (1 << 128):032x}"
    return Location(part, 512 * (number % 4), size, zlib.crc32(payload_of(number, size)))


def add(copies, *numbers, size=SIZE):
    for number in numbers:
        copies.add(location_of(number, size), payload_of(number, size))


def held(copies, numbers):
    return {number for number in numbers if copies.get(location_of(number)) == payload_of(number)}


def files_of(folder):
    """All files of the copies, finished and unfinished."""
    return sorted(path for path in folder.glob("??/*") if path.is_file())


def path_of(folder, number):
    location = location_of(number)
    return folder / location.part[:2] / f"{location.part}.{location.offset}.{location.size_bytes}"


def used(folder):
    return int((folder / "used").read_text())


def bytes_of(folder):
    return sum(path.stat().st_size for path in files_of(folder))


def last_used(folder, number, ago):
    """Make a copy one that was last used some seconds ago."""
    os.utime(path_of(folder, number), (time.time() - ago,) * 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500MB", 500 * 10**6), ("20GB", 20 * 10**9), ("1.5TB", 1500 * 10**9), ("12345", 12345), ("64GiB", 64 << 30),
        ("2 kb", 2000), ("3g", 3 * 10**9), ("7B", 7),
    ],
)  # fmt: skip
def test_sizes_are_read_as_they_are_written(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e9", "20 gigabytes", "1,5TB", "nan", "0.1B", "٣GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--local_cache_size .*must be a size such as"):
        parse_size(text)


def test_a_copy_is_there_for_others_and_after_a_restart(tmp_path):
    copies = LocalCache(tmp_path / "a" / "b", 10**6)
    assert copies.get(location_of(0)) is None
    add(copies, 0, 1, 5)
    assert held(copies, range(8)) == {0, 1, 5}
    other = pickle.loads(pickle.dumps(copies))  # noqa: S301 (as a spawned worker is given it)
    assert held(other, range(8)) == {0, 1, 5}
    assert used(tmp_path / "a" / "b") == 3 * SIZE == bytes_of(tmp_path / "a" / "b")


def test_the_least_recently_used_copies_go(tmp_path):
    copies = LocalCache(tmp_path, 5 * SIZE)
    add(copies, *range(5))
    for number, ago in enumerate((10, 50, 30, 40, 20)):
        last_used(tmp_path, number, ago)
    assert held(copies, [1]) == {1}  # used now
    add(copies, 5)
    assert held(copies, range(6)) == {0, 1, 2, 4, 5}
    for number, ago in ((0, 10), (1, 60), (2, 30), (4, 20), (5, 5)):
        last_used(tmp_path, number, ago)
    add(copies, 6)
    assert held(copies, range(7)) == {0, 2, 4, 5, 6}


def test_a_tenth_of_the_limit_goes_at_a_time(tmp_path):
    copies = LocalCache(tmp_path, 50 * SIZE)
    add(copies, *range(50))
    for number in range(50):
        last_used(tmp_path, number, 100 - number)
    add(copies, 50)
    assert held(copies, range(51)) == set(range(5, 51))


def test_the_limit_holds_whatever_comes(tmp_path):
    rng = random.Random(0)
    copies = LocalCache(tmp_path, 20 * SIZE)
    for _ in range(300):
        number = rng.randrange(60)
        size = rng.choice([100, SIZE, 7 * SIZE])
        if copies.get(location_of(number, size)) is None:
            add(copies, number, size=size)
        assert bytes_of(tmp_path) == used(tmp_path) <= 20 * SIZE
    assert bytes_of(tmp_path) > 10 * SIZE


def test_what_is_larger_than_the_limit_is_not_kept_and_drives_nothing_out(tmp_path):
    copies = LocalCache(tmp_path, 5 * SIZE)
    add(copies, 0, 1)
    add(copies, 2, size=5 * SIZE + 1)
    assert held(copies, [0, 1]) == {0, 1}
    assert len(files_of(tmp_path)) == 2


def test_a_smaller_limit_holds_from_the_start(tmp_path):
    add(LocalCache(tmp_path, 10 * SIZE), *range(10))
    LocalCache(tmp_path, 5 * SIZE).open()
    assert bytes_of(tmp_path) == used(tmp_path) <= 5 * SIZE


@pytest.mark.parametrize("change", ["flipped", "shorter", "empty", "longer"])
def test_a_copy_that_has_changed_is_removed(tmp_path, change):
    copies, path = LocalCache(tmp_path, 10**6), path_of(tmp_path, 1)
    add(copies, 0, 1)
    data = path.read_bytes()
    flipped = data[:7] + bytes([data[7] ^ 4]) + data[8:]
    path.write_bytes({"flipped": flipped, "shorter": data[:-1], "empty": b"", "longer": data + b"x"}[change])
    assert copies.get(location_of(1)) is None
    assert not path.exists()
    add(copies, 1)
    assert held(copies, [0, 1]) == {0, 1}


def test_files_of_others_in_the_folder_stay(tmp_path):
    others = ["notes.txt", "ab/notes.txt", "ab/0123.0.9", "cd/.hidden"]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10**5))
    copies = LocalCache(tmp_path, 5 * SIZE)
    add(copies, *range(12))
    assert all((tmp_path / name).stat().st_size == 10**5 for name in others)
    assert len(held(copies, range(12))) == 5


def test_what_was_counted_wrong_is_counted_again_by_the_next_run(tmp_path):
    copies = LocalCache(tmp_path, 10 * SIZE)
    add(copies, *range(4))
    del copies
    (tmp_path / "used").write_text(f"{0:020}")
    again = LocalCache(tmp_path, 10 * SIZE)
    again.open()
    assert used(tmp_path) == 4 * SIZE


def test_a_full_disk_gives_a_tenth_back_and_nobody_stops(tmp_path, monkeypatch):
    copies = LocalCache(tmp_path, 20 * SIZE)
    add(copies, *range(10))
    for number in range(10):
        last_used(tmp_path, number, 100 - number)
    whole = Path.open

    def full(self, mode="r", *args, **named):
        if self.name.startswith(".") and mode == "r+b":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, mode, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        add(copies, 11)
    assert held(copies, range(12)) == set(range(2, 10))
    assert used(tmp_path) == 8 * SIZE == bytes_of(tmp_path)
    add(copies, 11)
    assert held(copies, [11]) == {11}


def test_a_folder_that_cannot_be_one_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^--local_cache .*/file: .*; give a folder of a local disk$"):
        LocalCache(tmp_path / "file", 10**6).open()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_local_cache import add
from train.local_cache import LocalCache

copies = LocalCache(Path(sys.argv[1]), 10**6)
add(copies, 0)
at = sys.argv[2]
def die(*args, **named):
    os.kill(os.getpid(), signal.SIGKILL)
if at == "before writing":
    whole = os.truncate
    os.truncate = lambda *args: (whole(*args), die())
elif at == "before counting":
    LocalCache._set_used = die
else:
    Path.rename = die
add(copies, 1)
"""


@pytest.mark.parametrize("instant", ["before counting", "before writing", "before naming"])
def test_who_is_killed_while_writing_leaves_no_copy_and_takes_no_room(tmp_path, instant):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), instant], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path_of(tmp_path, 1).exists()
    assert [path.name.startswith(".") for path in files_of(tmp_path)].count(True) == 1
    copies = LocalCache(tmp_path, 10**6)
    assert held(copies, [0, 1]) == {0}
    assert files_of(tmp_path) == [path_of(tmp_path, 0)]
    assert used(tmp_path) == SIZE


MANY = """
import random, sys
from pathlib import Path
from tests.test_local_cache import SIZE, add, location_of, payload_of
from train.local_cache import LocalCache

copies, rng, hits = LocalCache(Path(sys.argv[1]), 20 * SIZE), random.Random(sys.argv[2]), 0
for _ in range(400):
    number = rng.randrange(40)
    payload = copies.get(location_of(number))
    if payload is None:
        add(copies, number)
    else:
        hits += payload == payload_of(number)
print(hits)
"""


def test_many_processes_share_a_folder_within_its_limit(tmp_path):
    workers = [
        subprocess.Popen([sys.executable, "-c", MANY, str(tmp_path), str(n)], cwd=ROOT, stdout=subprocess.PIPE)
        for n in range(3)
    ]
    most = 0
    while any(worker.poll() is None for worker in workers):
        sizes = []
        for path in tmp_path.glob("??/*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
    told = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert all(int(hits) > 50 for hits in told)
    assert used(tmp_path) == bytes_of(tmp_path) <= 20 * SIZE
    assert not [path for path in files_of(tmp_path) if path.name.startswith(".")]
    copies = LocalCache(tmp_path, 20 * SIZE)
    assert len(held(copies, range(40))) == len(files_of(tmp_path)) > 10
