"""A U-Net that is small enough for a test: two levels, of which the coarser attends."""

from __future__ import annotations

from ditserve.model.spec.unet_config import UNetConfig

TINY_UNET = UNetConfig(
    image_size=(8, 8),
    in_channels=3,
    base_channels=16,
    multipliers=(1, 2),
    res_blocks=1,
    attention=(1,),
    head_size=16,
    classes=(5, 3),
    learn_sigma=False,
)
