"""Smaller in steps: no data, unlabeled inputs, and training in rounds, on a network trained here.

    python examples/retune.py

Half of the held-out examples choose, the other half give the numbers that are printed.
"""

import torch
from torch import nn

import fxfib

LOSS = nn.functional.cross_entropy


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the plane, seen through twenty noisy features; the class is the ring."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(count, 2, generator=generator)
    features = plane @ torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    features += 0.1 * torch.randn(count, 20, generator=generator)
    return features, torch.bucketize(plane.norm(dim=1), torch.tensor([0.7, 1.2, 1.7]))


def main() -> None:
    """Train, tune, retune, and the same loop by hand."""
    torch.manual_seed(0)
    inputs, labels = data(2000, 1)
    training = list(zip(inputs.split(100), labels.split(100), strict=True))
    choosing, (held, truth) = [data(1000, 2)], data(1000, 3)
    model = nn.Sequential(nn.Linear(20, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU())
    model.append(nn.Linear(64, 4))
    fxfib.finetune(model, training, LOSS, passes=15, rate=3e-3, progress=False)
    model.eval()

    def show(name: str, network: nn.Module) -> None:
        with torch.no_grad():
            right = 100 * (network(held).argmax(1) == truth).float().mean().item()
        print(f"{name:<28} {sum(p.numel() for p in network.parameters()):>6} {right:>7.1f} %")

    print(f"{'':<28} {'params':>6} {'accuracy':>9}")
    show("trained", model)
    given = {"example_inputs": (inputs[:2],), "progress": False}
    show("a tenth, no data", fxfib.tune(model, params=0.1, **given))
    show("a tenth, unlabeled inputs", fxfib.tune(model, params=0.1, calibration=inputs, **given))
    show("a tenth, retuned", fxfib.retune(model, training, LOSS, params=0.1, **given))
    small = fxfib.retune(
        model, training, LOSS, validation=choosing, max_loss_increase=0.02, **given
    )
    show("within 0.02 of the loss", small)
    print(*small.fibration.notes[-3:], sep="\n")

    # What `retune` does, by hand: any training loop will do.
    small = model
    for share in (0.5, 0.25, 0.1):
        count = int(share * sum(p.numel() for p in model.parameters()))
        small = fxfib.tune(small, params=count, calibration=inputs, **given)
        small.train()
        optimizer = torch.optim.Adam(small.parameters(), 1e-3)
        for x, y in training:
            optimizer.zero_grad()
            LOSS(small(x), y).backward()
            optimizer.step()
        small.eval()
    show("a tenth, by hand", small)


if __name__ == "__main__":
    main()
