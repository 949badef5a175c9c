"""The sparse autoencoder of Coates et al., which learns features of images without labels.

Sources: A. Coates, B. Huval, T. Wang, D. Wu, A. Ng and B. Catanzaro, "Deep learning with COTS HPC systems", ICML
2013; the stages are those of Q. Le et al., ICML 2012, and the objective is reconstruction ICA: Q. Le, A. Karpenko,
J. Ngiam and A. Ng, "ICA with reconstruction cost for efficient overcomplete feature learning", NIPS 2011.

A stage is untied local filters, L2 pooling over neighbouring positions, and local contrast normalisation.  Each is
trained on what the one below gives, with the objective

    λ Σ_p |W_pᵀ W_p x_p - x_p|²  +  Σ sqrt(ε + Σ_window (W_p x_p)²),

the error of giving each receptive field x_p back and the pooled responses, which are to be few.  The papers train
stage by stage.  Here no derivative goes from a stage to the one below, so the sum of the stages' objectives trains
all side by side, each on inputs that settle as the one below does.

Both sums run over positions, and no position needs another's filters: a network cut into spatial tiles adds up the
tiles' objectives and exchanges nothing but the fringes of the maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from windlass.errors import ConfigError
from windlass.layers.local import Channels, L2Pool2d, LocalContrastNorm2d, LocallyConnected2d, StopGradient


class Stage(nn.Module):
    """Filters, pooling, normalisation; see the head of this file.

    Args:
        in_channels: maps of the stage below.
        maps: filters at each position.
        image_size: rows and columns of the input.
        field, step: of the receptive fields.
        pool: rows and columns of positions whose responses are pooled, around every position.
        norm: rows and columns of the window of contrast normalisation.
        window: ``gaussian`` or ``box``.
    """

    def __init__(
        self, in_channels: int, maps: int, *, image_size: int, field: int, step: int, pool: int, norm: int, window: str
    ) -> None:
        super().__init__()
        self.filters = LocallyConnected2d(
            in_channels, maps, field, input_size=image_size, stride=step, reconstruct=True
        )
        self.responses = Channels(0, maps)
        self.error = Channels(maps, maps + 1)
        self.pool = L2Pool2d(pool, stride=1, padding=pool // 2)
        self.stop = StopGradient()
        self.norm = LocalContrastNorm2d(norm, window=window)

    @property
    def out_size(self) -> int:
        """Rows and columns of the output."""
        return int(self.filters.weight.shape[0])

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features for the next stage; the error of each receptive field; the pooled responses."""
        filtered = self.filters(x_NCHW)
        error = self.error(filtered)
        pooled = self.pool(self.responses(filtered))
        return self.norm(self.stop(pooled)), error, pooled


class SparseAutoencoder(nn.Module):
    """Stages on top of each other, trained side by side without labels."""

    def __init__(self, stages: Sequence[Stage], *, reconstruction: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.reconstruction = reconstruction

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The last stage's features (N, maps, P, Q), then each stage's errors (N, 1, P, Q) and pooled responses."""
        costs: list[Tensor] = []
        x = x_NCHW
        for stage in self.stages:
            x, error, pooled = stage(x)
            costs += (error, pooled)
        return x, *costs

    def own_loss(self, outputs: Sequence[Tensor], images: Tensor) -> Tensor:
        """The objective, summed over samples and positions: of a tile's outputs, that tile's part of it."""
        pairs = zip(outputs[1::2], outputs[2::2], strict=True)
        return torch.stack([self.reconstruction * error.sum() + pooled.sum() for error, pooled in pairs]).sum()


def coates(
    *,
    num_classes: int = 1,
    in_channels: int = 3,
    image_size: int = 200,
    layers: int = 1,
    maps: int = 16,
    field: int = 8,
    step: int = 2,
    pool: int = 3,
    norm: int = 5,
    window: str = "gaussian",
    reconstruction: float = 1.0,
) -> SparseAutoencoder:
    """Coates et al.'s sparse autoencoder of one to three stages (three in the paper); `num_classes` is ignored.

    A stage whose input is smaller than `field` takes all of it as its receptive field.

    Args:
        num_classes: labels are not looked at.
        in_channels: channels of the images.
        image_size: rows and columns of the images.
        layers: stages.
        maps: filters at each position of each stage.
        field: rows and columns of receptive fields.
        step: from one receptive field to the next.
        pool: positions pooled, in rows and columns, odd.
        norm: window of contrast normalisation, in rows and columns, odd.
        window: ``gaussian`` or ``box``.
        reconstruction: λ, what giving back counts beside being sparse.

    Raises:
        ConfigError: a number that does not fit.
    """
    _check(layers=layers, maps=maps, field=field, step=step, pool=pool, reconstruction=reconstruction)
    stages: list[Stage] = []
    channels, size = in_channels, image_size
    for _ in range(layers):
        stage = Stage(
            channels, maps, image_size=size, field=min(field, size), step=step, pool=pool, norm=norm, window=window
        )
        stages.append(stage)
        channels, size = maps, stage.out_size
    return SparseAutoencoder(stages, reconstruction=reconstruction)


def _check(*, layers: int, pool: int, reconstruction: float, **counts: int) -> None:
    if layers not in (1, 2, 3):
        raise ConfigError(f"coates has 1 to 3 layers, got {layers}")
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"coates: {name} needs a number of at least 1, got {count}")
    if pool < 1 or pool % 2 == 0:
        raise ConfigError(f"coates: pool is around a position and needs an odd number, got {pool}")
    if not reconstruction > 0:
        raise ConfigError(f"coates: reconstruction needs a number above 0, got {reconstruction}")
