from ipywidgets import IntSlider
from matplotlib.figure import Figure

from cellseg_helpers.explore import explore


def test_the_picture_follows_the_controls():
    drawn = []

    def draw(number: int) -> Figure:
        drawn.append(number)
        figure = Figure(figsize=(1, 1))
        figure.text(0.5, 0.5, str(number))
        return figure

    slider = IntSlider(2, 0, 9)
    box = explore(draw, number=slider)
    picture = box.children[-1]
    before = bytes(picture.value)
    assert drawn == [2] and before.startswith(b"\x89PNG")
    slider.value = 7
    assert drawn == [2, 7] and bytes(picture.value) != before and box.children[0] is slider
