"""NIfTI by nibabel, other medical formats by SimpleITK; where a volume lies in the world.

The axes of a volume are x, y, z, as nibabel has them. World coordinates grow to the right, to the
front and upwards (RAS).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from losswatch.data.reading import NIFTI, File, Unusable, suffix_of


def read_nifti(path: Path) -> File:
    """A volume, or an image [x, y, 1]; a fourth axis is that of channels."""
    import nibabel

    image = nibabel.load(path)
    array = np.asarray(image.dataobj)  # type: ignore[attr-defined]
    if array.dtype.fields:  # colours
        array = np.stack([array[name] for name in array.dtype.names or ()], -1)
    more = tuple(n for n in array.shape[3:] if n > 1)
    array = array.reshape(*(array.shape + (1, 1, 1))[:3], *more)
    if array.ndim > 4:
        raise Unusable(f"it has {array.ndim} axes; a volume and its channels are 4: split it")
    header = image.header
    known = [int(header[key]) for key in ("sform_code", "qform_code") if key in header]  # type: ignore
    place = image.affine if any(known) and np.linalg.det(image.affine) else None  # type: ignore
    return File(np.moveaxis(array, 3, 0) if array.ndim == 4 else array[None], place)


def read_itk(path: Path) -> File:
    """A volume of NRRD, MetaImage or DICOM; a folder is a series of DICOM files."""
    import SimpleITK as sitk

    image = _series(path) if path.is_dir() else sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)  # [z, y, x, channels]
    dims = image.GetDimension()
    array = np.moveaxis(array, -1, 0) if array.ndim > dims else array[None]
    if dims == 3 and array.shape[1] == 1:
        array, dims = array[:, 0], 2
    if dims == 2:
        return File(array)  # [y, x], as of a picture
    if dims != 3:
        raise Unusable(f"an image has 2 or 3 dimensions, it has {dims}: split it")
    place = np.eye(4)
    place[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    place[:3, 3] = image.GetOrigin()
    return File(array.transpose(0, 3, 2, 1), np.diag([-1.0, -1, 1, 1]) @ place)


def _series(folder: Path) -> Any:
    """An image of SimpleITK.

    Raises:
        Unusable: the folder holds no series or several, or slices of one are missing.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # errors say what is needed
    names = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(names) != 1:
        raise Unusable(
            f"a folder of DICOM files must hold one series, it holds {len(names)}; sort them, or "
            "convert them to NIfTI, by dcm2niix for example"
        )
    reader = sitk.ImageSeriesReader()
    files = reader.GetGDCMSeriesFileNames(str(folder), names[0])
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    position = "0020|0032"  # of the patient (DICOM PS3.3, C.7.6.2.1.1)
    if len(files) > 2 and all(reader.HasMetaDataKey(i, position) for i in range(len(files))):
        points = [reader.GetMetaData(i, position).split("\\") for i in range(len(files))]
        gaps = np.linalg.norm(np.diff(np.array(points, float), axis=0), axis=1)
        if np.ptp(gaps) > 0.1 * gaps.min():
            raise Unusable(
                f"its slices are {gaps.min():.3g} to {gaps.max():.3g} mm apart, as if some were "
                "missing; complete or resample the series"
            )
    return image


def is_orientation(axes: object) -> bool:
    """Whether text names the directions of three axes, such as "RAS".

    >>> is_orientation("LPS"), is_orientation("RAL"), is_orientation("")
    (True, False, False)
    """
    pairs = [[pair for pair in ("RL", "AP", "SI") if letter in pair] for letter in str(axes)]
    return sorted(sum(pairs, [])) == ["AP", "RL", "SI"]


def axes_of(file: File) -> str:
    """The orientation of a volume, such as "RAS" for axes to the right, front and top; or ""."""
    from nibabel.orientations import aff2axcodes

    if file.place is None or file.array.ndim != 4:
        return ""
    return "".join(aff2axcodes(file.place))  # type: ignore[arg-type]


def placed(file: File, image: File) -> File:
    """A mask or a channel at the place of its image, where only one of the files says its own.

    Then pixels of equal index lie together.
    """
    if image.place is None:
        return file._replace(place=None)
    flat_one = image.array.ndim == 4 and image.array.shape[3] == 1 and file.array.ndim == 3
    array = file.array[..., None] if flat_one else file.array
    if file.place is not None or array.shape[1:] != image.array.shape[1:]:
        return file
    return file._replace(array=array, place=image.place)


def turned(file: File, axes: str) -> File:
    """A volume whose axes are mirrored and swapped to an orientation, such as "RAS".

    One whose place is not known stays as it is.
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff

    own = axes_of(file)
    if not own or not axes or own == axes:
        return file
    change = _change(own, axes)
    array = np.stack([apply_orientation(plane, change) for plane in file.array])
    return file._replace(array=array, place=file.place @ inv_ornt_aff(change, file.array.shape[1:]))


def turned_back(labels: np.ndarray, axes: str, own: str) -> np.ndarray:
    """A mask [*space] of an orientation, in the orientation `own` of its image."""
    from nibabel.orientations import apply_orientation

    return apply_orientation(labels, _change(axes, own)) if axes and own else labels


def _change(before: str, after: str) -> np.ndarray:
    from nibabel.orientations import axcodes2ornt, ornt_transform

    return ornt_transform(axcodes2ornt(before), axcodes2ornt(after))


def distance(first: File, second: File) -> float:
    """How far apart pixels of equal index lie at most, in pixels; 0 where it is not known."""
    if first.place is None or second.place is None or first.place.shape != second.place.shape:
        return 0.0
    shape = np.array(first.array.shape[1:])
    corners = np.indices([2] * len(shape)).reshape(len(shape), -1).T * (shape - 1)
    points = np.c_[corners, np.ones(len(corners))]
    there = points @ (np.linalg.inv(first.place) @ second.place).T
    return float(abs(there - points).max())


def flat(file: File) -> np.ndarray:
    """The array [channels, *space], without the third axis of a NIfTI that has one slice."""
    array = file.array
    return array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array


def write_volume(labels: np.ndarray, path: Path, like: Path) -> Path:
    """Write a mask, in the orientation of its image `like`, with that image's place in the world.

    As NRRD or MetaImage if the image is one, otherwise as NIfTI.
    """
    import nibabel

    suffix = suffix_of(like)
    if suffix in (".nrrd", ".nhdr", ".mha", ".mhd"):
        import SimpleITK as sitk

        source = sitk.ReadImage(str(like))
        array = labels if labels.ndim == 2 else labels.T
        mask = sitk.GetImageFromArray(array.reshape(source.GetSize()[::-1]))
        mask.CopyInformation(source)
        path = path.with_name(path.name + (".nrrd" if suffix in (".nrrd", ".nhdr") else ".mha"))
        sitk.WriteImage(mask, str(path), True)
        return path
    file = read_nifti(like) if suffix in NIFTI else read_itk(like)
    place = file.place if file.array.ndim == 4 else None
    path = path.with_name(f"{path.name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels.reshape(file.array.shape[1:]), place), path)  # type: ignore
    return path
