"""``pytest --without-peft``: the suite as it is where PEFT is not installed.

Nothing can import it, nor find that it is there. Tests that compare with it are skipped; all others
have to pass, for the package must not need it.
"""

import re
import sys

import pytest

_REASON = "compares with PEFT"
_ASKED = re.compile(r"ModuleNotFoundError: (import of peft|No module named 'peft[.'])")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--without-peft", action="store_true", help="as if PEFT were not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Have every import of it fail, before anything looks for it."""
    if config.getoption("--without-peft"):
        sys.modules["peft"] = None  # type: ignore[assignment]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> object:
    """Skip a file that imports it."""
    report = yield
    if report.failed and _is_hidden(collector.config) and _ASKED.search(str(report.longrepr)):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, _REASON)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """Skip a test that imports it."""
    report = yield
    error = call.excinfo.value if call.excinfo is not None else None
    hidden = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("peft")
    if report.failed and hidden and _is_hidden(item.config):
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1], _REASON)
    return report


def _is_hidden(config: pytest.Config) -> bool:
    return bool(config.getoption("--without-peft"))
