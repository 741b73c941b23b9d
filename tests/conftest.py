import os
from pathlib import Path

import pytest

from cellseg_helpers.config import ROOT


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real sample images, which the project may not ship."""
    folder = Path(os.environ.get("CELLSEG_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real sample images: set CELLSEG_SAMPLE_DATA to their folder")
    return folder
