"""What eps does to size, error and accuracy, on a small network that is trained here.

    python examples/choose_eps.py

The accuracy is that of examples that the network was not trained on and eps is not chosen on: half
of the held-out examples choose, the other half give the number to report.
"""

import torch
from torch import nn

import fxfib


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the plane, seen through twenty noisy features; the class is the quadrant."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(count, 2, generator=generator)
    features = plane @ torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    features += 0.3 * torch.randn(count, 20, generator=generator)
    return features, (plane[:, 0] > 0).long() + 2 * (plane[:, 1] > 0).long()


def accuracy(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent."""
    with torch.no_grad():
        return 100 * (model(inputs).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train, sweep, choose."""
    torch.manual_seed(0)
    inputs, labels = data(2000, 1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    model.append(nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    model.eval()

    choosing, reporting = data(1000, 2), data(1000, 3)
    before = accuracy(model, *choosing)
    print(f"trained: {sum(p.numel() for p in model.parameters())} parameters, {before:.1f} %")
    chosen = model
    for eps in (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5):
        small = fxfib.compile(model, eps, (inputs[:64],))
        report, found = small.fibration, accuracy(small, *choosing)
        print(
            f"eps {eps:<5} {report.parameters_after:>6} parameters, relative error "
            f"{report.relative_error:.1e}, {found:.1f} %"
        )
        if found >= before - 1.0:
            chosen = small
    parameters = sum(p.numel() for p in chosen.parameters())
    print(f"chosen: {parameters} parameters, {accuracy(chosen, *reporting):.1f} % on fresh data")


if __name__ == "__main__":
    main()
