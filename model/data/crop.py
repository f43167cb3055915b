"""Pictures of any size to one size, as in ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis")."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image


def centre_crop(picture: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The centre of a picture (h, w, 3), resampled to `size` (H, W).

    It is halved with a box filter while both sides stay at least as large as asked, then resampled (bicubic) so that it just
    covers `size`, then cut out of the middle. A picture of that size already is returned as it is.
    """
    height, width = size
    if picture.shape[:2] == size:
        return picture
    image = Image.fromarray(picture)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image)[top : top + height, left : left + width]
