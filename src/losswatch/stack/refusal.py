"""Runs that need the ordinary step: the one error for them, and how PyTorch refuses to map one."""

import dis
from pathlib import Path

import torch


class NotStackable(Exception):
    """These runs cannot be trained as a stack, or compiled; the message says in one line why.

    It is raised where that is detected. Any other error, of somebody's code, of the memory or a bug
    of ours, is an error of the runs.
    """


def is_refusal(error: RuntimeError) -> bool:
    """Whether PyTorch refuses an operation, rather than a `raise` statement of other code.

    torch.func has no error of its own. Under `vmap`, operators raise RuntimeErrors with dozens of
    messages: "vmap: It looks like you're calling .item()", "Batching rule not implemented for",
    "Cannot access data pointer of Tensor", "stack expects each tensor to be equal size" and so on.
    What they share is the place where they begin: in an operator, so that the innermost line of
    Python is a call, or in a Python file of PyTorch.
    """
    traceback = error.__traceback__
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    if Path(torch.__file__).parent in Path(code.co_filename).parents:
        return True
    return dis.opname[code.co_code[traceback.tb_lasti]] != "RAISE_VARARGS"
