"""Files among the images that are none."""

import os

import pytest
from PIL import Image

from salvit_core import datasets


def test_a_fifo_among_the_images_is_refused_and_not_waited_for(tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "imagenette" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8)).save(folder / f"{i}.JPEG")
    os.mkfifo(folder / "fifo.JPEG")
    with pytest.raises(ValueError, match=r"fifo.JPEG is no plain file: delete it"):
        datasets.load("imagenette", tmp_path, image=8)
