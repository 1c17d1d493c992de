"""ZipLoRA: a factor for every column of each adapter, learned on the base model (arXiv 2311.13600)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import InstanceOf

from qrlora.errors import QrloraError
from qrlora.formats import Adapter
from qrlora.merging._header import merged_header
from qrlora.merging._learn import Learning, drawn_pictures, learn, on_model
from qrlora.merging._mergers import Overlap, joined
from qrlora.merging._registry import register_merge
from qrlora.merging.methods.concat import merge_concat
from qrlora.models import LoadedModel, load_pipeline


@register_merge("zip", denoiser_only=True)
def merge_zip(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    model: InstanceOf[LoadedModel] | str | Path | None = None,
    prompts: str | Sequence[str] | None = None,
    pictures: int = 4,
    num_inference_steps: int | None = None,
    steps: int = 100,
    learning_rate: float = 0.01,
    weight_decay: float = 0.01,
    strength: float = 0.01,
    penalty: Overlap = "product",
    train_batch_size: int = 1,
    guidance_scale: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int, float], object] | None = None,
) -> Adapter:
    """`dW = sum_i w_i dW_i diag(m_i)`: mergers `m_i`, one number a column of each layer, learned from 1 by AdamW.

    The loss is `sum_i MSE(merged(x_i), adapter_i(x_i)) + strength * P`: on the pictures of each adapter the merge is to
    predict what that adapter alone does, at the same noise and level, and no two adapters are to use a column. `P` is
    the mean over layers of `mean_j |m_1j m_2j|` or of `|cos(m_1, m_2)|`, summed over pairs of adapters. What the paper
    takes for its rate, its stopping and P is not known to us: the rate is that of LoRA.rar's rerun (arXiv 2412.05148),
    100 steps and P those of a reimplementation.

    Adapters that share a stored basis on the output side keep it: `dR = sum_i w_i dR_i diag(m_i)` is exact at rank r,
    and learning costs what one adapter costs. Others are concatenated, at the summed rank.

    A file holds no pictures, so each adapter draws some of its own captions first; that is ours. Adapters of text
    encoders take no part in either and are merged by `auto`.

    Args:
        adapters: of equal layers, two or more.
        weights: one an adapter, none 0: the method works on `w_i dW_i`, in the pictures and in what is to be matched.
        model: the base model, with its encoders, or its hub id or folder, which is then loaded in fp32 on the CPU. It
            is given back as it was.
        prompts: what each adapter draws, one an adapter, as text separated by "|"; the captions in the files where
            None.
        pictures: of each adapter, drawn at once.
        num_inference_steps: of a picture; the model's own, at most 10, where None.
        steps: of AdamW.
        learning_rate: of AdamW.
        weight_decay: of AdamW, towards 0.
        strength: of the penalty P.
        penalty: "product" or "cosine".
        train_batch_size: pictures of each adapter in a step.
        guidance_scale: the guidance embedding, on models that have one.
        seed: of pictures, noise and levels.
        progress: called after each step with the steps done, the steps in all, and the loss.

    Raises:
        QrloraError: no model, adapters of another model, an adapter without captions and no prompts, a weight of 0, or
            a number out of its range.
    """
    if len(adapters) == 1:
        return merge_concat(adapters, weights)
    _check_numbers(pictures=pictures, steps=steps, train_batch_size=train_batch_size)
    _check_rates(learning_rate=learning_rate, weight_decay=weight_decay, strength=strength)
    if not all(weights):
        raise QrloraError(
            "method zip learns what adapters do at their weights, and one weight is 0; leave that adapter out."
        )
    if model is None:
        raise QrloraError(
            "method zip learns on the base model; give it as model: a LoadedModel, a hub id or a local folder."
        )
    captions = _captions(adapters, prompts)
    loaded = model if isinstance(model, LoadedModel) else load_pipeline(model)
    parts = joined(adapters, weights)
    how = Learning(steps, learning_rate, weight_decay, strength, penalty, train_batch_size, guidance_scale, seed)
    header = merged_header(adapters, weights, "zip", rank=parts.rank, keep_basis=parts.shared)
    with on_model(loaded, parts, adapters[0].component, header.weight_hashes) as adapter:
        encoded = drawn_pictures(
            loaded,
            adapter,
            parts.to(loaded.device),
            captions,
            count=pictures,
            num_inference_steps=num_inference_steps,
            seed=seed,
        )
        mergers = learn(loaded, adapter, parts, encoded, how, progress)
    return Adapter(parts.layers(parts.merged(mergers)), header, adapters[0].component)


def _captions(adapters: Sequence[Adapter], prompts: str | Sequence[str] | None) -> list[list[str]]:
    """What each adapter draws."""
    if prompts is not None:
        given = [text.strip() for text in (prompts.split("|") if isinstance(prompts, str) else prompts)]
        if len(given) != len(adapters) or not all(given):
            raise QrloraError(
                f"{len(adapters)} adapters but prompts={prompts!r}; give one an adapter, as a list or as a text such "
                'as "a <c> dog | a cat in <s> style".'
            )
        return [[text] for text in given]
    for adapter in adapters:
        if not adapter.captions:
            raise QrloraError(
                f"{adapter.label} does not say what it was trained on, so method zip does not know what to draw with "
                'it; give one prompt an adapter as prompts, such as "a <c> dog | a cat in <s> style".'
            )
    return [adapter.captions for adapter in adapters]


def _check_numbers(**given: int) -> None:
    for name, value in given.items():
        if value < 1:
            raise QrloraError(f"{name}={value} is not possible for method zip; give 1 or more.")


def _check_rates(**given: float) -> None:
    for name, value in given.items():
        if not 0 <= value < float("inf"):
            raise QrloraError(f"{name}={value} is not possible for method zip; give a number of at least 0.")
