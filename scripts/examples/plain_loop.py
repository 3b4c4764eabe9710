"""Watch a training loop in plain PyTorch: one line before `backward()`.

python scripts/examples/plain_loop.py [steps]
"""

import sys

import torch
from shapes import disks, network
from torch import nn

from losswatch import Observer

STEPS = int(sys.argv[1]) if sys.argv[1:] else 200

images, masks = disks(64)
net, loss_fn = network(), nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
observer = Observer(["cce", "dice", "dice_fg"], net)

print("step   ", *(f"{name:>18}" for name in observer.names(1)), "  (value, gradient norm)")
for step in range(STEPS):
    batch = torch.randperm(len(images))[:8]
    logits = net(images[batch])
    loss = loss_fn(logits, masks[batch])
    optimizer.zero_grad()
    if step % 20 == 0:
        seen = observer(logits, masks[batch])
        pairs = zip(seen.values.tolist(), seen.norms.tolist(), strict=True)
        print(f"{step:5}  ", *(f"{value:9.4f} {norm:8.4f}" for value, norm in pairs))
    loss.backward()
    optimizer.step()
