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

from losswatch.command import main

if __name__ == "__main__":
    main()
