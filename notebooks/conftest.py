"""Keeps out of the compared outputs what depends on a machine's state: progress bars, and
matplotlib's note on its first use.
"""

import os

import matplotlib.font_manager  # noqa: F401 - builds the font cache, if there is none

os.environ["TQDM_DISABLE"] = "1"
