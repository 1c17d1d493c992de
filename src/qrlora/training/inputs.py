"""What a run is given to learn from: the part of its configuration about the model and the pictures."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qrlora.data import AUTO, in_looks, parse_buckets
from qrlora.errors import QrloraError


class Inputs(BaseModel):
    """The base model and the pictures of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str | None = None
    """Hub id or local diffusers folder; none means the embedded base model."""
    instance_data_dir: str | None = None
    """A picture, or a folder of pictures with same-stem .txt captions or a metadata.jsonl. Either this or
    dataset_name."""
    instance_prompt: str | None = None
    """The caption of pictures that have none of their own."""
    dataset_name: str | None = None
    """A data set instead: a hub id, or a local folder that the datasets library reads; its train split is used. Needs
    the package datasets."""
    dataset_config_name: str | None = None
    """Which configuration of the data set, where it has several."""
    image_column: str = "image"
    """The data set's column of pictures."""
    caption_column: str | None = None
    """The data set's column of captions; none means instance_prompt for all pictures."""
    with_prior_preservation: bool = False
    """Add a loss on pictures of the whole class, drawn by the base itself, so that the class does not turn into the
    instance."""
    class_data_dir: str | None = None
    """Folder of the class pictures; missing ones are drawn into it."""
    class_prompt: str | None = None
    """The caption of all class pictures, such as "a photo of a dog"."""
    num_class_images: int = Field(default=100, gt=0)
    """How many class pictures are used."""
    prior_loss_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """The loss is that of the instance plus this times that of the class."""
    resolution: int | None = Field(default=None, gt=0)
    """Pixels of a side of the training pictures; none means what the model makes by default."""
    aspect_ratio_buckets: str | None = None
    """Train on several sizes, "height,width;height,width;...": a picture goes to the nearest by aspect ratio and every
    batch is of one size. "auto" makes them of the resolution's area, up to 2:1. None is the square alone."""
    center_crop: bool = True
    """Cut pictures from the centre; false draws random_crops crops of each."""
    random_crops: int = Field(default=8, gt=0)
    """With center_crop: false, how many crops of each picture are drawn, once, and cached."""
    random_flip: bool = False
    """Mirror each picture half of the time."""
    looks: tuple[str, ...] = ()
    """Also train on each picture in these looks, each named in its caption, so that the adapter leaves the look to the
    prompt: line-drawing, sepia, inverted, duotone, halftone, embossed, greyscale, black-and-white. For the content of a
    blend."""
    repeats: int = Field(default=1, gt=0)
    """How often each instance picture comes in one pass over all of them, before they are shuffled anew."""
    mask_loss: bool = True
    """Weight the loss by NAME.mask.png or the picture's alpha channel, where there is one."""

    @field_validator("looks")
    @classmethod
    def _looks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        in_looks((), value)
        return value

    @field_validator("aspect_ratio_buckets")
    @classmethod
    def _buckets(cls, value: str | None) -> str | None:
        if value is not None and value.strip() != AUTO:
            parse_buckets(value)
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.instance_data_dir is None and self.dataset_name is None:
            raise QrloraError(
                "instance_data_dir is missing: give a picture or a folder of pictures, or dataset_name, a data set."
            )
        if self.instance_data_dir is not None and self.dataset_name is not None:
            raise QrloraError("instance_data_dir and dataset_name exclude each other: both say where the pictures are.")
        for name in ("dataset_config_name", "caption_column"):
            if self.dataset_name is None and getattr(self, name) is not None:
                raise QrloraError(
                    f"{name}={getattr(self, name)} is about a data set, but dataset_name is not given; drop it, or "
                    "give dataset_name instead of instance_data_dir."
                )
        return self

    @model_validator(mode="after")
    def _class_pictures(self) -> Self:
        for name in ("class_data_dir", "class_prompt"):
            value = getattr(self, name)
            if self.with_prior_preservation and not (value or "").strip():
                raise QrloraError(f"with_prior_preservation needs {name}; give it.")
            if not self.with_prior_preservation and value is not None:
                raise QrloraError(f"{name}={value} is for with_prior_preservation: true; set that, or drop {name}.")
        if self.with_prior_preservation and _same(self.class_data_dir, self.instance_data_dir):
            raise QrloraError(
                f"class_data_dir and instance_data_dir are one folder, {self.class_data_dir}; give class pictures "
                "a folder of their own."
            )
        return self


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()
