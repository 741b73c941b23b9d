"""Controls above a figure, for JupyterLab; under papermill and nbval the figure is drawn once and
nothing waits.
"""

import io
from collections.abc import Callable

from ipywidgets import Image, Layout, ValueWidget, VBox
from matplotlib.figure import Figure


def explore(draw: Callable[..., Figure], **controls: ValueWidget) -> VBox:
    """``draw(name=value, ...)`` as a picture that is drawn anew whenever one of the controls
    changes.

    ``ipywidgets.interact`` would do, but its Output widget sends messages back to the kernel when a
    notebook is run without a browser, and papermill then sometimes waits for ever.

    Args:
        draw: takes the controls' values by name.
        controls: widgets that have a value.
    """
    picture = Image(
        format="png", layout=Layout(align_self="flex-start")
    )  # at its own size, not stretched to the page

    def redraw(_=None) -> None:
        png = io.BytesIO()
        draw(**{name: control.value for name, control in controls.items()}).savefig(
            png, format="png"
        )
        picture.value = png.getvalue()

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    return VBox([*controls.values(), picture])
