"""CLIP text encoders, which may be adapted together with a denoiser: what of them is adapted."""

from qrlora.adapter import register_targets

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The attention of every layer, as diffusers' training scripts have it."""

for _class in ("CLIPTextModel", "CLIPTextModelWithProjection"):
    register_targets(_class, TARGETS)
