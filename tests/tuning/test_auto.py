"""``auto`` by measurement."""

from collections.abc import Iterator

import pytest
import torch

from windlass.layers import Conv2d, choice_for, set_chooser
from windlass.plan.convolution import ConvChoice, ConvShape
from windlass.tuning import auto, convolution
from windlass.tuning.cache import TimesCache
from windlass.tuning.convolution import OnEvent, Tuner, real_measure
from windlass.tuning.cost import Machine
from windlass.tuning.results import Settings
from windlass.tuning.timing import Effort

SHAPE = ConvShape(batch=1, in_channels=4, height=9, width=9, out_channels=4, kernel=(3, 3), padding=(1, 1, 1, 1))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Really measures, but then says that direct is fastest; the list holds what was measured."""
    seen: list[str] = []
    real = real_measure(threads=1, effort=Effort(min_rounds=1, max_rounds=1, sample_s=0))

    def make(settings: Settings, *, threads: int, on_event: OnEvent) -> Tuner:
        def measure(case, direction, names):  # type: ignore[no-untyped-def]
            found = real(case, direction, names)
            assert set(found) == set(names) and all(seconds > 0 for seconds in found.values())
            seen.append(f"{case.layout}/{direction}/{case.is_training}")
            return {name: 0.1 if name == "direct" else 1.0 for name in names}

        return Tuner(settings, Machine(1e9, 1e12, 1), TimesCache({}, lambda message: None, None), measure, lambda *_: 0)

    monkeypatch.setattr(auto, "make_tuner", make)
    monkeypatch.setattr(convolution, "BEHIND", 1e9)
    monkeypatch.setattr(convolution, "HOPELESS", 1e9)
    yield seen
    set_chooser(None)


def test_auto_is_measured_once_per_size_and_layout(measured: list[str]) -> None:
    auto.tune_auto()
    assert choice_for(SHAPE) == ConvChoice("direct", "direct", "direct")
    assert measured == ["contiguous/forward/True", "contiguous/input/True", "contiguous/weight/True"]
    measured.clear()
    assert choice_for(SHAPE) == ConvChoice("direct", "direct", "direct")
    assert measured == []
    assert choice_for(SHAPE, layout="channels_last", grad=False).forward == "direct"
    assert measured == ["channels_last/forward/False"]


def test_a_layer_measures_when_it_is_first_called_whatever_the_mode(measured: list[str]) -> None:
    auto.tune_auto()
    layer, x = Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 9, 9)
    with torch.inference_mode():
        first = layer(x)
    assert measured
    layer(x.requires_grad_()).sum().backward()  # training is another case than inference
    measured.clear()
    layer(x).sum().backward()
    assert measured == [] and x.grad is not None
    torch.testing.assert_close(layer(x), first)


def test_off_is_pytorch_s_own(measured: list[str]) -> None:
    auto.tune_auto(tune="off")
    assert choice_for(SHAPE) == ConvChoice() and measured == []
