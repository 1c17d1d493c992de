"""How gated adapters use their experts, recorded while the model draws with them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qrlora.adapter import record_usage
from qrlora.blend.painter import Painter, Picture
from qrlora.formats import Adapter, atomic_write

if TYPE_CHECKING:
    from qrlora.analysis import ExpertUsage


@dataclass(frozen=True)
class DrawnUsage:
    """What was drawn, a picture a prompt, and how each adapter used its experts meanwhile."""

    painter: Painter
    pictures: list[Picture]
    usages: "list[ExpertUsage]"

    def write(self, folder: Path) -> None:
        """Write `NAME-usage.json` for each adapter, as `ExpertUsage.read` takes it, and `drawn-1.png`, ...

        Raises:
            QrloraError: a file cannot be written.
        """
        for usage in self.usages:
            file = f"{usage.name.replace('/', '-')}-usage.json"
            atomic_write(folder / file, usage.model_dump_json(indent=1) + "\n")
        for index, picture in enumerate(self.pictures, start=1):
            self.painter.save(picture, folder / f"drawn-{index}.png")


def draw_usage(painter: Painter, files: Mapping[str, Path], prompts: Sequence[str], seed: int) -> DrawnUsage:
    """Draw each prompt with all of some gated adapters at weight 1, and record how each uses its experts.

    Args:
        painter: of their base model; the adapters come off it again.
        files: by the names that the usages get.
        prompts: one picture each.
        seed: of every picture.

    Raises:
        QrloraError: a file that cannot be read, has no gates, or is of another base model.
    """
    from qrlora.analysis import ExpertUsage  # brings matplotlib, and is for gated adapters alone

    attached = {f"gated_{index}": file for index, file in enumerate(files.values())}
    with ExitStack() as stack:
        for name, file in attached.items():
            painter.attach(name, file)
            stack.callback(painter.detach, name)
        recorded = [stack.enter_context(record_usage(painter.loaded.denoiser, name)) for name in attached]
        pictures = [painter.paint(prompt, seed, dict.fromkeys(attached, 1.0), anew=True) for prompt in prompts]
    usages = [ExpertUsage.of(usage, name, prompts) for usage, name in zip(recorded, files, strict=True)]
    return DrawnUsage(painter, pictures, usages)


def trained_captions(*adapters: Adapter) -> list[str]:
    """What some adapters of ours were trained with, each caption once."""
    return list(dict.fromkeys(caption for adapter in adapters for caption in adapter.captions))
