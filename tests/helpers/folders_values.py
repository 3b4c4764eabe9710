"""Folders of masks of all types of numbers; nearest classes, thresholds, classes that clash."""

from __future__ import annotations

import numpy as np
from folders import JPEG, THREE, case, grey, pairs, put, refused, scene, volumes
from folders_layouts import of_class

CELL = {"background": 0, "cell": 1}

# --- Any type of a mask --------------------------------------------------------------------------


def near(high, scale=1.0):
    """Values from 0 to 19 for the background, and of the cell up to 19 below `high`."""

    def draw(label):
        noise = np.random.default_rng(int(label.sum())).integers(0, 20, label.shape)
        return np.where(label > 0, high - noise, noise) * scale

    return draw


def typed(draw, dtype):
    return lambda label: draw(label).astype(dtype)


def nearest_of(dtype, ending, high=255, scale=1.0, slow=False):
    def build(root):
        return pairs(root, mask=f"masks/{{}}{ending}", draw=typed(near(high, scale), dtype))

    build.__name__ = f"nearest_{np.dtype(dtype).str.strip('<|=').replace('>', 'big_')}"
    classes = f"data.classes={{background:0,cell:{int(high * scale)}}}"
    case(classes, "data.nearest=true", classes=CELL, said="nearest", slow=slow)(build)


nearest_of("u1", ".png")
nearest_of("u2", ".tif", slow=True)
nearest_of("u4", ".tif", slow=True)
nearest_of("u8", ".npy")
nearest_of("i1", ".npy", 127)
nearest_of("i4", ".tif", slow=True)
nearest_of("i8", ".npy")
nearest_of("f2", ".npy", 254, 0.5)
nearest_of("f4", ".tif", 254, 0.5)
nearest_of(">u2", ".npy", slow=True)
nearest_of(">i4", ".npy")
nearest_of(">f4", ".npy", 254, 0.5)


@case("data.classes={background:0,cell:200}", "data.nearest=true", classes=CELL, said="nearest")
def nearest_beyond_int8(root):
    """A class has a value that the type of the masks does not hold."""
    return pairs(root, mask="masks/{}.npy", draw=lambda x: (x * 120 + 1).astype(np.int8))


@case("data.classes={background:0,cell:255}", classes=CELL, far=JPEG, wrong=0.02, said="nearest")
def nearest_jpeg(root):
    """Masks as JPEG; the table of shares is that of the labels."""
    return pairs(root, "images/{}.jpg", "masks/{}.jpg", draw=lambda x: x * np.uint8(255))


def half(label):
    """0.8 in the cell, beside it 0.2 and exactly 0.5."""
    found = np.where(label > 0, 0.8, 0.2)
    found[:, ::2] = np.where(label > 0, 0.8, 0.5)[:, ::2]
    return found


def above_half(dtype, ending):
    def build(root):
        return pairs(root, mask=f"masks/{{}}{ending}", draw=typed(half, dtype))

    build.__name__ = f"above_half_{np.dtype(dtype).str.strip('<|=').replace('>', 'big_')}"
    case("data.classes={background:'<=0.5',cell:'>0.5'}", classes=CELL)(build)


above_half("f4", ".tif")
above_half("f8", ".tif")
above_half("f2", ".npy")
above_half(">f4", ".npy")


@case("data.classes={background:'<0.5',cell:'>=0.5'}", classes=CELL)
def from_half_on(root):
    """The other side of the same threshold: 0.5 belongs to the cell."""
    truth = pairs(root, mask="masks/{}.tif", draw=typed(half, np.float32))
    return {name: (image, half(label) >= 0.5) for name, (image, label) in truth.items()}


@case(classes={"0": 0, "2147483653": 2147483653})
def values_beyond_int32(root):
    large = lambda label: label.astype(np.int64) * 2147483653  # noqa: E731
    truth = pairs(root, "images/{}.tif", "masks/{}.tif", draw=large)
    return {name: (image, large(label)) for name, (image, label) in truth.items()}


@case(classes={"9007199254740992": 0, "9007199254740993": 1})
def values_beyond_float64(root):
    """Whole numbers of which float64 knows every second one."""
    return pairs(root, mask="masks/{}.npy", draw=lambda x: x.astype(np.int64) + 2**53)


@refused("(?i)value|uint64|64", at="masks", either=True, classes={"0": 0, "9223372036854775809": 1})
def values_beyond_int64(root):
    return pairs(root, mask="masks/{}.npy", draw=lambda x: x * np.uint64(2**63 + 1))


# --- To which class a value of none goes ---------------------------------------------------------


def striped(value):
    """A band of another value above 10, and 255 in the cell."""

    def draw(label):
        found = np.where(label > 0, 255, 10).astype(np.uint8)
        found[:6] = value
        return found

    return draw


@case("data.classes={background:'<50',cell:255}", classes=CELL, said="nearest")
def nearest_single_first(root):
    """A threshold has said which values are its own, so 60 goes to the single value."""
    truth = pairs(root, draw=striped(60))
    return {name: (image, striped(60)(y) > 50) for name, (image, y) in truth.items()}


@case("data.classes={background:'<50',cell:'>=200'}", "data.ignore_index=128", classes=CELL,
      said="nearest")  # fmt: skip
def nearest_threshold_not_ignored(root):
    """60 is nearer to the background than to the cell; ignored pixels attract nothing."""
    truth = pairs(root, draw=striped(60))
    return {name: (image, striped(60)(y) == 255) for name, (image, y) in truth.items()}


