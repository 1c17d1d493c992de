"""What an adapter is on one layer. A new file in this folder is a new form, with no other file touched.

A form is a subclass of `Form`, made known by `register_form`. It answers, for one layer at a time:

1. **How it starts.** `start(weight, spec, layer, cache)` gives a `Start`: the low-rank `pair` that becomes peft's
   `lora_B` and `lora_A` (without the scale `lora_alpha / rank`), and its `own` tensors by key (gates, cores, fixed
   copies). Keys are Python identifiers. Everything is fp32 on the CPU; it is copied to the layer's device, fp32
   whatever the base is.
2. **What is trained.** `frozen(side)` names the factors of the pair that are not; `trained_own` the keys of `own` that
   are (parameters; the other own tensors are buffers). Parameters are called `{layer}.lora_A.weight`,
   `{layer}.lora_B.weight` and `{layer}.{key}`. `masks` says whether `AdapterSpec.mask` means something to it.
3. **What it computes**, where `scale * B (A x)` is not enough: with `has_update = True`, `update(held, x, base)`
   returns what is added to the layer's output. `held` has the tensors as they are now, the scale with the weight of
   `set_adapters` in it, and `held.through_A(tensor, x)` / `held.through_B(tensor, h)`, which run a Linear or a
   convolution with any tensor shaped like `lora_A` or `lora_B`; `base()` is the base's own output without its bias, so
   that no adapter depends on another. peft calls it through `qrlora.adapter._variant`, the one place that knows how.
   Return exact zeros at the start: an adapter starts from exactly the base model. Take small differences of
   coefficients in fp32 before they meet `x`, which may be bf16.
4. **What a file says.** `export(held)` gives a `Start` with the scale baked in. Is the form an ordinary LoRA there
   (`low_rank = True`), the pair alone goes into a vanilla file and `own` is empty: everybody can load it, and it
   merges. Is it more than `W + B A` (`low_rank = False`), the pair and the own tensors go into a file of our own
   layout, keys `{component}.{layer}.{form}.B`, `.A` and `.{key}`, which stock loaders refuse; add the reason to
   `BEYOND_LORA` in `formats/_adapter.py`, so that merging and other formats can say in one sentence why they refuse.
   The file's `Header.form` is the form's name wherever that is not clear from `basis` and `side` (`names_itself`).
5. **How it comes back.** `resume(saved, weight, spec, layer, cache)` turns an exported `Start` into the `Start` it
   goes on training from; `attach_adapter(trainable=True)` calls it. Own tensors of a file are a stranger's:
   `check_saved` refuses what does not fit together. An exact resume from a checkpoint also gets back `kept(held)`:
   frozen tensors that a file does not hold to the last bit. Without training, a low-rank form is attached as its pair,
   and any other as itself with all of it frozen.

Spec fields that mean something to one form only (say `experts`) are declared in `AdapterSpec`, with a default that
means "not given", and named in the form's `fields`; `add_adapter` refuses them for any other form. `form="auto"` takes
the form that claims the basis' name (`bases`), else the one whose `fields` are given, else "coefficients".
`check(spec)` refuses combinations in one sentence, and `trained_size` counts what is trained.
"""

from importlib import import_module
from pkgutil import iter_modules

from qrlora.adapter.forms._form import Form, Held, Start, form_named, form_names, form_of, own_bases, register_form

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Form", "Held", "Start", "form_named", "form_names", "form_of", "own_bases", "register_form"]
