"""Reads NIfTI by nibabel and other medical formats by SimpleITK, and places volumes in the world.

The axes of a volume are x, y, z, as in nibabel. World coordinates grow to the right, to the front
and upwards (RAS).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from losswatch.data.formats import NIFTI, File, Unusable, suffix_of

TO_RAS = np.diag([-1.0, -1, 1, 1])  # from the coordinates of ITK (LPS)

# --- Files ---------------------------------------------------------------------------------------


def read_nifti(path: Path) -> File:
    """Read a volume [x, y, z] or an image [x, y, 1]. A fourth axis is that of the channels."""
    import nibabel

    image: Any = nibabel.load(path)
    array = np.asarray(image.dataobj)
    if array.dtype.fields:  # colours
        array = np.stack([array[name] for name in array.dtype.names or ()], -1)
    more = tuple(n for n in array.shape[3:] if n > 1)
    array = array.reshape(*(array.shape + (1, 1, 1))[:3], *more)
    if array.ndim > 4:
        raise Unusable(f"it has {array.ndim} axes; a volume and its channels are 4: split it")
    return File(np.moveaxis(array, 3, 0) if array.ndim == 4 else array[None], _nifti_place(image))


def _nifti_place(image: Any) -> np.ndarray | None:
    """The affine matrix of an image of nibabel; None if its header has none."""
    header = image.header
    known = [int(header[key]) for key in ("sform_code", "qform_code") if key in header]
    return image.affine if any(known) and np.linalg.det(image.affine) else None


def read_itk(path: Path, is_volume: bool = False) -> File:
    """Read a volume of NRRD, MetaImage or DICOM. A folder is a series of DICOM files.

    Args:
        is_volume: whether an image with one slice becomes [x, y, 1]. Otherwise it becomes [rows,
            columns], like a picture.
    """
    import SimpleITK as sitk

    image = _open(path)
    dims = image.GetDimension()
    if dims not in (2, 3):
        raise Unusable(f"an image has 2 or 3 dimensions, it has {dims}: split it")
    array = sitk.GetArrayFromImage(image)  # [z, y, x, channels]
    array = np.moveaxis(array, -1, 0) if array.ndim > dims else array[None]
    place = _itk_place(image)
    if dims == 2 and is_volume:
        array, dims = array[:, None], 3
        place = np.insert(np.insert(place, 2, 0, 0), 2, 0, 1)
        place[2, 2] = 1
    if dims == 2:
        return File(array, place[:, [1, 0, 2]])
    place = TO_RAS @ place
    if array.shape[1] == 1 and not is_volume:
        return File(array[:, 0], place[:, [1, 0, 3]])
    return File(array.transpose(0, 3, 2, 1), place)


def _itk_place(image: Any) -> np.ndarray:
    """The affine matrix of an image of SimpleITK, in its own coordinates (LPS)."""
    dims = image.GetDimension()
    place = np.eye(dims + 1)
    place[:dims, :dims] = np.reshape(image.GetDirection(), (dims, dims)) * image.GetSpacing()
    place[:dims, dims] = image.GetOrigin()
    return place


def _open(path: Path) -> Any:
    """An image of SimpleITK.

    Raises:
        Unusable: a folder does not hold exactly one series, or slices of the series are missing.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # errors tell enough
    if not path.is_dir():
        return sitk.ReadImage(str(path))
    names = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    if len(names) != 1:
        raise Unusable(
            f"a folder of DICOM files must hold one series, it holds {len(names)}; sort them, or "
            "convert them to NIfTI, by dcm2niix for example"
        )
    reader = sitk.ImageSeriesReader()
    files = reader.GetGDCMSeriesFileNames(str(path), names[0])
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


def write_volume(labels: np.ndarray, path: Path, like: Path, axes: str) -> Path:
    """Write a mask with the place in the world of its image `like`.

    The format is NRRD or MetaImage if that of the image is, otherwise NIfTI.

    Args:
        labels: [*space], in the orientation `axes`; "" is that of the image.
        path: without a suffix.
    """
    suffix = suffix_of(like)
    if suffix in NIFTI:
        import nibabel

        source: Any = nibabel.load(like)
        array = _stored(labels, _axes(_nifti_place(source)), axes)
        path = path.with_name(f"{path.name}.nii.gz")
        image = nibabel.Nifti1Image(
            array.reshape(source.shape[:3]), source.affine, source.header, dtype=array.dtype
        )
        nibabel.save(image, path)
        return path
    import SimpleITK as sitk

    image = _open(like)
    array = labels  # correct for a picture
    if labels.ndim == 3:
        array = _stored(labels, _axes(TO_RAS @ _itk_place(image)), axes).T
    mask = sitk.GetImageFromArray(np.ascontiguousarray(array.reshape(image.GetSize()[::-1])))
    mask.CopyInformation(image)
    kind = {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}.get(suffix)
    path = path.with_name(f"{path.name}{kind or '.nii.gz'}")
    sitk.WriteImage(mask, str(path), True)
    return path


