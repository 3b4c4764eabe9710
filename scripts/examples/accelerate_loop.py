"""Watch a loop of Hugging Face Accelerate: one line before `accelerator.backward`.

pip install accelerate
python scripts/examples/accelerate_loop.py [steps]
"""

import sys

import torch
from accelerate import Accelerator
from shapes import disks, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from losswatch import Observer

STEPS = int(sys.argv[1]) if sys.argv[1:] else 100

accelerator = Accelerator(cpu=True)
net, loss_fn = network(), nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
loader = DataLoader(TensorDataset(*disks(8 * STEPS)), batch_size=8)
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
observer = Observer(["cce", "dice"], net)

for step, (images, masks) in enumerate(loader):
    logits = net(images)
    loss = loss_fn(logits, masks)
    if step % 10 == 0:
        seen = observer(logits, masks)
        accelerator.print(step, dict(zip(seen.names, seen.norms.tolist(), strict=True)))
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
