"""The weights of a blend: what it was told, else what its model is best at, else 1."""

from pydantic import BaseModel, ConfigDict, ValidationError

from qrlora.blend.config import BlendConfig, Weights
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel

GRID: Weights = (0.0, 0.5, 0.75, 1.0)


class BlendWeights(BaseModel):
    """Of the merged file, and of the sheet's rows and columns.

    Attributes:
        content, style: of the merged file.
        contents: rows of the sheet.
        styles: its columns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    content: float = 1.0
    style: float = 1.0
    contents: Weights = GRID
    styles: Weights = GRID


def weights_of(config: BlendConfig, model: LoadedModel) -> BlendWeights:
    """What the configuration says of weights, and the model's own choice where it says nothing.

    Raises:
        QrloraError: the model's folder gives weights that are none.
    """
    told = {
        "content": config.content_weight,
        "style": config.style_weight,
        "contents": config.content_weights,
        "styles": config.style_weights,
    }
    try:
        return BlendWeights.model_validate({**model.weights, **{k: v for k, v in told.items() if v is not None}})
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise QrloraError(f"qrlora.json of {model.model_id}: weights: {place}: {problem['msg']}.") from error
