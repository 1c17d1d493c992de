"""diffusers' public DreamBooth script for FLUX LoRA on the embedded base: `SCRIPT ARGUMENTS`, as the script takes them.

The script is not in this repository and its text is not changed. Three things of the embedded base it does not expect:
a T5 tokenizer with a vocabulary of its own, 32 positions of the CLIP encoder, and no compiled torchvision on the CPU.
"""

import runpy
import sys
import types
from typing import Any


def main() -> None:
    """Run the script as the main program."""
    # Its compiled operators do not go with a CPU build of torch; the script uses the Python transforms alone.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    import transformers

    library: Any = transformers
    library.T5TokenizerFast.from_pretrained = library.AutoTokenizer.from_pretrained
    call = library.CLIPTokenizer.__call__

    def shorter(self: Any, *given: Any, **options: Any) -> Any:
        return call(self, *given, **options | {"max_length": self.model_max_length})

    library.CLIPTokenizer.__call__ = shorter
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
