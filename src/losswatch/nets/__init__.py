"""The networks of `conf/model`: the article's plain network and a U-Net."""

from losswatch.nets.convnet import ConvNet
from losswatch.nets.unet import UNet

__all__ = ["ConvNet", "UNet"]
