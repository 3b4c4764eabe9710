"""Switches of a process that a command sets and restores."""

import logging
import os
import signal
import sys


def switches():
    names = ("HYDRA_FULL_ERROR", "PYTHONWARNINGS")
    environment = {name: os.environ.get(name) for name in names}
    handler = signal.getsignal(signal.SIGTERM)
    return environment, logging.raiseExceptions, handler, sys.unraisablehook
