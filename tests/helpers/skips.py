"""The reasons for which a test may be skipped, each with the largest number of tests that it may skip.

A session fails if a test is skipped for another reason, or if more tests are skipped than that.
"""

import os
from collections import Counter

import pytest

SKIPS = {
    "clip_benchmark is not installed": 1,
    "huggingface.co cannot be reached": 2,
    "KOCLIP_NODE_MODULES": 2,
    "KOCLIP_TOWERS": 4,
    "there is a GPU": 1,
    "this file system takes UTF-8 names only": 1,
}
# CI has all of these, a developer's machine may lack them.
NOT_IN_CI = {"../shared/data is not there": 40, "no Chromium here": 30}


def known_reason(reason: str) -> str | None:
    """Return the reason above with which `reason` begins, None if there is none."""
    return next((known for known in SKIPS | NOT_IN_CI if reason.startswith(known)), None)


def unexpected_skips(reporter: pytest.TerminalReporter) -> list[str]:
    """Return a line for every skip of a session that is not allowed."""
    allowed = SKIPS if os.environ.get("CI") else SKIPS | NOT_IN_CI
    counts: Counter[str] = Counter()
    problems = []
    for report in reporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        known = known_reason(reason)
        if known is None:
            problems.append(f"{report.nodeid} is skipped for a reason that tests/helpers/skips.py lacks: {reason}")
        else:
            counts[known] += 1
    problems += [
        f"{count} tests are skipped, expected at most {allowed.get(reason, 0)}: {reason}"
        for reason, count in counts.items()
        if count > allowed.get(reason, 0)
    ]
    return problems
