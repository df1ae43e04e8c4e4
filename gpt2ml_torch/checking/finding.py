"""The result of one check."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Verdict = Literal["pass", "fail", "info"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The name of a check, its verdict, one line of text for people, and values for programs.

    `values` holds JSON types only and nothing private: no paths, no names of users or machines.
    """

    name: str
    verdict: Verdict
    text: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


def judge(name: str, faults: list[str], good: str, **values: Any) -> Finding:
    """A finding that passes with the text `good`, or fails with the first three of `faults`."""
    if not faults:
        return Finding(name, "pass", good, values)
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return Finding(name, "fail", "; ".join(faults[:3]) + more, {**values, "faults": faults[:50]})
