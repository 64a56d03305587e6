"""What all tests share: the switch that rewrites golden files, and a cache of their own."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Run in the background of a shell: tests that press Ctrl-C would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-generated", action="store_true", help="rewrite the golden files in generated/"
    )


@pytest.fixture
def update_generated(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-generated"))


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A test that leaves Ctrl-C ignored would make another one wait for it, for ever."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after is before, "the test changed what Ctrl-C does in its process"


@pytest.fixture(autouse=True)
def sizes_of_this_test() -> None:
    """Earlier tests' batches would leave those of this one to BLAS."""
    from cl_compiler.runtime.loader import forget_sizes

    forget_sizes()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the cache of the person who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CL_COMPILER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
