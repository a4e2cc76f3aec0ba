"""Keeps a run alive: processes, files, images, options. Knows nothing of SlotCon."""

LAYOUTS = {  # the folders in which each data set's images lie; * stands for one level of any name
    "folder": (".",),  # any folder, flat or nested
    "coco": ("train2017",),
    "cocoplus": ("train2017", "unlabeled2017"),
    "imagenet": ("train/*",),
    "bdd100k": ("images/100k/train", "images/100k/test"),  # the slide's 90K images = train + test
}
