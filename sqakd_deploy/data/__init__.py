"""Images: the embedded digits, known data sets, folders and arrays, as uint8 in memory.

Reading is free of torch; :mod:`sqakd_deploy.data.batches` turns the arrays into torch batches.
"""

from sqakd_deploy.data.arrays import from_arrays
from sqakd_deploy.data.folder import load_folder
from sqakd_deploy.data.load import DATASETS, Dataset, load_data
from sqakd_deploy.data.options import Progress, ReadOptions
from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing
from sqakd_deploy.data.splits import ImageData, ImageSplit

__all__ = [
    "DATASETS",
    "Augmentation",
    "Dataset",
    "ImageData",
    "ImageSplit",
    "Preprocessing",
    "Progress",
    "ReadOptions",
    "from_arrays",
    "load_data",
    "load_folder",
]