def _stored(labels: np.ndarray, own: str, axes: str) -> np.ndarray:
    """A mask turned from the orientation `axes` to that of its image's file, `own`."""
    from nibabel.orientations import apply_orientation

    array = labels[..., None] if labels.ndim == 2 else labels
    change = _change(axes, own)
    is_turned = change is not None and not _leaves_plane(array, change)
    return apply_orientation(array, change) if is_turned else array


# --- Places in the world --------------------------------------------------------------------------


def is_orientation(axes: object) -> bool:
    """Whether a text names the directions of three axes, such as "RAS".

    >>> is_orientation("LPS"), is_orientation("RAL"), is_orientation("")
    (True, False, False)
    """
    pairs = [[pair for pair in ("RL", "AP", "SI") if letter in pair] for letter in str(axes)]
    return sorted(sum(pairs, [])) == ["AP", "RL", "SI"]


def axes_of(file: File) -> str:
    """The orientation of a volume: "RAS" for axes to the right, front and top; "" if unknown."""
    return _axes(file.place) if file.array.ndim == 4 else ""


def _axes(place: np.ndarray | None) -> str:
    from nibabel.orientations import aff2axcodes

    return "" if place is None else "".join(aff2axcodes(place))  # type: ignore[arg-type]


def _change(before: str, after: str) -> np.ndarray | None:
    """nibabel's transform from one orientation to another; None if one of them is unknown."""
    from nibabel.orientations import axcodes2ornt, ornt_transform

    if not before or not after:
        return None
    return ornt_transform(axcodes2ornt(before), axcodes2ornt(after))


def _leaves_plane(array: np.ndarray, change: np.ndarray) -> bool:
    """Whether a change of axes moves the single slice of an image [..., 1] out of its plane."""
    return array.shape[-1] == 1 and change[2, 0] != 2


def turn_to(file: File, axes: str) -> File:
    """A volume with its axes mirrored and swapped to an orientation, such as "RAS".

    A volume without a place stays unchanged, and so does a single slice in another plane.
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff

    change = _change(axes_of(file), axes)
    if change is None or _leaves_plane(file.array, change):
        return file
    array = np.stack([apply_orientation(plane, change) for plane in file.array])
    return file._replace(array=array, place=file.place @ inv_ornt_aff(change, file.array.shape[1:]))


def place_like(file: File, image: File) -> File:
    """A mask or a channel with the place of its image, if only one of the files has a place.

    So pixels with equal indices lie together.

    Raises:
        Unusable: the axis of a NIfTI that is the rows of a picture cannot be known.
    """
    if {file.array.ndim, image.array.ndim} == {3, 4}:
        plane, volume = sorted((file.array, image.array), key=np.ndim)
        rows, columns = plane.shape[1:]
        if volume.shape[3] == 1 and rows == columns and volume.shape[1:3] == (rows, rows):
            raise Unusable(
                "one is a square picture and the other a NIfTI, which do not tell rows from "
                "columns; save both in one format"
            )
    if image.place is None:
        return file._replace(place=None)
    is_flat = image.array.ndim == 4 and image.array.shape[3] == 1 and file.array.ndim == 3
    array = file.array[..., None] if is_flat else file.array
    if file.place is not None and not is_flat or array.shape[1:] != image.array.shape[1:]:
        return file
    return file._replace(array=array, place=image.place)


def distance(first: File, second: File) -> float:
    """The largest distance between pixels with equal indices, in pixels; 0 if it is unknown."""
    if first.place is None or second.place is None or first.place.shape != second.place.shape:
        return 0.0
    shape = np.array(first.array.shape[1:])
    corners = np.indices([2] * len(shape)).reshape(len(shape), -1).T * (shape - 1)
    points = np.c_[corners, np.ones(len(corners))]
    there = points @ (np.linalg.pinv(first.place) @ second.place).T
    return float(abs(there - points).max())


def without_slice_axis(file: File) -> np.ndarray:
    """The array [channels, *space]; a NIfTI with one slice loses its third axis."""
    array = file.array
    return array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
