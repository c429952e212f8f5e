"""Times as cron writes them: five fields, each within its limits."""

from __future__ import annotations

import re

_LIMITS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def is_cron_schedule(schedule: str) -> bool:
    """Whether these are five fields of numbers, ranges, lists and steps."""
    fields = schedule.split()
    return len(fields) == len(_LIMITS) and all(map(_is_field, fields, _LIMITS))


def _is_field(field: str, limits: tuple[int, int]) -> bool:
    if not re.fullmatch(r"(\*|\d+(-\d+)?)(/\d+)?(,\d+)*", field):
        return False
    return all(limits[0] <= int(number) <= limits[1] for number in re.findall(r"\d+", field))
