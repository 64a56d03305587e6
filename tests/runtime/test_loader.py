"""Generated text becomes a module whose lines can be seen and whose contents can be pickled."""

from __future__ import annotations

import inspect
import linecache
import os
import pickle
import sys
import threading
import traceback
from pathlib import Path

import pytest

from cl_compiler.runtime.loader import PACKAGE, load_source

SOURCE = '''"""A generated module."""

import math


def area(radius: float) -> float:
    """Area of a circle."""
    return math.pi * radius**2


def broken() -> float:
    return 1.0 / 0.0


class Box:
    side = 2
'''


def _variant(tag: str) -> str:
    return f"{SOURCE}\nTAG = {tag!r}\n"  # texts are memoised: each test loads its own


def test_the_text_is_executed_under_its_own_name() -> None:
    module = load_source(_variant("name"), "clip-3f9a1c7e02b4")
    assert module.area(2.0) == pytest.approx(12.566370614359172)
    assert module.__name__.startswith(f"{PACKAGE}.clip_3f9a1c7e02b4_")
    assert sys.modules[module.__name__] is module
    assert module.__doc__ == "A generated module."


def test_the_same_text_is_the_same_module_wherever_it_came_from(tmp_path: Path) -> None:
    first = load_source(_variant("same"), "clip-000000000001")
    assert load_source(_variant("same"), "clip-000000000001", tmp_path / "kernels.py") is first
    other = load_source(_variant("other"), "clip-000000000001")
    assert other is not first
    assert other.__name__ != first.__name__
    assert (first.TAG, other.TAG) == ("same", "other")


def test_the_file_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text("raise SystemExit('executed')\n")
    module = load_source(_variant("unread"), "clip-000000000002", path)
    assert module.TAG == "unread"
    assert module.__file__ == str(path)
    assert inspect.getsource(module.area).startswith("def area(radius")
    assert list(tmp_path.iterdir()) == [path], "no byte code is left beside the source"


@pytest.mark.parametrize("on_disk", [True, False])
def test_inspect_shows_the_lines_that_run(tmp_path: Path, on_disk: bool) -> None:
    path = tmp_path / "kernels.py" if on_disk else None
    module = load_source(_variant(f"inspect {on_disk}"), "clip-000000000003", path)
    assert inspect.getsource(module.broken) == "def broken() -> float:\n    return 1.0 / 0.0\n"
    assert inspect.getsource(module.Box) == "class Box:\n    side = 2\n"
    assert inspect.getsource(module) == _variant(f"inspect {on_disk}")
    assert inspect.getsourcelines(module.area)[1] == 6


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_traceback_shows_the_line_even_after_the_file_changed(
    tmp_path: Path, on_disk: bool
) -> None:
    path = tmp_path / "kernels.py" if on_disk else None
    if path is not None:
        path.write_text(_variant(f"traceback {on_disk}"))
    module = load_source(_variant(f"traceback {on_disk}"), "clip-000000000004", path)
    if path is not None:
        path.write_text("# something else\n")
        os.utime(path, (1, 1))
    linecache.checkcache()
    with pytest.raises(ZeroDivisionError) as caught:
        module.broken()
    text = "".join(traceback.format_exception(caught.value))
    assert "return 1.0 / 0.0" in text
    assert f'File "{module.__file__}", line 12, in broken' in text


def test_what_a_module_defines_is_pickled_by_reference() -> None:
    module = load_source(_variant("pickle"), "clip-000000000005")
    assert pickle.loads(pickle.dumps(module.area)) is module.area
    assert pickle.loads(pickle.dumps(module.Box)) is module.Box


def test_a_text_that_fails_leaves_no_module_and_may_be_tried_again() -> None:
    before = set(sys.modules)
    text = "import sys\nif not hasattr(sys, 'loader_test'):\n    raise OSError('first time')\n"
    with pytest.raises(OSError, match="first time"):
        load_source(text, "clip-000000000006")
    assert set(sys.modules) - before <= {PACKAGE}
    sys.loader_test = True  # type: ignore[attr-defined]
    try:
        assert load_source(text, "clip-000000000006").__name__ in sys.modules
    finally:
        del sys.loader_test  # type: ignore[attr-defined]


def test_a_syntax_error_names_the_file_and_the_line(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError) as caught:
        load_source("x = 1\ny = = 2\n", "clip-000000000007", tmp_path / "kernels.py")
    assert (caught.value.filename, caught.value.lineno) == (str(tmp_path / "kernels.py"), 2)


def test_annotations_mean_what_they_mean_in_a_file_of_their_own() -> None:
    module = load_source("def f(x: 1 + 1): ...\n", "clip-000000000008")
    assert module.f.__annotations__ == {"x": 2}, "the loader's __future__ imports leaked"


def test_threads_that_load_one_text_execute_it_once() -> None:
    text = "import sys, time\ntime.sleep(0.05)\nsys.loader_runs.append(1)\n"
    sys.loader_runs = []  # type: ignore[attr-defined]
    try:
        threads = [
            threading.Thread(target=load_source, args=(text, "clip-000000000009")) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sys.loader_runs == [1]  # type: ignore[attr-defined]
    finally:
        del sys.loader_runs  # type: ignore[attr-defined]
