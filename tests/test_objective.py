import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from windlass.config import config_from_layers
from windlass.display import end_lines, epoch_line
from windlass.errors import ConfigError
from windlass.networks import build_network
from windlass.objective import accuracy_of, check_metrics, has_own_loss, loss_of, objective


class Copies(nn.Module):
    """Learns to give back its input."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def own_loss(self, outputs: Tensor, images: Tensor) -> Tensor:
        return (outputs - images).square().sum()


def test_labels_are_descended_to_and_counted() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    loss, correct = loss_of(nn.Identity(), logits, torch.empty(0), labels)
    assert float(loss) == pytest.approx(float(functional.cross_entropy(logits, labels)) * 6)
    assert correct == sum(int(row.argmax()) == label for row, label in zip(logits, labels.tolist(), strict=True))
    assert accuracy_of(nn.Identity(), 3, 4) == 0.75
    both, _ = loss_of(nn.Identity(), (logits, -logits), torch.empty(0), labels)
    assert float(both) == pytest.approx(float(objective(nn.Identity(), (logits, -logits), labels)))


def test_an_own_objective_takes_images_and_counts_nothing() -> None:
    module, images = Copies(), torch.arange(4.0).view(2, 2)
    loss, correct = loss_of(module, module(images), images, torch.zeros(2, dtype=torch.int64))
    assert (float(loss), correct) == (14.0, 0.0)
    assert has_own_loss(module) and not has_own_loss(nn.Identity())
    assert accuracy_of(module, 0, 4) is None


def test_an_accuracy_that_is_none_cannot_be_watched() -> None:
    coates = build_network("coates", num_classes=1, in_channels=1, image_size=8)
    config = config_from_layers([{"network": "coates"}])
    assert (config.checkpoint.monitor, config.data.source) == ("test_loss", "patches")
    check_metrics(coates, config)
    watching = config_from_layers([{"network": "coates", "checkpoint": {"monitor": "test_accuracy"}}])
    with pytest.raises(ConfigError, match=r"checkpoint.monitor: test_accuracy means nothing for network coates"):
        check_metrics(coates, watching)
    early = config_from_layers([{"network": "coates", "early_stop": {"patience": 2, "metric": "train_accuracy"}}])
    with pytest.raises(ConfigError, match=r"early_stop.metric: train_accuracy"):
        check_metrics(coates, early)
    check_metrics(nn.Identity(), watching)


EPOCH = {
    "epoch": 0, "train_loss": 3.0, "train_accuracy": 0.5, "test_loss": 4.0, "test_accuracy": 0.25,
    "images_per_s": 10.0, "data_share": 0.01, "eta_s": 1.0,
}  # fmt: skip
END = {
    "status": "done", "metrics": EPOCH, "best": None, "step": 7, "seconds": 1.0, "folder": "out",
}  # fmt: skip


def test_what_a_person_sees() -> None:
    assert "loss 3.0000  accuracy  50.00%  test loss 4.0000  test accuracy  25.00%  10 images/s" in epoch_line(EPOCH)
    without = {**EPOCH, "train_accuracy": None, "test_accuracy": None}
    assert "loss 3.0000  test loss 4.0000  10 images/s" in epoch_line(without)
    assert "test accuracy 25.00%, test loss 4.0000" in end_lines(END)[0]
    assert end_lines({**END, "metrics": without})[0].endswith("s: test loss 4.0000")
