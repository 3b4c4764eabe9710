"""losswatch: train a segmentation network with one loss, watch them all.

    python train.py                                             one run with conf/config.yaml
    python train.py loss=cce theta=0.05 optimizer.lr=3e-4       one run, some of it changed
    python train.py -m loss=dice,cce theta=0.05,0.5,0.95        a sweep: six runs, and their table
    python train.py mode=test checkpoint=outputs/<sweep>/<run>  its test metrics, nothing trained
    python train.py --help                                      all groups and keys
    tensorboard --logdir outputs                                browse the curves

A run leaves TensorBoard events, checkpoints/, curves.png, its config (.hydra/), its log and
result.json in outputs/<sweep>/<run>/.
"""

import sys

import hydra
from omegaconf import DictConfig

from losswatch.sweep.exit import clear_errors, open_streams
from losswatch.train import config
from losswatch.train.names import quoted

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Train or test one run; the accuracy returned is for sweepers."""
    # Imported late: PyTorch takes seconds, and --help or a misspelt key needs none of it.
    from losswatch.task import run_task

    return run_task(cfg)


if __name__ == "__main__":
    open_streams()
    sys.argv = [quoted(argument) for argument in sys.argv]
    with clear_errors():
        main()
