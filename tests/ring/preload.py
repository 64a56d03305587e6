"""What every rank imports, once: the server forks them from a process that has done so."""

import torch

import cl_compiler.runtime.group_loss  # noqa: F401
from cl_compiler import api, losses  # noqa: F401
from cl_compiler.codegen.ring import backend  # noqa: F401
from cl_compiler.lang import reference  # noqa: F401

torch.set_num_threads(1)
