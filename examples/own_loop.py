"""STD in a training loop of your own: any backbone that yields features [B, P, C] can be the student.

`distil` is the example. The rest makes it run: scikit-learn's handwritten digits, a backbone of two convolutions in
plain PyTorch, and a teacher that is trained first. Takes seconds: `python examples/own_loop.py`
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from std_fast import MutualInformation, STDModule, distillation_loss, targets_from_logits


def distil(backbone, teachers, batches, P, C, K, alpha=0.5, mine_every=1000):
    """Trains `backbone` (images -> [B, P, C]); returns the model as a function of images, and its parts."""
    head, std, mine = nn.Linear(C, K), STDModule(C, P, K, len(teachers)), MutualInformation(C, P, weight=0.01)
    parts = nn.ModuleList([backbone, head, std, mine])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=2e-3, weight_decay=0.0)
    for step, (images, labels) in enumerate(batches):
        with torch.no_grad():
            targets = targets_from_logits(torch.stack([teacher(images) for teacher in teachers], dim=1))
        z_BPC = backbone(images)
        tokens = std(z_BPC)  # tokens.logits [B, M, K]: one head for each teacher
        class_loss = F.cross_entropy(head(z_BPC.mean(1)), labels)
        loss = (1 - alpha) * class_loss + alpha * distillation_loss(tokens.logits, targets)
        if step % mine_every == 0:  # about once an epoch, as in the paper: in each step it cost accuracy
            loss = loss - mine(tokens.spatial, tokens.channel)  # the two tokens come to carry different information
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def model(images):
        z_BPC = backbone(images)
        return (head(z_BPC.mean(1)) + std(z_BPC).logits.mean(1)) / 2

    return model, parts


class Backbone(nn.Module):
    """Images [B, 1, 8, 8] -> features of 16 patches [B, 16, 32]."""

    def __init__(self):
        super().__init__()
        self.patch, self.mix = nn.Conv2d(1, 32, 2, stride=2), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, images):
        return self.mix(F.gelu(self.patch(images))).flatten(2).transpose(1, 2)


def main(steps=400, batch=128):
    """Trains teacher and student on three quarters of the digits; returns the accuracy of each on the last quarter."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    images, labels, held_images, held_labels = images[:1348], labels[:1348], images[1348:], labels[1348:]

    def batches(model):
        for step in range(steps):
            if step % 50 == 0:
                print(f"{model}: step {step} of {steps}", flush=True)
            rows = torch.randint(len(images), (batch,))
            yield images[rows], labels[rows]

    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    for x, y in batches("teacher"):
        F.cross_entropy(teacher(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    student, _ = distil(Backbone(), [teacher], batches("student"), P=16, C=32, K=10, mine_every=len(images) // batch)
    return [(model(held_images).argmax(1) == held_labels).float().mean().item() for model in (teacher, student)]


if __name__ == "__main__":
    print("teacher {:.1%}, student {:.1%}".format(*main()))
