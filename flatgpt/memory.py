"""Count the memory that is free, in a container too."""

from contextlib import suppress
from pathlib import Path

# a container's limit, its use, and the part of it that can be dropped: cgroup v2's files and v1's
CGROUPS = (('memory.max', 'memory.current', 'memory.stat', 'inactive_file'),
           ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes', 'memory/memory.stat',
            'total_inactive_file'))


def free_memory(cgroup='/sys/fs/cgroup'):
    """Return the bytes of memory that this process can still take; 0: not known."""
    free = 0
    with suppress(OSError, StopIteration), open('/proc/meminfo', encoding='utf-8') as file:
        free = next(1024 * int(line.split()[1]) for line in file if 'MemAvailable' in line)
    for *names, key in CGROUPS:
        with suppress(OSError, ValueError):  # 'max' is no number
            limit, used, stat = (Path(cgroup, name).read_text() for name in names)
            kept = dict(line.split() for line in stat.splitlines())
            free = min(free, int(limit) - int(used) + int(kept.get(key, 0)))
    return max(0, free)
