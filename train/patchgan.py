"""The PatchGAN discriminator of the tokenizer's adversarial loss, keys as in LlamaGen's files (``main.N``).

Pix2pix's network (Isola et al., 2017): 4x4 convolutions, all but the last two halving the image; its output judges
overlapping patches of 70x70 pixels (three layers), not the image as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchGAN(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> one logit a patch [B, 1, h, w]: above 0 for real, below for made.

    ``ndf``: filters of the first layer; ``n_layers``: layers with halving (3: patches of 70 pixels). Filters double
    from layer to layer, up to eight times ``ndf``. BatchNorm takes the statistics of its batch in training mode, so
    real and made images go through in separate calls.
    """

    def __init__(self, ndf: int = 64, n_layers: int = 3, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        for i in range(1, n_layers + 1):
            stride = 2 if i < n_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),  # the norm has the bias
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, 0.02) for convolutions, normal(1, 0.02) for the norms' weights; upstream leaves the conv biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1.0, 0.02)
                module.bias.zero_()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.main(images_BCHW)
