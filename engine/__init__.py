"""Keeps a run alive: processes, files, images, options. Knows nothing of SlotCon."""

# How the names of image files end. Here, so that a command line is read before torch is loaded
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"),
    *(".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"),
)
LAYOUTS = {  # the folders in which each data set's images lie; * stands for one level of any name
    "coco": ("train2017",),
    "cocoplus": ("train2017", "unlabeled2017"),
    "imagenet": ("train/*",),
    "bdd100k": ("images/100k/train", "images/100k/test"),  # the slide's 90K images = train + test
    "folder": (".",),  # any folder, flat or nested
    "list": (),  # a text file with one path per line, absolute or relative to the file's folder
}
