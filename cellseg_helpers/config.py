"""stub"""
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def resolve_path(path: str | Path) -> Path:
    """An absolute path; a relative one stands under the repository's root, whatever the working folder."""
    return ROOT / Path(path).expanduser()
