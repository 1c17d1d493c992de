"""Z-Image: the names of its single-file checkpoints, which ComfyUI has; kohya's musubi-tuner trains on diffusers'.

Sources: `z_image_to_diffusers` in ComfyUI's `comfy/utils.py`, diffusers' converter of single-file checkpoints, and
`convert_z_image_lora_to_comfy.py` of https://github.com/kohya-ss/musubi-tuner.
"""

from collections.abc import Iterator

from qrlora.formats.keys._table import Entry, KeyTable, Part, plain

_PATCHES = "2-1"  # diffusers keeps embedders by the sizes of patches, of which there is one: 2 in space, 1 in time


def _block(block: str) -> Iterator[Entry]:
    attention = f"{block}.{{}}.attention"
    yield Entry(f"{attention}.qkv", tuple(Part(f"{attention}.to_{each}") for each in "qkv"))
    yield plain(f"{attention}.out", f"{attention}.to_out.0")
    for layer in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"):
        yield plain(f"{block}.{{}}.{layer}", f"{block}.{{}}.{layer}")


Z_IMAGE = KeyTable(
    "z-image",
    "transformer",
    [
        *(entry for block in ("layers", "noise_refiner", "context_refiner") for entry in _block(block)),
        plain("x_embedder", f"all_x_embedder.{_PATCHES}"),
        *(
            plain(f"final_layer.{each}", f"all_final_layer.{_PATCHES}.{each}")
            for each in ("linear", "adaLN_modulation.1")
        ),
        *(plain(each, each) for each in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")),
    ],
    kohya_module="networks.lora_zimage",
    kohya_by_path=True,
)
