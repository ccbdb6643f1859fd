"""Class names of the published image sets: id in the data set -> published name.

Long lists come from TFDS's own declaration through a rename rule, with a table of exceptions. The
others are files in `names/` with one class per line: id, tab, name. Sources match classes by id, so
the order here is the label order whatever the order of the data on a machine.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from etils import epath

from mpt_jax.data.classes import readable
from mpt_jax.tasks.image_tfds import declared_names

NAMES = Path(__file__).parent / "names"


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """The classes of a data set.

    Attributes:
        number: The number of classes.
        read_ids: Returns the ids in the data set, in label order.
        rename: The rule from an id to a display name.
        exceptions: Id -> display name, where the rule does not apply.
    """

    number: int
    read_ids: Callable[[], Sequence[str]]
    rename: Callable[[str], str] = readable
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ids(self) -> tuple[str, ...]:
        """Returns the ids in label order.

        Raises:
            ValueError: there is another number of classes.
        """
        ids = tuple(self.read_ids())
        if len(ids) != self.number or not set(self.exceptions) <= set(ids):
            raise ValueError(
                f"The data set has {len(ids)} classes, such as {ids[:1]}, but {self.number} were "
                "expected. Use the published version of the data set."
            )
        return ids

    def names(self) -> tuple[str, ...]:
        """Returns the display names in label order."""
        return tuple(self.exceptions.get(x) or self.rename(x) for x in self.ids())


def table(names: Mapping[str, str]) -> ClassTable:
    """Returns the classes of a mapping from ids to display names."""
    return ClassTable(len(names), lambda: tuple(names), exceptions=names)


def shipped(name: str) -> ClassTable:
    """Returns the classes of `names/<name>.tsv`."""
    lines = (NAMES / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return table(dict(line.split("\t") for line in lines))


def tfds_names(data: str, number: int, drop: Sequence[str] = (), **settings: object) -> ClassTable:
    """Returns the classes that TFDS declares for a data set, except `drop`.

    Args:
        data: TFDS's name of the data set.
        number: The number of classes without `drop`.
        drop: Ids to leave out.
        settings: `rename` and `exceptions`, see `ClassTable`.
    """

    def read() -> tuple[str, ...]:
        return tuple(name for name in declared_names(data) if name not in drop)

    return ClassTable(number, read, **settings)  # type: ignore[arg-type]


def imagenet(root: str) -> ClassTable:
    """Returns the classes of ImageNet: WordNet ids from TFDS, and display names from
    `<root>/imagenet/classnames.txt`, CoOp's file with one class per line: id, space, name.

    CoOp's file has `missile` and `sunglasses` twice. So the names of `IMAGENET` take precedence
    over it: n04008634 is `projectile`, and n04355933 is `sunglass`, as in WordNet.
    """
    path = epath.Path(os.path.join(root, "imagenet", "classnames.txt"))

    def name(wordnet_id: str) -> str:
        names = _classnames(path)
        if wordnet_id not in names:
            raise ValueError(
                f"{path} has no line for the class {wordnet_id}. Use CoOp's classnames.txt, with "
                "one line for each of the 1,000 classes."
            )
        return names[wordnet_id]

    return tfds_names("imagenet2012:5.1.0", 1000, rename=name, exceptions=IMAGENET)


def _classnames(path: epath.Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"The class names of ImageNet are not in {path}. Copy CoOp's classnames.txt there (one "
            "class per line: WordNet id, space, name), or set MPT_JAX_IMAGES to its folder."
        )
    lines = path.read_text().splitlines()
    pairs = (line.strip().partition(" ") for line in lines)
    return {wordnet_id: " ".join(name.split()) for wordnet_id, _, name in pairs if name}


def year_first(name: str) -> str:
    """Returns the name of a car with its year moved first: `2012 BMW M3 Coupe`."""
    words = name.split()
    return " ".join([words[-1], *words[:-1]])


def scene(path: str) -> str:
    """Returns the name of a SUN397 class: its words without the letter, the last part first:
    '/a/apse/indoor' is `indoor apse`."""
    return readable(" ".join(reversed(path.split("/")[2:])))


IMAGENET = {"n04008634": "projectile", "n04355933": "sunglass"}
CALTECH_COOP = {
    "airplanes": "airplane",
    "faces": "face",
    "leopards": "leopard",
    "motorbikes": "motorbike",
}
CALTECH_ELEVATER = {
    "airplanes": "airplane",
    "background_google": "background",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a crocodile",
    "faces": "off-center face",
    "faces_easy": "centered face",
    "flamingo_head": "head of a flamingo",
    "leopards": "leopard",
    "motorbikes": "motorbike",
    "snoopy": "snoopy (cartoon beagle)",
    "yin_yang": "yin and yang symbol",
}
FLOWERS_COOP = {"pink-yellow dahlia?": "pink-yellow dahlia"}
FLOWERS_ELEVATER = {
    "pink-yellow dahlia?": "pink and yellow dahlia",
    "ball moss": "air plant",
}
EUROSAT_COOP = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}
EUROSAT_ELEVATER = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()
# The published names lack spaces, which a tokenizer does not restore.
VOC_SPACED = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
# Label numbers of the data sets -> names. FER-2013's are those of its CSV file; ELEVATER lists
# several names for some classes, of which the first is used.
FER2013 = dict(enumerate(("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")))
PATCH_CAMELYON = {"0": "lymph node", "1": "lymph node containing metastatic tumor tissue"}
HATEFUL_MEMES = {"0": "meme", "1": "hatespeech meme"}
RENDERED_SST2 = {"negative": "negative", "positive": "positive"}
KITTI_DISTANCE = {
    "0": "a photo i took of a car on my left or right side.",
    "1": "a photo i took with a car nearby.",
    "2": "a photo i took with a car in the distance.",
    "3": "a photo i took with no car.",
}