@case("data.classes={background:'<50',cell:'>=200'}", "data.ignore_index=128", classes=CELL,
      ignored=(2,))  # fmt: skip
def ignored_between_thresholds(root):
    truth = pairs(root, draw=striped(128))
    for name, (image, label) in truth.items():
        label = label.copy()
        label[:6] = 2
        truth[name] = image, label
    return truth


@case("data.classes={background:10,cell:255}", "data.ignore_index=128", "data.nearest=true",
      classes=CELL, ignored=(2,), said="nearest")  # fmt: skip
def nearest_ignored(root):
    """Between single values, 120 is a soft edge of what is ignored."""
    truth = ignored_between_thresholds(root)
    for name in truth:
        put(root / "masks" / f"{name}.png", striped(120)(scene(int(name) - 1)[1]))
    return truth


# --- Classes that clash --------------------------------------------------------------------------


def clash(name, pattern, *options):
    """Masks of 0, 1 and 2, and settings that give a value to two classes."""

    def build(root):
        pairs(root, classes=3)

    build.__name__ = f"clash_{name}"
    refused(pattern, *options)(build)


clash("value", "(?=.*low)(?=.*middle).*1", "data.classes={low:[0,1],middle:1,high:2}")
clash(
    "ignored",
    "(?=.*ignore_index)(?=.*2)",
    "data.classes={low:0,middle:1,high:2}",
    "data.ignore_index=2",
)
clash(
    "ignored_list",
    "(?=.*ignore_index)(?=.*2)",
    "data.classes={low:0,high:[1,2]}",
    "data.ignore_index=2",
)
clash("thresholds", "(?=.*middle)(?=.*high).*>", "data.classes={low:'<1',middle:'>=1',high:'>=2'}")
clash("thresholds_meet", "(?=.*low)(?=.*high).*1", "data.classes={low:'<=1',high:'>=1'}")


@refused("(?i)(?=.*road)(?=.*car).*#ff0000",
         "data.classes={sky:'#000000',road:'#ff0000',car:'#FF0000'}")  # fmt: skip
def clash_colours(root):
    pairs(root, draw=lambda label: np.dstack([label * 255, label * 0, label * 0]).astype(np.uint8))


@case("data.classes={low:'<2',middle:1,high:2}", classes={"low": 0, "middle": 1, "high": 2})
def single_inside_threshold(root):
    """A single value goes before the threshold of another class."""
    return pairs(root, classes=3)


@case("data.classes={low:'<1',middle:1,high:'>1'}", classes={"low": 0, "middle": 1, "high": 2})
def single_between_thresholds(root):
    return pairs(root, classes=3)


# --- A folder for each class, and data.classes ---------------------------------------------------


def of_folders(root, *names):
    """masks/<name>/: the first class is 1, the second 2."""
    for value, name in enumerate(names, 1):
        truth = pairs(root, mask=f"masks/{name}/{{}}.png", classes=3, draw=of_class(value))
    return truth


def named(name, options, **expected):
    def build(root):
        truth = of_folders(root, "nucleus", "border")
        return truth if "classes" in expected else None

    build.__name__ = f"class_folders_{name}"
    case(options, **expected)(build)


BOTH = {"classes": {"nucleus": 1, "border": 2}, "overlap": True}
named("in_order", "data.classes={border:rest,nucleus:rest}", **BOTH)
named("other_order", "data.classes={nucleus:rest,border:rest}", **BOTH)
named("by_value", "data.classes={nucleus:255,border:'>127'}", **BOTH)
named("other_names", "data.classes={cell:rest,edge:rest}",
      refused="(?=.*(cell|edge))(?=.*nucleus)(?=.*border)")  # fmt: skip
named("one_too_many", "data.classes={nucleus:rest,border:rest,edge:rest}", refused="edge")
named("one_too_few", "data.classes={nucleus:rest}", refused="border")


@case(classes={"train": 1, "car": 2}, overlap=True)
def class_folders_vehicles(root):
    """A class is called like a split; another class lies beside it."""
    return of_folders(root, "train", "car")


# --- Intensities that float32 does not hold ------------------------------------------------------


@refused("(?i)float32|large|beyond", at="images/")
def image_beyond_float32(root):
    pairs(root, "images/{}.tif", look=lambda image: image[0] * 1e37)


@case(far=600, said="(?i)float32")
def image_far_from_zero(root):
    """float64 that differ by 139 at most, where float32 has steps of 1024."""
    look = lambda image: image[0].astype(np.float64) + 1e10  # noqa: E731
    truth = pairs(root, "images/{}.tif", look=look)
    return grey({name: (image + 1e10, label) for name, (image, label) in truth.items()})


@case(far=150, said="(?i)float32")
def image_far_uint32(root):
    """The same of whole numbers, where float32 has steps of 256."""
    look = lambda image: image[0].astype(np.uint32) + np.uint32(2**31)  # noqa: E731
    truth = pairs(root, "images/{}.tif", look=look)
    return grey({name: (image + 2.0**31, label) for name, (image, label) in truth.items()})


@case(classes=THREE)
def image_float64(root):
    """float64 that float32 holds: nothing is said."""
    truth = volumes(root, look=lambda image: image[0].astype(np.float64) * 1000)
    return {name: (image * 1000.0, label) for name, (image, label) in truth.items()}
