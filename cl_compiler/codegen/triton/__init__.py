"""The Triton back end: a ``Program`` as one Python module with kernels, launchers and a Function.

It is a sibling of the torch templates: the same program, the same names, the same interface of the
emitted module (``ARGUMENTS``, ``OUTPUTS``, ``GRADIENTS``, ``forward``, ``backward``, ``Loss``).
``render.render_triton`` is the entry; ``support.obstacle`` says which programs it cannot serve.
"""
