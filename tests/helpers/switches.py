"""Switches of a process that a sweep sets and restores."""

import logging
import os
import sys

from hydra.plugins.sweeper import Sweeper
from losswatch.sweep.command import current_sweep


def switches():
    names = ("HYDRA_FULL_ERROR", "PYTHONWARNINGS")
    environment = {name: os.environ.get(name) for name in names}
    return (
        environment,
        Sweeper.validate_batch_is_legal,
        logging.raiseExceptions,
        current_sweep(),
        sys.unraisablehook,
    )
