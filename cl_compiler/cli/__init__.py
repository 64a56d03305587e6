"""``cl-compiler``: the compiler from a shell.

``main`` dispatches and turns errors into messages; ``options`` and ``requests`` read what is asked
for; ``output`` prints tables, JSON and progress.  Every other module is one command, imported only
when that command runs.
"""
