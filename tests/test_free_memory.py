"""Free memory as the files of a Linux kernel tell it."""

import pytest

from recclr.memory import available_bytes

MEMINFO = "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:   1000 kB\n"


@pytest.fixture
def system(tmp_path):
    def make(cgroup="", meminfo=MEMINFO, **groups):
        for path, text in {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        for path, text in groups.items():
            place = tmp_path / "cg" / path.replace("__", "/").replace("--", ".")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        return available_bytes(proc=tmp_path / "proc", cgroups=tmp_path / "cg")

    return make


def group(path, limit, used, cache, *, old=False):
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if old
        else ("memory.max", "memory.current")
    )
    stat = f"anon 5\ninactive_file {cache}\nactive_file 1\n"
    if old:
        stat += f"total_inactive_file {cache}\ntotal_active_file 1\n"
    values = (f"{limit}\n", f"{used}\n")
    return {path + name: value for name, value in zip(names, values, strict=True)} | {
        path + "memory.stat": stat
    }


def test_without_groups_it_is_what_the_machine_has(system):
    assert system() == 1000 * 1024


def test_the_tightest_group_above_the_process_counts(system):
    groups = group("", "max", 5, 0) | group("a__", 9000, 2000, 99) | group("a__b__", 8000, 4000, 49)
    assert system("0::/a/b\n", **groups) == 8000 - 4000 + 50
    assert system("0::/a\n", **groups) == 9000 - 2000 + 100
    assert system("0::/other\n", **groups) == 1000 * 1024


def test_groups_of_version_1_are_read_as_well(system):
    groups = group("memory__job__", 7000, 3000, 19, old=True)
    assert system("5:cpu,memory:/job\n4:pids:/\n", **groups) == 7000 - 3000 + 20
    assert system("5:cpu:/job\n", **groups) == 1000 * 1024


def test_a_group_that_is_full_leaves_nothing_and_a_silent_system_says_nothing(system):
    assert system("0::/a\n", **group("a__", 100, 900, 0)) == 0
    assert system("0::/nowhere\n", meminfo="") is None
