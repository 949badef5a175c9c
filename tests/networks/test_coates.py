import copy
from itertools import pairwise

import pytest
import torch
from measured_steps import allocated_peak
from torch import nn
from torch.nn import functional

from windlass.errors import ConfigError
from windlass.networks import build_network
from windlass.networks.capture import capture
from windlass.networks.coates import SparseAutoencoder, Stage, coates


def small(**changes: object) -> SparseAutoencoder:
    torch.manual_seed(7)
    given: dict[str, object] = {"in_channels": 2, "image_size": 12, "maps": 3, "field": 4, "step": 2, "norm": 3}
    return coates(**{**given, **changes})  # type: ignore[arg-type]


def stages_of(net: SparseAutoencoder) -> list[Stage]:
    return [stage for stage in net.stages if isinstance(stage, Stage)]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_outputs_are_features_and_each_stages_costs(layers: int) -> None:
    outputs = small(layers=layers)(torch.randn(5, 2, 12, 12))
    sides = [5, 1, 1]
    expected = [(5, 3, sides[layers - 1], sides[layers - 1])]
    for side in sides[:layers]:
        expected += [(5, 1, side, side), (5, 3, side, side)]
    assert [tuple(output.shape) for output in outputs] == expected


def test_the_objective_is_reconstruction_ica() -> None:
    """λ Σ_p |W_pᵀ W_p x_p - x_p|² + Σ sqrt(ε + Σ_window (W_p x_p)²), sample by sample, from the weights."""
    net, images = small(reconstruction=0.3).double(), torch.randn(4, 2, 12, 12, dtype=torch.float64)
    stage = stages_of(net)[0]
    weight, eps = stage.filters.weight.detach(), stage.pool.eps
    expected = 0.0
    for image in images:
        responses = torch.zeros(3, 5, 5, dtype=torch.float64)
        for p in range(5):
            for q in range(5):
                field = image[:, 2 * p : 2 * p + 4, 2 * q : 2 * q + 4].flatten()
                responses[:, p, q] = weight[p, q] @ field
                expected += 0.3 * float((weight[p, q].T @ responses[:, p, q] - field).square().sum())
        sums = functional.conv2d(responses[:, None].square(), torch.ones(1, 1, 3, 3).double(), padding=1)
        expected += float((sums + eps).sqrt().sum())
    loss = net.own_loss(net(images), images).detach()
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_the_objective_of_a_batch_is_the_sum_of_its_samples() -> None:
    net, images = small(layers=2).double(), torch.randn(3, 2, 12, 12, dtype=torch.float64)
    parts = [float(net.own_loss(net(image[None]), image[None]).detach()) for image in images]
    assert float(net.own_loss(net(images), images).detach()) == pytest.approx(sum(parts), rel=1e-12)


def test_no_derivative_goes_from_a_stage_to_the_one_below() -> None:
    """Both stages' gradients at once are those of the first alone, and of the second on fixed inputs."""
    net, images = small(layers=2), torch.randn(4, 2, 12, 12)
    net.own_loss(net(images), images).backward()  # type: ignore[no-untyped-call]
    first, second = stages_of(net)
    alone = copy.deepcopy(net)
    alone.zero_grad()
    features, error, pooled = stages_of(alone)[0](images)
    (error.sum() + pooled.sum()).backward()
    torch.testing.assert_close(first.filters.weight.grad, stages_of(alone)[0].filters.weight.grad)
    _, error, pooled = stages_of(alone)[1](features.detach())
    (error.sum() + pooled.sum()).backward()
    torch.testing.assert_close(second.filters.weight.grad, stages_of(alone)[1].filters.weight.grad)
    assert not features.requires_grad


@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 1, 3, 5)])
def test_the_objectives_of_tiles_add_up(cuts: tuple[int, ...]) -> None:
    """Output rows cut into tiles: filters on the rows they see, pooling with a fringe; losses and gradients add."""
    net, images = small().double(), torch.randn(2, 2, 12, 12, dtype=torch.float64)
    loss = net.own_loss(net(images), images)
    loss.backward()  # type: ignore[no-untyped-call]
    stage, total = stages_of(net)[0], 0.0
    weight = stage.filters.weight.detach()
    gradient = torch.zeros_like(weight)
    for start, stop in pairwise(cuts):
        low, high = max(0, start - 1), min(5, stop + 1)  # a row above and below for the windows of pooling
        tile = copy.deepcopy(stage)
        tile.filters.weight = nn.Parameter(weight[low:high].clone())
        filtered = tile.filters(images[:, :, 2 * low : 2 * high + 2])
        tile.pool.padding = (0, 1)
        frame = (0, 0, int(start == 0), int(stop == 5))
        pooled = tile.pool(functional.pad(tile.responses(filtered), frame))
        part = net.own_loss((pooled, tile.error(filtered)[:, :, start - low : stop - low], pooled), images)
        part.backward()  # type: ignore[no-untyped-call]
        total += float(part.detach())
        assert tile.filters.weight.grad is not None
        gradient[low:high] += tile.filters.weight.grad
    assert total == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, stage.filters.weight.grad, rtol=1e-10, atol=1e-10)


def test_it_can_be_captured() -> None:
    net = small(layers=2)
    graph = capture(net, (6, 2, 12, 12), name="coates", num_classes=1)
    layers = {layer.name: layer for layer in graph.layers}
    filters = layers["stages.0.filters"]
    products = 6 * 5 * 5 * 3 * 2 * 4 * 4  # samples, positions, maps, elements of a field
    assert filters.forward_macs == 2 * products, "encoder and decoder"
    assert filters.backward_macs == 3 * products, "the images want no derivative"
    assert graph.num_parameters == sum(p.numel() for p in net.parameters())
    assert layers["stages.1.filters"].inputs == ("stages.0.norm.divide",)
    assert capture(net, (6, 2, 12, 12), name="coates", num_classes=1, training=False).peak_bytes < graph.peak_bytes


@pytest.mark.parametrize("layers", [1, 2])
def test_predicted_peak_is_what_pytorch_held(layers: int) -> None:
    net = small(image_size=40, maps=8, layers=layers)
    images = torch.randn(32, 2, 40, 40)
    held = sum(t.numel() * t.element_size() for t in (*net.parameters(), images)) + 32 * 8  # and labels
    graph = capture(net, (32, 2, 40, 40), name="coates", num_classes=1)

    def step() -> None:
        outputs = net(images)
        loss = net.own_loss(outputs, images)
        del outputs
        loss.backward()  # type: ignore[no-untyped-call]

    assert graph.peak_bytes == pytest.approx(held + allocated_peak(step), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 4}, "1 to 3 layers, got 4"),
        ({"maps": 0}, "maps needs a number of at least 1, got 0"),
        ({"pool": 2}, "pool is around a position and needs an odd number, got 2"),
        ({"norm": 2}, "odd number of rows, got 2"),
        ({"reconstruction": 0.0}, "reconstruction needs a number above 0"),
        ({"window": "disc"}, "unknown window 'disc'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_the_smallest_images() -> None:
    net = build_network("coates", num_classes=10, in_channels=1, image_size=8, layers=3)
    assert net(torch.zeros(2, 1, 8, 8))[0].shape == (2, 16, 1, 1)
