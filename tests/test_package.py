"""What ``import cl_compiler`` offers."""

from __future__ import annotations

import cl_compiler


def test_the_package_lists_its_own_names_only():
    """Not what it imports to work: completion in a notebook shows what a user may call."""
    public = [name for name in dir(cl_compiler) if not name.startswith("__")]
    assert public == sorted(cl_compiler.__all__)
    for name in public:
        assert getattr(cl_compiler, name).__doc__
