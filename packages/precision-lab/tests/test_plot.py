import matplotlib.image
import pytest

from precision_lab.plot import save_plot
from precision_lab.results import Comparison, Row


def curve(mode, status="done", factor=1.0, steps=20):
    losses = [factor * (2 + 3 / (1 + step)) for step in range(steps)]
    held_out = 2.2 * factor if status == "done" else None
    return Row(mode, status, "", losses, [0.1] * steps, held_out)


@pytest.mark.parametrize(
    "rows",
    [
        [curve("64-true"), curve("32-true"), curve("bf16-mixed", factor=1.01)],
        [curve("64-true"), curve("16-true", "failed", steps=7), Row("16-mixed", reason="slow")],
        [curve("32-true", steps=1)],
        [Row("32-true", "failed", "broke")],
        [curve("64-true"), curve("bf16-mixed; *.norm: params=float32,compute=float16,scale=false", factor=1.01)],
    ],
    ids=["drift", "failed", "one step", "nothing", "long name"],
)
def test_picture_of(rows, tmp_path):
    save_plot(Comparison(20, 0, rows), tmp_path / "picture.png")
    pixels = matplotlib.image.imread(tmp_path / "picture.png")
    assert pixels.shape[:2] == (624, 2040)
    assert pixels[..., :3].std() > 0.01  # not a blank page
