"""What is harvested, what is not, and that nothing leaks from one side to the other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cl_compiler.cli.demo.collection import collect
from cl_compiler.cli.demo.harvest import Pair, deduplicate, harvest, pairs_of_source, split
from cl_compiler.cli.demo.sources import SourceRoot, installed_roots, list_files, roots_key

SOURCE = '''
"""A module docstring that is never harvested at all."""

def factorial(number):
    """Multiply all the positive integers up to number.

    A second paragraph with the word secretparagraph.
    """
    # a comment with the word secretcomment
    def helper(value):
        "An inner docstring with secretinner words."
        return value * factorial(value - 1)
    return helper(number) if number > 1 else 1


class Stack:
    """A class docstring that is not harvested either."""

    async def push(self, item):
        """Put one more item on top of the others."""
        self.items.append(item)
        return await super().push(item)

    def no_words(self):
        """Do it."""
        return [self.items[index] for index in range(10)]

    def no_code(self):
        """This abstract method has a long description."""

    def undescribed(self):
        return {key: value for key, value in self.items}
'''


def write_package(folder: Path, files: dict[str, str]) -> SourceRoot:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return SourceRoot("fixture", folder, "1.0")


def function(name: str, text: str, expression: str) -> str:
    return f'def {name}(a, b, c):\n    """{text}"""\n    return {expression}\n'


def test_only_described_functions_with_a_body_are_pairs() -> None:
    pairs = pairs_of_source(SOURCE, "m")
    assert [pair.text for pair in pairs] == [
        "Multiply all the positive integers up to number.",
        "An inner docstring with secretinner words.",
        "Put one more item on top of the others.",
    ]
    assert {pair.module for pair in pairs} == {"m"}


def test_code_holds_neither_docstrings_nor_comments_nor_its_own_name() -> None:
    factorial, _, push = pairs_of_source(SOURCE, "m")
    assert "secret" not in factorial.code
    assert "Multiply" not in factorial.code
    assert "factorial" not in factorial.code
    assert "helper(number) if number > 1 else 1" in factorial.code
    assert "push" not in push.code
    assert "await super()._own_name(item)" in push.code


def test_a_file_that_does_not_parse_is_skipped() -> None:
    assert pairs_of_source("def broken(:\n", "m") == []
    assert pairs_of_source(b"x = '\xff'\n", "m") == []


def test_duplicates_by_words_of_either_side_keep_the_first() -> None:
    pairs = [
        Pair("a", "Return the sum of two numbers.", "return a + b"),
        Pair("b", "return the SUM, of two numbers", "return c + d"),
        Pair("c", "Add up two numbers and return.", "return  a+b"),
        Pair("d", "Return the sum of three numbers.", "return a + b + c"),
    ]
    assert [pair.module for pair in deduplicate(pairs)] == ["a", "d"]


def test_no_module_is_on_two_sides_and_every_pair_is_on_one() -> None:
    pairs = [
        Pair(f"package.m{index % 200}", f"text {index}", f"code {index}") for index in range(1000)
    ]
    sides = split(pairs)
    modules = [{pair.module for pair in side} for side in (sides.train, sides.valid, sides.test)]
    assert sum(len(names) for names in modules) == len(set.union(*modules)) == 200
    assert sorted((*sides.train, *sides.valid, *sides.test), key=pairs.index) == pairs
    assert 0.03 <= len(sides.test) / len(pairs) <= 0.2
    assert sides.valid


def test_the_side_of_a_module_depends_on_its_name_alone() -> None:
    pairs = [Pair(f"m{index}", "text", "code") for index in range(100)]
    whole = split(pairs)
    half = split(reversed(pairs[::2]))
    assert set(half.test) == set(whole.test) & set(pairs[::2])


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    names = [f"f{index:02d}" for index in range(40)]
    root = write_package(
        tmp_path,
        {
            f"{name}.py": function(name, f"Compute the value called {name} here.", f"a + b * {i}")
            for i, name in enumerate(names)
        },
    )
    files = list_files(root)
    counted: list[int] = []
    alone = harvest(files, workers=1)
    together = harvest(files, workers=2, advance=counted.append)
    assert alone == together
    assert len(alone) == sum(counted) == 40


def test_tests_and_links_out_of_the_package_are_not_read(tmp_path: Path) -> None:
    root = write_package(
        tmp_path / "package",
        {"a.py": SOURCE, "tests/b.py": SOURCE, "sub/__init__.py": SOURCE, "sub/test/c.py": SOURCE},
    )
    (tmp_path / "private.py").write_text(SOURCE)
    (tmp_path / "package" / "link.py").symlink_to(tmp_path / "private.py")
    assert [file.module for file in list_files(root)] == ["fixture.a", "fixture.sub"]


def test_a_package_in_the_working_directory_is_not_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path / "sympy", {"__init__.py": SOURCE})
    write_package(tmp_path / "mine", {"__init__.py": SOURCE})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    roots = installed_roots(("sympy", "mine"))
    assert [root.package for root in roots] == ["stdlib", "sympy"]
    assert not roots[1].path.is_relative_to(tmp_path)


def test_a_collection_is_kept_and_read_back(tmp_path: Path) -> None:
    root = write_package(tmp_path / "package", {"a.py": SOURCE})
    first = collect([root], tmp_path / "kept")
    (tmp_path / "package" / "a.py").unlink()
    second = collect([root], tmp_path / "kept")
    assert not first.was_kept
    assert second.was_kept
    assert second.pairs == first.pairs
    assert len(first.pairs) == 3
    assert first.path is not None
    assert os.listdir(tmp_path / "kept") == [first.path.name]


@pytest.mark.parametrize("damage", [b"", b"no gzip at all", b"\x1f\x8b\x08\x00cut short"])
def test_a_damaged_collection_is_harvested_anew(tmp_path: Path, damage: bytes) -> None:
    root = write_package(tmp_path / "package", {"a.py": SOURCE})
    first = collect([root], tmp_path / "kept")
    assert first.path is not None
    whole = first.path.read_bytes()
    for content in (damage, whole[: len(whole) // 2]):
        first.path.write_bytes(content)
        again = collect([root], tmp_path / "kept")
        assert not again.was_kept
        assert again.pairs == first.pairs
        assert first.path.read_bytes() == whole


def test_another_release_of_a_package_is_another_collection(tmp_path: Path) -> None:
    root = write_package(tmp_path / "package", {"a.py": SOURCE})
    newer = SourceRoot(root.package, root.path, "2.0")
    moved = SourceRoot(root.package, tmp_path, root.version)
    assert roots_key([root], 1) != roots_key([newer], 1)
    assert roots_key([root], 1) != roots_key([root], 2)
    assert roots_key([root], 1) == roots_key([moved], 1)


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(tmp_path: Path) -> None:
    root = write_package(tmp_path / "package", {"a.py": SOURCE})
    (tmp_path / "file").write_text("")
    collection = collect([root], tmp_path / "file" / "kept")
    assert collection.path is None
    assert len(collection.pairs) == 3
