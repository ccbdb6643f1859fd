"""Published text templates of image data sets, first published by OpenAI under the MIT license.

`COOP` has the hand-written templates of CoOp, one for each set, and `ELEVATER` the ensembles of
ELEVATER's 20 sets, under the names of the tasks without the suite's prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PHOTO = ("a photo of a {}.",)
AIRCRAFT = "a photo of a {}, a type of aircraft."
FLOWER = "a photo of a {}, a type of flower."
PET = "a photo of a {}, a type of pet."
FOOD = "a photo of {}, a type of food."

COOP: Mapping[str, tuple[str, ...]] = {
    "imagenet": PHOTO,
    "caltech101": PHOTO,
    "food101": (FOOD,),
    "stanford_cars": PHOTO,
    "oxford_pets": (PET,),
    "oxford_flowers": (FLOWER,),
    "fgvc_aircraft": (AIRCRAFT,),
    "sun397": PHOTO,
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "ucf101": ("a photo of a person doing {}.",),
}

# CoOp's ensemble for ImageNet, "select 7".
IMAGENET_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def _both(forms: Sequence[str]) -> tuple[str, ...]:
    """Returns the forms with `a` for `@`, followed by those with `the`."""
    return tuple(form.replace("@", article) for article in ("a", "the") for form in forms)


CIFAR = _both(
    (
        "a photo of @ {}.",
        "a blurry photo of @ {}.",
        "a black and white photo of @ {}.",
        "a low contrast photo of @ {}.",
        "a high contrast photo of @ {}.",
        "a bad photo of @ {}.",
        "a good photo of @ {}.",
        "a photo of @ small {}.",
        "a photo of @ big {}.",
    )
)

CALTECH101 = _both(
    (
        "a photo of @ {}.",
        "a painting of @ {}.",
        "@ plastic {}.",
        "a sculpture of @ {}.",
        "a sketch of @ {}.",
        "a tattoo of @ {}.",
        "@ toy {}.",
        "a rendition of @ {}.",
        "@ embroidered {}.",
        "@ cartoon {}.",
        "@ {} in a video game.",
        "@ plushie {}.",
        "@ origami {}.",
        "art of @ {}.",
        "graffiti of @ {}.",
        "a drawing of @ {}.",
        "a doodle of @ {}.",
    )
)

RESISC45 = tuple(
    f"{view} of {article}{{}}."
    for article in ("", "a ", "the ")
    for view in (
        "satellite imagery",
        "aerial imagery",
        "satellite photo",
        "aerial photo",
        "satellite view",
        "aerial view",
    )
)

UCF101 = tuple(
    f"a {kind} of {article} person {doing}{{}}."
    for doing in ("", "using ", "doing ", "during ", "performing ", "practicing ")
    for article in ("a", "the")
    for kind in ("photo", "video", "example", "demonstration")
)

ELEVATER: Mapping[str, tuple[str, ...]] = {
    "hateful_memes": ("a {}.",),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "mnist": ('a photo of the number: "{}".',),
    "oxford_flowers102": (FLOWER,),
    "oxford_pets": (PET,),
    "resisc45": RESISC45,
    "country211": (
        "a photo i took in {}.",
        "a photo i took while visiting {}.",
        "a photo from my home country of {}.",
        "a photo from my visit to {}.",
        "a photo showing the country of {}.",
    ),
    "food101": (FOOD,),
    "stanford_cars": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "fgvc_aircraft": (AIRCRAFT, "a photo of the {}, a type of aircraft."),
    "caltech101": CALTECH101,
    "dtd": tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
    "voc2007": PHOTO,
    "patch_camelyon": ("this is a photo of {}",),
    "rendered_sst2": ("a {} review of a movie.",),
    "gtsrb": (
        'a zoomed in photo of a "{}" traffic sign.',
        'a centered photo of a "{}" traffic sign.',
        'a close up photo of a "{}" traffic sign.',
    ),
    "eurosat": (
        "a centered satellite photo of {}.",
        "a centered satellite photo of a {}.",
        "a centered satellite photo of the {}.",
    ),
    "fer2013": (
        "a photo of a {} looking face.",
        "a photo of a face showing the emotion: {}.",
        "a photo of a face looking {}.",
        "a face that looks {}.",
        "they look {}.",
        "look at how {} they are.",
    ),
    "kitti_distance": ("{}",),
}

# Sets that other suites may use.
SUN397 = STL10 = ("a photo of a {}.", "a photo of the {}.")
BIRDSNAP = ("a photo of a {}, a type of bird.",)

# ImageNet's ensemble of 80.
IMAGENET_80 = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)
