"""`qrlora generate`: pictures with adapters at weights, or a picture of ours again."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from pydantic import BaseModel, ConfigDict, Field

from qrlora.cli._options import flag, method_options, parse_options, refuse_existing, say
from qrlora.errors import QrloraError


class GenerateOptions(BaseModel):
    """Make pictures. With --from, make a picture of ours again, exactly."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    prompt: str | None = None
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FILE, FILE=WEIGHT or FILE=WEIGHT@LOW-HIGH, where it acts at timesteps from LOW to HIGH alone (0 is clean, 1000
    pure noise); may be given several times."""
    method: str | None = None
    """k-lora: of two adapters, content then style, one for each layer and step. None adds adapters up; other methods
    make a file first (qrlora merge)."""
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE of the method, such as scale=s; may be given several times."""
    output: Path = Path("picture.png")
    """The PNG file; several pictures are numbered."""
    overwrite: bool = False
    """Replace the output file."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A picture made by qrlora: repeat it, with its own adapters, prompt, seed and settings, and its own model where
    that is the embedded base or a folder that is here."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of the first picture; 0 where not given."""
    num_images: int = Field(default=1, gt=0)
    """How many; each has the next seed."""
    jobs: Path | None = None
    """A list of pictures instead (YAML, JSON, or .jsonl): prompt, seed, adapters (FILE: WEIGHT) and name of each. They
    are drawn several at a time, each with its own adapters, into the folder --output."""
    batch_size: int | None = Field(default=None, gt=0)
    """With --jobs, pictures drawn at a time; 4 where not given."""
    model: str | None = None
    """Hub id or local diffusers folder; none means the embedded base."""
    device: str | None = None
    """cpu, cuda, mps...; none means the best that is there."""
    memory: Literal["6gb", "8gb", "12gb", "16gb", "24gb", "max"] | None = None
    """For a card of that size: quantised and offloaded weights, as far as the model needs. Pictures of quantised
    weights differ."""
    height: int | None = Field(default=None, gt=0)
    """In pixels."""
    width: int | None = Field(default=None, gt=0)
    num_inference_steps: int | None = Field(default=None, gt=0)
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    """As the model's own pipeline means it: distilled guidance (FLUX), or classifier-free guidance (SD3, SDXL)."""
    true_cfg_scale: float | None = Field(default=None, allow_inf_nan=False)
    """Classifier-free guidance on FLUX; 1 is off."""
    negative_prompt: str | None = None
    """What classifier-free guidance guides away from."""
    max_sequence_length: int | None = Field(default=None, gt=0)


_BATCH = 4
_OF_ONE = ("prompt", "adapter", "from_", "seed", "num_images")
_ONE_BY_ONE = ("method", "option")
_RANGE = re.compile(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)")
_FIXED_BY_PICTURE = (
    "prompt",
    "adapter",
    "method",
    "option",
    "seed",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "negative_prompt",
    "max_sequence_length",
)


def run(arguments: Sequence[str]) -> None:
    """Parse, then generate or repeat."""
    options = parse_options(GenerateOptions, "generate", arguments)
    if options.jobs is not None:
        return _generate_list(options, options.jobs)
    if options.batch_size is not None:
        raise QrloraError("--batch-size is for pictures of a list; give --jobs FILE, or drop it.")
    outputs = output_files(options.output, options.num_images)
    for path in outputs:
        refuse_existing(path, options.overwrite)
    if options.from_ is not None:
        return _repeat(options, options.from_)
    if not options.prompt:
        raise QrloraError('say what to show: --prompt "a <c> dog in <s> style", or --from a picture made before.')
    return _generate(options, options.prompt, outputs)


def _generate(options: GenerateOptions, prompt: str, outputs: Sequence[Path]) -> None:
    adapters = [split_adapter(text) for text in options.adapter]
    if options.option and options.method is None:
        raise QrloraError(f"--option {options.option[0]} is of a method; give --method too, or drop it.")
    from qrlora.blend import RunTime, load_painter, settings_of
    from qrlora.merging import check_run_time
    from qrlora.training.memory import enough_to

    method = None
    if options.method is not None:
        check_run_time(options.method)
        method = RunTime(name=options.method, options=method_options(options.option))
    painter = load_painter(options.model, options.device, options.memory)
    painter.settings = settings_of(options, painter.settings, painter.loaded)
    weights = {f"adapter_{index}": adapter.weight for index, adapter in enumerate(adapters)}
    named = dict(zip(weights, adapters, strict=True))
    timesteps = {name: adapter.timesteps for name, adapter in named.items() if adapter.timesteps is not None}
    for name, adapter in named.items():
        painter.attach(name, adapter.file)
    for index, path in enumerate(outputs):
        with enough_to("draw", options.memory):
            picture = painter.paint(prompt, (options.seed or 0) + index, weights, timesteps, method=method)
        print(painter.save(picture, path))


def _generate_list(options: GenerateOptions, path: Path) -> None:
    """Draw the pictures of a list."""
    for name in _OF_ONE:
        if getattr(options, name) != GenerateOptions.model_fields[name].default:
            raise QrloraError(f"--jobs {path} says all of each picture; drop {flag(name)}.")
    for name in _ONE_BY_ONE:
        if getattr(options, name):
            raise QrloraError(
                f"{flag(name)} chooses adapters anew at every step, which --jobs {path} does not for pictures that are "
                "drawn together; draw them one by one, without --jobs."
            )
    folder = Path("pictures") if options.output == GenerateOptions.model_fields["output"].default else options.output
    if folder.exists() and not folder.is_dir():
        raise QrloraError(f"--output {folder} is a file; name a folder for the pictures of --jobs.")
    from qrlora.blend import load_painter, paint_wishes, picture_names, read_wishes, settings_of
    from qrlora.training.memory import enough_to

    wishes = read_wishes(path)
    files = [folder / f"{name}.png" for name in picture_names(wishes)]
    for file in files:
        refuse_existing(file, options.overwrite)
    painter = load_painter(options.model, options.device, options.memory)
    painter.settings = settings_of(options, painter.settings, painter.loaded)
    with enough_to("draw", options.memory):
        for file in paint_wishes(painter, wishes, files, options.batch_size or _BATCH):
            print(file)


