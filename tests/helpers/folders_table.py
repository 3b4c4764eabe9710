"""The whole table of folders: each module adds its rows."""

import importlib

from folders import ROWS

for name in (
    "folders_colours",
    "folders_damaged",
    "folders_datasets",
    "folders_flat",
    "folders_formats",
    "folders_layouts",
    "folders_left",
    "folders_lists",
    "folders_masks",
    "folders_nnunet",
    "folders_scans",
    "folders_values",
):
    importlib.import_module(name)

__all__ = ["ROWS"]
