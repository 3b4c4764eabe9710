"""Watch a `Trainer` of Hugging Face: a subclass with an observer.

pip install transformers accelerate
python scripts/examples/hugging_face.py [steps]
"""

import sys

import torch.nn.functional as F
from shapes import disks, network
from torch import nn
from transformers import Trainer, TrainingArguments

from losswatch import Observer

STEPS = int(sys.argv[1]) if sys.argv[1:] else 100


class Segmenter(nn.Module):
    """A model as `Trainer` wants it: it returns its loss and its logits."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, pixel_values, labels):
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class WatchedTrainer(Trainer):
    observer = None

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training and self.state.global_step % 10 == 0:
            self.observer = self.observer or Observer(["cce", "dice"], model)
            seen = self.observer(outputs["logits"], inputs["labels"])
            norms = zip(seen.names, seen.norms.tolist(), strict=True)
            self.log({f"grad_norm/{name}": norm for name, norm in norms})
        return (loss, outputs) if return_outputs else loss


images, masks = disks(64)
arguments = TrainingArguments(
    output_dir="outputs/examples/hugging_face",
    max_steps=STEPS,
    per_device_train_batch_size=8,
    save_strategy="no",
    report_to=[],
)
data = [{"pixel_values": x, "labels": y} for x, y in zip(images, masks, strict=True)]
trainer = WatchedTrainer(Segmenter(), arguments, train_dataset=data)
trainer.train()
print([entry for entry in trainer.state.log_history if "grad_norm/dice" in entry][-1])
