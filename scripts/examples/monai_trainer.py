"""Watch a trainer of MONAI: a handler.

pip install monai pytorch-ignite
python scripts/examples/monai_trainer.py [epochs]
tensorboard --logdir outputs/examples/monai
"""

import sys

import torch
from monai.engines import SupervisedTrainer
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from shapes import disks
from torch.utils.tensorboard import SummaryWriter

from losswatch import WatchHandler

EPOCHS = int(sys.argv[1]) if sys.argv[1:] else 20

images, masks = disks(64)
batches = [
    {"image": images[i : i + 8], "label": masks[i : i + 8].unsqueeze(1)} for i in range(0, 64, 8)
]
net = UNet(2, 1, 2, channels=(8, 16, 32), strides=(2, 2))
trainer = SupervisedTrainer(
    device=torch.device("cpu"),
    max_epochs=EPOCHS,
    train_data_loader=batches,
    network=net,
    optimizer=torch.optim.Adam(net.parameters(), lr=1e-3),
    loss_function=DiceLoss(softmax=True, to_onehot_y=True),
)
with SummaryWriter("outputs/examples/monai") as writer:
    watch = WatchHandler(["cce", "dice", "dice_monai"], every_n_steps=10, writer=writer)
    watch.attach(trainer)
    trainer.run()
if watch.seen:
    print(dict(zip(watch.seen.names, watch.seen.norms.tolist(), strict=True)))
