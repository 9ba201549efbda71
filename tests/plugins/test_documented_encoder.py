"""The plug-in that docs/checkpoints.md shows adds a family of encoders."""

import re
from pathlib import Path

import pytest
import torch
import torchvision

from msn_eval import load_encoder
from msn_eval.features.encoder import encode

_DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the documented distribution, as pip does: its module, and its entry points beside it."""
    text = _DOCUMENT.read_text()
    (module,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (point,) = re.findall(r'entry-points."msn_eval.encoders"\]\n(.*?)\n\n', text, re.DOTALL)
    (tmp_path / "tv_net.py").write_text(module)
    info = tmp_path / "tv_net-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tv-net\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[msn_eval.encoders]\n{point.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_documented_plugin_encodes_like_its_own_network(installed: Path) -> None:
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), installed / "weights.pth")

    encoder = load_encoder(f"tv-net:resnet18@{installed / 'weights.pth'}", device="cpu")

    pixels = torch.full((1, 224, 224, 3), 200, dtype=torch.uint8)
    mean, std = torch.tensor(encoder.transform.mean), torch.tensor(encoder.transform.std)
    with torch.no_grad():
        network.fc = torch.nn.Identity()
        expected = network(((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2))
    assert torch.allclose(encode(encoder, pixels, ["out"])["out"], expected, atol=1e-5)
    assert encoder.checkpoint.distribution == "tv-net 1.0"
