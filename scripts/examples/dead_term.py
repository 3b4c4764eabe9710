"""A bug that real projects have: the cross entropy in their Dice + cross entropy does nothing.

    python scripts/examples/dead_term.py [steps]    draws outputs/watch/dead_term.png

The network has one channel. Dice reads its sigmoid, as it should. But `nn.CrossEntropyLoss` takes
the softmax over the channels, and the softmax of one channel is 1 everywhere: the term is 0 and has
no gradient. The sum still falls, because Dice falls. The gradient norms of the terms show the bug
at the first step.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from shapes import disks, network
from torch import nn

from losswatch import Dice, Observer

STEPS = int(sys.argv[1]) if sys.argv[1:] else 150
PICTURE = Path("outputs/watch/dead_term.png")

images, masks = disks(64)
labels = masks.unsqueeze(1).float()
net = network(channels=1)
dice, dead = Dice(activation="sigmoid"), nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
# "intended": with activation="sigmoid" the preset cce is binary cross entropy.
losses: dict[str, str | nn.Module] = {"dice": dice, "cross entropy": dead, "intended": "cce"}
observer = Observer(losses, net, activation="sigmoid")

values, norms = [], []
for _ in range(STEPS):
    batch = torch.randperm(len(images))[:8]
    logits = net(images[batch])
    loss = dice(logits, labels[batch]) + dead(logits, labels[batch])
    seen = observer(logits, labels[batch])
    values.append([float(loss.detach()), *seen.values.tolist()])
    norms.append(seen.norms.tolist())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.set(title="what the loop prints: the loss", xlabel="step", ylim=(0, None))
left.plot([row[0] for row in values], color="black", label="Dice + cross entropy")
right.set(title="what losswatch shows: gradient norms", xlabel="step")
for k, (name, colour) in enumerate(zip(losses, ("C0", "C3", "C2"), strict=True)):
    label = {"intended": "cross entropy as intended (watched)"}.get(name, f"term: {name}")
    right.plot([row[k] for row in norms], colour, label=label, lw=2.5 if k == 1 else 1.5)
for axes in (left, right):
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
PICTURE.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(PICTURE, dpi=150)
print(f"gradient norm of the cross entropy: {max(row[1] for row in norms)} at most. {PICTURE}")
