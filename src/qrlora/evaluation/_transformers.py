"""Models of transformers for metrics: from a folder or a hub id, safetensors alone."""

from pathlib import Path
from typing import Any

from qrlora.errors import QrloraError
from qrlora.models import told


def source_of(metric: str, model: str) -> str:
    """`model` as it is, after a look whether it can be a hub id where no such folder is here.

    Raises:
        QrloraError: it is neither.
    """
    parts = model.split("/")
    if Path(model).is_dir():
        return model
    if Path(model).exists() or len(parts) > 2 or not all(parts) or model.startswith((".", "~", "/")):
        raise QrloraError(f"metric {metric}: there is no model folder {model}; give a folder or a hub id.")
    return model


def from_pretrained(cls: type[Any], source: str, **extra: Any) -> Any:
    """A model, a processor or a tokenizer; a local folder never asks the hub.

    Raises:
        QrloraError: it cannot be loaded, or is of another class; the sentence names `source`.
    """
    return told(source, lambda: cls.from_pretrained(source, local_files_only=Path(source).is_dir(), **extra))


def network(metric: str, cls: type[Any], source: str) -> Any:
    """A model in evaluation and float32, refused where its folder is one of another kind.

    Raises:
        QrloraError: as `from_pretrained`, and a model of another kind or with weights that are missing.
    """
    from transformers import AutoConfig

    kind = from_pretrained(AutoConfig, source).model_type
    if kind != cls.config_class.model_type:
        raise QrloraError(
            f"metric {metric}: {source} is a model of the kind {kind!r}, and {cls.config_class.model_type!r} is needed."
        )
    model, found = from_pretrained(cls, source, use_safetensors=True, output_loading_info=True)
    if found["missing_keys"]:
        raise QrloraError(f"metric {metric}: {source} lacks the weights {sorted(found['missing_keys'])[0]} and more.")
    return model.float().eval().requires_grad_(False)
