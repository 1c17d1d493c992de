"""Picture files, data sets and captions into examples, and examples into cached latents and text embeddings."""

from qrlora.data._buckets import AUTO, nearest_size, parse_buckets, training_sizes
from qrlora.data._dataset import dataset_sources
from qrlora.data._encode import Encoded, Group, encode_examples, encode_texts
from qrlora.data._examples import Example, Framing, Source, frame
from qrlora.data._folder import class_sources, folder_sources, load_examples, picture_files, pictures_in
from qrlora.data._pictures import MAX_FILE_BYTES, MAX_PIXELS, Picture, decode_picture, open_picture, square
from qrlora.data.looks import LOOKS, Look, in_looks

__all__ = [
    "AUTO",
    "LOOKS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "Encoded",
    "Example",
    "Framing",
    "Group",
    "Look",
    "Picture",
    "Source",
    "class_sources",
    "dataset_sources",
    "decode_picture",
    "encode_examples",
    "encode_texts",
    "folder_sources",
    "frame",
    "in_looks",
    "load_examples",
    "nearest_size",
    "open_picture",
    "parse_buckets",
    "picture_files",
    "pictures_in",
    "square",
    "training_sizes",
]
