"""The README's quickstart, run as written."""

import re
import subprocess
import sys
from pathlib import Path


README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_quickstart_trains_saves_reloads_and_merges(tmp_path):
    (quickstart,) = re.findall(r"## Quickstart\n\n```py\n(.*?)```", README, re.DOTALL)
    checks = "\nimport torch\nassert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear\n"
    result = subprocess.run(
        [sys.executable, "-c", quickstart + checks],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    before, after = (
        float(re.search(rf"^{name}: (.*)$", result.stdout, re.MULTILINE)[1])
        for name in ("round-to-nearest", "LR-QAT")
    )
    assert after < before
    assert (tmp_path / "lrqat-3bit" / "adapter_model.safetensors").stat().st_size > 0
