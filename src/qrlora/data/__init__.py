"""Picture files and captions into examples, and examples into cached latents and text embeddings."""

from qrlora.data._encode import Encoded, encode_examples
from qrlora.data._examples import Example, load_examples, picture_files
from qrlora.data._pictures import MAX_FILE_BYTES, MAX_PIXELS, Picture, open_picture, square

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "Encoded",
    "Example",
    "Picture",
    "encode_examples",
    "load_examples",
    "open_picture",
    "picture_files",
    "square",
]
