"""Test-time augmentation: a photograph and its mirror image, judged together."""

from __future__ import annotations

from torch import Tensor, nn


class Mirrored(nn.Module):
    """The mean of what a network says of images and of the same mirrored left to right.

    A mirrored eye is an eye like any other, the left for the right one; upside down it would be none. The mean is of
    the outputs before the softmax, so calibration and thresholds apply to it as they are.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def head(self) -> nn.Module:
        """The network's own: what comes to it first are the features of the images as they are."""
        head = self.network.head
        assert isinstance(head, nn.Module)
        return head

    def forward(self, images: Tensor) -> Tensor:
        """images float[B, 3, H, W] -> float[B, K]."""
        mean: Tensor = (self.network(images) + self.network(images.flip(-1))) / 2
        return mean
