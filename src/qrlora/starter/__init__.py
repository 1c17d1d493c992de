"""The embedded base: a small FLUX pipeline and two sample pictures, so that everything works offline on a laptop.

The folder is an ordinary diffusers pipeline, trained by `tools.starter` (its README.md is the model card).
"""

from dataclasses import dataclass
from pathlib import Path

from qrlora.errors import QrloraError

__all__ = ["Samples", "path", "samples"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Samples:
    """One picture of a thing and one of a style, neither of them ever seen by the base, and what to ask for.

    Attributes:
        content, style: picture files.
        content_prompt, style_prompt: what they are trained with.
        prompt: what the merge is asked for.
    """

    content: Path
    style: Path
    content_prompt: str
    style_prompt: str
    prompt: str


def path() -> Path:
    """The folder of the embedded base, as `FluxPipeline.from_pretrained` takes it.

    Raises:
        QrloraError: the installation lacks it.
    """
    return _present(_HERE / "model")


def samples() -> Samples:
    """The bundled pictures and their prompts.

    Raises:
        QrloraError: the installation lacks them.
    """
    folder = _present(_HERE / "samples")
    return Samples(
        content=folder / "dragon-noto.png",
        style=folder / "red-apple-fluent-3d.png",
        content_prompt="a <c> emoji in noto style",
        style_prompt="a red apple emoji in <s> style",
        prompt="a <c> emoji in <s> style",
    )


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        raise QrloraError(f"this installation of qrlora lacks its {folder.name} folder; reinstall the package.")
    return folder
