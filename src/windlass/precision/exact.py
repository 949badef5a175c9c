"""Which layers and functions make no new numbers: their results need no rounding, and keep their inputs' format."""

from __future__ import annotations

from torch import nn

EXACT_LAYERS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.ZeroPad2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.UpsamplingNearest2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
"""Layers whose outputs are numbers among their inputs, and zeros."""

POOLING = {
    f"{kind}max_pool{dims}d{suffix}": dims
    for dims in (1, 2, 3)
    for kind, suffix in (("", ""), ("adaptive_", ""), ("", "_with_indices"), ("adaptive_", "_with_indices"))
}
"""Functions that save indices into the last so many dims of their input."""

EXACT_FUNCTIONS = frozenset((
    "relu", "relu_", "threshold", "flatten", "unflatten", "reshape", "view",
    "view_as", "reshape_as", "permute", "transpose", "t", "swapaxes", "movedim", "contiguous", "clone", "detach",
    "to", "float", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "cat", "concat", "concatenate",
    "stack", "hstack", "vstack", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "index_select",
    "gather", "getitem", "__getitem__", "pad", "flip", "roll", "index_put", "index_put_", "scatter", "masked_fill",
    "masked_fill_", "where", "max", "min", "amax", "amin", "maximum", "minimum", "sort", "topk",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "as_strided", "unfold", "tril", "triu", "diagonal",
    "broadcast_to", *POOLING,
))  # fmt: skip
"""Functions for which the same holds, by name."""

FILLING = frozenset(("masked_fill", "masked_fill_", "where", "pad", "scatter", "threshold"))
"""Those of them that may be given a number which is in no format."""

ZEROS = frozenset(("new_zeros", "zeros_like", "zeros"))
"""Functions whose results are in every format."""

METADATA = frozenset((
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "storage_offset", "element_size",
    "type", "is_floating_point", "is_complex", "data_ptr", "requires_grad_", "register_hook", "new_zeros",
    "new_empty", "empty", "empty_strided", "new_ones", "new_full", "new_tensor", "zeros_like", "empty_like",
    "__len__", "__hash__",
    "__repr__", "__format__", "get_device", "untyped_storage",
))  # fmt: skip
"""Functions that read no numbers of their tensor."""

READS_NUMBERS = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))
"""Attributes of a tensor that do."""
