"""The embedded data set: drawn scenes with captions, for learning without network, GPU or downloads."""

from unimodal.data.scenes.drawing import SHADE, checker_arguments, render, shape_mask
from unimodal.data.scenes.language import caption_matches, parse_caption, vocabulary
from unimodal.data.scenes.reader import Scenes, Swap
from unimodal.data.scenes.symbols import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, SIZES, TEXTURES, Scene, SceneObject

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "HELD_OUT",
    "SHADE",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Scene",
    "SceneObject",
    "Scenes",
    "Swap",
    "caption_matches",
    "checker_arguments",
    "parse_caption",
    "render",
    "shape_mask",
    "vocabulary",
]
