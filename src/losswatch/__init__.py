"""losswatch: train a segmentation network with one loss, watch them all."""
