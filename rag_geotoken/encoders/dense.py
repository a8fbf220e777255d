"""These functions compute linear layers at a CPU's full speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from rag_geotoken.storage.side_by_side import side_by_side

# With fewer rows than this, laying out the weights anew takes longer than the product gains.
FEWEST_ROWS = 128


def affine(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``linear``'s product (..., e) of states (..., d), weight (e, d) and bias (e,).

    On a CPU and without gradients by oneDNN. PyTorch multiplies float32 matrices with MKL, which keeps to AVX2 on AMD's
    processors, half of what those with AVX-512 can do; a convolution of single pixels is the same product by oneDNN.
    """
    rows = states.numel() // states.shape[-1]
    plain = torch.is_grad_enabled() or states.device.type != "cpu" or states.dtype != torch.float32
    if plain or rows < FEWEST_ROWS or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return linear(states, weight, bias)
    pixels = states.reshape(1, 1, rows, -1).permute(0, 3, 1, 2)  # channels last: nothing is copied
    return conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*states.shape[:-1], -1)


class Dense(nn.Linear):
    """This layer is ``nn.Linear``, computed by :func:`affine`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) for inputs (..., in_features)."""
        return affine(input, self.weight, self.bias)


def in_blocks(
    function: Callable[[Tensor], Tensor], values: Tensor, size: int, advance: Callable[[int], object] = lambda n: None
) -> Tensor:
    """Apply a function to rows (N, ...) in blocks of exactly ``size``, the last filled up; return the N results.

    Matrix products round differently for other numbers of rows. So no row's result depends on how many others there
    are: the same photo has the same embedding alone and in any batch. ``advance`` is called with every block's rows.
    """

    def whole(block: Tensor) -> Tensor:
        missing = size - len(block)
        filled = torch.cat([block, block[-1:].expand(missing, *block.shape[1:])]) if missing else block
        return function(filled)[: len(block)]

    results = []
    for result in side_by_side(whole, torch.split(values, size)):
        results.append(result)
        advance(len(result))
    return torch.cat(results)
