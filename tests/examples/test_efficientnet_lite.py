"""EfficientNet-Lite as an example of a network of another package."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from examples.encoders import efficientnet_lite
from msn_eval.checkpoints.checkpoint import read_checkpoint


@pytest.mark.parametrize("factory", ["lite1", "lite2"])
def test_weights_classify_images_of_imagenet_from_the_features(shared_data: Path, factory: str) -> None:
    network = getattr(efficientnet_lite, factory)().eval()
    classes = _read_classes(shared_data)
    resize = v2.Compose([v2.Resize(146), v2.CenterCrop(128), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    normalise = v2.Normalize(network.mean, network.std)
    images, labels = [], []
    with tarfile.open(shared_data / "imagenet_samples.tar") as archive:
        for member in [member for member in archive.getmembers() if member.isfile()][::7]:
            content = archive.extractfile(member)
            assert content is not None
            images.append(normalise(resize(Image.open(io.BytesIO(content.read())).convert("RGB"))))
            labels.append(classes.index(Path(member.name).parent.name))

    with torch.inference_mode():
        predicted = network.network._fc(network(torch.stack(images))).argmax(dim=1)

    right = (predicted == torch.tensor(labels)).sum().item()
    assert right > 0.6 * len(labels)


def test_checkpoint_name_states_size_and_normalisation() -> None:
    checkpoint = read_checkpoint("py:examples.encoders.efficientnet_lite:lite1")
    assert (checkpoint.image_pixels, checkpoint.normalisation.mean) == (240, (0.5, 0.5, 0.5))


def _read_classes(shared_data: Path) -> list[str]:
    lines = (shared_data / "imagenet_subsets/imagenet_subsets1/1imgs_class.txt").read_text().split()
    return sorted({line.partition("_")[0] for line in lines})
