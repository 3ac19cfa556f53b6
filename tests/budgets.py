"""Each suite has a budget of CPU seconds; `make test` prints what each took and fails where one is over.

CPU time, not wall time, so that a busy machine does not fail the tests. Of a test it counts this process and
the child processes it has waited for, fixtures included. The slow tests have no budget.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

import pytest

BUDGETS = {
    "tests/unit": 800,
    "tests/oracle": 15,
    "tests/property": 240,
    "tests/equivalence": 300,
    "tests/distributed": 480,
    "tests/cli": 320,
    "tests/examples": 150,
    "src": 40,
}
"""CPU seconds per suite: twice what it takes where others slow the machine down; what fails is growth."""

_KEY = "cpu_seconds"


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def suite_of(nodeid: str) -> str:
    """The suite a test belongs to: the folder below ``tests``, or ``src`` for doctests."""
    parts = nodeid.split("::")[0].split("/")
    return "/".join(parts[:2]) if parts[0] == "tests" else parts[0]


class Budgets:
    """The pytest plugin: measures on the workers, adds up and judges where the reports arrive."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.tests: dict[str, int] = defaultdict(int)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        item.stash[_STARTED] = _cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        try:
            return (yield)
        finally:
            item.user_properties.append((_KEY, _cpu_seconds() - item.stash[_STARTED]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.tests[suite_of(report.nodeid)] += 1
            self.spent[suite_of(report.nodeid)] += dict(report.user_properties).get(_KEY, 0.0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        over = [suite for suite, spent in self.spent.items() if spent > BUDGETS.get(suite, float("inf"))]
        if over and session.config.option.markexpr == "not slow" and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.spent:
            return
        terminalreporter.section("CPU seconds per suite")
        for suite in sorted(self.spent):
            budget = BUDGETS.get(suite)
            verdict = " OVER BUDGET" if budget is not None and self.spent[suite] > budget else ""
            took = f"{self.spent[suite]:7.1f} of {budget or '-'}"
            terminalreporter.write_line(f"{suite:20s} {self.tests[suite]:5d} tests {took}{verdict}")


_STARTED = pytest.StashKey[float]()
