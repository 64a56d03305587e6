"""What all tests share: the switch that rewrites golden files."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-generated", action="store_true", help="rewrite the golden files in generated/"
    )


@pytest.fixture
def update_generated(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-generated"))
