"""The command `losswatch`, which is `python train.py` from any folder.

losswatch loss=cce theta=0.05       train as train.py does, which lists more
losswatch losses                    print the table of losses
"""

import sys

import hydra
from omegaconf import DictConfig

from losswatch.config import schema as config
from losswatch.config.names import quoted
from losswatch.presets import CONF
from losswatch.sweep.exit import clear_errors
from losswatch.terminal import open_streams

config.register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def train(cfg: DictConfig) -> float | None:
    """Train or test one run; the accuracy returned is for sweepers."""
    # Imported late: PyTorch takes seconds, and --help or a misspelt key needs none of it.
    from losswatch.task import run_task

    return run_task(cfg)


def main() -> None:
    """Do what the arguments of this process ask for.

    Raises:
        SystemExit: with the exit status, if that is not 0.
    """
    open_streams()
    if sys.argv[1:2] == ["losses"]:
        from losswatch.report.losses import print_losses

        print_losses(sys.argv[2:])
        return
    typed = sys.argv[1:]
    sys.argv[1:] = map(quoted, typed)
    with clear_errors() as sweep:
        sweep.given = dict(zip(sys.argv[1:], typed, strict=True))
        train()
