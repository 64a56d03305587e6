"""Drop-ins: classes and functions of other packages, computed by compiled losses.

Each module has the names of the package that it stands in for: ``from
cl_compiler.integrations.open_clip import ClipLoss``.  None of those packages is imported before it
is needed, and most never are.  ``docs/drop_ins.md`` has the table of differences.
"""