def _repeat(options: GenerateOptions, source: Path) -> None:
    for name in _FIXED_BY_PICTURE:
        if getattr(options, name) not in (None, ()):
            raise QrloraError(f"--from repeats {source} as it is; drop {flag(name)}.")
    if options.num_images != 1:
        raise QrloraError("--from repeats one picture; drop --num-images.")
    if options.output.resolve() == source.resolve():
        raise QrloraError(f"--output {options.output} is the picture to repeat; name another file.")
    from PIL import Image, ImageChops
    from pydantic import ValidationError

    from qrlora.blend import load_painter, read_provenance
    from qrlora.blend.provenance import file_hash
    from qrlora.models import GenerationDefaults

    made = read_provenance(source)
    files = [(source.parent / use.file, use) for use in made.adapters]
    for file, use in files:
        if file_hash(file) != use.sha256:
            raise QrloraError(f"{file} has changed since {source} was made with it, so the picture cannot be repeated.")
    painter = load_painter(options.model or _model_of_picture(made.model, source), options.device, options.memory)
    loaded = painter.loaded
    if painter.model_hash != made.model_hash and loaded.quantization != made.quantization:
        here = loaded.quantization or str(loaded.denoiser.dtype).removeprefix("torch.")
        raise QrloraError(
            f"{source} was made with weights in {made.quantization or made.dtype}, and those of {loaded.model_id} are "
            f"in {here} here; give the same --memory as when it was made."
        )
    if painter.model_hash != made.model_hash:
        raise QrloraError(
            f"{source} was made with another base model than {painter.loaded.model_id} (or in another precision than "
            f"{made.dtype}); name the right one with --model, or the --device it was made on ({made.device})."
        )
    try:
        painter.settings = GenerationDefaults.model_validate(made.settings)
    except ValidationError as error:
        raise QrloraError(f"{source}: its settings are of another version of qrlora.") from error
    weights: dict[str, float] = {}
    timesteps: dict[str, tuple[float, float]] = {}
    for index, (file, use) in enumerate(files):
        painter.attach(f"adapter_{index}", file)
        weights[f"adapter_{index}"] = use.weight
        if use.timesteps is not None:
            timesteps[f"adapter_{index}"] = use.timesteps
    picture = painter.paint(made.prompt, made.seed, weights, timesteps, method=made.method)
    with Image.open(source) as image:
        extrema: Any = ImageChops.difference(image.convert("RGB"), picture.image.convert("RGB")).getextrema()
    difference = max(high for _, high in extrema)
    why = "another machine or version" if made.together is None else f"it was drawn {made.together} at a time"
    say("identical" if difference == 0 else f"differs by at most {difference} of 255: {why}")
    print(painter.save(picture, options.output))


def _model_of_picture(model: str | None, source: Path) -> str | None:
    """The model that a picture names, announced; a picture may be anybody's, so it alone has nothing downloaded.

    Raises:
        QrloraError: neither the embedded base nor a folder that is here.
    """
    if model is not None and not Path(model).is_dir():
        typed = shlex.quote(model) if model.isprintable() else "NAME"
        raise QrloraError(
            f"{source} names the model {model!r}, which is no folder here and is not downloaded on a picture's word; "
            f"if you want it, add --model {typed} (or the folder where you have it)."
        )
    say(f"model named in {source}: {'the embedded base' if model is None else repr(model)}")
    return model


class GivenAdapter(NamedTuple):
    """What one `--adapter` says."""

    file: Path
    weight: float = 1.0
    timesteps: tuple[float, float] | None = None


def split_adapter(text: str) -> GivenAdapter:
    """`FILE`, `FILE=WEIGHT`, `FILE@LOW-HIGH` or `FILE=WEIGHT@LOW-HIGH`; the weight is 1 where not given.

    Raises:
        QrloraError: the weight is not a number, or what follows the @ is not a range.
    """
    if Path(text).exists():
        return GivenAdapter(Path(text))
    rest, timesteps = _split_range(text)
    file, equals, weight = rest.rpartition("=")
    if not equals or Path(rest).exists():
        return GivenAdapter(Path(rest), timesteps=timesteps)
    try:
        return GivenAdapter(Path(file), float(weight), timesteps)
    except ValueError as error:
        raise QrloraError(f"--adapter {text}: {weight!r} is not a weight; write FILE=0.9.") from error


def _split_range(text: str) -> tuple[str, tuple[float, float] | None]:
    """What stands before the last @, and the range after it; an @ within the name of a file is no such sign."""
    rest, at, typed = text.rpartition("@")
    if not at:
        return text, None
    if match := _RANGE.fullmatch(typed):
        low, high = float(match[1]), float(match[2])
        if low <= high <= 1000:
            return rest, (low, high)
    elif not ("=" in rest or Path(rest).exists()):
        return text, None
    raise QrloraError(
        f"--adapter {text}: {typed!r} is not a range of timesteps; write FILE=0.9@500-1000 (0 is clean, 1000 pure "
        "noise)."
    )


def output_files(output: Path, count: int) -> list[Path]:
    """One PNG a picture: the name itself for one, NAME-0.png and so on for several."""
    if output.suffix.lower() != ".png":
        raise QrloraError(f"--output {output} must end in .png, the format that carries how a picture was made.")
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(count)]
